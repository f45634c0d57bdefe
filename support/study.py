"""A prompt with one or two concepts, drawn under several locks while its attention is kept.

    study = Study(model, "a photo of a {} next to a {}", [{"locked": teddy}, {"locked": cat}], steps=20,
                  seeds=range(4))
    drawn = study.drawn("locked keys", seed=0)          # picture, maps, masks, queries; drawn once, then kept
    pictures = study.moved(slide=0.5)                   # (seeds, 3, H, W): keys halfway between two locks
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import diffusion
import perfusion
from attention_maps import MASK_TIMESTEPS, attention, noised_map, record_queries
from clip_text import WORD_END
from concept import prepare

MAP_SIDE, QUERY_SIDE = 24, 16       # cells: the longer side of maps and queries that are kept, at most
LOCKS = {  # name -> keys in training (None: no concept), lock in drawing, what it is
    "locked keys": ("locked", "local", "Learned values, and the key of the ordinary word."),
    "trained keys": ("trained", "local", "Learned values, and a key that was learned with them."),
    "ordinary words": (None, "local", "The base model. Nothing is edited."),
    "textual inversion": ("none", "local", "Only a word embedding is learned. Nothing is edited."),
    "global lock": ("locked", "global", "Learned values, and all keys of the ordinary prompt.")}


@dataclass
class Word:
    """A word of a prompt. tokens: its places; pieces: the text of each token; concept: which one it names;
    mark: it is the start mark, the end mark, or all further end marks."""
    label: str
    tokens: list[int]
    pieces: list[str]
    concept: int | None = None
    mark: bool = False


@dataclass
class Drawn:
    """A picture (3, H, W) in [0, 1] and how it came about.

    maps: (steps, words, height, width), first the mean over layers, then one per layer: at a place the shares
    of all words sum to 1. seen: what the U-Net saw (steps, c, h, w). masks: (n, h, w) of 0 and 1, where the n
    concepts are. queries: of the middle step, `thinned`.
    """
    picture: Tensor
    maps: list[Tensor]
    seen: Tensor
    masks: Tensor
    queries: list[Tensor]


def prompt_words(tokenizer, prompt: str, concepts: list) -> list[Word]:
    """The words of a prompt in order, a concept named in it as one word, and the marks around them."""
    ids, (found,) = tokenizer.encode([prompt], {concept.token: concept.words for concept in concepts})
    ids, pieces = ids[0].tolist(), tokenizer.tokens(ids[0])
    owner = {t: (j, place[0]) for j, concept in enumerate(concepts)
             for place in found[concept.token] for t in place}
    last = {i for name, i in tokenizer.vocabulary.items() if name.endswith(WORD_END)} | {tokenizer.start}
    words, end = [Word("start", [0], ["start"], mark=True)], ids.index(tokenizer.end)
    starts = [t for t in range(1, end) if owner.get(t) != owner.get(t - 1)
              or t not in owner and ids[t - 1] in last]
    for start, stop in zip(starts, [*starts[1:], end]):
        concept = owner[start][0] if start in owner else None
        label = "".join(pieces[start:stop]) if concept is None else concepts[concept].token
        words.append(Word(label, list(range(start, stop)), pieces[start:stop], concept))
    words.append(Word("end", [end], ["end"], mark=True))
    padding = list(range(end + 1, len(ids)))
    return words + [Word("padding", padding, ["padding"], mark=True)] * bool(padding)


def shrink(maps: Tensor) -> Tensor:
    """Maps (n, h, w), at most MAP_SIDE high and wide: means over areas, so that shares stay shares."""
    scale = MAP_SIDE / max(maps.shape[-2:])
    size = [round(side * scale) for side in maps.shape[-2:]]
    return maps if scale >= 1 else F.interpolate(maps[None], size, mode="area")[0]


def thinned(queries: Tensor, size: tuple[int, int]) -> Tensor:
    """Queries (h w, width) of one picture -> (h', w', width), float32 on the CPU: every k-th row and column,
    so that at most QUERY_SIDE are left. A mean would not be a query that any place has asked. A copy: a view
    would keep all the queries."""
    every = -(-max(size) // QUERY_SIDE)
    return queries.unflatten(0, tuple(size))[every // 2::every, every // 2::every].float().cpu().clone()


def fill(template: str, names: Sequence[str]) -> str:
    """A template with the concepts' names, or their ordinary words, in the places of its {}."""
    for name in names:
        template = template.replace("{}", name, 1)
    return template


