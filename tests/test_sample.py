"""sample.py draws what it is asked for, repeatably, and answers every wrong command with one sentence."""

import re
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import drawing
from models import ROOT, run_script, tiny_model, write_concept, write_weights


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def concepts(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("concepts")
    write_concept(weights, folder / "teddy.safetensors")
    write_concept(weights, folder / "cat.safetensors", "cat")
    return folder


def sample(*arguments):
    return run_script("sample.py", *arguments)


def pixels(path):
    return torch.tensor(list(Image.open(path).convert("RGB").tobytes()), dtype=torch.float)


@pytest.fixture(scope="session")
def drawn(weights, tmp_path_factory):
    """Three pictures of the base model."""
    out = tmp_path_factory.mktemp("drawn")
    code, _, stderr = sample("a photo of a cat", "--weights", weights, "--n", 3, "--seed", 5, "--steps", 2,
                             "--size", "16x24", "--out", out)
    assert code == 0, stderr
    return out


def test_numbered_pictures_and_a_grid_of_the_size_asked_for(drawn):
    assert sorted(path.name for path in drawn.iterdir()) == [
        "0000.png", "0001.png", "0002.png", "grid_0000-0002.png"]
    assert Image.open(drawn / "0000.png").size == (24, 16)            # Pillow says width first
    assert Image.open(drawn / "grid_0000-0002.png").size == (48, 32)


def test_text_fields_hold_what_is_needed_to_draw_the_picture_again(drawn):
    text = Image.open(drawn / "0001.png").text
    assert (text["prompt"], text["seed"], text["steps"]) == ("a photo of a cat", "6", "2")
    assert {"sampler", "guidance", "weights", "concepts", "beta", "tau", "lock", "negative"} <= text.keys()


def test_a_picture_depends_on_its_seed_and_not_on_how_many_are_drawn(drawn, weights, tmp_path):
    sample("a photo of a cat", "--weights", weights, "--seed", 6, "--steps", 2, "--size", "16x24",
           "--out", tmp_path)
    assert torch.equal(pixels(tmp_path / "0000.png"), pixels(drawn / "0001.png"))
    assert not torch.equal(pixels(drawn / "0000.png"), pixels(drawn / "0001.png"))


def test_the_size_is_by_default_that_of_the_models_training(weights, tmp_path):
    assert sample("a cat", "--weights", weights, "--steps", 1, "--out", tmp_path)[0] == 0
    assert Image.open(tmp_path / "0000.png").size == (16, 16)


def test_a_second_run_overwrites_nothing(weights, tmp_path):
    for _ in range(2):
        sample("a cat", "--weights", weights, "--steps", 1, "--size", 16, "--out", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000.png", "0001.png"]


def test_low_vram_and_the_other_sampler_and_precision_draw(drawn, weights, tmp_path):
    common = ["a photo of a cat", "--weights", weights, "--seed", 5, "--steps", 2, "--size", "16x24"]
    assert sample(*common, "--low-vram", "--out", tmp_path / "low")[0] == 0
    assert torch.equal(pixels(tmp_path / "low" / "0000.png"), pixels(drawn / "0000.png"))
    assert sample(*common, "--precision", "bf16", "--out", tmp_path / "bf16")[0] == 0
    assert (pixels(tmp_path / "bf16" / "0000.png") - pixels(drawn / "0000.png")).abs().mean() < 8
    assert sample(*common, "--sampler", "dpm++", "--negative", "a hat", "--out", tmp_path / "dpm")[0] == 0


def test_concepts_change_the_picture_and_beta_sets_how_much(weights, concepts, tmp_path):
    common = ["--weights", weights, "--steps", 2, "--size", 16]
    teddy = ["--concept", concepts / "teddy.safetensors"]
    both = [*teddy, "--concept", concepts / "cat.safetensors"]
    prompt = "a <teddy> next to a <cat>"
    assert sample("a <teddy>", *common, *teddy, "--beta", 0.5, "--out", tmp_path / "a")[0] == 0
    assert sample("a <teddy>", *common, *teddy, "--beta", 5, "--out", tmp_path / "b")[0] == 0
    assert sample(prompt, *common, *both, "--beta", "0.5,0.7", "--tau", 0.1, "--out", tmp_path / "c")[0] == 0
    assert sample(prompt, *common, *both, "--lock", "global", "--out", tmp_path / "d")[0] == 0
    assert not torch.equal(pixels(tmp_path / "a" / "0000.png"), pixels(tmp_path / "b" / "0000.png"))
    assert Image.open(tmp_path / "c" / "0000.png").text["beta"] == "0.5 0.7"


def test_a_loaded_concept_that_the_prompt_does_not_use_is_a_warning(weights, concepts, tmp_path):
    code, _, stderr = sample("a cat", "--weights", weights, "--steps", 1, "--size", 16, "--out", tmp_path,
                             "--concept", concepts / "teddy.safetensors")
    assert code == 0 and "warning: the prompt does not use <teddy>" in stderr


def test_a_prompt_of_ten_thousand_characters_is_drawn_with_a_warning(weights, tmp_path):
    code, _, stderr = sample("cat " * 2500, "--weights", weights, "--steps", 1, "--size", 16,
                             "--out", tmp_path)
    assert code == 0 and "warning" in stderr and len(stderr) < 2000


WRONG = {
    "size 0": ["a cat", "--size", "0"], "size 7": ["a cat", "--size", "7"],
    "size 513": ["a cat", "--size", "513"],
    "size text": ["a cat", "--size", "big"], "size of three": ["a cat", "--size", "16x16x16"],
    "negative size": ["a cat", "--size", "-16"], "size too large": ["a cat", "--size", "100000"],
    "no steps": ["a cat", "--steps", "0"], "1000 steps": ["a cat", "--steps", "1000"],
    "n 0": ["a cat", "--n", "0"],
    "negative seed": ["a cat", "--seed", "-1"], "guidance nan": ["a cat", "--guidance", "nan"],
    "unknown concept": ["a <dog>"], "missing concept": ["a <teddy>", "--concept", "nothing.safetensors"],
    "no prompt": [], "sampler": ["a cat", "--sampler", "euler"], "weights": ["a cat", "--weights", "nowhere"],
    "three betas": ["a <teddy>", "--concept", "TEDDY", "--beta", "0.1,0.2,0.3"],
    "beta text": ["a <teddy>", "--concept", "TEDDY", "--beta", "low"],
    "beta nan": ["a <teddy>", "--concept", "TEDDY", "--beta", "nan"],
    "tau 0": ["a <teddy>", "--concept", "TEDDY", "--tau", "0"],
    "twice": ["a <teddy>", "--concept", "TEDDY", "--concept", "TEDDY"],
    "unknown beside a known": ["a <teddy> and <dog>", "--concept", "TEDDY"],
    "out is a file": ["a cat", "--out", "TEDDY"], "not a concept": ["a <teddy>", "--concept", "UNET"],
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_is_one_sentence_and_exit_code_2(case, weights, concepts, tmp_path):
    places = {"TEDDY": concepts / "teddy.safetensors",
              "UNET": weights / "unet" / "diffusion_pytorch_model.safetensors"}
    arguments = [str(places.get(argument, argument)) for argument in WRONG[case]]
    defaults = ["--weights", str(weights), "--steps", "1", "--out", str(tmp_path / "out"), "--size", "16"]
    if case not in ("no prompt",):
        arguments = arguments[:1] + [d for d in defaults] + arguments[1:]
    code, _, stderr = sample(*arguments)
    assert code == 2 and "Traceback" not in stderr, stderr
    assert len(re.findall(r"error: ", stderr)) == 1
    assert stderr.rstrip().count("\n") <= 9, stderr             # argparse's own errors repeat the usage
    if case.startswith("unknown beside"):
        assert "<dog>" in stderr and "known are <teddy>" in stderr


def test_help_answers_in_under_three_seconds():
    start = time.time()
    subprocess.run([sys.executable, str(ROOT / "sample.py"), "--help"], check=True, capture_output=True)
    assert time.time() - start < 3


def test_a_nan_stops_with_a_sentence():
    model = tiny_model()
    model.unet.conv_out.bias += float("nan")
    e = torch.randn(2, 24, 16)
    with pytest.raises(ValueError, match="NaN"):
        drawing.draw(model, model.unet.keys(e), model.unet.values(e), [0], (16, 16), steps=1)
    model.vae.decoder.conv_out.bias += float("nan")
    with pytest.raises(ValueError, match="NaN"):
        drawing.decode(model.vae, torch.zeros(1, 4, 8, 8))


def test_a_decoder_that_overflows_in_fp16_decodes_in_float32():
    model = tiny_model()
    model.vae.decoder.conv_in.weight *= 1e7 ** 0.5
    model.vae.decoder.mid_block.resnets[0].conv1.weight *= 1e5
    latents = torch.randn(1, 4, 8, 8) * 20
    expected = drawing.decode(model.vae, latents)
    assert not torch.isfinite(model.vae.half().decode(latents.half())).all()
    assert (drawing.decode(model.vae, latents) - expected).abs().max() < 0.1


@torch.no_grad()
def test_a_batch_of_seeds_draws_the_same_pictures_as_one_by_one():
    model, e = tiny_model(), torch.randn(2, 24, 16)
    keys, values = model.unet.keys(e), model.unet.values(e)
    together = drawing.draw(model, keys, values, [3, 4], (16, 16), steps=3)
    alone = torch.cat([drawing.draw(model, keys, values, [seed], (16, 16), steps=3) for seed in (3, 4)])
    assert (together - alone).abs().max() < 1e-4 and together.min() >= 0 and together.max() <= 1


def test_a_grid_holds_the_pictures_row_by_row_and_white_where_none_is():
    images = torch.arange(3.)[:, None, None, None].expand(3, 3, 2, 2) / 4
    sheet = drawing.grid(images, columns=2)
    assert sheet.shape == (3, 4, 4)
    assert sheet[0, ::2, ::2].tolist() == [[0, 0.25], [0.5, 1]]
