"""Where a word acts: cross-attention maps, from the U-Net's queries and any keys.

    with record_queries(unet) as queries:
        unet(z, t, keys, values)
    maps = attention(queries, keys, heads)              # or with the keys of another lock: its pure effect
    where = word_map(maps, [4, 5], size=(64, 64))       # "teddy bear" at tokens 4 and 5

    where = noised_map(model, latents, 400, keys, values, [4, 5])       # all of it, for a finished picture

The keys are explicit in this code, so only the queries need a hook, and the U-Net's forward stays untouched.
"""

from contextlib import ExitStack, contextmanager

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
    places = {layer.to_q: i for i, layer in enumerate(unet.cross_attentions)}
    queries = [None] * len(places)

    def keep(to_q, inputs, output):
        queries[places[to_q]] = output
    with ExitStack() as hooks:
        for to_q in places:
            hooks.enter_context(to_q.register_forward_hook(keep))
        yield queries


def attention(queries: list[Tensor], keys: list[Tensor], heads: int) -> list[Tensor]:
    """softmax(q k^T / sqrt(width of a head)) in every layer, in at least float32.

    queries per layer (B, HW, width), keys (B or 1, T, width) -> (B, heads, HW, T).
    """
    maps = []
    with torch.autocast(queries[0].device.type, enabled=False):     # it would multiply in half precision
        for q, k in zip(queries, keys, strict=True):
            precise = torch.promote_types(q.dtype, torch.float32)
            q, k = (x.to(precise).unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k))
            maps.append(torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1))
    return maps


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


def share_inside(where: Tensor, mask: Tensor) -> Tensor:
    """The share (B,) of maps (B, H, W) that lies inside a mask (B or 1, any height and width) of 0 to 1."""
    mask = F.interpolate(mask[:, None].to(where), where.shape[-2:], mode="area")[:, 0]
    return (where * mask).sum((1, 2)) / where.sum((1, 2))


@torch.no_grad()
def noised_map(model, latents: Tensor, timestep: int, keys: list[Tensor], values: list[Tensor],
               words: list[int], seed: int = 0) -> Tensor:
    """Where a word acts on pictures that are noised to a timestep: maps (B, h, w), as `word_map`.

    latents (B, c, h, w); keys, values per layer (B or 1, T, width); words: the word's token indices.
    """
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    times = torch.full((len(latents),), timestep, device=latents.device)
    with record_queries(model.unet) as queries:
        model.unet(model.schedule.add_noise(latents, noise, times).to(keys[0].dtype), times, keys, values)
    maps = attention(queries, keys, model.unet.config.attention_heads)
    return word_map(maps, words, tuple(latents.shape[-2:]))


@torch.no_grad()
def word_masks(model, latents: Tensor, word: str) -> Tensor:
    """The base model as its own segmenter: where it sees a thing in pictures, above 0.5 on the thing.

    The attention of the word, averaged over MASK_TIMESTEPS and MASK_DRAWS of noise, and stretched to 0...1,
    as attention elsewhere is small but not 0. latents (N, c, h, w) -> (N, 1, h, w). ValueError when the text
    encoder has no room for the word.
    """
    ids, (found,) = model.tokenizer.encode(["a photo of a <word>"], {"<word>": word})
    if not found["<word>"]:
        raise ValueError(f'"{word}" has too many tokens for the text encoder')
    e = model.text_encoder(model.text_encoder.embed(ids))
    keys, values, masks = model.unet.keys(e), model.unet.values(e), []
    for z in latents:
        draws = [noised_map(model, z.expand(MASK_DRAWS, -1, -1, -1), t, keys, values, found["<word>"][0], t)
                 for t in MASK_TIMESTEPS]
        mean = torch.cat(draws).mean(0)
        masks.append((mean - mean.min()) / (mean.max() - mean.min()))
    return torch.stack(masks)[:, None]
