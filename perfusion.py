"""Perfusion: key-locked, gated rank-1 editing (Tewel et al., SIGGRAPH 2023, arXiv 2305.01644).

In every cross-attention layer, the encodings e of a prompt's tokens become keys W_K e, which decide *where* a
word acts, and values W_V e, which decide *what* it puts there. A concept ("my teddy bear") edits both maps.

**Why rank one, and why C^-1.** The new map W' should send the concept's encoding i* to a chosen output o*:

    W' i* = o*                                                                  (the constraint)

Many W' do that. Take the one that changes the outputs for ordinary text least. Over captions with encodings e
and C = E[e e^T], the mean change is

    E |(W' - W) e|^2 = trace((W' - W) C (W' - W)^T)                             (what is minimised)

so C is the metric, and its inverse enters the solution, the equation of the paper's title:

    W' = W + (o* - W i*) (C^-1 i*)^T / (i*^T C^-1 i*)

W' - W is a column times a row: a matrix of rank one. The product of the row (C^-1 i*)^T with the encoding of
an unrelated word is about 0. Source of this closed form: ROME (Meng et al. 2022, arXiv 2202.05262), with the
covariance of keys over text. For an encoding e, with sim = e . C^-1 i* and energy = i* . C^-1 i*, it says

    W' e = W e_perp + o* sim / energy             e_perp = e - i* sim / energy: e without its part along i*

**The gate.** Perfusion puts a sigmoid in the place of the linear weight sim / energy:

    h(e) = W e_perp + gate(e) o*                  gate(e) = sigmoid((sim / energy - beta) / tau)

Near 1 for the concept's own word, near 0 for others. beta says how near to i* a word must be to open the
gate; it is chosen anew for every drawing: a lower beta shows more of the concept.

**The lock.** Where: o* of the keys is the key of the super-category ("teddy bear"). It is never trained.
What: o* of the values is trained, one vector per layer, and so is the word's embedding. Nothing else is.

**Several concepts**, trained apart: e_perp leaves out all of them at once, and each adds its own o* through
its own gate. They stay apart as long as the word of one does not open the gate of another.

Letters, as in the paper, with i* = i_star:
    e         (B, T, d)      encodings of B prompts of T tokens
    i_star    (d,)           target input: encoding of the concept's last token, a running mean over training
    o_star    (width,)       target output, one per layer, for the keys and for the values
    i_super   (d,)           encoding of the super-category's last token
    C         (d, d)         uncentred covariance of encodings, from covariance.py
    d_star    (d,)           C^-1 i_star
    I, D      (n, d)         i_star and d_star of n concepts, one row each

This file knows no network: a U-Net only has to offer `keys(e)` and `values(e)`, lists over layers. A concept
is what concept.py defines.

    keys, values, positions, gates = condition(model, ["", "a <teddy> on the beach"], concepts)
    noise = model.unet(z, t, keys, values)
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TEMPLATES = ("a photo of a {}", "a good photo of a {}", "the photo of a {}", "a good photo of the {}",
             "image of a {}", "image of the {}", "a photograph of {}", "a {} shown in a photo",
             "a photo of {}")                           # of the training prompts: paper, section 4
TRAINING_BETA, TRAINING_TAU = 0.75, 0.1                 # paper, section 4
DRAWING_BETA = {"local": 0.7, "global": 0.5}            # by lock: the middle of the paper's ranges, section 5
DRAWING_TAU = 0.15                                      # section 5: softer than in training
Number = float | Sequence[float]                        # one for all concepts, or one for each


# -------------------------------------------------------------------------------------------- the equations

def split(e: Tensor, I: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """Split encodings into the part along the concepts and the part orthogonal to them, in the metric C^-1.

        e_perp = e - (e D^T) (I D^T)^-1 I          ratio_j = e . d_j / i_j . d_j  = sim_j / energy_j

    The paper's appendix B writes the same projection with Cholesky + QR; for one concept it is eq. 3's
    e_perp = e - i_star sim / energy. Any scale of a row of D cancels.
    e (B, T, d), I and D (n, d) -> e_perp (B, T, d) in e's dtype, ratio (B, T, n) in at least float32: the
    metric is ill-conditioned, so it is never computed in half precision.
    """
    with torch.autocast(e.device.type, enabled=False):
        x = at_least_float32(e)
        I, D = I.to(x), D.to(x)
        sim, energy = x @ D.T, I @ D.T
        e_perp = x - sim @ torch.linalg.solve(energy, I)
        return e_perp.to(e.dtype), sim / energy.diagonal()


def gate(ratio: Tensor, beta: Number, tau: Number) -> Tensor:
    """Eq. 3's sigmoid((sim / energy - beta) / tau). ratio (B, T, n) = sim / energy -> gates (B, T, n)."""
    beta, tau = (torch.as_tensor(x, dtype=ratio.dtype, device=ratio.device) for x in (beta, tau))
    return torch.sigmoid((ratio - beta) / tau)


