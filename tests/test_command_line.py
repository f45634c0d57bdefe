"""What the command line and the files promise to every script."""

import errno
import io
import os
import runpy
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

import sample
from concept import Concept
from models import ROOT
from support import accumulation, command_line
from support.base_model import prediction
from support.files import replacing


@pytest.mark.parametrize("error, code, sentence", [
    (ValueError("it is\nwrong"), 2, "error: it is wrong\n"),
    (FileNotFoundError(errno.ENOENT, "No such file", "a.png"), 2, "error: a.png: No such file\n"),
    (MemoryError(), 2, "error: out of memory: less\n"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory: less\n"),
    (KeyboardInterrupt(), 130, "")])
def test_an_error_of_the_user_is_one_sentence_and_an_exit_code(error, code, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.run(Mock(side_effect=error), memory="less")
    assert stop.value.code == code and capsys.readouterr().err == sentence


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        command_line.run(Mock(side_effect=RuntimeError("shapes")), memory="less")


def test_what_the_terminal_cannot_show_is_replaced(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", None)                # was closed
    command_line.run(lambda: print("0.5 ± 0.1 für 熊", flush=True), memory="less")
    assert terminal.buffer.getvalue() == b"0.5 \xb1 0.1 f\xfcr ?\n"


@pytest.mark.parametrize("backend, notebook, left", [
    ("module://inline", False, None), ("module://inline", True, "module://inline"), ("pdf", False, "pdf")])
def test_a_notebooks_backend_stays_in_notebooks(monkeypatch, backend, notebook, left):
    monkeypatch.setenv("MPLBACKEND", backend)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", None)
    runpy.run_path(str(ROOT / "support/plots.py"))
    assert os.environ.get("MPLBACKEND") == left


@pytest.mark.parametrize("text, prompt", [
    ("'a cat' ", "a cat"), ("“a cat”", "a cat"), ('"cat" and "dog"', '"cat" and "dog"')])
def test_only_quotes_around_a_whole_prompt_go(text, prompt):
    assert command_line.unquoted(text) == prompt


def test_every_option_knows_the_home_folder_as_the_shell_does_at_the_start_of_a_word(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = sample.arguments(["a ~/cat", "--weights=~/sd", "--concept", "~/a", "--out=~", "--negative=~b~"])
    assert (args.prompt, args.weights, args.concept, str(args.out), args.negative) == (
        "a ~/cat", "/home/me/sd", ["/home/me/a"], "/home/me", "~b~")


def test_a_text_may_begin_with_a_dash_and_a_wrong_option_is_still_refused():
    args = sample.arguments(["-blurry", "--negative", "-dark", "--beta", "-0.5", "--concept", "a"])
    assert (args.prompt, args.negative, args.beta) == ("-blurry", "-dark", [-0.5])
    for wrong in (["--nonsense", "1"], ["--negative"], ["--negative", "--steps", "1"]):
        with pytest.raises(ValueError):
            sample.arguments(["a cat", *wrong])


@pytest.mark.parametrize("given", [
    [], ["--weights", "my sd", "--tokenizer", "t'", "--prediction", "epsilon"]])
def test_a_printed_command_runs_in_a_shell_as_it_stands(given, tmp_path, monkeypatch):
    args, words = sample.arguments(["a cat", *given]), ["a <teddy>", "--concept", "my $1/teddy.safetensors"]
    for folder, script in ((ROOT, "sample.py"), (tmp_path, str(ROOT / "sample.py"))):
        monkeypatch.chdir(folder)
        line = command_line.command(args, "sample.py", *words[:2], Path(words[2]))
        assert shlex.split(line) == ["python", script, *words, *given]


@pytest.mark.parametrize("folder, name", [
    ("my_photos", "my_photos"), ("My Photos (2)_", "my-photos-2-_"), ("__b-", "b"), ("x" * 50, "x" * 41)])
def test_a_folders_name_becomes_a_concepts(folder, name):
    assert command_line.concept_name(None, Path(folder)) == name


def test_what_the_concepts_were_trained_with_is_used_and_another_is_refused():
    old, eps, v = (Concept("<a>", "cat", torch.zeros(1, 2), metadata={"prediction": known})
                   for known in (None, "epsilon", "v_prediction"))
    assert prediction(None, [old]) is None and prediction("epsilon", [eps]) == "epsilon"
    with pytest.warns(match="<a> was trained with what its base model's files say, and is drawn with v_"):
        assert prediction(None, [old, v, v]) == prediction("v_prediction", [old]) == "v_prediction"
    for given, concepts in (("epsilon", [old, v]), (None, [eps, v])):
        with pytest.raises(ValueError, match="v_prediction [(]<a>[)]"):
            prediction(given, concepts)


@pytest.mark.parametrize("name, value", [("RANK", "3"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "two")])
def test_a_part_of_torchruns_variables_is_one_sentence(monkeypatch, name, value):
    assert accumulation.join_processes("cpu") == "cpu"
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="not as torchrun sets"):
        accumulation.join_processes("cpu")


# ------------------------------------------------------------------------------------------------------ files

def test_a_full_disk_loses_nothing_and_leaves_nothing_and_a_file_has_the_usual_permissions(tmp_path):
    old = tmp_path / "old.txt"
    old.write_text("old")
    with pytest.raises(OSError, match="old.txt cannot be written: full"), replacing(old) as partial:
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "full")
    assert list(tmp_path.iterdir()) == [old] and old.read_text() == "old"
    with replacing(tmp_path / "new") as partial:            # a package that lets only the owner read
        save_file({"a": torch.zeros(1)}, partial)
    assert (tmp_path / "new").stat().st_mode == old.stat().st_mode


def test_pictures_added_at_once_take_different_numbers_after_those_that_are_there(tmp_path, monkeypatch):
    for name in ("0007.png", "photo.png", ".0008.claim"):       # the last is of another program
        (tmp_path / name).touch()
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda k: sample.add_picture(tmp_path, bytes([k])), range(40)))
    assert sorted(path.name for path in paths) == [f"{k:04d}.png" for k in range(9, 49)]
    assert [path.read_bytes()[0] for path in paths] == list(range(40))
    monkeypatch.setattr(Path, "write_bytes", Mock(side_effect=OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="0049.png cannot be written: full"):
        sample.add_picture(tmp_path, b"")
    assert len(list(tmp_path.iterdir())) == 43          # nothing is left of it
