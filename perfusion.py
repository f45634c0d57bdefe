"""Perfusion: key-locked, gated rank-1 editing (Tewel et al., SIGGRAPH 2023, arXiv 2305.01644).

In every cross-attention layer, the encodings e of a prompt's tokens become keys W_K e, which decide *where* a
word acts, and values W_V e, which decide *what* it puts there. A concept ("my teddy bear") edits both maps:

    h(e) = W e_perp + gate(e) o_star                 e_perp is e without its part along the concept's i_star
    gate(e) = sigmoid((sim / energy - beta) / tau)   near 1 for the concept's own word, near 0 for others

Where: the target of the keys is the key of the super-category ("teddy bear"). It is *locked*, never trained.
What: the target of the values is trained, one vector per layer, and so is the word's embedding. No more.
How much: beta says how near to i_star a word must be to open the gate; a lower beta shows more of a concept.
Several concepts, trained apart: e_perp leaves out all of them at once, and each adds its own target through
its own gate. They stay apart as long as the word of one does not open the gate of another.

Letters, as in the paper:
    e         (B, T, d)      encodings of B prompts of T tokens
    i_star    (d,)           target input: encoding of the concept's last token, a running mean over training
    o_star    (width,)       target output, one per layer, for the keys and for the values
    i_super   (d,)           encoding of the super-category's last token
    C         (d, d)         uncentred covariance of encodings: a C^-1 b is about 0 for unrelated words a, b
    d_star    (d,)           C^-1 i_star
    I, D      (n, d)         i_star and d_star of n concepts, one row each

This file knows no network: a U-Net only has to offer `keys(e)` and `values(e)`, lists over layers.

    concepts = prepare([Concept.load("teddy.safetensors")], model)
    keys, values, positions, gates = project(model, ["", "a <teddy> on the beach"], concepts)
    noise = model.unet(z, t, keys, values)
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shell import replacing

TEMPLATES = ("a photo of a {}", "a good photo of a {}", "the photo of a {}", "a good photo of the {}",
             "image of a {}", "image of the {}", "a photograph of {}", "a {} shown in a photo",
             "a photo of {}")
TRAINING_BETA, TRAINING_TAU = 0.75, 0.1     # paper, section 4
# For drawing, the middle of the paper's range for each lock, and its softer gate.
DRAWING_BETA, DRAWING_GLOBAL_BETA, DRAWING_TAU = 0.7, 0.5, 0.15
LOCKS = ("locked", "trained", "none")       # of a concept's keys; "none" is textual inversion: no edit at all
FORMAT = 2                                  # of the concept file
MAX_BYTES = 10_000_000                      # of a concept file: a hundred times what SD v1 needs
SAME = 0.999                                # squared cosine of two i_star, from which they count as equal


# -------------------------------------------------------------------------------------------- the equations

def split(e: Tensor, I: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """Split encodings into the part along the concepts and the part orthogonal to them, in the metric C^-1.

        e_perp = e - (e D^T) (I D^T)^-1 I          sims_j = e . d_j / i_j . d_j  = sim_j / energy_j

    The paper's appendix B writes the same projection with Cholesky + QR; for one concept it is eq. 3's
    e_perp = e - i_star sim / energy. Any scale of a row of D cancels.
    e (B, T, d), I and D (n, d) -> e_perp (B, T, d) in e's dtype, sims (B, T, n) in at least float32: the
    metric is ill-conditioned, so it is never computed in half precision.
    """
    with torch.autocast(e.device.type, enabled=False):
        x = at_least_float32(e)
        I, D = I.to(x), D.to(x)
        similarity, energy = x @ D.T, I @ D.T
        e_perp = x - similarity @ torch.linalg.solve(energy, I)
        return e_perp.to(e.dtype), similarity / energy.diagonal()


def gate(sims: Tensor, beta: float | Sequence[float], tau: float | Sequence[float]) -> Tensor:
    """Eq. 3's sigmoid((sim / energy - beta) / tau). sims (B, T, n); beta, tau one number, or one per concept.

    It takes the place of the linear weight: words far from i_star are left alone; beta sets how near is near.
    """
    beta, tau = (torch.as_tensor(x, dtype=sims.dtype, device=sims.device) for x in (beta, tau))
    return torch.sigmoid((sims - beta) / tau)


def edit(linear: Callable, e_perp: Tensor, gates: Tensor, targets: list[Tensor]) -> list[Tensor]:
    """Eq. 3 in every layer: h(e) = W e_perp + sum_j gate_j(e) o_star_j. With gates = sims it is ROME's edit.

    linear: `unet.keys` or `unet.values`, (B, T, d) -> list of (B, T, width_l). gates (B, T, n).
    targets: per layer (n, width_l). Returns a list of (B, T, width_l).
    """
    return [h + (gates @ o).to(h.dtype) for h, o in zip(linear(e_perp), targets, strict=True)]


def running_mean(i_star: Tensor, e_concept: Tensor, decay: float) -> Tensor:
    """Section 4: i_star <- decay i_star + (1 - decay) mean of e_concept (B, d), its encodings in a batch."""
    return decay * i_star + (1 - decay) * e_concept.detach().to(i_star).mean(0)


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 -> float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------------------------- from encodings to K and V

def keys_and_values(unet, e: Tensor, e_super: Tensor | None, concepts: list[Concept],
                    beta: float | Sequence[float], tau: float | Sequence[float],
                    lock: str = "local") -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """K and V of every layer with the concepts' edits: the method, in training and at inference.

    e, e_super (B, T, d) from `encode`; beta, tau: one number, or one per concept. lock "local": every concept
    brings its own key target. lock "global": the keys of the whole prompt are those of e_super, needed only
    then. Returns two lists over layers of (B, T, width_l), ready for `unet(z, t, keys, values)`, and the
    gates (B, T, n) of the n concepts that edit, None without any. The text is the same in all denoising
    steps, so once is enough.
    """
    if lock not in ("local", "global"):
        raise ValueError(f'the lock is "local" or "global", not "{lock}"')
    edits = [concept for concept in concepts if concept.lock != "none"]
    if not edits:
        return unet.keys(e_super if lock == "global" else e), unet.values(e), None
    e_perp, gates = split_and_gate(e, concepts, beta, tau)
    values = edit(unet.values, e_perp, gates, _stacked([concept.values for concept in edits], gates))
    if lock == "global":
        return unet.keys(e_super), values, gates
    if any(concept.keys is None for concept in edits):
        raise ValueError("a concept's locked keys are missing: call prepare(concepts, model)")
    keys = edit(unet.keys, e_perp, gates, _stacked([concept.keys for concept in edits], gates))
    return keys, values, gates


def split_and_gate(e: Tensor, concepts: list[Concept], beta: float | Sequence[float],
                   tau: float | Sequence[float]) -> tuple[Tensor, Tensor]:
    """e_perp (B, T, d), and the gates (B, T, n) of those n >= 1 concepts that edit; beta, tau as above."""
    edits = [n for n, concept in enumerate(concepts) if concept.lock != "none"]
    beta, tau = (torch.as_tensor(x, dtype=torch.float64).expand(len(concepts))[edits] for x in (beta, tau))
    e_perp, sims = split(e, torch.stack([concepts[n].i_star for n in edits]),
                         torch.stack([concepts[n].d_star for n in edits]))
    return e_perp, gate(sims, beta, tau)


def _stacked(targets: list[list[Tensor]], gates: Tensor) -> list[Tensor]:
    """n lists over layers of (width_l,) -> a list over layers of (n, width_l), in the dtype of gates."""
    return [torch.stack(layer).to(gates) for layer in zip(*targets, strict=True)]


# ------------------------------------------------------------------------------- from prompts to encodings

def encode(text_encoder, tokenizer, prompts: list[str],
           concepts: list[Concept]) -> tuple[Tensor, Tensor, list[dict]]:
    """Encode prompts that may name concepts ("a <teddy> on the beach").

    Returns e (B, T, d) with the concepts' embeddings, e_super (B, T, d) with their super-categories instead,
    at the same places, and positions: for every prompt, token -> occurrences -> token indices.
    """
    ids, positions = tokenizer.encode(prompts, {concept.token: concept.words for concept in concepts})
    ordinary = text_encoder.embed(ids.to(next(text_encoder.parameters()).device))
    learned = insert(ordinary, positions, concepts)
    return text_encoder(learned), text_encoder(ordinary), positions


def insert(embeddings: Tensor, positions: list[dict], concepts: list[Concept]) -> Tensor:
    """Write the concepts' word embeddings (k, d) into a copy of embeddings (B, T, d) at their occurrences."""
    for concept in concepts:
        places = [(b, t, row) for b, found in enumerate(positions) for place in found.get(concept.token, [])
                  for row, t in enumerate(place)]
        if places:
            b, t, row = torch.tensor(places, device=embeddings.device).T
            embeddings = embeddings.index_put((b, t), concept.embedding.to(embeddings)[row])
    return embeddings