def edit(linear: Callable, e_perp: Tensor, gates: Tensor, targets: list[Tensor]) -> list[Tensor]:
    """Eq. 3 in every layer: h(e) = W e_perp + sum_j gate_j(e) o_star_j. With gates = ratio it is W' e.

    linear: `unet.keys` or `unet.values`, (B, T, d) -> list of (B, T, width_l). gates (B, T, n).
    targets: per layer (n, width_l). Returns a list of (B, T, width_l).
    """
    return [h + (gates @ o).to(h.dtype) for h, o in zip(linear(e_perp), targets, strict=True)]


def running_mean(i_star: Tensor, e_concept: Tensor, decay: float) -> Tensor:
    """Section 4: i_star <- decay i_star + (1 - decay) e_concept.

    e_concept (d,): the mean encoding of the concept's word in a batch. It moves while the embedding is trained;
    i_star follows slowly, so that the values can learn.
    """
    return decay * i_star + (1 - decay) * e_concept.detach().to(i_star)


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 -> float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------------------------- from encodings to K and V

def keys_and_values(unet, e: Tensor, e_super: Tensor | None, concepts: list, beta: Number, tau: Number,
                    lock: str = "local") -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """K and V of every layer with the concepts' edits: the method, in training and at inference.

    e, e_super (B, T, d) from `encode`. lock "local": every concept brings its own target of the keys. lock
    "global": the keys of the whole prompt are those of e_super, needed only then. Returns two lists over
    layers of (B, T, width_l), ready for `unet(z, t, keys, values)`, and the gates (B, T, n) of the n concepts
    that edit, None without any. The text is the same in all denoising steps, so once is enough. ValueError
    for another lock, and for a concept without its locked keys.
    """
    if lock not in DRAWING_BETA:
        raise ValueError(f'the lock is "local" or "global", not "{lock}"')
    edits = [concept for concept in concepts if concept.edits]
    if not edits:
        return unet.keys(e_super if lock == "global" else e), unet.values(e), None
    e_perp, gates = split_and_gate(e, concepts, beta, tau)
    values = edit(unet.values, e_perp, gates, _stacked([concept.o_values for concept in edits], gates))
    if lock == "global":
        return unet.keys(e_super), values, gates
    if any(concept.o_keys is None for concept in edits):
        raise ValueError("a concept's locked keys are missing: call prepare(concepts, model)")
    keys = edit(unet.keys, e_perp, gates, _stacked([concept.o_keys for concept in edits], gates))
    return keys, values, gates


def split_and_gate(e: Tensor, concepts: list, beta: Number, tau: Number) -> tuple[Tensor, Tensor]:
    """e_perp (B, T, d), and the gates (B, T, n) of those n >= 1 concepts that edit."""
    edits = [n for n, concept in enumerate(concepts) if concept.edits]
    beta, tau = (torch.as_tensor(x, dtype=torch.float64).expand(len(concepts))[edits] for x in (beta, tau))
    e_perp, ratio = split(e, torch.stack([concepts[n].i_star for n in edits]),
                          torch.stack([concepts[n].d_star for n in edits]))
    return e_perp, gate(ratio, beta, tau)


