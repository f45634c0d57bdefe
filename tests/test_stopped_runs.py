"""Whatever stops a run, no file has a final name and half its content, and nothing reported is gone."""

import csv
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import time
import traceback

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from models import ROOT, noise

COMMANDS = {
    "sample": ["a <teddy>", "--concept", "CONCEPT", "--steps", 1, "--n", 12, "--out", "OUT"],
    "train": ["--images", "IMAGES", "--super", "teddy bear", "--token", "teddy", "--steps", 6, "--batch", 2,
              "--preview", 3, "--checkpoint", 1, "--out", "OUT"],
    "evaluate": ["--concept", "CONCEPT", "--images", "IMAGES", "--prompts", "PROMPTS", "--steps", 1,
                 "--beta", "0.5,0.6", "--out", "OUT"],
    "covariance": ["--n", 300],                             # writes beside the weights
    "export": ["--concept", "CONCEPT", "--out", "NEW"]}     # replaces nothing

READ = {".png": lambda path: Image.open(path).load(), ".safetensors": load_file, ".pt": torch.load}


@pytest.fixture
def folder(weights, concept_files, tmp_path):
    """Weights with a covariance, a concept, a picture and prompts."""
    shutil.copytree(weights, tmp_path / "weights")
    shutil.copy(concept_files["teddy"], tmp_path)
    noise(16, 16).save(tmp_path / "picture.png")
    (tmp_path / "prompts.txt").write_text("a photo of a {}")
    return tmp_path


def run(script, folder, name="", largest=resource.RLIM_INFINITY):
    """Start a script in a process of its own, whose files cannot grow beyond `largest` bytes."""
    out, (reading, writing) = folder / script, os.pipe()    # a pipe has no size
    places = {"CONCEPT": folder / "teddy.safetensors", "IMAGES": folder / "picture.png", "OUT": out,
              "PROMPTS": folder / "prompts.txt", "NEW": out / name}

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


def check(out, reports, pictures):
    """Files with a final name are whole, what was reported is there, pictures: {path: content} as before."""
    for path in out.rglob("[!.]*.*"):
        if path.suffix == ".csv":
            assert path.read_text().endswith("\n") and len({len(row) for row in csv.reader(open(path))}) == 1
        elif path.suffix in READ:
            READ[path.suffix](path)
    for report in reports:                                  # the last line may be cut off
        reported = [word.strip(":,") for line in report.split("\n")[:-1] for word in line.split()
                    if word.startswith(str(out))]
        assert all(os.path.exists(path) for path in reported)
    for path in out.glob("[0-9]*.png"):
        pictures.setdefault(path, path.read_bytes())
    assert all(path.read_bytes() == content for path, content in pictures.items())


def stopped_runs(folder, script, stops, rng):
    """Run once to the end, to know how long it takes and what it writes; then stop it in all these ways."""
    out, start, pictures = folder / ("weights" if script == "covariance" else script), time.time(), {}
    process, _ = run(script, folder, "whole")
    process.join()
    seconds = time.time() - start
    assert process.exitcode == 0
    sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file() and path.stat().st_size]
    for k, stop in enumerate(stops):
        largest = rng.choice(sizes) - 1 if stop == "full" else resource.RLIM_INFINITY
        names = [f"{k}a", f"{k}b"] if stop == "two" else [f"{k}"]
        runs = [run(script, folder, name, largest) for name in names]
        if stop != "full":
            time.sleep(rng.uniform(0, seconds))
            os.kill(runs[0][0].pid, signal.SIGTERM if stop == "term" else signal.SIGKILL)
        for process, _ in runs:
            process.join()
        reports = [report.read() for _, report in runs]
        # 0 where the largest files are the weights', which were written before
        expected = (2, 0) if script == "covariance" else (2,)
        assert stop != "full" or process.exitcode in expected, reports
        check(out, reports, pictures)


@pytest.mark.parametrize("script", ["sample", "train", "export"])
def test_a_stopped_run_leaves_whole_files(script, folder):
    stopped_runs(folder, script, ["kill", "full"], random.Random(0))


@pytest.mark.slow
@pytest.mark.parametrize("script", COMMANDS)
def test_a_hundred_stopped_runs_leave_whole_files(script, folder):
    stopped_runs(folder, script, ["kill", "term", "full", "two"] * 5, random.Random(1))
