"""evaluate.py's numbers are the cosines they claim to be, and its table, file and figure hold all of them."""

import csv
import io
import math
import runpy
import statistics

import pytest
import torch
from PIL import Image

from concept import Concept
from models import ROOT, noise, run_script, write_concept
from support import intervals, pictures, plots

EVALUATE = runpy.run_path(str(ROOT / "evaluate.py"), run_name="evaluate")


def test_a_row_holds_mean_cosines_with_their_intervals_and_the_harmonic_mean():
    drawn, training, texts = (torch.rand(shape).double() for shape in ((3, 4, 8), (5, 8), (3, 8)))
    row = EVALUATE["measure"](*(torch.nn.functional.normalize(x, dim=-1) for x in (drawn, training, texts)))
    image = torch.cosine_similarity(drawn[:, :, None], training, dim=-1).mean((0, 2)).tolist()     # per seed
    text = torch.cosine_similarity(drawn, texts[:, None], dim=-1).mean(0).tolist()
    expected = *intervals.mean_and_interval(image), *intervals.mean_and_interval(text)
    harmonic = statistics.harmonic_mean([statistics.fmean(image), statistics.fmean(text)])
    assert list(row.values()) == pytest.approx([*expected, harmonic], abs=1e-10)


@pytest.mark.parametrize("n, t", [(4, 3.182), (5, 2.776), (8, 2.365), (31, 2.042)])
def test_the_interval_is_students_and_of_fewer_than_four_numbers_there_is_none(n, t):
    values = torch.randn(n, dtype=torch.float64)
    mean, half = intervals.mean_and_interval(values.tolist())
    assert abs(mean - values.mean()) < 1e-10
    assert half == pytest.approx(t * values.std().item() / math.sqrt(n), rel=0.01)
    assert math.isnan(intervals.mean_and_interval(values.tolist()[:3])[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Training pictures, and prompts."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "images").mkdir()
    for k in range(2):
        noise(16, 20, seed=k).save(folder / "images" / f"{k}.png")
    (folder / "prompts.txt").write_text("a photo of a {}\n\n'a {} on the beach'\n")
    return folder


def evaluate(weights, folder, out, files, *arguments):
    """Run evaluate.py with one step on concept files; returns its rows and stdout."""
    code, stdout, stderr = run_script(
        "evaluate.py", "--weights", weights, "--steps", 1, "--prompts", folder / "prompts.txt", "--images",
        folder / "images", "--out", out, "--concept", *files, *arguments)
    assert code == 0, stderr
    return list(csv.DictReader(open(out / "results.csv"))), stdout


def test_a_sweep_writes_every_row_once_and_a_figure(weights, concept_files, folder, tmp_path):
    """Of two concepts, one of textual inversion."""
    files = concept_files["teddy"], concept_files["hat"]
    rows, out = evaluate(weights, folder, tmp_path, files, "--beta", "0.5:0.7:0.1")
    assert [f"{row['concept']} {row['beta']}" for row in rows] == [
        "teddy bear (no concept) ", "teddy 0.5", "teddy 0.6", "teddy 0.7", "hat (no concept) ", "hat "]
    assert all(-1 <= float(row[f"{kind}_similarity"]) <= 1 for row in rows for kind in ("image", "text"))
    assert all(row["number_of_prompts"] == "2" and "own" in row["clip"] for row in rows)
    assert len({row["image_similarity"] for row in rows}) == 6
    assert Image.open(tmp_path / "pareto.png").width > 500
    assert "4 seeds, ± is a 95 % interval over seeds" in out and out.count("±") == 13


def test_the_best_of_several_files_is_named(weights, concept_files, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(intervals, "mean_and_interval", lambda values: (abs(values[0]), math.nan))
    files = concept_files["teddy"], write_concept(weights, tmp_path / "teddy.safetensors", seed=1)
    rows, out = evaluate(weights, folder, tmp_path, files, "--beta", "0.5,1.2", "--seeds", 1)
    best = max(rows[1:], key=lambda row: float(row["harmonic_mean"]))
    assert len({row["harmonic_mean"] for row in rows}) == 5
    assert f"<teddy>: {best['concept']} --beta {best['beta']} has the best harmonic mean" in out
    line, = [line.strip() for line in out.splitlines() if "sample.py" in line]
    assert line == ("python sample.py 'a <teddy> on the beach' --concept "
                    f"{best['concept']} --beta {best['beta']} --tau 0.15 --lock local --weights {weights}")


def test_without_images_those_of_the_training_are_read_and_it_is_said_if_they_are_others(folder):
    images, files = str(folder / "images"), sorted((folder / "images").glob("*.png"))

    def find(metadata, given=None):
        concept = Concept("<teddy>", "teddy bear", torch.zeros(2, 8), metadata=metadata)
        return EVALUATE["training_files"](concept, given)
    right = {"folder": images, "pictures": pictures.digest(files)}
    assert find(right) == find({"folder": images}) == find({}, images) == (images, files)
    for metadata, words in (({}, "known place"), ({"folder": "gone"}, "are not at gone")):
        with pytest.raises(ValueError, match=f"{words}.*--images"):
            find(metadata)
    with pytest.warns(UserWarning, match="does not hold the pictures that <teddy> was trained on") as said:
        assert find({"folder": images, "pictures": "x"}) == find({"pictures": "x"}, images) == (images, files)
    assert len(said) == 2


def test_a_bad_line_of_the_prompts_is_named(tmp_path):
    (tmp_path / "p").write_text("a {}\n\na cat\n")
    with pytest.raises(ValueError, match="p, line 3: "):
        EVALUATE["read_prompts"](str(tmp_path / "p"))


@pytest.mark.parametrize("name", ["_b", "a$b^{$", "$x$", "plain", "_$"])
def test_whatever_a_file_is_called_it_is_a_label_as_it_stands(name):
    point = dict(text_similarity=0.1, image_similarity=0.2, text_interval=0.0, image_interval=0.0, beta=0.7)
    figure = plots.pareto([point | {"concept": concept} for concept in ("base", name)], name)
    figure.savefig(io.BytesIO(), format="png")          # where a formula would be read
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["base", plots.label(name)] and plots.label(name).replace("\\", "").strip() == name
