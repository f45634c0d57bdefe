"""evaluate.py's numbers are the cosines they claim to be, and its table, file and figure hold all of them."""

import csv
import math
import runpy

import pytest
import torch
from PIL import Image

from perfusion import Concept
from models import ROOT, run_script, write_concept, write_weights

EVALUATE = runpy.run_path(str(ROOT / "evaluate.py"), run_name="evaluate")


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_image_similarity_is_the_mean_cosine_over_all_pairs():
    generated, training = unit(3, 4, 8), unit(5, 8)
    expected = torch.stack([torch.stack([torch.cosine_similarity(g, t, dim=0) for t in training]).mean()
                            for g in generated.flatten(0, 1)]).view(3, 4)
    assert (EVALUATE["image_similarity"](generated, training) - expected).abs().max() < 1e-10


def test_text_similarity_compares_each_picture_with_its_own_prompt():
    generated, texts = unit(3, 4, 8), unit(3, 8)
    found = EVALUATE["text_similarity"](generated, texts)
    assert found.shape == (3, 4)
    assert abs(found[2, 1] - torch.cosine_similarity(generated[2, 1], texts[2], dim=0)) < 1e-10


@pytest.mark.parametrize("n, t", [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (8, 2.365), (31, 2.042)])
def test_the_interval_is_students_over_seeds(n, t):
    values = torch.randn(6, n, dtype=torch.float64)
    mean, half = EVALUATE["mean_and_interval"](values)
    per_seed = values.mean(0)
    assert abs(mean - values.mean()) < 1e-10
    assert half == pytest.approx(t * per_seed.std().item() / math.sqrt(n), rel=0.02)


def test_one_seed_has_no_interval():
    assert math.isnan(EVALUATE["mean_and_interval"](torch.randn(6, 1))[1])


def test_built_in_sets_are_dreambenchs_25_prompts_each_with_one_place_for_the_concept():
    for name in ("objects", "live"):
        prompts = EVALUATE["read_prompts"](name)
        assert len(prompts) == len(set(prompts)) == 25 and all(prompt.count("{}") == 1 for prompt in prompts)


def test_a_range_includes_both_ends():
    assert EVALUATE["numbers"]("0.4:0.9:0.05") == [0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9]
    assert EVALUATE["numbers"]("0.6,0.7") == [0.6, 0.7]


def test_without_images_the_folder_that_a_concept_was_trained_on_is_read(tmp_path):
    def concept(folder):
        return Concept("<teddy>", "teddy bear", torch.zeros(2, 8), metadata={"folder": str(folder)})
    assert EVALUATE["training_folders"]([concept(tmp_path)]) == [str(tmp_path)]
    with pytest.raises(ValueError, match="--images"):
        EVALUATE["training_folders"]([concept(tmp_path / "gone")])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Weights, two concept files and a folder of training pictures."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_weights(folder / "weights")
    write_concept(folder / "weights", folder / "teddy.safetensors")
    write_concept(folder / "weights", folder / "inverted.safetensors", lock="none")
    (folder / "images").mkdir()
    for k in range(2):
        Image.new("RGBA", (20 + 4 * k, 16), (200, 40 * k, 90, 128)).save(folder / "images" / f"{k}.png")
    (folder / "images" / "notes.txt").write_text("not a picture")
    (folder / "prompts.txt").write_text("a photo of a {}\n\na {} on the beach\n")
    return folder


def evaluate(world, *arguments):
    defaults = ["--weights", world / "weights", "--images", world / "images", "--steps", 1, "--seeds", 2,
                "--prompts", world / "prompts.txt"]
    return run_script("evaluate.py", *defaults, *arguments)


def test_a_sweep_writes_every_row_a_figure_and_a_proposal(world, tmp_path):
    code, out, err = evaluate(world, "--concept", world / "teddy.safetensors", world / "inverted.safetensors",
                              "--beta", "0.5:0.7:0.1", "--out", tmp_path)
    assert code == 0, err
    rows = list(csv.DictReader(open(tmp_path / "results.csv")))
    assert [(row["concept"], row["beta"]) for row in rows] == [
        ("teddy bear (no concept)", ""), ("teddy", "0.5"), ("teddy", "0.6"), ("teddy", "0.7"),
        ("inverted", "")]
    assert all(-1 <= float(row[f"{kind}_similarity"]) <= 1 for row in rows for kind in ("image", "text"))
    assert all(row["seeds"] == row["number_of_prompts"] == "2" and "own" in row["clip"] for row in rows)
    assert len({row["image_similarity"] for row in rows}) > 2
    assert Image.open(tmp_path / "pareto.png").width > 500
    assert "teddy: beta 0." in out and "2 seeds" in out and "CLIP: " in out
    assert "inverted: beta" not in out


def test_the_same_command_gives_the_same_numbers(world, tmp_path):
    for name in ("a", "b"):
        evaluate(world, "--concept", world / "teddy.safetensors", "--beta", "0.6", "--out", tmp_path / name)
    assert (tmp_path / "a" / "results.csv").read_text() == (tmp_path / "b" / "results.csv").read_text()


WRONG = {
    "no such concept": ["--concept", "nowhere.safetensors"], "no concept": [],
    "no such prompts": ["--concept", "TEDDY", "--prompts", "nowhere.txt"],
    "prompts without a place": ["--concept", "TEDDY", "--prompts", "NOTES"],
    "no pictures": ["--concept", "TEDDY", "--images", "EMPTY"],
    "two folders for one file": ["--concept", "TEDDY", "--images", "EMPTY", "EMPTY"],
    "range backwards": ["--concept", "TEDDY", "--beta", "0.9:0.4:0.1"],
    "range of text": ["--concept", "TEDDY", "--beta", "a:b:c"], "tau 0": ["--concept", "TEDDY", "--tau", "0"],
    "no seeds": ["--concept", "TEDDY", "--seeds", "0"], "steps": ["--concept", "TEDDY", "--steps", "1000"],
    "no such clip": ["--concept", "TEDDY", "--clip", "EMPTY"],
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_is_one_sentence_and_exit_code_2(case, world, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"TEDDY": world / "teddy.safetensors", "EMPTY": tmp_path / "empty",
              "NOTES": world / "images" / "notes.txt"}
    code, _, err = evaluate(world, "--out", tmp_path / "out", *[places.get(a, a) for a in WRONG[case]])
    assert code == 2 and "Traceback" not in err and err.count("error: ") == 1, err