def check_room(model, prompt: str, names: Sequence[str]) -> None:
    """ValueError when a prompt in ordinary words is so long that a concept is cut off."""
    for name in names:
        if len(model.tokenizer.find(prompt, name)) < names.count(name):
            raise ValueError(f'the prompt "{prompt}" is too long: it has no room for "{name}"')


class Study:
    """A prompt with one or two concepts and everything that is drawn of it, each picture once.

    template: a prompt with {} for each concept. concepts: per concept {keys in training: Concept}, ready for
    the model. seeds: of the pictures. on_picture(n) is called when n more pictures are drawn.
    ValueError when the prompt has no room for a concept.
    """

    def __init__(self, model, template: str, concepts: list[dict], steps: int, seeds: Sequence[int],
                 on_picture: Callable = lambda n: None):
        self.model, self.concepts, self.steps = model, concepts, steps
        self.seeds, self.on_picture = seeds, on_picture
        self.locks = [name for name, (version, _, _) in LOCKS.items()
                      if all(version in (None, *versions) for versions in concepts)]
        self.locked = prepare([versions["locked"] for versions in concepts], model)
        self.tokens, self.names = [c.token for c in self.locked], [c.words for c in self.locked]
        self.prompt, self.ordinary = fill(template, self.tokens), fill(template, self.names)
        check_room(model, self.ordinary, self.names)
        self.words = prompt_words(model.tokenizer, self.prompt, self.locked)
        self.named = [next(word for word in self.words if word.concept == j) for j in range(len(concepts))]
        self.drawn, self.moved = functools.cache(self._drawn), functools.cache(self._moved)

    def condition(self, name: str, beta: float | None = None, tau: float = perfusion.DRAWING_TAU,
                  slide: float = 0) -> perfusion.Conditioning:
        """Keys and values of ["", prompt] and the gates, under one of LOCKS. slide: how far the keys are
        moved to the trained ones, 0 to 1."""
        version, lock, _ = LOCKS[name]
        concepts = [versions[version] for versions in self.concepts] if version else []
        for j, versions in enumerate(self.concepts if slide else ()):
            ends = zip(concepts[j].o_keys, versions["trained"].o_keys)
            concepts[j] = replace(concepts[j], o_keys=[torch.lerp(a, b, slide) for a, b in ends])
        prompt = self.prompt if concepts else self.ordinary
        return perfusion.condition(self.model, ["", prompt], concepts, beta, tau, lock)

    def pictures(self, name: str) -> Tensor:
        """Pictures (seeds, 3, H, W) under one of LOCKS."""
        return torch.stack([self.drawn(name, seed).picture for seed in self.seeds])

    def _moved(self, slide: float = 0, beta: float = perfusion.DRAWING_BETA["local"]) -> Tensor:
        """`moved`: pictures (seeds, 3, H, W) of the locked concepts with keys that slid, or another beta."""
        if (slide, beta) == (0, perfusion.DRAWING_BETA["local"]):
            return self.pictures("locked keys")
        model, given, pictures = self.model, self.condition("locked keys", beta, slide=slide), []
        for seed in self.seeds:         # one at a time, to spare memory
            pictures.append(diffusion.draw(model, given.keys, given.values, [seed], model.size, self.steps,
                                           model.guidance))
            self.on_picture(1)
        return torch.cat(pictures)

    @torch.no_grad()
    def _drawn(self, name: str, seed: int, keys_of: str | None = None) -> Drawn:
        """`drawn`: one seed under one of LOCKS, with the attention of its keys, or of another lock's."""
        model, given = self.model, self.condition(name)
        keys = [k[1:] for k in (self.condition(keys_of) if keys_of else given).keys]
        size = tuple(side // model.vae.factor for side in model.size)
        maps, seen, middle = [], [diffusion.seeded_noise(seed, (model.unet.config.in_channels, *size))], []

        def keep(z: Tensor) -> None:
            own = [q[1:] for q in queries]
            layers = self.layer_maps(own, keys, size)
            mean = torch.stack([F.interpolate(x[None], size, mode="bilinear")[0] for x in layers]).mean(0)
            maps.append([shrink(x).cpu() for x in (mean, *layers)])
            if len(maps) == self.steps // 2 + 1:
                middle.extend(thinned(q[0], x.shape[-2:]) for q, x in zip(own, layers))
            seen.append(z.cpu())

        with record_queries(model.unet) as queries:
            latents = diffusion.draw_latents(model.unet, model.schedule, given.keys, given.values, [seed],
                                             size, self.steps, model.guidance, on_step=keep)
        queries.clear()     # 0.1 GB of Stable Diffusion, not needed while its VAE decodes
        self.on_picture(1)
        return Drawn(diffusion.decode(model.vae, latents)[0], [torch.stack(level) for level in zip(*maps)],
                     torch.cat(seen[:-1]), self.masks(latents), middle)

    def layer_maps(self, queries: list[Tensor], keys: list[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Of one picture of `size`, per layer the words' shares of the attention (words, h, w)."""
        word_of = torch.tensor([w for w, word in enumerate(self.words) for _ in word.tokens])
        maps = []
        for a in attention(queries, keys, self.model.unet.config.attention_heads):
            height = round((a.shape[2] * size[0] / size[1]) ** 0.5)
            maps.append((a[0].mean(0) @ F.one_hot(word_of).to(a)).T.unflatten(1, (height, -1)))
        return maps

    @torch.no_grad()
    def masks(self, latents: Tensor) -> Tensor:
        """Where the base model sees the concepts' ordinary words in a picture: (n, h, w) of 0 and 1."""
        ordinary = self.condition("ordinary words")
        keys, values = [k[1:] for k in ordinary.keys], [v[1:] for v in ordinary.values]
        maps = torch.stack([torch.cat([noised_map(self.model, latents, t, keys, values, word.tokens)
                                       for word in self.named]) for t in MASK_TIMESTEPS]).mean(0)
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        return (maps > (low + high) / 2).float().cpu()

    def rows(self, text: str) -> list[int]:
        """Which of the prompt's words are a concept's name or an ordinary phrase; ValueError if none."""
        places = {t for found in self.model.tokenizer.find(self.ordinary, text)[:1] for t in found}
        rows = [i for i, word in enumerate(self.words) if word.label == text or places >= set(word.tokens)]
        if not rows:
            raise ValueError(f'--words: the prompt "{self.prompt}" has no word "{text}"')
        return rows

    def map_of(self, text: str, maps: Tensor) -> Tensor:
        """Maps (steps, h, w) of a word, see `rows`, from one level (steps, words, h, w) of drawn maps."""
        return maps[:, self.rows(text)].sum(1)

    def key_parts(self) -> tuple[Tensor, list[Tensor], list[list[Tensor]]]:
        """What the prompt's keys are made of, float32 on the CPU: sim / energy (T, n) of every token with
        every concept; W_K e_perp, per layer (T, width); and the concepts' targets of the keys, locked and,
        where there are such, trained: lists over layers of (n, width)."""
        e, *_ = perfusion.encode(self.model.text_encoder, self.model.tokenizer, [self.prompt], self.locked)
        e_perp, ratio = perfusion.split(e, torch.stack([concept.i_star for concept in self.locked]),
                                        torch.stack([concept.d_star for concept in self.locked]))
        sides = []
        for side in ("locked", "trained")[:1 + ("trained keys" in self.locks)]:
            layers = zip(*(versions[side].o_keys for versions in self.concepts), strict=True)
            sides.append([torch.stack(layer).float().cpu() for layer in layers])
        return ratio[0].cpu(), [k[0].float().cpu() for k in self.model.unet.keys(e_perp)], sides
