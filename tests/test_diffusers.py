"""Our edit in diffusers: by the hook, gates and all, and from the files of export.py, without gates."""

import dataclasses
import warnings

import pytest
import torch
from safetensors.torch import save_file

import diffusion
import perfusion
import unet
import weights_loader
from concept import Concept, prepare
from diffusers_hook import personal
from models import noise, run_script
from support.files import what_is

pytestmark = pytest.mark.filterwarnings("ignore:<teddy> and <cat> are of one", "ignore:Already found a `peft",
                                        "ignore:.*not as in Stable Diffusion v1")
PROMPT = "a <teddy> next to a <cat> on the beach"
SETTINGS = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt"}
EXACT = 1e-4  # of pictures in 0...1: float32 through three steps of two implementations
CLOSE = 1e-3  # the same with the LoRA's up vectors in float16


@pytest.fixture
def pipe(weights):
    """A pipeline of diffusers with our weights and our sampler."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTokenizer
    pipe = diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel.from_pretrained(weights / "unet", sample_size=64),
        vae=diffusers.AutoencoderKL.from_pretrained(weights / "vae"),
        scheduler=diffusers.DDIMScheduler.from_pretrained(weights / "scheduler"),
        text_encoder=CLIPTextModel.from_pretrained(weights / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(weights / "tokenizer"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float32)  # whatever the files are


@pytest.fixture(scope="module")
def model(weights):
    return weights_loader.load(weights)


@pytest.fixture(scope="module")
def concepts(concept_files, model):
    """Three prepared concepts: with locked keys, with trained keys, and a word only."""
    return prepare([Concept.load(file) for file in concept_files.values()], model)


def ours(model, prompt, concepts, beta, lock="local", n=1):
    """The pictures as sample.py makes them, (n, 3, H, W)."""
    keys, values, _, _ = perfusion.condition(model, ["", prompt], concepts, beta, 0.15, lock)
    return diffusion.draw(model, keys, values, range(n), (16, 16), 3, 3.0)


def theirs(pipe, n=1, **arguments):
    """The pictures of the pipeline, from the noise of the same seeds."""
    z = torch.cat([diffusion.seeded_noise(seed, (4, 8, 8)) for seed in range(n)])
    return pipe(**arguments, **SETTINGS, latents=z, num_images_per_prompt=n, height=16, width=16).images


@torch.no_grad()
@pytest.mark.parametrize("change", [
    None, lambda pipe: setattr(pipe, "unet", torch.compile(pipe.unet, backend="eager")),
    lambda pipe: pipe.unet.compile(backend="eager"),
    lambda pipe: pipe.unet.compile_repeated_blocks(backend="eager")])
@pytest.mark.parametrize("names, lock, beta", [
    ([0], "local", None), ([2], "local", None), ([2, 0, 1], "local", [0.7, 0.5, 0.6]),
    ([0], "global", None), ([0, 1], "global", [0.5, 0.6])])
def test_the_hooked_pipeline_draws_the_picture_of_sample_py(pipe, model, concepts, names, lock, beta, change):
    """With the defaults for drawing too, and with a U-Net that has already drawn a picture compiled."""
    chosen = [concepts[i] for i in names]
    if change:
        change(pipe)
        theirs(pipe, prompt="a cat")
    with personal(pipe, model, chosen, beta, lock=lock) as encode:
        pictures = theirs(pipe, n=2, **encode(PROMPT))
    beta = beta or perfusion.DRAWING_BETA[lock]
    assert (pictures - ours(model, PROMPT, chosen, beta, lock, n=2)).abs().max() < EXACT
    assert (pictures - ours(model, PROMPT, [], [])).abs().max() > 100 * EXACT


def test_a_second_context_is_refused(pipe, model, concepts):
    with personal(pipe, model, concepts[:1]) as encode:
        theirs(pipe, **encode("a <teddy>"))
        with pytest.raises(ValueError, match="edited already"), personal(pipe, model, concepts[1:2]):
            pass


@torch.no_grad()
@pytest.mark.parametrize("change, words", [
    (lambda pipe: pipe.fuse_qkv_projections(), "acted in 0 of 8"), (None, "nothing was drawn"),
    (lambda pipe: setattr(pipe.unet, "mid_block", None), "acted in 6 of 8")])
def test_an_edit_that_does_not_act_is_an_error(pipe, model, concepts, change, words):
    with pytest.raises(ValueError, match=words), personal(pipe, model, concepts[:1]) as encode:
        embeds = encode("a <teddy>")
        if change:
            change(pipe)
            theirs(pipe, **embeds)


@torch.no_grad()
@pytest.mark.parametrize("chosen", [0, 2])
def test_a_name_that_is_not_encoded_is_a_warning_once(pipe, model, concepts, chosen):
    prompt = f"a {concepts[chosen].token}"
    with warnings.catch_warnings(record=True) as caught, personal(pipe, model, [concepts[chosen]]) as encode:
        warnings.simplefilter("default")
        theirs(pipe, **encode(prompt))
        assert not any("`encode`" in str(warning.message) for warning in caught)
        theirs(pipe, prompt=prompt)
    said, = [warning.filename for warning in caught if "`encode`" in str(warning.message)]
    assert said.endswith("diffusers_hook.py")           # not a line of torch


@torch.no_grad()
def test_after_an_error_too_the_pipeline_is_exactly_as_before(pipe, model, concepts):
    before = theirs(pipe, prompt="a teddy bear")
    with pytest.raises(KeyError), personal(pipe, model, concepts, lock="global") as encode:
        assert not theirs(pipe, **encode("a <teddy>")).equal(before)
        raise KeyError
    assert theirs(pipe, prompt="a teddy bear").equal(before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())


@torch.no_grad()
def test_another_pipeline_takes_the_hook(pipe, model, concepts):
    """Inpainting with a ControlNet. That the edit acted in all layers is checked by the hook itself."""
    import diffusers
    net = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16))
    torch.nn.init.normal_(net.controlnet_mid_block.weight)
    pipe = diffusers.StableDiffusionControlNetInpaintPipeline.from_pipe(pipe, controlnet=net)
    photo = noise(16, 16)
    given = {"image": photo, "mask_image": photo, "control_image": photo, "strength": 1.0}
    with personal(pipe, model, concepts[:2], [0.5, 0.6], 0.15) as encode:
        given |= encode(PROMPT, negative="a hat")
        hooked = theirs(pipe, **given)
    assert (hooked - theirs(pipe, **given)).abs().max() > 0.01


def test_what_does_not_fit_is_refused_in_a_sentence(model, concepts):
    wider = unet.UNet(dataclasses.replace(model.unet.config, cross_attention_dim=32))
    for words, network, given, more in [
            ("another kind or size", torch.nn.Linear(1, 1), concepts, {}),
            ("another kind or size", wider, concepts, {}),
            ("the lock is", model.unet, concepts, {"lock": "x"}),
            ("one for each of the 3", model.unet, concepts, {"beta": [0.5, 0.6]}),
            ("one for each of the 1", model.unet, concepts[:1], {"tau": (0.1, 0.2)}),
            ("call prepare", model.unet, [dataclasses.replace(concepts[0], o_keys=None)], {})]:
        with pytest.raises(ValueError, match=words), personal(network, model, given, **more):
            pass


@torch.no_grad()
def test_the_global_lock_refuses_a_prompt_that_it_has_not_encoded(pipe, model, concepts):
    with personal(pipe, model, concepts, lock="global") as encode:
        for known in (False, True):
            with pytest.raises(ValueError, match="only prompts made by"):
                theirs(pipe, prompt="a cat")
            encode("a <teddy>")


# ----------------------------------------------------------------------------------------- the exported files

@torch.no_grad()
def test_diffusers_draws_our_ungated_edit_from_the_files(
        weights, concept_files, pipe, model, concepts, tmp_path, monkeypatch):
    """Of three concepts at once, whatever was trained. With gates = ratio, eq. 3 is W' e."""
    chosen = concept_files.values()
    code, *_ = run_script("export.py", "--weights", weights, "--out", tmp_path, "--concept", *chosen)
    assert code == 0 and not (tmp_path / "hat_lora.safetensors").exists()      # it is a word without an edit
    prompt = " next to ".join(concept.token for concept in concepts)
    monkeypatch.setattr(perfusion, "gate", lambda ratio, beta, tau: ratio)
    expected = ours(model, prompt, concepts, beta=None)
    for name in concept_files:
        pipe.load_textual_inversion(tmp_path / f"{name}_word.safetensors", token=f"<{name}>")
        if name != "hat":
            pipe.load_lora_weights(tmp_path / f"{name}_lora.safetensors", adapter_name=name)
    pipe.set_adapters(["teddy", "cat"], 0.0)
    assert (theirs(pipe, prompt=prompt) - expected).abs().max() > 10 * CLOSE
    pipe.set_adapters(["teddy", "cat"], 1.0)
    assert (theirs(pipe, prompt=prompt) - expected).abs().max() < CLOSE