@torch.no_grad()
def super_encoding(text_encoder, tokenizer, super_category: str) -> Tensor:
    """i_super (d,): the encoding of the super-category's last token, averaged over TEMPLATES."""
    prompts = [template.format("<super>") for template in TEMPLATES]
    ids, positions = tokenizer.encode(prompts, {"<super>": super_category})
    if not all(found.get("<super>") for found in positions):
        raise ValueError(f'the super-category "{super_category}" is empty or too long for the text encoder')
    e = text_encoder(text_encoder.embed(ids.to(next(text_encoder.parameters()).device)))
    last = [found["<super>"][0][-1] for found in positions]
    return at_least_float32(e[range(len(last)), last]).mean(0)


@torch.no_grad()
def locked_keys(model, super_category: str) -> list[Tensor]:
    """The key lock, o_star_K = W_K i_super (section 4): per layer (width_l,)."""
    i_super = super_encoding(model.text_encoder, model.tokenizer, super_category)
    return [at_least_float32(o) for o in model.unet.keys(i_super.to(next(model.unet.parameters())))]


class Projection(NamedTuple):
    """What the U-Net sees of B prompts, and where the concepts stand in them."""
    keys: list[Tensor]              # per layer (B, T, width_l)
    values: list[Tensor]            # per layer (B, T, width_l)
    positions: list[dict]           # per prompt: token -> occurrences -> token indices
    gates: Tensor | None            # (B, T, n) of the n concepts that edit, None without any


