"""From text projections to pictures: start noise, the sampling loop, the decoder, PNG-ready images.

    latents = draw_latents(unet, schedule, keys, values, seeds, size=(64, 64), steps=30)
    images  = decode(vae, latents)                  # or both at once: draw(model, keys, values, seeds, ...)

The text enters only as the keys and values of the cross-attention layers, so the same loop draws the base
model and any personal concept, and costs the same for both.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from diffusion import SAMPLERS, guided, seeded_noise


def pick_device(name: str | None = None) -> str:
    """A device name that is present: the one asked for (ValueError if it is missing), or the best one."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is not None and not present[name]:
        raise ValueError(f"this machine, or this build of torch, has no {name} device: use --device cpu")
    return name or next(device for device in present if present[device])


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


def to_bytes(images: Tensor) -> np.ndarray:
    """Images (..., 3, H, W) in [0, 1] -> uint8 array (..., H, W, 3), as PIL.Image.fromarray takes one."""
    return (images * 255).round().to(torch.uint8).movedim(-3, -1).numpy()


def grid(images: Tensor, columns: int) -> Tensor:
    """Images (n, 3, H, W) -> one image (3, rows * H, columns * W), row by row; missing places are white."""
    n, c, H, W = images.shape
    rows = -(-n // columns)
    sheet = torch.ones(rows * columns, c, H, W)
    sheet[:n] = images
    return sheet.view(rows, columns, c, H, W).permute(2, 0, 3, 1, 4).reshape(c, rows * H, columns * W)
