"""One HTML file that shows where the words of a prompt act, under several locks of the same concepts.

    words = prompt_words(model.tokenizer, "a <teddy> on the beach", concepts)
    latents, maps, seen = watch(model, keys, values, words, seed=0, steps=30, guidance=4.0)
    html = page(about, words, layers, views, betas, pictures, gates, seeds)     # from explorer.html
"""

import base64
import gzip
import io
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import diffusion
from attention_maps import attention, record_queries
from clip_text import WORD_END
from diffusion import ddim_timesteps, seeded_noise

MAP_SIDE, PICTURE_SIDE = 24, 320    # cells and pixels: the longer side of what the page holds, at most
STEPS_SHOWN, MAP_BYTES = 8, 3_000_000       # on a page, at most: rather fewer steps than more bytes


@dataclass
class Word:
    """What can be chosen on the page. tokens: places in the prompt; pieces: the text of each token; concept:
    which one it names; mark: it is the start mark, the end mark, or all further end marks."""
    label: str
    tokens: list[int]
    pieces: list[str]
    concept: int | None = None
    mark: bool = False


@dataclass
class View:
    """A lock, and what was drawn with it: picture (3, H, W) in [0, 1]; maps as `watch` returns them; masks
    (n, h, w) of 0 and 1, where each of the n concepts is; gates (T, n), None where nothing is edited."""
    name: str
    note: str
    picture: Tensor
    maps: list[Tensor]
    masks: Tensor
    gates: Tensor | None


def prompt_words(tokenizer, prompt: str, concepts: list) -> list[Word]:
    """The words of a prompt in order, a concept named in it as one word, and the marks around them."""
    ids, (found,) = tokenizer.encode([prompt], {concept.token: concept.words for concept in concepts})
    ids, pieces = ids[0].tolist(), tokenizer.tokens(ids[0])
    names = {i: name for name, i in tokenizer.vocabulary.items()}
    owner = {t: (j, place[0]) for j, concept in enumerate(concepts)
             for place in found[concept.token] for t in place}
    words, end = [Word("start", [0], ["start"], mark=True)], ids.index(tokenizer.end)
    for t in range(1, end):
        mine, last = owner.get(t), owner.get(t - 1)
        same = mine == last if mine or last else t > 1 and not names[ids[t - 1]].endswith(WORD_END)
        if not same:
            words.append(Word("", [], [], mine and mine[0]))
        words[-1].tokens.append(t)
        words[-1].pieces.append(pieces[t])
        words[-1].label = concepts[mine[0]].token if mine else "".join(words[-1].pieces)
    padding = list(range(end + 1, len(ids)))
    return words + [Word("end", [end], ["end"], mark=True),
                    Word("padding", padding, ["padding"], mark=True)][:1 + bool(padding)]


@torch.no_grad()
def watch(model, keys: list[Tensor], values: list[Tensor], words: list[Word], seed: int, steps: int,
          guidance: float, map_keys: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor], Tensor]:
    """Draw a picture and keep the attention to every word in every layer and step.

    keys, values: per layer (2, T, width) of ["", prompt]. map_keys: the keys whose attention is kept, where
    they are not those that draw. Returns the latents (1, c, h, w); the maps (steps, words, height, width),
    first the mean over layers, then one per layer: at a place the shares of all words sum to 1; and what the
    U-Net saw (steps, c, h, w).
    """
    size = tuple(side // model.vae.factor for side in model.size)
    tokens_of = torch.zeros(keys[0].shape[1], len(words), device=keys[0].device)
    for w, word in enumerate(words):
        tokens_of[word.tokens, w] = 1
    kept, seen = [], [seeded_noise(seed, (model.unet.config.in_channels, *size))]

    def keep(z: Tensor) -> None:
        layers = []
        for a in attention([q[-1:] for q in queries], [k[-1:] for k in map_keys or keys],
                           model.unet.config.attention_heads):
            height = round((a.shape[2] * size[0] / size[1]) ** 0.5)
            layers.append((a[0].mean(0) @ tokens_of).T.unflatten(1, (height, -1)))
        mean = torch.stack([F.interpolate(x[None], size, mode="bilinear")[0] for x in layers]).mean(0)
        kept.append([shrink(x).cpu() for x in (mean, *layers)])
        seen.append(z.cpu())

    with record_queries(model.unet) as queries:
        latents = diffusion.draw_latents(model.unet, model.schedule, keys, values, [seed], size, steps,
                                         guidance, on_step=keep)
    return latents, [torch.stack(level) for level in zip(*kept)], torch.cat(seen[:-1])


def shrink(maps: Tensor) -> Tensor:
    """Maps (n, h, w), at most MAP_SIDE high and wide: means over areas, so that shares stay shares."""
    scale = MAP_SIDE / max(maps.shape[-2:])
    size = [round(side * scale) for side in maps.shape[-2:]]
    return maps if scale >= 1 else F.interpolate(maps[None], size, mode="area")[0]


def page(about: dict, words: list[Word], layers: list[str], views: list[View], betas: list[float],
         pictures: Tensor, gates: Tensor, seeds: list[int], map_bytes: int = MAP_BYTES) -> str:
    """The page as text. about: lead and made (sentences above and below), concepts and objects (names and
    ordinary words). pictures (betas, seeds, 3, H, W) drawn at each beta, and their gates (betas, T, n)."""
    of = len(views[0].maps[0])
    step_bytes = len(views) * sum(level[0].numel() for level in views[0].maps)
    shown = min(of, STEPS_SHOWN, max(1, map_bytes // step_bytes))
    steps = torch.linspace(0, of - 1, shown).round().int().tolist() if shown > 1 else [of // 2]
    levels = [torch.stack(level)[:, steps] for level in zip(*(view.maps for view in views))]
    scales = [level.amax((0, 1, 3, 4)).clamp_min(1e-9) for level in levels]      # per word, for all locks
    maps = [(level / scale[:, None, None] * 255).round().byte() for level, scale in zip(levels, scales)]
    packed = gzip.compress(b"".join(level.numpy().tobytes() for level in maps), mtime=0)
    data = about | {
        "words": [vars(word) for word in words], "layers": ["mean of all", *layers], "seeds": seeds, "of": of,
        "steps": [{"number": k + 1, "t": ddim_timesteps(of)[k]} for k in steps],
        "sizes": [level.shape[-2:] for level in levels], "scales": [scale.tolist() for scale in scales],
        "maps": base64.b64encode(packed).decode(),
        "views": [{"name": view.name, "note": view.note, "picture": data_uri(view.picture),
                   "objects": [mask.gt(0.5).int().flatten().tolist() for mask in shrink(view.masks.float())],
                   "gates": view.gates is not None and per_word(view.gates, words)} for view in views],
        "betas": [{"beta": beta, "gates": per_word(opened, words), "pictures": [data_uri(x) for x in row]}
                  for beta, opened, row in zip(betas, gates, pictures)]}
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return template.replace("{{data}}", json.dumps(data).replace("<", "\\u003c"))


def per_word(gates: Tensor, words: list[Word]) -> list:
    """Gates (T, n) -> per word, per token, n numbers; of the padding only the widest."""
    rows = [gates[word.tokens] if len(word.pieces) > 1 else gates[word.tokens].amax(0, True)
            for word in words]
    return [[[round(x, 3) for x in token] for token in row.tolist()] for row in rows]


def data_uri(picture: Tensor) -> str:
    """A picture (3, H, W) in [0, 1] as the address of a WebP image."""
    image, file = Image.fromarray(diffusion.to_bytes(picture)), io.BytesIO()
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    image.save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
