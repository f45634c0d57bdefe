"""sample.py draws what it is asked for, repeatably, and loses no picture."""

import json
import os

import pytest
import torch
from PIL import Image

import diffusion
from concept import Concept
from models import run_script, tiny_model


@pytest.fixture(scope="module")
def drawn(weights, tmp_path_factory):
    """Three pictures of the base model."""
    out = tmp_path_factory.mktemp("drawn")
    draw(weights, out, "a photo of a cat", "--n", 3, "--seed", 5)
    return out


def draw(weights, out, prompt, *arguments):
    """Run sample.py with two steps at 16 x 24; returns stdout and stderr."""
    code, stdout, stderr = run_script("sample.py", prompt, "--weights", weights, "--steps", 2,
                                      "--size", "16x24", "--out", out, *arguments)
    assert code == 0, stderr
    return stdout, stderr


def pixels(out, name="0000.png"):
    return Image.open(out / name).convert("RGB").tobytes()


def test_numbered_pictures_and_a_grid_of_the_size_asked_for(drawn):
    names = {path.name for path in drawn.iterdir()}
    assert names == {"0000.png", "0001.png", "0002.png", "grid_0000-0002.png"}
    assert Image.open(drawn / "0000.png").size == (24, 16)            # Pillow says width first
    assert Image.open(drawn / "grid_0000-0002.png").size == (52, 36)     # with gaps of 4


def test_text_fields_and_the_second_line_hold_what_draws_the_picture_again(weights, concept_files, tmp_path):
    concept = concept_files["cat"]
    more = "--concept", concept, "--seed", 3, "--negative", "-dark, 熊"
    stdout, _ = draw(weights, tmp_path, "a <cat>", *more)
    expected = {"prompt": "a <cat>", "negative": "-dark, 熊", "steps": 2, "sampler": "ddim", "guidance": 4.0,
                "size": "16x24", "weights": str(weights), "prediction": "epsilon", "precision": "fp32",
                "concepts": str(concept), "beta": "0.7", "tau": "0.15", "lock": "local"}
    fields = Image.open(tmp_path / "0000.png").text
    assert fields.pop("parameters").split("\n") == [       # as the web UI writes it
        "a <cat>", "Negative prompt: -dark, 熊",
        "Steps: 2, Sampler: DDIM, CFG scale: 4.0, Seed: 3, Size: 24x16, Model: weights"]
    assert json.loads(fields.pop("perfusion")) == expected | {"seed": 3} and not fields
    assert stdout.splitlines()[1:] == ["; ".join(f"{key}: {value}" for key, value in expected.items()),
                                   str(tmp_path / "0000.png")]


def test_a_concept_is_drawn_as_it_was_trained_and_that_is_said(weights, concept_files, tmp_path):
    concept, file = Concept.load(concept_files["teddy"]), tmp_path / "v.safetensors"
    concept.metadata["prediction"] = "v_prediction"
    concept.save(file)
    _, said = draw(weights, tmp_path, "a <teddy>", "--concept", file)
    assert said.count("is used with v_prediction, its files say epsilon") == 1
    assert json.loads(Image.open(tmp_path / "0000.png").text["perfusion"])["prediction"] == "v_prediction"


def test_a_picture_depends_on_its_seed_and_not_on_how_many_are_drawn(weights, drawn, tmp_path):
    draw(weights, tmp_path, "a photo of a cat", "--seed", 6)
    assert pixels(tmp_path) == pixels(drawn, "0001.png") != pixels(drawn)


def test_the_size_is_by_default_that_of_the_models_training(weights, tmp_path):
    run_script("sample.py", "a cat", "--weights", weights, "--steps", 1, "--out", tmp_path)
    assert Image.open(tmp_path / "0000.png").size == (16, 16)


def test_concepts_change_the_picture_and_each_setting_does(weights, concept_files, tmp_path):
    concepts, found = [f"--concept={concept_files[name]}" for name in ("teddy", "cat")], set()
    settings = ("--beta=0.7", "--beta=5", "--beta=0.7,5", "--tau=1", "--lock=global --beta=0.7",
                "--negative=hat", "--precision=bf16", "--sampler=dpm++")
    for given in settings:
        draw(weights, tmp_path / given, "a <teddy> next to a <cat>", *concepts, *given.split())
        found.add(pixels(tmp_path / given))
    assert len(found) == len(settings)


def test_a_folder_that_cannot_be_written_is_named_before_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    _, _, stderr = run_script("sample.py", "a cat", "--weights", "nowhere", "--out", tmp_path)
    assert stderr == f"error: --out {tmp_path} cannot be written\n"


@pytest.mark.parametrize("prompt, warning", [
    ("a cat", "the prompt does not use <teddy>"), ("cat " * 2500 + "<teddy>", "cut off")])
def test_what_the_prompt_does_not_reach_is_a_warning(weights, concept_files, tmp_path, prompt, warning):
    _, stderr = draw(weights, tmp_path, prompt, "--concept", concept_files["teddy"])
    assert warning in stderr and stderr.count("warning: ") <= 4 and len(stderr) < 3000


def test_a_nan_stops_with_a_sentence():
    model = tiny_model()
    model.unet.conv_out.bias += float("nan")
    e = torch.randn(2, 24, 16)
    with pytest.raises(ValueError, match="NaN"):
        diffusion.draw(model, model.unet.keys(e), model.unet.values(e), [0], (16, 16), steps=1)
    model.vae.decoder.conv_out.bias += float("nan")
    with pytest.raises(ValueError, match="NaN"):
        diffusion.decode(model.vae, torch.zeros(1, 4, 8, 8))


def test_a_decoder_that_overflows_in_fp16_decodes_in_float32():
    model = tiny_model()
    model.vae.decoder.conv_in.weight *= 1e7 ** 0.5
    model.vae.decoder.mid_block.resnets[0].conv1.weight *= 1e5
    latents = torch.randn(1, 4, 8, 8) * 20
    expected = diffusion.decode(model.vae, latents)
    assert not torch.isfinite(model.vae.half().decode(latents.half())).all()
    assert (diffusion.decode(model.vae, latents) - expected).abs().max() < 0.1


def test_a_grid_holds_the_pictures_row_by_row_with_white_gaps_and_white_where_none_is():
    images = torch.arange(3.)[:, None, None, None].expand(3, 3, 2, 2) / 4
    sheet = diffusion.grid(images, columns=2, gap=1)
    assert sheet.shape == (3, 5, 5)
    assert sheet[0].tolist() == [[0, 0, 1, 0.25, 0.25]] * 2 + [[1] * 5] + [[0.5, 0.5, 1, 1, 1]] * 2
