"""The exported files draw our ungated edit in diffusers, keep to their sizes, and nothing is overwritten."""

import pytest
import test_full_size
import torch
from models import PUBLISHED, run_script, write_concept, write_weights
from safetensors.torch import load_file, save_file
from test_diffusers_hook import EXACT, pipeline, theirs

import diffusion
import export
import perfusion
import unet
import weights_loader
from diffusers_hook import personal
from diffusion import seeded_noise
from perfusion import Concept

pytestmark = pytest.mark.filterwarnings("ignore:.*not as in Stable Diffusion v1")
CLOSE = 1e-3  # of pictures in 0...1: the up vectors are float16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory):
    """Concept files: with locked keys, with trained keys, and of textual inversion."""
    out = tmp_path_factory.mktemp("concepts")
    return {"teddy": write_concept(folder, out / "teddy.safetensors"),
            "cat": write_concept(folder, out / "cat.safetensors", "cat", lock="trained", seed=1),
            "hat": write_concept(folder, out / "hat.safetensors", "hat", lock="none", seed=2)}


def ungated(model, prompts, concepts):
    """Keys and values of the prompts with gates = sims: eq. 3 as ROME has it."""
    e, _, _ = perfusion.encode(model.text_encoder, model.tokenizer, prompts, concepts)
    edited = [c for c in concepts if c.lock != "none"]
    if not edited:
        return model.unet.keys(e), model.unet.values(e)
    I, D = torch.stack([c.i_star for c in edited]), torch.stack([c.d_star for c in edited])
    e_perp, sims = perfusion.split(e, I, D)
    return [perfusion.edit(project, e_perp, sims, [torch.stack(layer) for layer in zip(*targets)])
            for project, targets in ((model.unet.keys, [c.keys for c in edited]),
                                     (model.unet.values, [c.values for c in edited]))]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:<teddy> and <cat> are of one")
@pytest.mark.parametrize("names", [["teddy"], ["cat"], ["hat"], ["teddy", "cat", "hat"]],
                         ids=["locked keys", "trained keys", "word only", "three at once"])
def test_diffusers_with_the_exported_files_draws_our_ungated_edit(folder, files, names, tmp_path):
    chosen = [files[name] for name in names]
    code, out, err = run_script("export.py", "--weights", folder, "--out", tmp_path, "--concept", *chosen)
    assert code == 0 and "error" not in err
    model = weights_loader.load(folder)
    concepts = perfusion.prepare([Concept.load(file) for file in chosen], model)
    prompt = " next to ".join(f"a <{name}>" for name in names)
    expected = diffusion.draw(model, *ungated(model, ["", prompt], concepts), [0], (16, 16), 3, 3.0)
    pipe = pipeline(folder)
    for name in names:
        pipe.load_textual_inversion(tmp_path / f"{name}_word.safetensors", token=f"<{name}>")
        if name != "hat":
            pipe.load_lora_weights(tmp_path / f"{name}_lora.safetensors", adapter_name=name)
    adapters = [name for name in names if name != "hat"]
    if adapters:
        pipe.set_adapters(adapters, 0.0)
        assert (theirs(pipe, prompt=prompt) - expected).abs().max() > 10 * CLOSE
        pipe.set_adapters(adapters, 1.0)
    assert (theirs(pipe, prompt=prompt) - expected).abs().max() < CLOSE


@pytest.fixture(scope="module")
def full_size():
    """The U-Net of Stable Diffusion v1, real only where an export reads it, and a concept of two tokens."""
    with torch.device("meta"):
        network = unet.UNet(unet.SD_V1)
    for layer in network.cross_attentions:
        for name in ("to_k", "to_v"):
            setattr(layer, name, torch.nn.Linear(768, layer.to_q.in_features, bias=False))
    i_star = torch.randn(768)
    with torch.no_grad():
        return network, Concept("<teddy>", "teddy bear", torch.randn(2, 768), i_star, torch.randn(768),
                                values=network.values(i_star + 1), keys=network.keys(i_star - 1))


