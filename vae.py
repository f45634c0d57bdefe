"""The KL autoencoder of Stable Diffusion v1: images to latents at an eighth of the size, and back.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752. Parameters
are named as in the published diffusers-layout files (attention: to_q, to_k, to_v, to_out.0).
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)  # CompVis DiagonalGaussianDistribution: keeps exp(logvar) finite


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a KL autoencoder; one entry of block_out_channels per level, full resolution first."""
    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215


SD_V1 = VAEConfig()


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, added to the input: (B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.conv_shortcut(x)


class Attention(nn.Module):
    """Self-attention with one head over all positions, added to the input: (B, c, H, W) -> the same shape."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        B, c, H, W = x.shape
        h = self.group_norm(x).permute(0, 2, 3, 1).reshape(B, 1, H * W, c)  # one head
        h = self.to_out(F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + h.reshape(B, H, W, c).permute(0, 3, 1, 2)


def resample(channels: int, up: bool) -> nn.Sequential:
    """Doubles height and width by nearest neighbour, then a 3x3 convolution; or a convolution that halves
    them, with zeros at the right and bottom only, unlike in the U-Net."""
    if up:
        size, conv = nn.Upsample(scale_factor=2.0), nn.Conv2d(channels, channels, 3, padding=1)
    else:
        size, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)
    return nn.Sequential(OrderedDict(size=size, conv=conv))


class Middle(nn.Module):
    """resnet, attention, resnet at the lowest resolution."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def levels(widths: tuple, layers: int, groups: int, name: str) -> nn.Sequential:
    """For every width `layers` resnets and, but for the last, one `resample`, by the published name:
    downsamplers or upsamplers."""
    levels = nn.Sequential()
    for c_in, c_out in zip((widths[0], *widths), widths):
        inputs = [c_in] + [c_out] * (layers - 1)
        resnets = nn.Sequential(*[ResnetBlock(c, c_out, groups) for c in inputs])
        levels.append(nn.Sequential(OrderedDict(resnets=resnets)))
        if len(levels) < len(widths):
            levels[-1].add_module(name, nn.Sequential(resample(c_out, up=name == "upsamplers")))
    return levels


def encoder(config: VAEConfig) -> nn.Sequential:
    """Images (B, 3, H, W) -> (B, 2 * latent channels, H / factor, W / factor)."""
    widths, groups = config.block_out_channels, config.norm_num_groups
    return nn.Sequential(OrderedDict(
        conv_in=nn.Conv2d(config.in_channels, widths[0], 3, padding=1),
        down_blocks=levels(widths, config.layers_per_block, groups, "downsamplers"),
        mid_block=Middle(widths[-1], groups),
        conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=NORM_EPS),
        conv_act=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)))


def decoder(config: VAEConfig) -> nn.Sequential:
    """Latents (B, c, h, w) -> images (B, 3, h * factor, w * factor); every level has one resnet more."""
    widths, groups = config.block_out_channels[::-1], config.norm_num_groups
    return nn.Sequential(OrderedDict(
        conv_in=nn.Conv2d(config.latent_channels, widths[0], 3, padding=1),
        mid_block=Middle(widths[0], groups),
        up_blocks=levels(widths, config.layers_per_block + 1, groups, "upsamplers"),
        conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=NORM_EPS),
        conv_act=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], config.in_channels, 3, padding=1)))


class VAE(nn.Module):
    """The autoencoder. Latents that leave encode() and enter decode() carry the scaling factor."""

    def __init__(self, config: VAEConfig = SD_V1):
        super().__init__()
        self.config = config
        self.encoder = encoder(config)
        self.decoder = decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    @property
    def factor(self) -> int:
        """Pixels per latent position along one side: 8 for SD v1."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> mean and log-variance (B, c, H/f, W/f) of unscaled latents."""
        H, W = images.shape[-2:]
        if H % self.factor or W % self.factor or not H or not W:
            raise ValueError(f"image sides must be positive multiples of {self.factor}, not {H}x{W}")
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents (B, c, H/f, W/f).

        A sample of the posterior for standard normal `noise` of the latents' shape, its mean without.
        """
        mean, logvar = self.moments(images)
        z = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        return z * self.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents (B, c, h, w) -> images (B, 3, h*f, w*f), about [-1, 1] and not clamped."""
        return self.decoder(self.post_quant_conv(z / self.config.scaling_factor))
