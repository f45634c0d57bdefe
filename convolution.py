"""3x3 convolutions with frozen weights on a CPU, in about half of torch's time: Winograd's algorithm.

With torch's convolutions they are nearly half of a step's time. F(4x4, 3x3) computes a tile of 4x4 outputs with
36 products per pair of channels instead of 144 (Lavin and Gray, "Fast Algorithms for Convolutional Neural
Networks", arXiv 1509.09308). It costs passes over memory, so that small layers are left to torch.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)  # with infinity; half the rounding errors of 0, 1, -1, 2, -2
TILES, CHANNELS = 64, 128  # the least 4x4 tiles and channels for which this is the faster way
BAND = 256  # tiles worked on at a time


def matrices(points=POINTS):
    """(36, 36), (36, 9), (16, 36) float32: for the 6x6 inputs of a tile, the 3x3 weights and the 36 products.

    To multiply two polynomials, multiply their values: the product, of degree 5, is known from its values at 5
    points and its highest coefficient, its "value at infinity". That, transposed, takes the 6 coefficients of
    the product to 4 numbers: a convolution with the 3 weights. The Kronecker product does both directions of
    the image at once.
    """
    rest = [[b for b in points if b != a] for a in points]
    inputs = [np.append(np.poly(others)[::-1], 0) for others in rest] + [np.poly(points)[::-1]]
    weights = [np.power(a, range(3)) / np.prod(np.subtract(a, others)) for a, others in zip(points, rest)]
    outputs = [[a ** k for a in points] + [float(k == 3)] for k in range(4)]
    three = [np.array(m) for m in (inputs, [*weights, (0, 0, 1)], outputs)]
    return [torch.tensor(np.kron(m, m), dtype=torch.float32) for m in three]


INPUTS, WEIGHTS, OUTPUTS = matrices()


def winograd(x, weight, turned=False):
    """x (B, c_in, H, W) with H and W multiples of 4, weight (c_out, c_in, 3, 3) -> (B, c_out, H, W), padded by 1.

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
        band = windows[:, top:top + rows].permute(0, 1, 2, 4, 5, 3).reshape(-1, 36, c)  # (n, 36, c) of n tiles
        products = torch.bmm((INPUTS @ band).transpose(0, 1), filters).transpose(0, 1)  # (n, 36, width)
        y[:, top:top + rows] = (OUTPUTS @ products).view(B, -1, w, 4, 4, width).transpose(2, 3)
    return y.view(B, H, W, width).permute(0, 3, 1, 2)


class Winograd(torch.autograd.Function):
    """winograd(x, weight), with a gradient for x only."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return winograd(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        return winograd(gradient, *ctx.saved_tensors, turned=True), None


class Conv3x3(nn.Conv2d):
    """nn.Conv2d, 3x3 and padded by 1: x (B, c_in, H, W) -> (B, c_out, H / stride, W / stride)."""

    def __init__(self, c_in, c_out, stride=1):
        super().__init__(c_in, c_out, 3, stride, padding=1)

    def forward(self, x):
        B, c, H, W = x.shape
        large = B * H * W >= 16 * TILES and min(c, self.out_channels) >= CHANNELS
        if (not large or H % 4 or W % 4 or self.stride != (1, 1) or x.device.type != "cpu"
                or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
                or self.weight.requires_grad and torch.is_grad_enabled()):
            return super().forward(x)
        return Winograd.apply(x, self.weight) + self.bias[:, None, None]
