"""diagnostics.py trains what is missing; its figures, their numbers and its pages say what was measured."""

import csv
import runpy
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jupytext
import nbformat
import pytest
import torch
from PIL import Image

import perfusion
from attention_maps import share_inside
from models import ROOT, run_script, write_concept
from test_full_size import LIMIT_GB, apart, script, write_weights

FIGURES = {"1_gates", "2_locks", "3_keys", "4_layers", "5_beta", "6_two"}
TEDDY = ROOT / "examples" / "teddy"
LOCKS = ["super-category", "locked keys", "global lock", "trained keys", "textual inversion"]


@pytest.fixture(scope="module")
def result(weights, tmp_path_factory):
    """The script's names after a whole run that trained one concept of four; its folder."""
    out, files = tmp_path_factory.mktemp("figures"), tmp_path_factory.mktemp("files")
    command = ["diagnostics.py", "--weights", weights, "--steps", "2", "--out", out, "--images", TEDDY,
               "--super", "teddy bear", "--training-steps", "1"]
    for option, name, words, lock in (
            ("--concept", "teddy", "teddy bear", "locked"), ("--trained", "trained", "teddy bear", "trained"),
            ("--second", "cat", "cat", "locked")):
        command += [option, write_concept(weights, files / f"{name}.safetensors", words, lock)]

    def run(command):
        """Here in this process: importing torch anew takes seconds."""
        return SimpleNamespace(returncode=run_script("train.py", *command[2:])[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        patch.setattr(sys, "argv", [str(word) for word in command])
        return runpy.run_path(str(ROOT / "diagnostics.py"), run_name="__main__"), out


def rows(out, name):
    return list(csv.DictReader(open(out / f"{name}.csv", encoding="utf-8")))


def test_all_figures_are_written_with_their_numbers_and_the_pages(result):
    _, out = result
    assert {path.name for path in out.iterdir()} == {"trained", "explorer.html", "explorer_two.html"} | {
        f"{name}.{kind}" for name in FIGURES for kind in ("png", "csv")}
    for name in FIGURES:
        image = Image.open(out / f"{name}.png").convert("L")
        assert image.width > 250 and len(image.getcolors(maxcolors=2 ** 24)) > 20, name


def test_the_gates_are_those_of_the_method_at_the_words_they_are_labelled_with(result):
    names, out = result
    one, table = names["one"], [row for row in rows(out, "1_gates") if "<cat>" not in row["prompt"]]
    model, concept = names["model"], one.concepts[0]["locked"]
    words = "start a photo of a teddy bear wearing a hat on the beach end"
    assert [row["token"] for row in table] == words.split()
    e, _, _ = perfusion.encode(model.text_encoder, model.tokenizer, [one.prompt], [concept])
    ratio = e[0] @ concept.d_star / (concept.i_star @ concept.d_star)
    expected = torch.sigmoid((ratio - 0.7) / 0.15)[:len(table)]
    assert [float(row["gate"]) for row in table] == pytest.approx(expected.tolist(), abs=1e-4)  # 4 decimals


def test_every_lock_has_a_row_and_only_the_concepts_word_a_share(result):
    names, out = result
    assert list(names["one"].drawn) == LOCKS and list(names["pair"].drawn) == LOCKS[:3]
    table = rows(out, "2_locks")
    assert [(row["row"], row["column"]) for row in table] == [
        (lock, word) for lock in LOCKS for word in ("<teddy>", "hat", "beach")]
    for row in table:
        assert bool(row["share on its object"]) == (row["column"] == "<teddy>")


def test_figure_3_changes_the_keys_alone(result):
    one = result[0]["one"]
    again = one.watch(0, "locked", map_version="trained")
    assert torch.equal(again.picture, one.drawn["locked keys"].picture)
    assert not torch.allclose(again.maps[0], one.drawn["locked keys"].maps[0])


def test_figure_5_ranges_from_an_open_gate_to_one_nearly_shut(result):
    gates = [float(row["gate of the concept's word"]) for row in rows(result[1], "5_beta")]
    assert gates[0] > 0.95 and gates == sorted(gates, reverse=True) and gates[-1] < 0.2


def test_each_of_two_concepts_is_measured_on_its_own_object(result):
    names, out = result
    pair, table = names["pair"], rows(out, "6_two")
    drawn = pair.drawn["locked keys"]
    for row, word, j in ((table[0], 5, 0), (table[1], 9, 1)):
        assert row["column"] == pair.words[word].label
        share = share_inside(drawn.maps[0][:, word].mean(0)[None], drawn.masks[j:j + 1]).item()
        assert float(row["share on its object"]) == pytest.approx(share, abs=1e-4)


def test_without_optional_files_the_other_figures_are_drawn(weights, concept_files, tmp_path):
    code, out, err = run_script("diagnostics.py", "--weights", weights, "--concept", concept_files["teddy"],
                                "--steps", 1, "--out", tmp_path, "--tokenizer", weights / "tokenizer",
                                "--prompt", "a {} {x}", "--words", "")
    assert code == 0, err
    assert {path.stem for path in tmp_path.glob("*.png")} == FIGURES - {"3_keys", "6_two"}
    assert "figure 3 needs --trained" in out


def test_what_is_missing_is_trained_once_and_kept_and_every_picture_was_announced(result):
    names, out = result
    assert names["one"].concepts[0]["none"].metadata["steps"] == 1
    assert len(list((out / "trained").iterdir())) == 1
    assert names["concept_files"](names["model"])[1] == []          # nothing is missing any more
    assert names["progress"].n == names["pictures"]


def test_other_pictures_words_weights_or_steps_are_another_training(result, tmp_path, monkeypatch):
    names, model, folder = result[0]["training_folder"], result[0]["model"], tmp_path / "pictures"
    shutil.copytree(TEDDY, folder)
    seen = {names(model, folder, *which) for which in (("teddy bear", "locked"), ("bear", "locked"),
                                                       ("teddy bear", "none"))}
    Image.open(folder / "0.png").rotate(90).save(folder / "0.png")
    seen.add(names(model, folder, "teddy bear", "locked"))
    for owner, name, value in ((result[0]["args"], "training_steps", 7), (model, "fingerprint", "x")):
        monkeypatch.setattr(owner, name, value)
        seen.add(names(model, folder, "teddy bear", "locked"))
    assert len(seen) == 6


@pytest.mark.slow
def test_at_sd_v1s_size_the_page_is_small_and_the_memory_bounded(tokenizer_folder, tmp_path):
    weights, flags = tmp_path / "weights", []
    apart(write_weights, weights, tokenizer_folder)
    for option, lock in (("concept", "locked"), ("trained", "trained"), ("inversion", "none")):
        file = tmp_path / f"{option}.safetensors"
        flags += [f"--{option}", apart(write_concept, weights, file, "teddy bear", lock)]
    peak = apart(script, "diagnostics.py", "--weights", weights, "--device", "cpu", *flags,
                 "--steps", 1, "--out", tmp_path / "out")
    assert peak < LIMIT_GB
    assert (tmp_path / "out" / "explorer.html").stat().st_size < 5_000_000


def test_the_notebook_is_the_script_and_at_most_1_mb():
    notebook, script = ROOT / "diagnostics.ipynb", ROOT / "diagnostics.py"
    sources = [[cell.source for cell in cells] for cells in (
        nbformat.read(notebook, 4).cells, jupytext.read(script).cells)]
    assert sources[0] == sources[1], "make it again as its first cell says"
    assert notebook.stat().st_size <= 1_000_000
