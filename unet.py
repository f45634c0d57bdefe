"""The U-Net of Stable Diffusion v1: predicts the noise in a latent image, guided by text.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752. The keys and
values of all cross-attention layers are arguments of the forward pass, so that a caller can edit them:

    keys, values = unet.keys(e), unet.values(e)    # lists, one (B, T, width) per layer, in order of execution
    noise_hat = unet(z, t, keys, values)

Parameters are named as in the published diffusers-layout files.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

RESNET_EPS = 1e-5
TRANSFORMER_NORM_EPS = 1e-6  # CompVis attention.Normalize; the resnets use the default of GroupNorm
MAX_PERIOD = 10000.0  # of the sinusoids that encode the timestep


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the U-Net; block_out_channels and cross_attention have one entry per level, finest first.

    The up blocks mirror the down blocks. attention_heads is what the public config calls attention_head_dim.
    sample_size: the side of the latents in training, or their (height, width).
    """
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    attention_heads: int = 8
    norm_num_groups: int = 32
    cross_attention: tuple = (True, True, True, False)
    sample_size: int | tuple = 64


SD_V1 = UNetConfig()


def timestep_encoding(t: Tensor, width: int) -> Tensor:
    """Timesteps t (B,) -> (B, width) float32: cosines, then sines, of geometrically falling frequencies."""
    half = width // 2
    k = torch.arange(half, device=t.device, dtype=torch.float32)
    angles = t.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * k / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """Sinusoids (B, c) -> the embedding of the timestep (B, width) that every resnet reads."""

    def __init__(self, c: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(c, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with the timestep added between: (B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in: int, c_out: int, time_width: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=RESNET_EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=RESNET_EPS)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, t_emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(t_emb))[:, :, None, None]
        h = F.silu(self.norm2(h))
        # The shortcut first: a checkpoint is recomputed up to the last tensor that it saved, so conv2 is not.
        return self.conv_shortcut(x) + self.conv2(h)


class Attention(nn.Module):
    """Multi-head attention of x (B, N, width) over given keys and values (B or 1, T, width)."""

    def __init__(self, width: int, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(d, width, bias=False)
        self.to_v = nn.Linear(d, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, N, width = x.shape
        q, k, v = (y.expand(B, -1, -1).unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for y in (self.to_q(x), k, v))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, width / heads)
        return self.to_out(h.transpose(1, 2).reshape(B, N, width))


class GEGLU(nn.Module):
    """x (B, N, width) -> value * gelu(gate) (B, N, inner); value is the first half of the projection."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward, each added to x (B, N, width)."""

    def __init__(self, width: int, d: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, d, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = nn.ModuleDict({"net": nn.Sequential(
            GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))})  # net.1 was a dropout

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, self.attn1.to_k(h), self.attn1.to_v(h))
        x = x + self.attn2(self.norm2(x), k, v)
        return x + self.ff["net"](self.norm3(x))


class Transformer(nn.Module):
    """A TransformerBlock over all positions of x (B, c, H, W), between two 1x1 convolutions, added to x."""

    def __init__(self, c: int, d: int, heads: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=TRANSFORMER_NORM_EPS)
        self.proj_in = nn.Conv2d(c, c, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(c, d, heads)])
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        H, W = x.shape[-2:]
        h = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).flatten(1, 2)  # (B, HW, c)
        h = self.transformer_blocks[0](h, k, v)
        return x + self.proj_out(h.unflatten(1, (H, W)).permute(0, 3, 1, 2))


