"""Pretraining from nothing, every stage for a moment; the result loads and draws like any other model."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import drawing
import weights_loader

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folders of a finished smoke run."""
    folder = tmp_path_factory.mktemp("pretrain")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, ROOT / "tiny" / "pretrain.py", "--smoke", "--workdir", folder / "work",
               "--out", folder / "weights"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_every_stage_leaves_its_log_and_the_published_layout(smoke):
    for name in ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
                 "text_encoder/model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt",
                 "scheduler/scheduler_config.json", "clip/model.safetensors", "covariance.safetensors"):
        assert (smoke / "weights" / name).is_file(), name
    for name in ("vae.csv", "text2image.csv"):
        assert len((smoke / "work" / name).read_text().splitlines()) >= 2


def test_the_result_loads_and_draws(smoke):
    model = weights_loader.load(str(smoke / "weights"))
    e = model.text_encoder(model.text_encoder.embed(model.tokenizer.encode(["", "a photo of a cat"])[0]))
    images = drawing.draw(model, model.unet.keys(e), model.unet.values(e), [0], (64, 64), steps=2)
    assert images.shape == (1, 3, 64, 64) and torch.isfinite(images).all()
