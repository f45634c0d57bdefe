"""The exported files draw our ungated edit in diffusers, keep to their sizes, and nothing is overwritten."""

import pytest
import torch
from safetensors.torch import load_file

import diffusion
import perfusion
import test_full_size
import weights_loader
from concept import Concept, prepare
from diffusers_hook import personal
from diffusion import seeded_noise
from models import run_script, write_concept
from test_diffusers_hook import EXACT, pipeline, theirs

pytestmark = pytest.mark.filterwarnings("ignore:.*not as in Stable Diffusion v1")
CLOSE = 1e-3  # of pictures in 0...1: the up vectors are float16


def ungated(model, prompts, concepts):
    """Keys and values of the prompts with gates = ratio: eq. 3 as ROME has it."""
    e, _, _ = perfusion.encode(model.text_encoder, model.tokenizer, prompts, concepts)
    edited = [c for c in concepts if c.edits]
    I, D = torch.stack([c.i_star for c in edited]), torch.stack([c.d_star for c in edited])
    e_perp, ratio = perfusion.split(e, I, D)
    return [perfusion.edit(project, e_perp, ratio, [torch.stack(layer) for layer in zip(*targets)])
            for project, targets in ((model.unet.keys, [c.o_keys for c in edited]),
                                     (model.unet.values, [c.o_values for c in edited]))]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:<teddy> and <cat> are of one")
def test_diffusers_with_the_exported_files_draws_our_ungated_edit(weights, concept_files, tmp_path):
    """Of three concepts at once, whatever was trained."""
    names, chosen = list(concept_files), list(concept_files.values())
    code, out, err = run_script("export.py", "--weights", weights, "--out", tmp_path, "--concept", *chosen)
    assert code == 0 and "error" not in err
    model = weights_loader.load(weights)
    concepts = prepare([Concept.load(file) for file in chosen], model)
    prompt = " next to ".join(f"a <{name}>" for name in names)
    expected = diffusion.draw(model, *ungated(model, ["", prompt], concepts), [0], (16, 16), 3, 3.0)
    pipe = pipeline(weights)
    for name in names:
        pipe.load_textual_inversion(tmp_path / f"{name}_word.safetensors", token=f"<{name}>")
        if name != "hat":
            pipe.load_lora_weights(tmp_path / f"{name}_lora.safetensors", adapter_name=name)
    pipe.set_adapters(["teddy", "cat"], 0.0)
    assert (theirs(pipe, prompt=prompt) - expected).abs().max() > 10 * CLOSE
    pipe.set_adapters(["teddy", "cat"], 1.0)
    assert (theirs(pipe, prompt=prompt) - expected).abs().max() < CLOSE


def test_an_embedding_file_has_one_row_per_token(weights, concept_files, tmp_path):
    file = concept_files["hat"]
    assert run_script("export.py", "--weights", weights, "--out", tmp_path, "--concept", file)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["hat_word.safetensors"]  # there is no edit
    word = load_file(tmp_path / "hat_word.safetensors")
    assert word["emb_params"].equal(Concept.load(file).embedding.half()) and len(word) == 1


@pytest.mark.parametrize("name, words", [
    ("large", "does not fit float16"), ("teddy", "exists already"), ("one/hat", "the same name")])
def test_what_cannot_be_exported_is_one_sentence(weights, concept_files, tmp_path, name, words):
    precious, file = tmp_path / "teddy_lora.safetensors", tmp_path / f"{name}.safetensors"
    precious.write_text("precious")
    concept = Concept.load(concept_files["teddy"])
    if name == "large":
        concept.o_values[0] = concept.o_values[0] + 6e4
        concept.d_star, concept.i_star = torch.eye(16)[0], torch.eye(16)[0] / 100
    file.parent.mkdir(exist_ok=True)
    concept.save(file)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run_script("export.py", "--weights", weights, "--out", tmp_path, "--concept", file,
                                concept_files["hat"])
    sentence, = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert code == 2 and sentence.startswith("error: ") and words in sentence
    assert sorted(tmp_path.rglob("*")) == before and not out and precious.read_text() == "precious"


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
    concepts = prepare([Concept.load(file)], model)
    prompt, z = "a <teddy> on the beach", seeded_noise(0, (4, 8, 8))
    gated = perfusion.condition(model, ["", prompt], concepts)
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