def _stacked(targets: list[list[Tensor]], gates: Tensor) -> list[Tensor]:
    """n lists over layers of (width_l,) -> a list over layers of (n, width_l), in the dtype of gates."""
    return [torch.stack(layer).to(gates) for layer in zip(*targets, strict=True)]


# ------------------------------------------------------------------------------- from prompts to encodings

def encode(text_encoder, tokenizer, prompts: list[str], concepts: list) -> tuple[Tensor, Tensor, list[dict]]:
    """Encode prompts that may name concepts ("a <teddy> on the beach").

    Returns e (B, T, d) with the concepts' embeddings, e_super (B, T, d) with their super-categories instead,
    at the same places, and positions: for every prompt, token -> occurrences -> token indices.
    """
    ids, positions = tokenizer.encode(prompts, {concept.token: concept.words for concept in concepts})
    ordinary = text_encoder.embed(ids)
    learned = insert(ordinary, positions, concepts)
    return text_encoder(learned), text_encoder(ordinary), positions


def insert(embeddings: Tensor, positions: list[dict], concepts: list) -> Tensor:
    """embeddings (B, T, d) with the concepts' own (k, d) at their occurrences; no argument is changed."""
    for concept in concepts:
        places = [(b, t, row) for b, found in enumerate(positions) for place in found.get(concept.token, [])
                  for row, t in enumerate(place)]
        if places:
            b, t, row = torch.tensor(places, device=embeddings.device).T
            embeddings = embeddings.index_put((b, t), concept.embedding.to(embeddings)[row])
    return embeddings


@torch.no_grad()
def super_encoding(text_encoder, tokenizer, super_category: str) -> Tensor:
    """i_super (d,): the encoding of the super-category's last token, averaged over TEMPLATES.

    ValueError if the super-category is empty or too long.
    """
    prompts = [template.format("<super>") for template in TEMPLATES]
    ids, positions = tokenizer.encode(prompts, {"<super>": super_category})
    if not all(found.get("<super>") for found in positions):
        raise ValueError(f'the super-category "{super_category}" is empty or too long for the text encoder')
    e = text_encoder(text_encoder.embed(ids))
    last = [found["<super>"][0][-1] for found in positions]
    return at_least_float32(e[range(len(last)), last]).mean(0)


@torch.no_grad()
def locked_keys(model, super_category: str) -> list[Tensor]:
    """The key lock, o_star_K = W_K i_super (section 4): per layer (width_l,)."""
    i_super = super_encoding(model.text_encoder, model.tokenizer, super_category)
    return [at_least_float32(o) for o in model.unet.keys(i_super.to(next(model.unet.parameters())))]


class Conditioning(NamedTuple):
    """What the U-Net sees of B prompts, and where the concepts stand in them."""
    keys: list[Tensor]              # per layer (B, T, width_l)
    values: list[Tensor]            # per layer (B, T, width_l)
    positions: list[dict]           # per prompt: token -> occurrences -> token indices
    gates: Tensor | None            # (B, T, n) of the n concepts that edit, None without any


@torch.no_grad()
def condition(model, prompts: list[str], concepts: list, beta: Number | None = None,
              tau: Number = DRAWING_TAU, lock: str = "local") -> Conditioning:
    """From prompts and prepared concepts to the keys and values of every layer: all that drawing needs.

    model: anything with unet, text_encoder and tokenizer. concepts: from `concept.prepare`.
    lock: "local" or "global". beta: by default the DRAWING_BETA of this lock. ValueError as keys_and_values.
    """
    beta = DRAWING_BETA.get(lock) if beta is None else beta
    e, e_super, positions = encode(model.text_encoder, model.tokenizer, prompts, concepts)
    keys, values, gates = keys_and_values(model.unet, e, e_super, concepts, beta, tau, lock)
    return Conditioning(keys, values, positions, gates)
