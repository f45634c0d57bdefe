"""The README's commands and its snippet, run in their order on a small stand-in for every base model."""

import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

import weights_loader
from models import ROOT, noise, run_script

README = (ROOT / "README.md").read_text(encoding="utf-8")
FEW = {"train.py": "--steps 1 --batch 2 --preview 0", "sample.py": "--steps 1",
       "diagnostics.py": "--steps 1 --training-steps 1"}       # more options, to take seconds


def commands():
    """The scripts of the README's shell blocks, as lists of words."""
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                words = shlex.split(command)
                if words[0] == "python" and words[1].endswith(".py"):
                    yield words[1:]


@pytest.fixture
def desk(weights, tmp_path, monkeypatch):
    """A folder with the examples and a person's photographs, where `tiny` is a random model."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "my_photos").mkdir()
    for k in range(3):
        noise(40, 30, seed=k).save(tmp_path / "my_photos" / f"{k}.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights_loader, "TINY", weights)

    def run(command, *_, **__):         # of diagnostics.py, which starts train.py
        code, _, error = run_script(*map(str, command[1:]))
        return SimpleNamespace(returncode=code, stdout="", stderr=error)
    monkeypatch.setattr(subprocess, "run", run)
    return weights


def test_every_command_of_the_readme_runs_in_its_order_and_so_does_its_snippet(desk):
    done = []
    for script, *words in commands():
        words = [str(desk) if word == "sd15" else word for word in words]
        code, said, error = run_script(script, *words, *FEW.get(script, "").split())
        assert code == 0, (script, words, error)
        done.append(script)
    assert {"train.py", "sample.py", "export.py", "diagnostics.py"} <= set(done)
    snippet, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(snippet, names)
    assert names["images"].shape == (1, 3, *names["model"].size)
    assert sys.modules["perfusion"].condition(names["model"], ["a <teddy>"], names["concepts"]).gates.shape[2] == 1
