"""One HTML file that explains the lock: the story of a study, and everything in it to explore.

    text = page(study, training, made, records)         # from page.html

What the page computes itself: keys are linear in the gates, so with q a query, scaled by 1 / sqrt(width of a
head), a place's logits over the tokens are

    A + sum_j gate_j ((1 - lambda) u_j + lambda v_j)        A = q . W_K e_perp, one number per token
                                                            u_j = q . o*_K, locked, of concept j; v_j: trained

for every lambda, beta and tau. `live` packs A, u and v.
"""

import base64
import gzip
import io
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import diffusion
from perfusion import DRAWING_BETA, DRAWING_TAU
from support.plots import palette
from support.study import LOCKS, Study, shrink

SLIDES = (0, 0.25, 0.5, 0.75, 1)            # lambda of the pictures: from locked to trained keys
BETAS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)


def page(study: Study, training: list[list[Tensor]], made: str, records: dict | None) -> str:
    """The page as text. training: per concept its pictures (3, H, W) in [0, 1]. made: how it was made, in
    words. records: what was measured, as tiny/records.json, or None."""
    data = {
        "fingerprint": study.model.fingerprint, "made": made,
        "concepts": [{"token": token, "words": words, "training": uris(pictures)}
                     for token, words, pictures in zip(study.tokens, study.names, training)],
        "prompt": study.prompt, "ordinary": study.ordinary, "words": [vars(word) for word in study.words],
        "seeds": list(study.seeds), "palette": palette(), "beta": DRAWING_BETA["local"], "tau": DRAWING_TAU,
        "locks": {name: uris(study.pictures(name))
                  for name in ("locked keys", "trained keys", "ordinary words") if name in study.locks},
        "slides": SLIDES,
        "slid": [uris(study.moved(slide=x)) for x in SLIDES] if "trained keys" in study.locks else None,
        "betas": BETAS, "swept": [uris(study.moved(beta=beta)) for beta in BETAS],
        "live": live(study), "explorer": explorer(study), "records": records}
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return template.replace("{{data}}", json.dumps(data).replace("<", "\\u003c"))


def live(study: Study, limit: int = 3_000_000) -> dict:
    """What the browser needs to compute the attention of the locked drawings of as many seeds as `limit`
    bytes allow: per seed and layer A (places, heads, tokens + 1), u and v (places, heads, n), as whole
    numbers of 16 bits in units of `unit`.

    The padding's tokens are one: its A is their logsumexp at shut gates. The page adds the mean of their
    gates, so what is left out is of second order in gates that are nearly shut.
    """
    heads, last = study.model.unet.config.attention_heads, study.words[-1]
    first = last.tokens[0]
    ratios, plain, sides = study.key_parts()
    every = [study.drawn("locked keys", seed) for seed in study.seeds]
    parts = []
    for drawn in every:
        for q, k, *targets in zip(drawn.queries, plain, *sides):
            q = q.flatten(0, 1).unflatten(1, (heads, -1)) * (q.shape[-1] // heads) ** -0.5
            a, *uv = (torch.einsum("phd,khd->phk", q, x.unflatten(1, (heads, -1))) for x in (k, *targets))
            if last.label == "padding":
                a = torch.cat([a[..., :first], a[..., first:].logsumexp(-1, keepdim=True)], -1)
            parts += [x.flatten() for x in (a, *uv)]
    packed = torch.cat(parts).view(len(every), -1)
    shown = min(len(every), max(1, limit // (2 * packed.shape[1])))
    numbers, size = packed[:shown], every[0].queries[0].shape[:2]
    unit = numbers.abs().max().item() / 32767
    masks = F.interpolate(torch.stack([drawn.masks for drawn in every[:shown]]), size, mode="area")
    return {"ratios": ratios.tolist(), "heads": heads, "unit": unit, "sides": len(sides),
            "sizes": [q.shape[:2] for q in every[0].queries], "masks": masks.gt(0.5).int().flatten(2).tolist(),
            "numbers": compressed((numbers / unit).round().short().numpy().tobytes())}


def explorer(study: Study, limit: int = 2_500_000) -> dict:
    """The first seed under every lock: maps of all words in as many steps as `limit` bytes allow, in all
    layers, in steps of 1 / 255 of the largest value that a word has under any lock; what the U-Net saw."""
    views = {name: study.drawn(name, study.seeds[0]) for name in study.locks}
    first, of = next(iter(views.values())), study.steps
    step_bytes = len(views) * sum(level[0].numel() for level in first.maps)
    shown = min(of, 8, max(1, limit // step_bytes))
    steps = torch.linspace(0, of - 1, shown).round().int().tolist() if shown > 1 else [of // 2]
    levels = [torch.stack(level)[:, steps] for level in zip(*(view.maps for view in views.values()))]
    scales = [level.amax((0, 1, 3, 4)).clamp_min(1e-9) for level in levels]      # per word, for all locks
    maps = [(level / scale[:, None, None] * 255).round().byte() for level, scale in zip(levels, scales)]
    vae, device = study.model.vae, study.model.device
    return {
        "layers": ["mean of all", *study.model.unet.layer_names()], "of": of,
        "steps": [{"number": k + 1, "t": diffusion.ddim_timesteps(of)[k]} for k in steps],
        "sizes": [level.shape[-2:] for level in levels], "scales": [scale.tolist() for scale in scales],
        "maps": compressed(b"".join(level.numpy().tobytes() for level in maps)),
        "views": [{"name": name, "note": LOCKS[name][2],
                   "seen": uris(diffusion.decode(vae, view.seen[steps].to(device)), 128, 60),
                   "objects": shrink(view.masks).gt(0.5).int().flatten(1).tolist()}
                  for name, view in views.items()]}


def compressed(numbers: bytes) -> str:
    return base64.b64encode(gzip.compress(numbers, mtime=0)).decode()


def uris(pictures, side: int = 256, quality: int = 80) -> list[str]:
    """Pictures (3, H, W) in [0, 1] as addresses of WebP images, at most `side` pixels high and wide."""
    addresses = []
    for picture in pictures:
        image, file = Image.fromarray(diffusion.to_bytes(picture)), io.BytesIO()
        image.thumbnail((side, side))
        image.save(file, "WEBP", quality=quality)
        addresses.append("data:image/webp;base64," + base64.b64encode(file.getvalue()).decode())
    return addresses
