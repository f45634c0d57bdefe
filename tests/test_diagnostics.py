"""diagnostics.py writes its six figures, and the numbers on them are what their labels say."""

import runpy
import sys

import pytest
import torch
from PIL import Image

import perfusion
from models import ROOT, run_script, write_concept, write_weights

FIGURES = ("1_gates.png", "2_locks.png", "3_keys.png", "4_layers.png", "5_beta.png", "5_tau.png", "6_two.png")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnostics")
    write_weights(folder / "weights")
    for name, words, lock in (("teddy", "teddy bear", "locked"), ("trained", "teddy bear", "trained"),
                              ("inversion", "teddy bear", "none"), ("cat", "cat", "locked")):
        write_concept(folder / "weights", folder / f"{name}.safetensors", words, lock)
    return folder


def flags(files, out):
    return ["--weights", files / "weights", "--concept", files / "teddy.safetensors", "--steps", 1,
            "--out", out, "--trained", files / "trained.safetensors",
            "--inversion", files / "inversion.safetensors",
            "--second", files / "cat.safetensors"]


@pytest.fixture(scope="module")
def result(files, tmp_path_factory):
    """The script's names after a whole run, and its folder of figures."""
    out, before = tmp_path_factory.mktemp("figures"), sys.argv
    sys.argv = ["diagnostics.py", *map(str, flags(files, out))]
    try:
        return runpy.run_path(str(ROOT / "diagnostics.py"), run_name="__main__"), out
    finally:
        sys.argv = before


def test_all_figures_are_written_and_hold_something(result):
    _, out = result
    assert sorted(path.name for path in out.iterdir()) == sorted(FIGURES)
    for name in FIGURES:
        image = Image.open(out / name).convert("L")
        assert image.width > 400 and len(image.getcolors(maxcolors=2 ** 24)) > 20, name


def test_gates_are_those_of_the_method_at_the_words_they_are_labelled_with(result):
    names, _ = result
    labels, gates, _ = names["gate_panels"][0]
    concept, model = names["concept"], names["model"]
    assert (labels[0], labels[-1], labels[5:7]) == ("<|startoftext|>", "<|endoftext|>", ["teddy", "bear"])
    e, _, _ = perfusion.encode(model.text_encoder, model.tokenizer, [names["prompt"]], [concept])
    sim = e[0] @ concept.d_star / (concept.i_star @ concept.d_star)
    expected = torch.sigmoid((sim - names["BETA"]["local"]) / names["TAU"])[:len(labels)]
    assert (gates[:, 0] - expected).abs().max() < 1e-5
    assert names["gate_panels"][1][1].shape[1] == 2


def test_every_lock_has_a_row_and_a_share_between_0_and_1(result):
    names, _ = result
    assert list(names["drawn"]) == ["super-category", "locked keys", "global lock", "trained keys",
                                    "textual inversion"]
    assert names["lock_shares"].shape == (5, 3)
    assert names["lock_shares"].min() >= 0 and names["lock_shares"].max() <= 1


def test_the_global_lock_has_the_super_categorys_keys_and_the_concepts_values(result):
    names, _ = result
    project, concept = names["projections"], names["concept"]
    plain = project(names["ordinary"], [], 0, 1, "local")
    locked = project(names["prompt"], [concept], 0.7, 0.15, "global")
    assert all(torch.equal(a, b) for a, b in zip(plain[0], locked[0]))
    assert not any(torch.equal(a, b) for a, b in zip(plain[1], locked[1]))


def test_the_maps_of_all_tokens_sum_to_one(result):
    names, _ = result
    keys, values = names["projections"](names["ordinary"], [], 0, 1, "local")
    maps = names["maps_of_noised"](names["latents"], keys, values, [[t] for t in range(24)], 401)
    assert (maps.sum(0) - 1).abs().max() < 1e-5


def test_the_share_inside_a_mask_is_the_maps_mass_there(result):
    names, _ = result
    maps, mask = torch.rand(2, 3, 8, 8), torch.zeros(8, 8)
    mask[:4] = 1
    expected = maps[..., :4, :].sum((-1, -2)) / maps.sum((-1, -2))
    assert (names["shares"](maps, mask) - expected).abs().max() < 1e-6


def test_without_optional_files_the_other_figures_are_still_drawn(files, tmp_path):
    code, out, err = run_script("diagnostics.py", "--weights", files / "weights", "--concept",
                                files / "teddy.safetensors", "--steps", 1, "--out", tmp_path)
    assert code == 0, err
    assert {path.name for path in tmp_path.iterdir()} == set(FIGURES) - {"3_keys.png", "6_two.png"}
    assert "figure 3 needs --trained" in out


@pytest.mark.parametrize("wrong", [
    [], ["--concept", "nowhere.safetensors"], ["--concept", "TEDDY", "--prompt", "no place"],
    ["--concept", "TEDDY", "--words", "submarine"], ["--concept", "TEDDY", "--second", "TEDDY"],
    ["--concept", "TEDDY", "--weights", "nowhere"], ["--concept", "TEDDY", "--steps", "0"]])
def test_a_wrong_command_is_one_sentence_and_exit_code_2(wrong, files, tmp_path):
    arguments = [files / "teddy.safetensors" if part == "TEDDY" else part for part in wrong]
    code, _, err = run_script("diagnostics.py", "--weights", files / "weights", "--out", tmp_path, *arguments)
    assert code == 2 and "Traceback" not in err and err.count("error: ") == 1, err
