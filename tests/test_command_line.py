"""What the command line and the files promise to every script."""

import errno
import io
import os
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

import sample
from models import ROOT
from support import command_line
from support.files import read_lines, replacing


@pytest.mark.parametrize("error, code, sentence", [
    (ValueError("it is\nwrong"), 2, "error: it is wrong\n"),
    (FileNotFoundError(errno.ENOENT, "No such file", "a.png"), 2, "error: a.png: No such file\n"),
    (MemoryError(), 2, "error: out of memory: less\n"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory: less\n"),
    (KeyboardInterrupt(), 130, "")])
def test_an_error_of_the_user_is_one_sentence_and_an_exit_code(error, code, sentence, capsys):
    with pytest.raises(SystemExit) as stop, command_line.plain_errors(memory="less"):
        raise error
    assert stop.value.code == code and capsys.readouterr().err == sentence


@pytest.mark.parametrize("error", [RuntimeError("shapes"), KeyError("key"), AssertionError()])
def test_an_error_of_the_program_keeps_its_traceback(error):
    with pytest.raises(type(error)), command_line.plain_errors(memory="less"):
        raise error


def test_what_the_terminal_cannot_show_is_replaced(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", None)                # was closed
    with command_line.plain_errors(memory="less"):
        print("0.5 ± 0.1 für 熊", flush=True)
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


# ------------------------------------------------------------------------------------------------------ files

def test_on_a_full_disk_nothing_is_lost_and_nothing_left_behind(tmp_path):
    (tmp_path / "old.txt").write_text("old")
    with pytest.raises(OSError, match="old.txt cannot be written: full"):
        with replacing(tmp_path / "old.txt") as partial:
            partial.write_text("half")
            raise OSError(errno.ENOSPC, "full")
    assert [path.name for path in tmp_path.iterdir()] == ["old.txt"]
    assert (tmp_path / "old.txt").read_text() == "old"


def test_a_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    with replacing(tmp_path / "a.safetensors") as partial:
        save_file({"a": torch.zeros(1)}, partial)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_pictures_added_at_once_take_different_numbers_after_those_that_are_there(tmp_path):
    (tmp_path / "0007.png").touch()
    (tmp_path / "photo.png").touch()
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda k: sample.add_picture(tmp_path, bytes([k])), range(40)))
    assert sorted(path.name for path in paths) == [f"{k:04d}.png" for k in range(8, 48)]
    assert [path.read_bytes()[0] for path in paths] == list(range(40))
    assert len(list(tmp_path.iterdir())) == 42


def test_lines_are_read_without_notepads_mark_and_blanks(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeffa bear\r\n\r\n  für \n".encode())
    assert read_lines(path) == ["a bear", "für"]
    path.write_bytes("für".encode("latin-1"))
    with pytest.raises(ValueError, match="lines.txt is not a text in UTF-8"):
        read_lines(path)
    os.truncate(path, 10 ** 9)                              # sparse: takes no room
    with pytest.raises(ValueError, match="larger than 100 MB"):
        read_lines(path)