@torch.no_grad()
def project(model, prompts: list[str], concepts: list[Concept], beta: float | Sequence[float] = DRAWING_BETA,
            tau: float | Sequence[float] = DRAWING_TAU, lock: str = "local") -> Projection:
    """From prompts and prepared concepts to the keys and values of every layer: all that drawing needs.

    model: anything with unet, text_encoder and tokenizer. beta, tau: one number, or one per concept.
    lock: "local" or "global", for which DRAWING_GLOBAL_BETA suits.
    """
    e, e_super, positions = encode(model.text_encoder, model.tokenizer, prompts, concepts)
    keys, values, gates = keys_and_values(model.unet, e, e_super, concepts, beta, tau, lock)
    return Projection(keys, values, positions, gates)


# ---------------------------------------------------------------------------------- the concept and its file

@dataclass
class Concept:
    """A learned concept: the word embedding, i_star and one value target per layer are all there is to it.

    token          its name in a prompt, "<teddy>"
    super_category ordinary words for the kind of thing, "teddy bear"
    embedding      (k, d) word embedding, trained, one row per token of the super-category
    i_star, d_star (d,); None for textual inversion
    values         o_star of the values, trained: list over layers, in order of execution, of (width_l,)
    keys           o_star of the keys, the same; if locked, not in the file but computed by `prepare`
    beta, tau      the gate in training; inference chooses its own
    lock           one of LOCKS
    metadata       what else the file says, JSON; "base" is the fingerprint of the base model
    layers         a name per layer, for the file: `unet.layer_names()`
    """
    token: str
    super_category: str
    embedding: Tensor
    i_star: Tensor | None = None
    d_star: Tensor | None = None
    values: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] | None = None
    beta: float = TRAINING_BETA
    tau: float = TRAINING_TAU
    lock: str = "locked"
    metadata: dict = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)

    @property
    def words(self) -> str:
        """The ordinary words that hold the concept's place: as many tokens as the concept has embeddings.

        They are the super-category, or its last word when the concept is a single token of a longer one.
        """
        return self.super_category if len(self.embedding) > 1 else self.super_category.split()[-1]

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write a safetensors file, whole or not at all; equal concepts are equal bytes.

        ValueError if a number is not finite in `dtype`, OSError if the file cannot be written.
        """
        tensors = {"embedding": self.embedding}
        if self.lock != "none":
            # The scale of d_star cancels in `split`; a largest entry of 1 keeps it inside float16's range.
            tensors |= {"i_star": self.i_star, "d_star": self.d_star / self.d_star.abs().max()}
            tensors |= {f"values.{name}": o for name, o in zip(self.layers, self.values, strict=True)}
        if self.lock == "trained":
            tensors |= {f"keys.{name}": o for name, o in zip(self.layers, self.keys, strict=True)}
        tensors = {name: x.detach().to("cpu", dtype).contiguous() for name, x in tensors.items()}
        for name, x in tensors.items():
            if not x.isfinite().all():
                raise ValueError(f"{self.token} cannot be saved: its {name} is not finite in {dtype}")
        header = {"format": FORMAT, "token": self.token, "super_category": self.super_category,
                  "lock": self.lock, "beta": self.beta, "tau": self.tau, "metadata": self.metadata}
        with replacing(path) as partial:    # one entry: the package writes several in random order
            save_file(tensors, partial, {"concept": json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> Concept:
        """Read a concept file into float32; its locked keys are still to `prepare`. ValueError, OSError."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: there is no such concept file")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path} is too large to be a concept: {path.stat().st_size / 1e6:.0f} MB")
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("concept", "{}"))
                x = {name: file.get_tensor(name).float() for name in file.keys()}
        except (SafetensorError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a concept file, or is damaged: {error}") from error
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ValueError(f"{path} is not a concept file of this version: train the concept again")
        # In alphabetical order the blocks are in order of execution: down, mid, up.
        layers = sorted(name.removeprefix("values.") for name in x if name.startswith("values."))
        try:
            concept = cls(header["token"], header["super_category"], x["embedding"], x.get("i_star"),
                          x.get("d_star"), [x[f"values.{name}"] for name in layers],
                          [x[f"keys.{name}"] for name in layers] if header["lock"] == "trained" else None,
                          float(header["beta"]), float(header["tau"]), header["lock"],
                          dict(header["metadata"]), layers)
            sound = concept._is_sound()
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
            sound = False
        if not sound:
            raise ValueError(f"{path} is damaged: its names, numbers or shapes are not those of a concept")
        return concept

    def _is_sound(self):
        """True if types, shapes and numbers are those of a concept; may raise if they are not."""
        targets = self.values + (self.keys or [])
        vectors = [] if self.lock == "none" else [self.i_star, self.d_star]
        return (self.token.strip("<>") and self.super_category.strip()
                and self.lock in LOCKS and 0 < self.tau < float("inf")
                and self.embedding.ndim == 2 and len(self.embedding) > 0
                and all(x.shape == self.embedding.shape[1:] for x in vectors)
                and bool(targets) == bool(vectors) and all(o.ndim == 1 for o in targets)
                and all(x.isfinite().all() for x in [self.embedding, *vectors, *targets])
                and (not vectors or self.i_star @ self.d_star > 0))


def prepare(concepts: list[Concept], model) -> list[Concept]:
    """Concepts as `Concept.load` returns them, checked against a base model and given their locked keys.

    model: anything with unet, text_encoder, tokenizer, fingerprint and name (`weights_loader.Model`).
    ValueError for a concept of another base model, for two of one name, and for two that are equal.
    """
    prepared = []
    for concept in concepts:
        base = concept.metadata.get("base")
        if base != model.fingerprint:
            raise ValueError(f"{concept.token} was trained on another base model ({base}) than {model.name} "
                             f"({model.fingerprint}): load that one, or train the concept anew")
        if concept.token in [other.token for other in prepared]:
            raise ValueError(f"two concepts are called {concept.token}: train one again with another --token")
        _, (found,) = model.tokenizer.encode([concept.token], {concept.token: concept.words})
        keys = locked_keys(model, concept.super_category)
        if [len(place) for place in found[concept.token]] != [len(concept.embedding)] \
                or concept.embedding.shape[1] != model.text_encoder.config.width \
                or concept.lock != "none" and any([o.shape for o in side] != [o.shape for o in keys]
                                                  for side in (concept.values, concept.keys or keys)):
            raise ValueError(f"{concept.token} does not fit {model.name}: its file is damaged")
        prepared.append(dataclasses.replace(concept, keys=keys) if concept.lock == "locked" else concept)
    _check_pairs([concept for concept in prepared if concept.lock != "none"])
    return prepared


def _check_pairs(concepts: list[Concept]) -> None:
    """Warn of two concepts of one kind, whose words open each other's gate; ValueError for two equal ones."""
    for a, b in itertools.combinations(concepts, 2):
        ab, ba = (float(x.i_star @ y.d_star / (y.i_star @ y.d_star)) for x, y in ((a, b), (b, a)))
        if ab * ba > SAME:          # the squared cosine in the metric: `split` would have no solution
            raise ValueError(f"{a.token} and {b.token} cannot be told apart, each word opens the gate of both "
                             f"(sim/energy {ab:.2f} and {ba:.2f}): use only one of them")
        if max(ab, ba) > DRAWING_BETA:
            warnings.warn(f"{a.token} and {b.token} are of one kind: the word of one opens the gate of the "
                          f"other (sim/energy {ab:.2f} and {ba:.2f}), so their looks will mix", stacklevel=3)
