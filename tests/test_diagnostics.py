"""diagnostics.py trains what is missing; its figures say what was measured, and its page is written."""

import contextlib
import io
import shutil
from types import SimpleNamespace

import nbformat
import pytest
import torch
from PIL import Image

import diagnostics
import diffusion
import perfusion
from attention_maps import share_inside
from concept import KEYS, Concept
from models import ROOT, run_script, write_concept
from support.page import BETAS
from support.study import LOCKS
from test_full_size import LIMIT_GB, apart, script, write_weights

FIGURES = {"1_gates", "2_locks", "3_keys", "4_beta", "5_two"}
TEDDY = ROOT / "examples" / "teddy"


@pytest.fixture(scope="module")
def result(weights, concept_files, tmp_path_factory):
    """A whole run that trained one concept of four: what it worked with; its folder; what it said."""
    out, folder = tmp_path_factory.mktemp("figures"), tmp_path_factory.mktemp("files")
    bear = write_concept(weights, folder / "bear.safetensors", "teddy bear", "trained")
    cat = write_concept(weights, folder / "cat.safetensors", "cat")
    command = ["--weights", weights, "--steps", 2, "--out", out, "--images", TEDDY, "--super", "teddy bear",
               "--training-steps", 1, "--concept", concept_files["teddy"], "--trained", bear, "--second", cat]

    def train(command, stdout):
        """Here in this process: importing torch anew takes seconds."""
        return SimpleNamespace(returncode=run_script("train.py", *command[2:])[0])
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setitem(diagnostics.SEEDS, True, 2)
        patch.setattr("subprocess.run", train)
        started = diagnostics.start(list(map(str, command)))
        patch.setattr(diagnostics, "start", lambda argv: started)
        diagnostics.main()
    return started, out, said.getvalue()


def test_all_figures_are_written_and_the_page(result):
    _, out, said = result
    assert {path.stem for path in out.iterdir()} == {"trained", "index"} | FIGURES
    for name in FIGURES:
        image = Image.open(out / f"{name}.png").convert("L")
        assert image.width > 250 and len(image.getcolors(maxcolors=2 ** 24)) > 20, name
    assert "training 1 of 1: teddy bear, --keys none" in said and said.count("draw with it") == 1


def test_the_gates_are_those_of_the_method_at_the_words_they_are_labelled_with(result):
    one = result[0][1]
    model, (concept,), place = one.model, one.locked, one.named[0].tokens[-1]
    axes, = diagnostics.figure_gates([one]).axes
    words = "start a photo of a teddy bear wearing a hat on the beach end".split()
    assert [label.get_text() for label in axes.get_xticklabels()] == words
    e, _, _ = perfusion.encode(model.text_encoder, model.tokenizer, [one.prompt], [concept])
    ratio = e[0] @ concept.d_star / (concept.i_star @ concept.d_star)
    expected = torch.sigmoid((ratio - 0.7) / 0.15)[:len(words)]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(expected.tolist(), abs=1e-4)
    for beta, axes in zip(BETAS, diagnostics.figure_beta(one).axes):
        assert axes.get_title() == f"beta {beta:g}\ngate {torch.sigmoid((ratio[place] - beta) / 0.15):.0%}"


def test_every_lock_has_a_row_and_a_word_its_share_on_its_own_object(result):
    _, one, pair, _ = result[0]
    assert set(LOCKS) - set(pair.locks) == {"trained keys", "textual inversion"}
    axes = diagnostics.figure_locks(one, ["hat", "beach"]).axes
    assert [place.get_ylabel() for place in axes[::4]] == one.locks == list(LOCKS)
    assert [place.get_title().split("\n")[0] for place in axes[:4]] == ["picture", "<teddy>", "hat", "beach"]
    assert [bool(place.get_xlabel()) for place in axes] == [False, True, False, False] * len(LOCKS)
    drawn, axes = pair.drawn("locked keys", 0), diagnostics.figure_two(pair).axes
    for j, word in enumerate((5, 9)):
        share = share_inside(drawn.maps[0][:, word].mean(0)[None], drawn.masks[j:j + 1]).item()
        assert axes[1 + j].get_title().startswith(pair.words[word].label)
        assert axes[1 + j].get_xlabel() == f"{share:.0%} on its object"


def test_figure_3_changes_the_keys_alone_and_all_files_take_the_name_of_the_locked_one(result):
    one = result[0][1]
    locked, other = (one.drawn("locked keys", 0, *keys) for keys in ((), ("trained keys",)))
    assert torch.equal(other.picture, locked.picture)
    assert not torch.allclose(other.maps[0], locked.maps[0])
    assert [concept.token for concept in one.concepts[0].values()] == ["<teddy>"] * 3


def test_without_optional_files_the_other_figures_are_drawn(weights, concept_files, tmp_path, monkeypatch):
    monkeypatch.setitem(diagnostics.SEEDS, True, 1)
    monkeypatch.setattr(diagnostics, "png", lambda figure: b"")
    page, concept = tmp_path / "docs" / "page.html", concept_files["teddy"]
    diagnostics.main([*map(str, ("--weights", weights, "--concept", concept, "--steps", 1, "--out", tmp_path,
                                 "--tokenizer", weights / "tokenizer", "--page", page)),
                      "--prompt", "a {} {x}", "--words", ""])
    assert {path.stem for path in tmp_path.glob("*.png")} == FIGURES - {"3_keys", "5_two"}
    assert page.exists() and not (tmp_path / "index.html").exists()


def test_what_is_missing_is_trained_once_and_again_for_other_pictures_words_weights_or_steps(
        result, tmp_path, monkeypatch):
    ((args, one, *_), out, _), folder = result, shutil.copytree(TEDDY, tmp_path / "teddy")
    source = args.sources[0]
    monkeypatch.setattr(args, "out", shutil.copytree(out, tmp_path / "out"))

    def missing():
        monkeypatch.setattr(source, "files", {})        # as if none were given
        return tuple(keys for _, keys in diagnostics.missing_trainings(args, one.model))
    for owner, name, value in ((source, "words", "bear"), (args, "training_steps", 7),
                               (one.model, "fingerprint", "x"),
                               (one.model, "schedule", diffusion.Schedule.sd_v1("v_prediction"))):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert missing() == KEYS, name
    monkeypatch.setattr(args, "steps", 3)
    monkeypatch.setattr(source, "pictures", folder)
    assert missing() == KEYS[:2] and len(set(source.files.values())) == 3
    file = source.files["none"]
    stopped = Concept.load(file)
    stopped.metadata["steps"] = 0
    stopped.save(file)
    assert missing() == KEYS
    Image.open(folder / "0.png").rotate(90).save(folder / "0.png")
    assert missing() == KEYS and source.files["none"] != file


@pytest.mark.slow
def test_at_sd_v1s_size_the_page_is_small_and_the_memory_bounded(tokenizer_folder, tmp_path):
    weights, files = tmp_path / "weights", []
    apart(write_weights, weights, tokenizer_folder)
    for keys in KEYS:
        files.append(apart(write_concept, weights, tmp_path / f"{keys}.safetensors", "teddy bear", keys))
    peak = apart(script, "diagnostics.py", "--weights", weights, "--device", "cpu", "--concept", *files,
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
