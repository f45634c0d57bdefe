"""At the full size of Stable Diffusion v1: the scripts; the networks beside the reference."""

import gc
import multiprocessing
import subprocess
import sys

import pytest
import torch

import clip_text
import weights_loader
from conftest import build_reference
from models import ROOT, largest_difference, toy_model, write_vocabulary
from support import weight_names

LIMIT_GB = 9.0      # of each script's resident memory; measured: 6.4 to 6.9


def write_weights(folder, tokenizer_folder):
    """Random weights in the published layout, as float16 to spare the disk."""
    torch.manual_seed(0)
    tokenizer = clip_text.Tokenizer.load(tokenizer_folder, clip_text.SD_V1.max_length)
    weights_loader.save(toy_model(weight_names.SD_V1, tokenizer, "random"), folder, torch.float16)


def apart(function, *arguments):
    """The function's result in a new process: the peak of what it starts counts from this process's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def script(name, *arguments):
    """Run a script, see `apart`; prints and returns its peak resident memory in GB."""
    import resource  # Windows has none

    subprocess.run([sys.executable, str(ROOT / name), *map(str, arguments)], check=True)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    print(f"\n{name}: {usage.ru_utime + usage.ru_stime:.0f} s of the processor, peak {peak:.2f} GB")
    return peak


@pytest.mark.slow
def test_at_full_size_a_concept_is_trained_and_drawn_in_bounded_memory(tokenizer_folder, tmp_path):
    weights, out = tmp_path / "weights", tmp_path / "out"
    apart(write_weights, weights, tokenizer_folder)
    common = "--weights", weights, "--device", "cpu"
    apart(script, "covariance.py", *common, "--n", 256)
    peaks = [apart(script, "train.py", *common, "--images", ROOT / "examples" / "mug", "--super",
                   "teddy bear", "--steps", 2, "--batch", 1, "--preview", 0, "--out", out),
             apart(script, "sample.py", "a photo of a <mug>", *common, "--steps", 2, "--out",
                   out / "pictures", "--concept", out / "mug.safetensors")]
    assert (out / "mug.safetensors").stat().st_size <= 36_000
    assert max(peaks) < LIMIT_GB


@torch.no_grad()
@pytest.mark.slow
def test_at_full_size_all_networks_equal_the_reference(tmp_path):
    write_vocabulary(tmp_path / "tokenizer")
    text_config = clip_text.TextConfig(vocab_size=514)  # full width and depth, a short word list
    theirs = build_reference(tmp_path, weight_names.SD_V1 | {"text_encoder": text_config})
    ids, z, t, e, image = (torch.randint(0, text_config.vocab_size, (1, 77)), torch.randn(1, 4, 16, 16),
                           torch.tensor([981]), torch.randn(1, 77, 768), torch.rand(1, 3, 128, 128) * 2 - 1)
    expected = [theirs.text_encoder(ids).last_hidden_state, theirs.unet(z, t, e).sample,
                theirs.vae.encode(image).latent_dist.mean, theirs.vae.decode(z).sample]
    del theirs
    gc.collect()  # two U-Nets would not fit beside each other everywhere
    ours = weights_loader.load(tmp_path)
    text, unet, vae = ours.text_encoder, ours.unet, ours.vae
    found = [text(text.embed(ids)), unet(z, t, unet.keys(e), unet.values(e)), vae.moments(image)[0],
             vae.decode(z * vae.config.scaling_factor)]
    for name, result, value in zip(("text", "U-Net", "encoder", "decoder"), found, expected, strict=True):
        difference = largest_difference(result, value)
        print(f"{name}: largest difference {difference:.1e}, largest value {value.abs().max():.2f}")
        assert value.abs().max() > 0.1 and difference < 1e-4, name
