"""evaluate.py's numbers are the cosines they claim to be, and its table, file and figure hold all of them."""

import csv
import io
import math
import runpy

import pytest
import torch
from PIL import Image

from concept import Concept
from models import ROOT, noise, run_script, write_concept
from support import pictures, plots
from support.intervals import mean_and_interval

EVALUATE = runpy.run_path(str(ROOT / "evaluate.py"), run_name="evaluate")


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_image_similarity_is_the_mean_cosine_over_all_pairs():
    generated, training = unit(3, 4, 8), unit(5, 8)
    expected = torch.cosine_similarity(generated[:, :, None], training, dim=-1).mean(-1)
    assert (EVALUATE["image_similarity"](generated, training) - expected).abs().max() < 1e-10


def test_text_similarity_compares_each_picture_with_its_own_prompt():
    generated, texts = unit(3, 4, 8), unit(3, 8)
    expected = torch.cosine_similarity(generated, texts[:, None], dim=-1)
    assert (EVALUATE["text_similarity"](generated, texts) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("n, t", [(4, 3.182), (5, 2.776), (8, 2.365), (31, 2.042)])
def test_the_interval_is_students_and_of_fewer_than_four_numbers_there_is_none(n, t):
    values = torch.randn(n, dtype=torch.float64)
    mean, half = mean_and_interval(values.tolist())
    assert abs(mean - values.mean()) < 1e-10
    assert half == pytest.approx(t * values.std().item() / math.sqrt(n), rel=0.01)
    assert math.isnan(mean_and_interval(values.tolist()[:3])[1])


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    """Two files of one concept, another of textual inversion, and training pictures."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_concept(weights, folder / "teddy.safetensors")
    concept = Concept.load(write_concept(weights, folder / "teddy_0010.safetensors", seed=1))
    concept.token = "<teddy>"                               # another name of the file is not another concept
    concept.save(folder / "teddy_0010.safetensors")
    write_concept(weights, folder / "inverted.safetensors", lock="none")
    (folder / "images").mkdir()
    for k in range(2):
        noise(16, 20, seed=k).save(folder / "images" / f"{k}.png")
    (folder / "prompts.txt").write_text("a photo of a {}\n\na {} on the beach\n")
    return folder


def evaluate(weights, folder, out, names, *arguments):
    """Run evaluate.py with one step on files of the folder; returns its rows and stdout."""
    files = [folder / f"{name}.safetensors" for name in names]
    code, stdout, stderr = run_script(
        "evaluate.py", "--weights", weights, "--steps", 1, "--prompts", folder / "prompts.txt", "--images",
        folder / "images", "--out", out, "--concept", *files, *arguments)
    assert code == 0, stderr
    return list(csv.DictReader(open(out / "results.csv"))), stdout


def test_a_sweep_writes_every_row_once_and_a_figure(weights, folder, tmp_path):
    rows, out = evaluate(weights, folder, tmp_path, ["teddy", "inverted"], "--beta", "0.5:0.7:0.1")
    assert [f"{row['concept']} {row['beta']}" for row in rows] == [
        "teddy bear (no concept) ", "teddy 0.5", "teddy 0.6", "teddy 0.7", "inverted "]
    assert all(-1 <= float(row[f"{kind}_similarity"]) <= 1 for row in rows for kind in ("image", "text"))
    assert all(row["number_of_prompts"] == "2" and "own" in row["clip"] for row in rows)
    assert len({row["image_similarity"] for row in rows}) == 5
    assert Image.open(tmp_path / "pareto.png").width > 500
    assert "4 seeds, ± is a 95 % interval over seeds" in out and out.count("±") == 11


def test_of_several_files_of_one_concept_the_best_is_named_and_kept(weights, folder, tmp_path):
    names = ["teddy", "teddy_0010"]
    rows, out = evaluate(weights, folder, tmp_path, names, "--beta", "0.5,1.2", "--seeds", 1,
                         "--keep-best", tmp_path / "kept")
    best = max(rows[1:], key=lambda row: float(row["harmonic_mean"]))
    assert f"<teddy>: {best['concept']} --beta {best['beta']} has the best harmonic mean" in out
    line, = [line.strip() for line in out.splitlines() if "sample.py" in line]
    assert line == (f"python sample.py 'a <teddy> on the beach' --concept {tmp_path}/kept/teddy.safetensors "
                    f"--beta {best['beta']} --tau 0.15 --lock local --weights {weights}")
    kept = (tmp_path / "kept" / "teddy.safetensors").read_bytes()
    assert [kept == (folder / f"{name}.safetensors").read_bytes() for name in names] == [
        best["concept"] == name for name in names]


@pytest.mark.parametrize("change, words", [
    ({"folder": ""}, "known place"), ({"folder": "gone"}, "are not at gone"), ({"pictures": "x"}, "does not hold")])
def test_without_images_those_of_the_training_are_read_if_they_are_still_the_same(folder, change, words):
    images, files = str(folder / "images"), sorted((folder / "images").glob("*.png"))

    def find(metadata, given=None):
        concept = Concept("<teddy>", "teddy bear", torch.zeros(2, 8), metadata=metadata)
        return EVALUATE["training_files"](concept, given)
    right = {"folder": images, "pictures": pictures.digest(files)}
    assert find(right) == find({"folder": images}) == find({}, images) == (images, files)
    with pytest.raises(ValueError, match=f"{words}.*--images"):
        find(right | change)
    with pytest.warns(UserWarning, match="does not hold the pictures that <teddy> was trained on"):
        find({"pictures": "x"}, images)


@pytest.mark.parametrize("name", ["_b", "a$b^{$", "$x$", "plain", "_$"])
def test_whatever_a_file_is_called_it_is_a_label_as_it_stands(name):
    point = [0.1, 0.2, 0.0, 0.0]
    figure = plots.pareto({"base": ([point], []), name: ([point], [name])}, "x", "y", name, name)
    figure.savefig(io.BytesIO(), format="png")          # where a formula would be read
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["base", plots.label(name)] and plots.label(name).replace("\\", "").strip() == name
