"""Whatever stops a run, no file has a final name and half its content, and nothing reported is gone."""

import multiprocessing
import os
import random
import resource
import runpy
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from models import ROOT, noise

COMMANDS = {
    "sample": ["a <teddy>", "--concept", "CONCEPT", "--steps", 1, "--n", 12, "--out", "OUT"],
    "train": ["--images", "IMAGES", "--super", "teddy bear", "--token", "teddy", "--steps", 6, "--batch", 2,
              "--preview", 3, "--checkpoint", 1, "--out", "OUT"],
    "export": ["--concept", "CONCEPT", "--out", "NEW"]}     # replaces nothing
READ = {".png": lambda path: Image.open(path).load(), ".safetensors": load_file, ".pt": torch.load,
        ".csv": lambda path: path.read_text().index("\n", -1)}      # its last line is whole


def run(script, places, largest=resource.RLIM_INFINITY):
    """Start a script in a process of its own, whose files cannot grow beyond `largest` bytes."""
    reading, writing = os.pipe()                            # a pipe has no size

    def child():
        torch.set_num_threads(1)                            # threads do not survive a fork
        sys.argv = [script, *(str(places.get(word, word)) for word in COMMANDS[script]),
                    "--weights", str(places["WEIGHTS"])]
        sys.stderr, sys.stdout = open(os.devnull, "w"), os.fdopen(writing, "w", buffering=1)
        sys.dont_write_bytecode = True                      # Python keeps a half that it wrote on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    os.close(writing)
    return process, os.fdopen(reading)


def check(out, report, pictures):
    """Files with a final name are whole, what was reported is there, pictures: {path: content} as before."""
    for path in out.rglob("[!.]*.*"):
        READ[path.suffix](path)
    reported = [word.strip(":,") for line in report.split("\n")[:-1] for word in line.split()
                if word.startswith(str(out))]               # the last line may be cut off
    assert all(os.path.exists(path) for path in reported)
    for path in out.glob("[0-9]*.png"):
        pictures.setdefault(path, path.read_bytes())
    assert all(path.read_bytes() == content for path, content in pictures.items())


@pytest.mark.parametrize("script", COMMANDS)
@pytest.mark.parametrize("kills", [2, pytest.param(34, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_or_has_no_room_leaves_whole_files(
        script, kills, weights, concept_files, tmp_path):
    """Run once, for the time and the sizes; then kill it often, and let each kind of file find no room."""
    out, start, pictures, rng = tmp_path / script, time.time(), {}, random.Random(0)
    places = {"CONCEPT": concept_files["teddy"], "IMAGES": tmp_path / "picture.png", "OUT": out,
              "NEW": out / "whole", "WEIGHTS": weights}
    noise(16, 16).save(places["IMAGES"])
    process, _ = run(script, places)
    process.join()
    seconds = time.time() - start
    assert process.exitcode == 0
    sizes = {path.suffix: path.stat().st_size for path in out.rglob("*.*")}
    for k, largest in enumerate([resource.RLIM_INFINITY] * kills + [size - 1 for size in sizes.values()]):
        places["NEW"] = out / str(k)
        process, report = run(script, places, largest)
        if largest == resource.RLIM_INFINITY:
            time.sleep(rng.uniform(0, seconds))
            process.kill()
        process.join()
        assert largest == resource.RLIM_INFINITY or process.exitcode == 2
        check(out, report.read(), pictures)
