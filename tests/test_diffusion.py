"""Schedule and samplers equal diffusers', made from the scheduler's file that is published with SD v1-5."""

import diffusers
import pytest
import torch

from diffusion import SAMPLERS, Schedule, ddim_timesteps, dpm_timesteps, guided
from models import PUBLISHED

pytestmark = pytest.mark.filterwarnings("ignore:__array__")  # the reference's use of numpy
TIMESTEPS = {"ddim": ddim_timesteps, "dpm++": dpm_timesteps}
MIXING = torch.randn(4, 4, generator=torch.Generator().manual_seed(7)) * 0.3


def network(z, t):
    """The best guess for standard normal images, and something that mixes the channels and grows with t."""
    sigma = (1 - Schedule.sd_v1().alphas_cumprod[t]).sqrt()
    return sigma * z + 0.1 * torch.tanh(torch.einsum("ij,bjhw->bihw", MIXING, z)) * (1 + t / 1000)


def reference(name="ddim", **changes):
    scheduler = {"ddim": diffusers.DDIMScheduler, "dpm++": diffusers.DPMSolverMultistepScheduler}[name]
    return scheduler.from_config(PUBLISHED["configs_v1-5"]["scheduler"] | changes)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_number_of_steps_takes_the_timesteps_of_the_reference(name):
    scheduler = reference(name)
    for steps in (*range(1, 101), 333, 999):
        scheduler.set_timesteps(steps)
        assert TIMESTEPS[name](steps) == scheduler.timesteps.tolist(), steps


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 10, 20, 30, 50])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_equals_the_reference(name, steps, prediction_type):
    scheduler, schedule = reference(name, prediction_type=prediction_type), Schedule.sd_v1(prediction_type)
    scheduler.set_timesteps(steps)
    z = expected = torch.randn(2, 4, 8, 8)
    ours = SAMPLERS[name](lambda z, t: schedule.to_noise(network(z, t), z, t), z, schedule, steps)
    for t, z in zip(scheduler.timesteps, ours, strict=True):
        expected = scheduler.step(network(expected, int(t)), t, expected).prev_sample
        assert (z - expected).abs().max() < 1e-5


def test_noise_and_velocity_equal_the_reference():
    scheduler, schedule = reference(), Schedule.sd_v1()
    z, noise, t = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4), torch.tensor([0, 500, 999])
    torch.testing.assert_close(schedule.add_noise(z, noise, t), scheduler.add_noise(z, noise, t))
    assert schedule.target(z, noise, t) is noise
    velocity = Schedule.sd_v1("v_prediction").target(z, noise, t)
    torch.testing.assert_close(velocity, scheduler.get_velocity(z, noise, t))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_guidance_leads_away_from_the_prediction_without_text(model, prediction_type):
    schedule, unet = Schedule.sd_v1(prediction_type), model.unet
    z, e = torch.randn(2, 4, 8, 8), torch.randn(4, 7, 48)  # two prompts without text first
    eps = [schedule.to_noise(unet(z, 500, unet.keys(part), unet.values(part)), z, 500) for part in e.chunk(2)]
    result = guided(unet, schedule, unet.keys(e), unet.values(e), 7.5)(z, 500)
    torch.testing.assert_close(result, eps[0] + 7.5 * (eps[1] - eps[0]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="keys of 6 prompts, not 4"):
        guided(unet, schedule, unet.keys(e), unet.values(e), 7.5)(torch.randn(3, 4, 8, 8), 500)
