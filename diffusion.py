"""Stable Diffusion v1's noise schedule, training target, samplers and guidance; and the way to pictures.

    latents = draw_latents(unet, schedule, keys, values, seeds, size=(64, 64), steps=30)
    images  = decode(vae, latents)                  # or both at once: draw(model, keys, values, seeds, ...)

The text enters only as the keys and values of the cross-attention layers, so the same loop draws the base
model and any personal concept, and costs the same for both.

Notation: z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise, with abar_t the cumulative product of Ho et al.,
"Denoising Diffusion Probabilistic Models", arXiv 2006.11239. Timesteps are whole numbers from 0 to 999.

A sampler is a generator that yields the latents after each step; the last are the result. Its steps are those
of diffusers' scheduler of that name, made from the scheduler_config.json published with SD v1: DDIM begins at
981 (50 steps) and ends at abar_0, DPM-Solver++ begins at 999 and ends at abar = 1. predict_noise takes
latents z (B, c, h, w) and an int t, and returns the noise in z.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012  # CompVis v1-inference.yaml
PredictNoise = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class Schedule:
    """How much noise each timestep holds, and what the network is trained to output.

    alphas_cumprod: abar (1000,) float32. prediction_type: "epsilon" (the noise) or "v_prediction" (Salimans
    and Ho, arXiv 2202.00512: v = sqrt(abar) noise - sqrt(1 - abar) z_0).
    """
    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"

    def __post_init__(self):
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"the prediction type is epsilon or v_prediction, not {self.prediction_type!r}")

    @classmethod
    def sd_v1(cls, prediction_type: str = "epsilon") -> "Schedule":
        """The schedule of SD v1: betas whose square roots are evenly spaced."""
        betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2
        return cls((1 - betas).cumprod(0).float(), prediction_type)

    def add_noise(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Clean latents z and noise (B, c, h, w), timesteps t (B,) -> z_t (B, c, h, w)."""
        signal, sigma = self._coefficients(z, t)
        return signal * z + sigma * noise

    def target(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should output for add_noise(z, noise, t): (B, c, h, w)."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._coefficients(z, t)
        return signal * noise - sigma * z

    def to_noise(self, output: Tensor, z_t: Tensor, t: Tensor | int) -> Tensor:
        """The network's output at z_t (B, c, h, w), t (B,) or an int -> the noise that it predicts."""
        if self.prediction_type == "epsilon":
            return output
        signal, sigma = self._coefficients(z_t, t)
        return signal * output + sigma * z_t

    def _coefficients(self, z: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), shaped to multiply z."""
        abar = self.alphas_cumprod.to(z.device)[torch.as_tensor(t, device=z.device)].reshape(-1, 1, 1, 1)
        return abar.sqrt().to(z.dtype), (1 - abar).sqrt().to(z.dtype)


def ddim_timesteps(steps: int) -> list[int]:
    """Leading spacing: `steps` timesteps, 1000 // steps apart, the last one 1; 50 give 981, 961, ..., 1."""
    _check_steps(steps)
    return [i * (NUM_TIMESTEPS // steps) + 1 for i in reversed(range(steps))]


def dpm_timesteps(steps: int) -> list[int]:
    """Even spacing from 999 to 0, without the 0: 20 steps give 999, 949, 899, ..., 50."""
    _check_steps(steps)
    stride = (NUM_TIMESTEPS - 1) / steps  # divided first, as numpy's linspace does: halves are rounded alike
    return [round(i * stride) for i in range(steps, 0, -1)]


def ddim_step(z: Tensor, eps: Tensor, a: float, a_next: float) -> Tensor:
    """DDIM's eq. 12 (arXiv 2010.02502) without random noise: z at abar = a -> z at abar = a_next."""
    z_0 = (z - math.sqrt(1 - a) * eps) / math.sqrt(a)
    return math.sqrt(a_next) * z_0 + math.sqrt(1 - a_next) * eps


def ddim(predict_noise: PredictNoise, z: Tensor, schedule: Schedule, steps: int) -> Iterator[Tensor]:
    """DDIM (Song et al., arXiv 2010.02502) from noise z (B, c, h, w); yields z after each of the steps."""
    abar = schedule.alphas_cumprod.double().tolist()
    for t in ddim_timesteps(steps):
        z = ddim_step(z, predict_noise(z, t), abar[t], abar[max(t - NUM_TIMESTEPS // steps, 0)])
        yield z


def dpm_solver_pp(predict_noise: PredictNoise, z: Tensor, schedule: Schedule, steps: int) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2) from noise z (B, c, h, w); yields as ddim.

    The first and the last step are of first order; the last one leaves no noise, it yields z_0 itself.
    """
    abar = schedule.alphas_cumprod.double().tolist()
    times = dpm_timesteps(steps)
    alpha = [*(math.sqrt(abar[t]) for t in times), 1.0]
    sigma = [*(math.sqrt(1 - abar[t]) for t in times), 0.0]
    lam = [math.log(a / s) if s else math.inf for a, s in zip(alpha, sigma)]  # half the log signal-to-noise
    z_0_before = None
    for i, t in enumerate(times):
        z_0 = (z - sigma[i] * predict_noise(z, t)) / alpha[i]
        h, D = lam[i + 1] - lam[i], z_0
        if 0 < i < steps - 1:
            r = (lam[i] - lam[i - 1]) / h
            D = z_0 + (z_0 - z_0_before) / (2 * r)
        z = sigma[i + 1] / sigma[i] * z - alpha[i + 1] * math.expm1(-h) * D
        z_0_before = z_0
        yield z


SAMPLERS = {"ddim": ddim, "dpm++": dpm_solver_pp}


def guided(unet: nn.Module, schedule: Schedule, keys: list[Tensor], values: list[Tensor],
           guidance: float) -> PredictNoise:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): a predict_noise for the samplers.

    keys, values: per layer (2n, T, width), the n empty (or negative) prompts first; every step calls the
    U-Net once with the n latents twice. The arithmetic keeps the latents' dtype; the U-Net runs in the keys'.
    """
    def predict_noise(z: Tensor, t: int) -> Tensor:
        if len(keys[0]) != 2 * len(z):
            raise ValueError(f"guidance of {len(z)} latents takes keys of {2 * len(z)} prompts, "
                             f"not {len(keys[0])}")
        twice = torch.cat([z, z])
        output = unet(twice.to(keys[0].dtype), t, keys, values).to(z.dtype)
        without, with_text = schedule.to_noise(output, twice, t).chunk(2)
        return without + guidance * (with_text - without)
    return predict_noise


def seeded_noise(seed: int, shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise (1, c, h, w) for a shape (c, h, w), drawn on the CPU: equal on every device."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def _check_steps(steps: int) -> None:
    if not 1 <= steps < NUM_TIMESTEPS:
        raise ValueError(f"the number of sampling steps must be 1 to {NUM_TIMESTEPS - 1}, not {steps}")


# ------------------------------------------------------------------------ from keys and values to pictures

def paired(tensors: list[Tensor], n: int) -> list[Tensor]:
    """Keys or values of (empty prompt, prompt), each layer (2, T, w) -> (2n, T, w) for n pictures."""
    return [t if len(t) == 2 * n else t.repeat_interleave(n, dim=0) for t in tensors]


@torch.no_grad()
def draw_latents(unet, schedule, keys: list[Tensor], values: list[Tensor], seeds: Sequence[int],
                 size: tuple[int, int], steps: int = 30, guidance: float = 7.5, sampler: str = "ddim",
                 on_step: Callable | None = None) -> Tensor:
    """Sample one latent per seed.

    keys, values: per layer (2, T, w) = [empty or negative prompt, prompt], or (2n, T, w) = [n of the first,
    n of the second]. seeds: n integers; picture k depends on seeds[k] alone (up to rounding when n changes).
    size: height and width in latent pixels. on_step(z) is called after every step.
    Returns scaled latents (n, c, height, width), float32. Raises ValueError when a step is not finite.
    """
    device, n = keys[0].device, len(seeds)
    z = torch.cat([seeded_noise(seed, (unet.config.in_channels, *size)) for seed in seeds]).to(device)
    predict_noise = guided(unet, schedule, paired(keys, n), paired(values, n), guidance)
    for z in SAMPLERS[sampler](predict_noise, z, schedule, steps):
        if not torch.isfinite(z).all():
            raise ValueError("the U-Net returned NaN or infinity: try another --precision or --device")
        if on_step is not None:
            on_step(z)
    return z


@torch.no_grad()
def decode(vae, latents: Tensor) -> Tensor:
    """Scaled latents (n, c, h, w) -> images (n, 3, H, W) in [0, 1], float32 on the CPU.

    One at a time, to save memory. A decoder in fp16 can overflow (SD v1's does, on some pictures): it is then
    switched to float32, and stays so.
    """
    images = []
    for latent in latents.split(1):
        image = vae.decode(latent.to(next(vae.parameters()).dtype))
        if not torch.isfinite(image).all():
            image = vae.float().decode(latent.float())
            if not torch.isfinite(image).all():
                raise ValueError("the VAE decoded a picture to NaN or infinity")
        images.append((image.float() / 2 + 0.5).clamp(0, 1).cpu())
    return torch.cat(images)


def draw(model, keys: list[Tensor], values: list[Tensor], seeds: Sequence[int], size: tuple[int, int],
         steps: int = 30, guidance: float = 7.5, sampler: str = "ddim",
         on_step: Callable | None = None) -> Tensor:
    """draw_latents, then decode, with the networks of a loaded model; size is (height, width) in pixels."""
    latent_size = size[0] // model.vae.factor, size[1] // model.vae.factor
    latents = draw_latents(model.unet, model.schedule, keys, values, seeds, latent_size, steps, guidance,
                           sampler, on_step)
    return decode(model.vae, latents)


def to_bytes(images: Tensor):
    """Images (..., 3, H, W) in [0, 1] -> uint8 array (..., H, W, 3), as PIL.Image.fromarray takes it."""
    return (images * 255).round().to(torch.uint8).movedim(-3, -1).numpy()


def grid(images: Tensor, columns: int, gap: int = 4) -> Tensor:
    """Images (n, 3, H, W) -> one image of rows and columns with white gaps; missing places are white too.

    Its shape is (3, rows * (H + gap) - gap, columns * (W + gap) - gap).
    """
    n, c, H, W = images.shape
    rows = -(-n // columns)
    sheet = torch.ones(rows * columns, c, H + gap, W + gap)
    sheet[:n, :, :H, :W] = images
    sheet = sheet.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    return sheet[:, :-gap, :-gap]
