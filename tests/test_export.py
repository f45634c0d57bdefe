"""The exported files draw our ungated edit in diffusers, and each kind of file is known."""

import pytest
import torch
from safetensors.torch import save_file

import diffusion
import perfusion
import weights_loader
from concept import Concept, prepare
from models import noise, run_script
from support.files import what_is
from test_diffusers_hook import pipeline, theirs

pytestmark = pytest.mark.filterwarnings("ignore:.*not as in Stable Diffusion v1")
CLOSE = 1e-3  # of pictures in 0...1: the up vectors are float16


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:<teddy> and <cat> are of one")
def test_diffusers_draws_our_ungated_edit_from_the_files(weights, concept_files, tmp_path, monkeypatch):
    """Of three concepts at once, whatever was trained. With gates = ratio, eq. 3 is W' e."""
    names, chosen = list(concept_files), list(concept_files.values())
    code, *_ = run_script("export.py", "--weights", weights, "--out", tmp_path, "--concept", *chosen)
    assert code == 0 and not (tmp_path / "hat_lora.safetensors").exists()      # it is a word without an edit
    model = weights_loader.load(weights)
    concepts = prepare([Concept.load(file) for file in chosen], model)
    prompt = " next to ".join(f"a <{name}>" for name in names)
    monkeypatch.setattr(perfusion, "gate", lambda ratio, beta, tau: ratio)
    keys, values, *_ = perfusion.condition(model, ["", prompt], concepts)
    expected = diffusion.draw(model, keys, values, [0], (16, 16), 3, 3.0)
    pipe = pipeline(weights)
    for name in names:
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
