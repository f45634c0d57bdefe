"""Whatever stops a run, no file has a final name and half its content, and nothing reported is gone."""

import csv
import hashlib
import multiprocessing
import os
import random
import resource
import runpy
import sys
import time
import traceback

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from models import ROOT, run_script, write_concept, write_weights

COMMANDS = {
    "sample": ["a <teddy>", "--concept", "CONCEPT", "--steps", 1, "--n", 12, "--out", "OUT"],
    "train": ["--images", "IMAGES", "--super", "teddy bear", "--token", "teddy", "--steps", 6, "--batch", 2,
              "--preview", "PREVIEW", "--checkpoint", 1, "--out", "OUT"],
    "evaluate": ["--concept", "CONCEPT", "--images", "IMAGES", "--prompts", "PROMPTS", "--steps", 1,
                 "--beta", "0.5,0.6", "--out", "OUT"],
    "covariance": ["--n", 300],                             # writes beside the weights
    "export": ["--concept", "CONCEPT", "--out", "NEW"]}     # replaces nothing


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Weights with a covariance, a concept, pictures and prompts."""
    write_concept(write_weights(tmp_path / "weights"), tmp_path / "teddy.safetensors")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "images" / "red.png")
    (tmp_path / "prompts.txt").write_text("a photo of a {}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code, _, stderr = run_script("covariance.py", "--weights", tmp_path / "weights", "--n", 300)
    assert code == 0, stderr
    return tmp_path


def run(script, folder, name="", largest=resource.RLIM_INFINITY, preview=0):
    """Start a script in a process of its own, whose files cannot grow beyond `largest` bytes."""
    out, (reading, writing) = folder / script, os.pipe()    # a pipe has no size
    places = {"CONCEPT": folder / "teddy.safetensors", "IMAGES": folder / "images", "OUT": out,
              "PROMPTS": folder / "prompts.txt", "NEW": out / name, "PREVIEW": preview}

    def child():
        torch.set_num_threads(1)                            # threads do not survive a fork
        sys.argv = [script, *(str(places.get(word, word)) for word in COMMANDS[script]),
                    "--weights", str(folder / "weights")]
        sys.stderr, sys.stdout = open(os.devnull, "w"), os.fdopen(writing, "w", buffering=1)
        sys.dont_write_bytecode = True                      # Python keeps a half that it wrote on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        try:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        except Exception:
            traceback.print_exc(file=sys.stdout)
            raise
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    os.close(writing)
    return process, os.fdopen(reading)


def check(out, report, pictures):
    """Files with a final name are whole, what was reported is there, pictures: {path: digest} as before."""
    for path in [path for path in out.rglob("*") if path.is_file() and not path.name.startswith(".")]:
        if path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".csv":
            assert path.read_text().endswith("\n") and len({len(row) for row in csv.reader(open(path))}) == 1
    reported = [word.strip(":,") for line in report.split("\n")[:-1] for word in line.split()
                if word.startswith(str(out))]               # the last line may be cut off
    assert all(os.path.exists(path) for path in reported)
    for path in out.glob("[0-9]*.png"):
        assert pictures.setdefault(path, digest(path)) == digest(path)
    assert all(path.exists() for path in pictures)


def digest(path):
    return hashlib.sha256(path.read_bytes()).digest()


def stopped_runs(folder, script, stops, rng, preview=0):
    """Run once to the end, to know how long it takes and what it writes; then stop it in all these ways."""
    out, start, pictures = folder / ("weights" if script == "covariance" else script), time.time(), {}
    process, _ = run(script, folder, "whole", preview=preview)
    process.join()
    seconds = time.time() - start
    assert process.exitcode == 0
    sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file() and path.stat().st_size]
    for k, stop in enumerate(stops):
        largest = rng.choice(sizes) - 1 if stop == "full" else resource.RLIM_INFINITY
        process, report = run(script, folder, f"{k}", largest, preview)
        if stop == "kill":
            time.sleep(rng.uniform(0, seconds))
            process.kill()
        process.join()
        reported = report.read()
        # 0 where the largest files are the weights', which were written before
        expected = (2, 0) if script == "covariance" else (2,)
        assert stop != "full" or process.exitcode in expected, reported
        check(out, reported, pictures)


@pytest.mark.parametrize("script", ["sample", "train", "export"])
def test_a_stopped_run_leaves_whole_files(script, folder):
    stopped_runs(folder, script, ["kill", "full"], random.Random(0))


@pytest.mark.slow
@pytest.mark.parametrize("script", COMMANDS)
def test_twenty_stopped_runs_leave_whole_files(script, folder):
    stopped_runs(folder, script, ["kill", "full"] * 10, random.Random(1), preview=3)
