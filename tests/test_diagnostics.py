"""diagnostics.py trains what is missing; its figures, their numbers and its page say what was measured."""

import contextlib
import csv
import io
import shutil
import subprocess
from types import SimpleNamespace

import nbformat
import pytest
import torch
from PIL import Image

import diagnostics
import perfusion
from attention_maps import share_inside
from models import ROOT, run_script, write_concept
from support.study import LOCKS
from test_full_size import LIMIT_GB, apart, script, write_weights

FIGURES = {"1_gates", "2_locks", "3_keys", "4_layers", "5_beta", "6_two"}
TEDDY = ROOT / "examples" / "teddy"


@pytest.fixture(scope="module")
def result(weights, tmp_path_factory):
    """A whole run that trained one concept of four; its folder; what it said."""
    out, files = tmp_path_factory.mktemp("figures"), tmp_path_factory.mktemp("files")
    command = ["--weights", weights, "--steps", "2", "--out", out, "--images", TEDDY, "--super", "teddy bear",
               "--training-steps", "1"]
    for option, name, words, lock in (
            ("--concept", "teddy", "teddy bear", "locked"), ("--trained", "trained", "teddy bear", "trained"),
            ("--second", "cat", "cat", "locked")):
        command += [option, write_concept(weights, files / f"{name}.safetensors", words, lock)]

    def train(command, stdout):
        """Here in this process: importing torch anew takes seconds."""
        assert stdout == subprocess.DEVNULL
        return SimpleNamespace(returncode=run_script("train.py", *command[2:])[0])
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setitem(diagnostics.SEEDS, True, 2)
        patch.setattr(subprocess, "run", train)
        run = diagnostics.start([str(word) for word in command])
        patch.setattr(diagnostics, "start", lambda argv: run)
        diagnostics.main()
    return run, out, said.getvalue()


def rows(out, name):
    return list(csv.DictReader(open(out / f"{name}.csv", encoding="utf-8")))


def test_all_figures_are_written_with_their_numbers_and_the_page(result):
    _, out, said = result
    assert {path.name for path in out.iterdir()} == {"trained", "index.html"} | {
        f"{name}.{kind}" for name in FIGURES for kind in ("png", "csv")}
    for name in FIGURES:
        image = Image.open(out / f"{name}.png").convert("L")
        assert image.width > 250 and len(image.getcolors(maxcolors=2 ** 24)) > 20, name
    assert "training 1 of 1: teddy bear, --keys none" in said and said.count("draw with it") == 1


def test_the_gates_are_those_of_the_method_at_the_words_they_are_labelled_with(result):
    one, table = result[0].one, [row for row in rows(result[1], "1_gates") if "<cat>" not in row["prompt"]]
    model, (concept,) = one.model, one.locked
    words = "start a photo of a teddy bear wearing a hat on the beach end"
    assert [row["token"] for row in table] == words.split()
    e, _, _ = perfusion.encode(model.text_encoder, model.tokenizer, [one.prompt], [concept])
    ratio = e[0] @ concept.d_star / (concept.i_star @ concept.d_star)
    expected = torch.sigmoid((ratio - 0.7) / 0.15)[:len(table)]
    assert [float(row["gate"]) for row in table] == pytest.approx(expected.tolist(), abs=1e-4)  # 4 decimals
    place, swept = one.named[0].tokens[-1], rows(result[1], "5_beta")
    assert [float(row["gate of the concept's word"]) for row in swept] == pytest.approx(
        [torch.sigmoid((ratio[place] - float(row["beta"])) / 0.15).item() for row in swept], abs=1e-4)


def test_every_lock_has_a_row_and_a_word_its_share_on_its_own_object(result):
    run, out, _ = result
    assert run.one.locks == list(LOCKS)
    assert set(LOCKS) - set(run.pair.locks) == {"trained keys", "textual inversion"}
    table = rows(out, "2_locks")
    assert [(row["row"], row["column"], bool(row["share on its object"])) for row in table] == [
        (lock, word, word == "<teddy>") for lock in LOCKS for word in ("<teddy>", "hat", "beach")]
    drawn = run.pair.drawn("locked keys", 0)
    for row, word, j in zip(rows(out, "6_two"), (5, 9), (0, 1)):
        assert row["column"] == run.pair.words[word].label
        share = share_inside(drawn.maps[0][:, word].mean(0)[None], drawn.masks[j:j + 1]).item()
        assert float(row["share on its object"]) == pytest.approx(share, abs=1e-4)


def test_figure_3_changes_the_keys_alone(result):
    locked, other = (result[0].one.drawn("locked keys", 0, *keys) for keys in ((), ("trained keys",)))
    assert torch.equal(other.picture, locked.picture)
    assert not torch.allclose(other.maps[0], locked.maps[0])


def test_without_optional_files_the_other_figures_are_drawn(weights, concept_files, tmp_path, monkeypatch):
    monkeypatch.setitem(diagnostics.SEEDS, True, 1)
    monkeypatch.setattr(diagnostics, "png", lambda figure: b"")
    page, concept = tmp_path / "docs" / "page.html", concept_files["teddy"]
    diagnostics.main([*map(str, ("--weights", weights, "--concept", concept, "--steps", 1, "--out", tmp_path,
                                 "--tokenizer", weights / "tokenizer", "--page", page)),
                      "--prompt", "a {} {x}", "--words", ""])
    assert {path.stem for path in tmp_path.glob("*.png")} == FIGURES - {"3_keys", "6_two"}
    assert page.exists() and not (tmp_path / "index.html").exists()


def test_what_is_missing_is_trained_once_and_again_for_other_pictures_words_weights_or_steps(
        result, tmp_path, monkeypatch):
    (run, out, _), folder, seen = result, tmp_path / "teddy", []
    args, model, source = run.args, run.one.model, run.args.sources[0]
    file = source.files["none"]
    assert list((out / "trained").iterdir()) == [file.parent]
    assert diagnostics.finished(file, 1) and not diagnostics.finished(file, 2)
    shutil.copytree(TEDDY, folder)
    for owner, name, value in ((args, "steps", 3), (source, "pictures", folder), (source, "words", "bear"),
                               (args, "training_steps", 7), (model, "fingerprint", "x")):
        monkeypatch.setattr(owner, name, value)
        seen.append(diagnostics.trained_file(args, model, source, "none"))
    Image.open(folder / "0.png").rotate(90).save(folder / "0.png")
    seen += [diagnostics.trained_file(args, model, source, lock) for lock in ("none", "locked")]
    assert seen[:2] == [file, file] and len(set(seen)) == 6


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
    assert (tmp_path / "out" / "index.html").stat().st_size < 8_000_000


def test_the_notebook_is_short_cells_that_ran_and_at_most_1_mb():
    cells = [cell for cell in nbformat.read(ROOT / "diagnostics.ipynb", 4).cells]
    ran = [cell for cell in cells if cell.cell_type == "code"]
    assert all(len(cell.source.splitlines()) <= 15 for cell in cells)
    assert [cell.execution_count for cell in ran] == list(range(1, len(ran) + 1))
    outputs = [output for cell in ran for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 6
    assert (ROOT / "diagnostics.ipynb").stat().st_size <= 1_000_000