def test_a_file_given_in_the_wrong_place_is_named_for_what_it_is(weights, concept_files, tmp_path):
    teddy, one = concept_files["teddy"], torch.zeros(1)
    assert run_script("export.py", "--weights", weights, "--out", tmp_path, "--concept", teddy)[0] == 0
    save_file({"unet.down_blocks.0.attn2.to_k.lora_A.weight": one}, tmp_path / "peft.safetensors")
    torch.save({"<cat-toy>": one}, tmp_path / "learned_embeds.bin")
    torch.save({"identity": {"seed": "0"}, "optimizer": {"state": one}}, tmp_path / "checkpoint.pt")
    torch.save({"state_dict": {"model.diffusion_model.out.2.bias": one}}, tmp_path / "sd.ckpt")
    noise(16, 16).save(tmp_path / "x.png")
    for words, files in {
            "a concept file": [teddy], "a LoRA": ["teddy_lora.safetensors", "peft.safetensors"],
            "an embedding file": ["teddy_word.safetensors", "learned_embeds.bin"],
            "a checkpoint of train.py": ["checkpoint.pt"], "a whole base model": ["sd.ckpt"],
            "the covariance": [weights / "covariance.safetensors"], "a file of another kind": ["x.png"],
            "a network": [weights / "unet/diffusion_pytorch_model.safetensors"]}.items():
        assert all(what_is(tmp_path / file).startswith(words) for file in files)
