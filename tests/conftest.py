"""Fixtures: CLIP's vocabulary, and a small reference model written by diffusers and transformers."""

import gzip
import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before diffusers and transformers are imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is: pytest-xdist already uses every processor

import pytest
import torch

import weights_loader
from models import REFERENCE, write_concept, write_vocabulary, write_weights
from support import weight_names


def pytest_addoption(parser):
    parser.addoption("--weights", metavar="PATH", help="Stable Diffusion v1-4 or another v1, for -m weights")


@pytest.fixture(scope="session")
def weights_path(request):
    """The path given with --weights; without it the test is skipped."""
    path = request.config.getoption("--weights")
    if path is None:
        pytest.skip("needs published weights: python -m pytest -m weights --weights=PATH")
    return path


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A folder with the published vocab.json and merges.txt, from the list that OpenAI's code carries."""
    package = importlib.util.find_spec("clip")
    path = Path(package.origin if package else __file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    if not path.is_file():
        pytest.skip("the package clip-anytorch, which carries CLIP's vocabulary, is not installed")
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    folder = tmp_path_factory.mktemp("tokenizer")
    write_vocabulary(folder, merges=lines[1:48895])  # the list goes on, CLIP stops there
    return folder


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The reference's networks with random weights, and the folder into which it has saved them."""
    folder = tmp_path_factory.mktemp("reference")
    write_vocabulary(folder / "tokenizer")
    return build_reference(folder, REFERENCE)


@pytest.fixture(scope="session")
def model(reference):
    """The reference's weights in our networks, by way of the folder and the loader."""
    return weights_loader.load(reference.folder)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """The folder of a tiny_model with its covariance, only to be read."""
    return write_weights(tmp_path_factory.mktemp("tiny") / "weights", captions=200)


@pytest.fixture(scope="session")
def concept_files(weights, tmp_path_factory):
    """Concepts of that model: with locked keys, with trained keys, and of textual inversion."""
    folder = tmp_path_factory.mktemp("concepts")
    return {"teddy": write_concept(weights, folder / "teddy.safetensors"),
            "cat": write_concept(weights, folder / "cat.safetensors", "cat", lock="trained", seed=1),
            "hat": write_concept(weights, folder / "hat.safetensors", "hat", lock="none", seed=2)}


def build_reference(folder, configs):
    """Random networks of the reference, saved by it into the folder; returns them and the folder."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    public = {part: weight_names.write_config(part, config) for part, config in configs.items()}
    reference = SimpleNamespace(
        folder=folder, unet=UNet2DConditionModel.from_config(public["unet"]),
        vae=AutoencoderKL.from_config(public["vae"]),
        text_encoder=CLIPTextModel(CLIPTextConfig.from_dict(public["text_encoder"])))
    for name in configs:
        network = getattr(reference, name)
        network.eval().requires_grad_(False)
        for key, parameter in network.named_parameters():   # no two tensors can be confused unseen:
            if parameter.ndim == 1:                         # norms and biases are random, attention is sharp
                parameter += 0.2 * torch.randn_like(parameter)
            elif any(part in key for part in ("to_q", "to_k", "q_proj", "k_proj")):
                parameter *= 2
        network.save_pretrained(folder / name)
    PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                  skip_prk_steps=True).save_pretrained(folder / "scheduler")
    return reference
