"""Proof on the published weights of Stable Diffusion v1, which no machine of this project has.

    python -m pytest -m weights --weights=PATH        # a folder in the layout of diffusers, or one file

The first test needs v1-4 itself, the others any model of its family. See tests/reproduce_sd15.md for more.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import covariance
import diffusion
import perfusion
import weights_loader
from diffusion import SAMPLERS, guided

pytestmark = pytest.mark.weights
ASTRONAUT = "a photograph of an astronaut riding a horse"
# test_stable_diffusion_ddim in diffusers' nightly tests: blue, in the last three rows and columns
SLICE = torch.tensor([[.38019, .28647, .27321], [.40377, .38290, .35446], [.39218, .38165, .42239]])
START = torch.from_numpy(np.random.RandomState(0).standard_normal((1, 4, 64, 64))).float()   # its noise


@pytest.fixture(scope="module")
def model(weights_path):
    return weights_loader.load(weights_path)


@pytest.fixture(scope="module")
def picture(model):
    """The astronaut after 3 steps of DDIM with guidance 7.5, (1, 3, 512, 512)."""
    keys, values, _, _ = perfusion.condition(model, ["", ASTRONAUT], [])
    predict_noise = guided(model.unet, model.schedule, keys, values, 7.5)
    with torch.no_grad():
        *_, z = SAMPLERS["ddim"](predict_noise, START, model.schedule, 3)
    return diffusion.decode(model.vae, z)


def test_v1_4_draws_the_public_numbers_of_the_astronaut(picture):
    difference = (picture[0, -1, -3:, -3:] - SLICE).abs().max()
    assert difference < 1e-4, "these are the numbers of v1-4 in float32: other models have others"


@torch.no_grad()
def test_diffusers_draws_the_same_astronaut(weights_path, picture):
    if not Path(weights_path).is_dir():
        pytest.skip("diffusers reads a single file only with its configs from the network")
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(weights_path, safety_checker=None).to(torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    theirs = pipe(ASTRONAUT, latents=START, num_inference_steps=3, guidance_scale=7.5, output_type="pt")
    assert (picture - theirs.images).abs().max() < 1e-3


@torch.no_grad()
def test_the_gate_of_bear_opens_at_bear_in_first_and_in_second_place_and_nowhere_else(model):
    C = covariance.cached(model)
    assert 1e3 < torch.linalg.cond(C) < 1e4
    i_star = perfusion.super_encoding(model.text_encoder, model.tokenizer, "bear").double()
    d_star = covariance.inverse(C) @ i_star
    for prompt in ("a bear next to a mug on the beach", "a mug next to a bear on the beach"):
        ids, _ = model.tokenizer.encode([prompt])
        _, ratio = perfusion.split(model.text_encoder(model.text_encoder.embed(ids)).double(),
                                  i_star[None], d_star[None])
        gates = perfusion.gate(ratio, perfusion.DRAWING_BETA["local"], perfusion.DRAWING_TAU)[0, :, 0]
        bear, = model.tokenizer.find(prompt, "bear")[0]
        end = ids[0].tolist().index(model.tokenizer.end)
        print(prompt, [round(g, 2) for g in gates[1:end].tolist()])
        assert gates[bear] > 0.5 and (gates[1:end] > 0.5).sum() == 1