def test_a_lora_names_every_key_and_value_matrix_and_is_at_most_110_kb(full_size, tmp_path):
    network, concept = full_size
    tensors, = export.lora(network, [concept])
    save_file(tensors, tmp_path / "lora.safetensors")
    assert (tmp_path / "lora.safetensors").stat().st_size <= 110 * 1024
    read = load_file(tmp_path / "lora.safetensors")
    published = {"lora_unet_" + name.removesuffix(".weight").replace(".", "_")
                 for name in PUBLISHED["diffusers_unet"] if "attn2.to_k" in name or "attn2.to_v" in name}
    assert len(published) == 32
    assert read.keys() == {f"{name}.{part}" for name in published
                           for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"
    assert read[f"{name}.lora_down.weight"].shape == (1, 768)
    assert read[f"{name}.lora_up.weight"].shape == (1280, 1)


def test_the_lora_turns_i_star_into_o_star(full_size):
    """W' i_star = o_star, in every layer and for keys and values alike."""
    network, concept = full_size
    tensors, = export.lora(network, [concept])
    paths = {module: path.replace(".", "_") for path, module in network.named_modules()}
    for kind, project, targets in (("to_k", network.keys, concept.keys),
                                   ("to_v", network.values, concept.values)):
        before = project(concept.i_star)
        for layer, before, o_star in zip(network.cross_attentions, before, targets, strict=True):
            up, down = (tensors[f"lora_unet_{paths[layer]}_{kind}.lora_{side}.weight"].float()
                        for side in ("up", "down"))
            torch.testing.assert_close(before + up @ down @ concept.i_star, o_star, rtol=0, atol=0.01)


def test_an_embedding_file_has_one_row_per_token_and_is_at_most_5_kb(tmp_path, folder, files, full_size):
    assert run_script("export.py", "--weights", folder, "--out", tmp_path, "--concept", files["hat"])[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["hat_word.safetensors"]  # there is no edit
    word = load_file(tmp_path / "hat_word.safetensors")
    assert word["emb_params"].equal(Concept.load(files["hat"]).embedding.half()) and len(word) == 1
    save_file({"emb_params": full_size[1].embedding.half()}, tmp_path / "full.safetensors")
    assert (tmp_path / "full.safetensors").stat().st_size <= 5 * 1024


def damaged(files, tmp_path):
    concept = Concept.load(files["teddy"])
    concept.values[0] = concept.values[0] + 6e4
    concept.d_star = concept.d_star * 0 + torch.eye(16)[0]
    concept.i_star = concept.i_star * 0 + torch.eye(16)[0] / 100
    concept.save(tmp_path / "damaged.safetensors")
    return [tmp_path / "damaged.safetensors"]


def foreign(files, tmp_path):
    concept = Concept.load(files["teddy"])
    concept.metadata["base"] = "0" * 16
    concept.save(tmp_path / "foreign.safetensors")
    return [tmp_path / "foreign.safetensors"]


def touched(path):
    path.write_text("precious")
    return path


def there_already(files, tmp_path):
    touched(tmp_path / "out" / "teddy_lora.safetensors")
    return [files["teddy"]]


WRONG = {  # arguments after --weights and --out, and words of the message
    "absent": (lambda files, path: [path / "absent.safetensors"], "absent.safetensors"),
    "no concept": (lambda files, path: [touched(path / "x.safetensors")], "not a concept"),
    "another base": (foreign, "another base model"),
    "too large": (damaged, "does not fit float16"),
    "one name": (lambda files, path: [files["teddy"], path / "teddy.safetensors"], "the same name"),
    "there already": (there_already, "exists already"),
    "no weights": (lambda files, path: [files["teddy"], "--weights", path / "absent"], "absent"),
    "a file for --out": (lambda files, path: [files["teddy"], "--out", touched(path / "file")], "file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_ends_in_a_sentence_and_nothing_is_written(folder, files, tmp_path, name):
    (tmp_path / "out").mkdir()
    arguments, words = WRONG[name]
    arguments = arguments(files, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run_script("export.py", "--weights", folder, "--out", tmp_path / "out",
                                "--concept", *arguments)
    sentence, = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert code == 2 and sentence.startswith("error: ") and words in sentence
    assert sorted(tmp_path.rglob("*")) == before and not out
    assert all(path.read_text() == "precious" for path in (tmp_path / "out").iterdir())


@torch.no_grad()
@pytest.mark.slow
def test_at_full_size_the_lora_and_the_hook_draw_what_we_draw(tokenizer_folder, tmp_path):
    """Random weights in the published layout, at 64 x 64 pixels to spare time."""
    folder, out = tmp_path / "weights", tmp_path / "out"
    test_full_size.write_weights(folder, tokenizer_folder)
    file = write_concept(folder, tmp_path / "teddy.safetensors")
    assert run_script("export.py", "--weights", folder, "--out", out, "--concept", file)[0] == 0
    assert (out / "teddy_lora.safetensors").stat().st_size <= 110 * 1024
    assert (out / "teddy_word.safetensors").stat().st_size <= 5 * 1024
    model = weights_loader.load(folder)
    concepts = perfusion.prepare([Concept.load(file)], model)
    prompt, z = "a <teddy> on the beach", seeded_noise(0, (4, 8, 8))
    gated = perfusion.project(model, ["", prompt], concepts)
    ours = [diffusion.draw(model, *edit[:2], [0], (64, 64), 2, 3.0)
            for edit in (gated, ungated(model, ["", prompt], concepts))]
    pipe = pipeline(folder)
    settings = {"latents": z, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt",
                "height": 64, "width": 64}
    plain = pipe("a teddy bear on the beach", **settings).images
    with personal(pipe, model, concepts) as encode:
        hooked = pipe(**encode(prompt), **settings).images
    assert pipe("a teddy bear on the beach", **settings).images.equal(plain)
    pipe.load_textual_inversion(out / "teddy_word.safetensors", token="<teddy>")
    pipe.load_lora_weights(out / "teddy_lora.safetensors")
    theirs = hooked, pipe(prompt, **settings).images
    for a, b, tolerance in zip(ours, theirs, (EXACT, CLOSE)):
        print(f"largest difference {(a - b).abs().max():.1e}, to the base {(a - plain).abs().max():.2f}")
        assert (a - b).abs().max() < tolerance < 0.01 < (a - plain).abs().max()