class Resample(nn.Module):
    """A 3x3 convolution that halves height and width, padded on all sides unlike in the VAE; or that follows
    their doubling by nearest neighbour."""

    def __init__(self, c: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(c, c, 3, stride=1 if up else 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x)


class Level(nn.Module):
    """The parts of one resolution: resnets with these input channels and c output channels, transformers, a
    resampling. UNet.forward says how they are run; what is absent is an empty list."""

    def __init__(self, config: UNetConfig, inputs: list[int], c: int, transformers: int,
                 downsample: bool = False, upsample: bool = False):
        super().__init__()
        d, heads, groups = config.cross_attention_dim, config.attention_heads, config.norm_num_groups
        time_width = 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList([ResnetBlock(c_in, c, time_width, groups) for c_in in inputs])
        self.attentions = nn.ModuleList([Transformer(c, d, heads, groups) for _ in range(transformers)])
        self.downsamplers = nn.ModuleList([Resample(c, up=False)] if downsample else [])
        self.upsamplers = nn.ModuleList([Resample(c, up=True)] if upsample else [])


class UNet(nn.Module):
    """The denoising network.

    Stages of SD v1 (R resnet, T transformer, D down, U up; channels; in brackets the inputs of the resnets):

        down 0     R T R T D   320      up 3     R T R T R T     320  (960, 640, 640)
        down 1     R T R T D   640      up 2     R T R T R T U   640  (1920, 1280, 960)
        down 2     R T R T D  1280      up 1     R T R T R T U  1280  (2560, 2560, 1920)
        down 3     R R        1280      up 0     R R R U        1280  (2560, 2560, 2560)
                          middle     R T R    1280

    With `checkpointing`, the activations inside resnets and transformers are recomputed in the backward pass:
    the same gradients for less memory and more time.
    """

    def __init__(self, config: UNetConfig = SD_V1, checkpointing: bool = False):
        super().__init__()
        self.config, self.checkpointing = config, checkpointing
        widths, layers = config.block_out_channels, config.layers_per_block
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0])

        c, skips = widths[0], [widths[0]]  # channels here, and of the outputs that the way up will read
        self.down_blocks = nn.ModuleList()
        for i, (width, cross) in enumerate(zip(widths, config.cross_attention)):
            inputs, last = [c] + [width] * (layers - 1), i == len(widths) - 1
            self.down_blocks.append(Level(config, inputs, width, layers * cross, downsample=not last))
            c, skips = width, skips + [width] * (layers if last else layers + 1)
        self.mid_block = Level(config, [c, c], c, 1)
        self.up_blocks = nn.ModuleList()
        for i, (width, cross) in enumerate(zip(widths[::-1], config.cross_attention[::-1])):
            inputs = [(c if j == 0 else width) + skips.pop() for j in range(layers + 1)]
            last = i == len(widths) - 1
            self.up_blocks.append(Level(config, inputs, width, len(inputs) * cross, upsample=not last))
            c = width

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, c, eps=RESNET_EPS)
        self.conv_out = nn.Conv2d(c, config.out_channels, 3, padding=1)
        # order of execution, which is not the order of the parameter names
        self.cross_attentions = [transformer.transformer_blocks[0].attn2
                                 for level in (*self.down_blocks, self.mid_block, *self.up_blocks)
                                 for transformer in level.attentions]

    def layer_names(self) -> list[str]:
        """A name for each cross-attention layer, in order of execution: down.0.0, ..., mid.0, up.1.0, ..."""
        stages = [(f"down.{i}", level) for i, level in enumerate(self.down_blocks)]
        stages += [("mid", self.mid_block)] + [(f"up.{i}", level) for i, level in enumerate(self.up_blocks)]
        return [f"{stage}.{i}" for stage, level in stages for i in range(len(level.attentions))]

    def keys(self, e: Tensor) -> list[Tensor]:
        """Text encodings e (..., d) -> the keys of each cross-attention layer, a list of (..., width)."""
        return [layer.to_k(e) for layer in self.cross_attentions]

    def values(self, e: Tensor) -> list[Tensor]:
        """Text encodings e (..., d) -> the values of each cross-attention layer, a list of (..., width)."""
        return [layer.to_v(e) for layer in self.cross_attentions]

    def forward(self, z: Tensor, t: Tensor | int, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """Noisy latents z (B, c, H, W), timesteps t (B,) or one number, 0 to 999 -> output (B, c, H, W).

        keys and values: one (B, T, width) per cross-attention layer; those of batch 1 serve the whole batch.
        ValueError when H or W is not a multiple of 8 (of 2^(levels - 1)).
        """
        B, c, H, W = z.shape
        factor = 2 ** (len(self.down_blocks) - 1)
        if H % factor or W % factor or not H or not W:
            raise ValueError(f"latent height and width must be positive multiples of {factor}, not {H}x{W}")
        if not len(keys) == len(values) == len(self.cross_attentions):
            raise ValueError(f"the U-Net has {len(self.cross_attentions)} cross-attention layers, "
                             f"but got {len(keys)} keys and {len(values)} values")
        pairs = zip(keys, values)
        t = torch.as_tensor(t, device=z.device).expand(B)
        t_emb = self.time_embedding(timestep_encoding(t, self.conv_in.out_channels).to(z.dtype))
        x = self.conv_in(z)

        skips = [x]
        for level in self.down_blocks:
            for i, resnet in enumerate(level.resnets):
                x = self._run(resnet, x, t_emb)
                if level.attentions:
                    x = self._run(level.attentions[i], x, *next(pairs))
                skips.append(x)
            for downsample in level.downsamplers:
                x = downsample(x)
                skips.append(x)

        x = self._run(self.mid_block.resnets[0], x, t_emb)
        x = self._run(self.mid_block.attentions[0], x, *next(pairs))
        x = self._run(self.mid_block.resnets[1], x, t_emb)

        for level in self.up_blocks:
            for i, resnet in enumerate(level.resnets):
                x = self._run(resnet, torch.cat([x, skips.pop()], dim=1), t_emb)
                if level.attentions:
                    x = self._run(level.attentions[i], x, *next(pairs))
            for upsample in level.upsamplers:
                x = upsample(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _run(self, module: nn.Module, x: Tensor, *args: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, x, *args, use_reentrant=False, preserve_rng_state=False)
        return module(x, *args)
