"""The README's commands and its snippet, run in their order on a small stand-in for every base model."""

import re
import shlex
import shutil
import subprocess
from types import SimpleNamespace

import perfusion
import weights_loader
from models import ROOT, run_script
from support import plots, study

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(?:.*&& +)?python (\w+\.py.*)", README.replace("\\\n", " "), re.MULTILINE)
FEW = {"train.py": "--steps 1 --batch 2 --preview 0", "sample.py": "--steps 1",
       "diagnostics.py": "--steps 1 --training-steps 1"}       # more options, to take seconds


def test_every_command_runs_in_its_order_and_so_does_the_snippet(weights, tmp_path, monkeypatch):
    """Beside the examples and a person's photographs; `tiny` is a random model."""
    ignore = shutil.ignore_patterns("[1-9]*.png")           # one picture of each will do
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=ignore)
    shutil.copytree(ROOT / "examples" / "dog", tmp_path / "my_photos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights_loader, "TINY", weights)

    def run(command, *_, **__):         # of diagnostics.py, which starts train.py
        code, _, error = run_script(*map(str, command[1:]))
        return SimpleNamespace(returncode=code, stdout="", stderr=error)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(plots, "png", lambda figure: b"")       # test_diagnostics.py sees the figures
    monkeypatch.setattr(study, "MASK_TIMESTEPS", [400])
    assert len(COMMANDS) >= 6
    for command in COMMANDS:
        script, *words = shlex.split(command.replace("sd15", str(weights)))
        code, _, error = run_script(script, *words, *FEW.get(script, "").split())
        assert code == 0, (command, error)
    snippet, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(snippet, names)
    model, gates = names["model"], perfusion.condition(names["model"], ["a <teddy>"], names["concepts"]).gates
    assert names["images"].shape == (1, 3, *model.size) and gates.shape[2] == 1
