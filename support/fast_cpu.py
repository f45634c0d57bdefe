"""Every trick that makes the networks faster on a CPU, switched on by one call on a loaded model.

    model = load("sd15")
    fast_cpu.enable(model)

Layers get another `forward`; parameters, their names and hooks stay. Results differ by rounding only. On
another device, and where a trick does not apply, the layers do what torch does.

    3x3 convolutions  Winograd's algorithm, in about half the time
    half precision    in float32 where the processor has no instructions for it: 10 to 100 times faster
    GEGLU             two products instead of one, so that each half lies together in memory
    memory            convolutions' weights lie channels last, as their inputs; the U-Net keeps freed memory
"""

import ctypes
import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unet
from weights_loader import Model

HALF_IS_SLOW = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)  # with infinity; half the rounding errors of 0, 1, -1, 2, -2
TILES, CHANNELS = 64, 128  # the least 4x4 tiles and channels for which Winograd's algorithm is the faster way
BAND = 256  # tiles worked on at a time


def enable(model: Model) -> None:
    """Make a model's networks faster, if it is on a CPU, and let this process keep the memory it frees."""
    if model.device.type != "cpu":
        return
    for network in (model.unet, model.vae, model.text_encoder):
        for module in network.modules():
            module.__class__ = FASTER.get(type(module), type(module))
        network.to(memory_format=torch.channels_last)
    keep_freed_memory(model.vae)  # not before: what the line above frees would lie between the weights


def keep_freed_memory(vae: nn.Module) -> None:
    """Let this process keep what it frees from now on, if its C library is glibc.

    By default, glibc gives large blocks back to the system at once. To get them anew, page by page, takes
    about 5 % of the time of a step of Stable Diffusion. The blocks of the VAE's decoder grow from level to
    level and do not fit into what was freed: there, all that is free is given back.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2 ** 30)
        libc.mallopt(M_TRIM_THRESHOLD, -1)

        def give_back(*_) -> None:
            libc.malloc_trim(0)
        for module in (vae.decoder, *vae.decoder.up_blocks):
            module.register_forward_pre_hook(give_back)
            module.register_forward_hook(give_back)


# ------------------------------------------------------------------------------------------------- the layers

def product(function: Callable, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """function(x, weight, bias); half precision is computed in float32 and then rounded if HALF_IS_SLOW."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if not HALF_IS_SLOW or x.device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return function(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        return function(x.float(), weight.float(), None if bias is None else bias.float()).to(dtype)


class FastLinear(nn.Linear):
    """nn.Linear: x (..., c_in) -> (..., c_out)."""

    def forward(self, x: Tensor) -> Tensor:
        return product(F.linear, x, self.weight, self.bias)


class FastGEGLU(unet.GEGLU):
    """unet.GEGLU: x (B, N, width) -> (B, N, inner)."""

    def forward(self, x: Tensor) -> Tensor:
        return product(self.halves, x, self.proj.weight, self.proj.bias)

    def halves(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        value, gate = (F.linear(x, *half) for half in zip(weight.chunk(2), bias.chunk(2)))
        return value * F.gelu(gate)


class FastConv2d(nn.Conv2d):
    """nn.Conv2d: x (B, c_in, H, W) -> (B, c_out, H / stride, W / stride)."""

    def forward(self, x: Tensor) -> Tensor:
        return product(self.convolve, x, self.weight, self.bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        B, c, H, W = x.shape
        plain = (self.kernel_size, self.stride, self.padding) == ((3, 3), (1, 1), (1, 1)) and bias is not None
        large = B * H * W >= 16 * TILES and min(c, self.out_channels) >= CHANNELS and not H % 4 and not W % 4
        if (plain and large and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
                and not torch.is_autocast_enabled("cpu")
                and not (weight.requires_grad and torch.is_grad_enabled())):
            return Winograd.apply(x, weight) + bias[:, None, None]
        return self._conv_forward(x, weight, bias)


FASTER = {nn.Linear: FastLinear, nn.Conv2d: FastConv2d, unet.GEGLU: FastGEGLU}


# --------------------------------------------------------------------------------------- Winograd's algorithm

def matrices(points: tuple = POINTS) -> list[Tensor]:
    """(36, 36), (36, 9), (16, 36) float32: for the 6x6 inputs of a tile, the 3x3 weights and the 36 products.

    This is F(4x4, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv
    1509.09308: 4x4 outputs take 36 products per pair of channels instead of 144.

    To multiply two polynomials, multiply their values: the product, of degree 5, is known from its values at
    5 points and its highest coefficient, its "value at infinity". That, transposed, takes the 6 coefficients
    of the product to 4 numbers: a convolution with the 3 weights. The Kronecker product does both directions
    of the image at once.
    """
    rest = [[b for b in points if b != a] for a in points]
    inputs = [np.append(np.poly(others)[::-1], 0) for others in rest] + [np.poly(points)[::-1]]
    weights = [np.power(a, range(3)) / np.prod(np.subtract(a, others)) for a, others in zip(points, rest)]
    outputs = [[a ** k for a in points] + [float(k == 3)] for k in range(4)]
    three = [np.array(m) for m in (inputs, [*weights, (0, 0, 1)], outputs)]
    return [torch.tensor(np.kron(m, m), dtype=torch.float32) for m in three]


INPUTS, WEIGHTS, OUTPUTS = matrices()


def winograd(x: Tensor, weight: Tensor, turned: bool = False) -> Tensor:
    """x (B, c_in, H, W), weight (c_out, c_in, 3, 3) -> (B, c_out, H, W), padded by 1; H and W multiples of 4.

    With `turned` x is the gradient of such an output, and the result that of the input: every 3x3 turned by
    180 degrees, the channels exchanged.
    """
    B, c, H, W = x.shape
    h, w, width = H // 4, W // 4, weight.shape[1] if turned else weight.shape[0]
    filters = (WEIGHTS.flip(1) if turned else WEIGHTS) @ weight.permute(0, 2, 3, 1).flatten(1, 2)
    filters = filters.permute(1, 0, 2) if turned else filters.permute(1, 2, 0)  # (36, c, width)
    windows = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).unfold(1, 6, 4).unfold(2, 6, 4)
    y = x.new_empty(B, h, 4, w, 4, width)
    rows = max(1, BAND // (B * w))
    for top in range(0, h, rows):
        band = windows[:, top:top + rows].permute(0, 1, 2, 4, 5, 3).reshape(-1, 36, c)  # (n, 36, c): n tiles
        products = torch.bmm((INPUTS @ band).transpose(0, 1), filters).transpose(0, 1)  # (n, 36, width)
        y[:, top:top + rows] = (OUTPUTS @ products).view(B, -1, w, 4, 4, width).transpose(2, 3)
    return y.view(B, H, W, width).permute(0, 3, 1, 2)


class Winograd(torch.autograd.Function):
    """winograd(x, weight), with a gradient for x only."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return winograd(x, weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return winograd(gradient, *ctx.saved_tensors, turned=True), None
