"""Where a word acts: cross-attention maps, from the U-Net's queries and any keys.

    with record_queries(unet) as queries:
        unet(z, t, keys, values)
    maps = attention(queries, keys, heads)              # or with the keys of another lock: its pure effect
    where = word_map(maps, [4, 5], size=(64, 64))       # "teddy bear" at tokens 4 and 5

The keys are explicit in this code, so only the queries need a hook, and the U-Net's forward stays untouched.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

MASK_TIMESTEPS = (200, 300, 400, 500, 600)  # outlines are decided here: earlier is texture, later is noise
MASK_DRAWS = 4                              # noise draws per timestep


@contextmanager
def record_queries(unet):
    """Context in which every forward pass leaves its queries in the yielded list, the last pass overwriting.

    The list has one entry per cross-attention layer, in order of execution: (B, HW, width), with their graph.
    """
    queries = [None] * len(unet.cross_attentions)

    def keep(i):
        def hook(module, inputs, output):
            queries[i] = output
        return hook
    handles = [layer.to_q.register_forward_hook(keep(i)) for i, layer in enumerate(unet.cross_attentions)]
    try:
        yield queries
    finally:
        for handle in handles:
            handle.remove()


def attention(queries: list[Tensor], keys: list[Tensor], heads: int) -> list[Tensor]:
    """softmax(q k^T / sqrt(width of a head)) in every layer, in at least float32.

    queries per layer (B, HW, width), keys (B or 1, T, width) -> (B, heads, HW, T).
    """
    return [_attention(q, k, heads) for q, k in zip(queries, keys, strict=True)]


def _attention(q: Tensor, k: Tensor, heads: int) -> Tensor:
    precise = torch.promote_types(q.dtype, torch.float32)
    q, k = (x.to(precise).unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k))
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)


def word_map(attentions: list[Tensor], token_indices: list[int], size: tuple[int, int]) -> Tensor:
    """One map of a word: the mean over its tokens, heads and all layers, each enlarged to size = (H, W).

    attentions: per layer (B, heads, HW, T), of pictures with the shape of `size`.
    Returns (B, H, W): shares of a pixel's attention, so the maps of all tokens sum to 1.
    """
    H, W = size
    maps = []
    for layer in attentions:
        flat = layer[..., token_indices].mean(-1).mean(1)           # (B, HW of the layer)
        h = round((flat.shape[1] * H / W) ** 0.5)
        maps.append(F.interpolate(flat.unflatten(1, (h, -1))[:, None], size, mode="bilinear")[:, 0])
    return torch.stack(maps).mean(0)


def share_inside(map: Tensor, mask: Tensor) -> Tensor:
    """The share (B,) of maps (B, H, W) that lies inside a mask (B or 1, any height and width) of 0 to 1."""
    mask = F.interpolate(mask[:, None].to(map), map.shape[-2:], mode="area")[:, 0]
    return (map * mask).sum((1, 2)) / map.sum((1, 2))


@torch.no_grad()
def word_masks(model, latents: Tensor, word: str, seed: int = 0) -> Tensor:
    """The base model as its own segmenter: where a word acts on noised pictures.

    latents (N, c, h, w) -> (N, 1, h, w): the word's cross-attention map, averaged over MASK_TIMESTEPS and
    MASK_DRAWS of noise, stretched to 0...1, as attention elsewhere is small but not 0.
    ValueError when the text encoder has no room for the word.
    """
    device, heads = latents.device, model.unet.config.attention_heads
    ids, (found,) = model.tokenizer.encode(["a photo of a <word>"], {"<word>": word})
    if not found["<word>"]:
        raise ValueError(f'"{word}" has too many tokens for the text encoder')
    e = model.text_encoder(model.text_encoder.embed(ids.to(device)))
    keys, values = model.unet.keys(e), model.unet.values(e)
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for z in latents.split(1):
        draws = []
        for t in MASK_TIMESTEPS:
            noise = torch.randn(MASK_DRAWS, *z.shape[1:], generator=generator).to(z)
            times = torch.full((MASK_DRAWS,), t, device=device)
            with record_queries(model.unet) as queries:
                model.unet(model.schedule.add_noise(z.expand_as(noise), noise, times), times, keys, values)
            draws.append(word_map(attention(queries, keys, heads), found["<word>"][0], z.shape[-2:]))
        mean = torch.cat(draws).mean(0, keepdim=True)
        masks.append((mean - mean.min()) / (mean.max() - mean.min()))
    return torch.stack(masks)
