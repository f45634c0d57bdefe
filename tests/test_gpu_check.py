"""gpu_check.py, which is for machines with a GPU, keeps working: all of its lines at tiny sizes on the CPU."""

import gpu_check


def test_every_line_passes_at_tiny_sizes_on_the_cpu_and_is_kept(tmp_path, capsys):
    file = tmp_path / "table.md"
    assert gpu_check.main(["--small", "--device", "cpu", "--out", str(file)]) == 0
    assert file.read_text(encoding="utf-8") == capsys.readouterr().out
    lines = [line.split(" | ") for line in file.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    assert len(lines) > 30 and all(result.endswith(("|", "ok |", "|  |")) for *_, result in lines)


def test_a_line_that_fails_says_why_and_stops_nothing(capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel\nfor this")
    monkeypatch.setitem(gpu_check.CHECKS, "hook", broken)
    assert gpu_check.main(["--small", "--device", "cpu", "--parts", "hook", "picture"]) == 1
    table = capsys.readouterr().out
    assert "| hook | RuntimeError: no kernel | FAILED |" in table and "| picture, fp32 exact |" in table
