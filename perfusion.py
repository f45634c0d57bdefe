"""Perfusion: key-locked, gated rank-1 editing (Tewel et al., SIGGRAPH 2023, arXiv 2305.01644).

In every cross-attention layer the encodings e of the prompt's tokens become keys W_K e, which decide *where*
a word acts, and values W_V e, which decide *what* it puts there. A concept ("my teddy bear") is an edit of
these linear maps: it keeps the keys of its super-category ("teddy bear") and learns only its values and its
word embedding.

Letters, as in the paper:
    e         (B, T, d)      encodings of B prompts of T tokens
    i_star    (d,)           target input: encoding of the concept's last token, a running mean over training
    o_star    (width,)       target output, one per layer: keys W_K i_super (locked), values learned
    i_super   (d,)           encoding of the super-category's last token
    C         (d, d)         uncentred covariance of encodings: unrelated words have a C^-1 b of about 0
    d_star    (d,)           C^-1 i_star
    I, D      (n, d)         i_star and d_star of n concepts, one row each

The file knows no network: a U-Net only has to offer `keys(e)` and `values(e)`, lists with an entry per layer.
The order of use: `Concept.load`, `prepare`, `encode`, `keys_and_values`, `unet(z, t, keys, values)`.
"""

import dataclasses
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

TEMPLATES = ("a photo of a {}", "a good photo of a {}", "the photo of a {}", "a good photo of the {}",
             "image of a {}", "image of the {}", "a photograph of {}", "a {} shown in a photo",
             "a photo of {}")
TRAINING_BETA, TRAINING_TAU = 0.75, 0.1     # paper, section 4
LOCKS = ("locked", "trained", "none")       # of a concept's keys; "none" is textual inversion: no edit at all
FORMAT = 1                                  # of the concept file


# ------------------------------------------------------------------------------------------------- the method

def split(e: Tensor, I: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """Split encodings into the part along the concepts and the part orthogonal to them, in the metric C^-1.

        e_perp = e - (e D^T) (I D^T)^-1 I          sims_j = e . d_j / i_j . d_j  = sim_j / energy_j

    The paper's appendix B writes the same projection with Cholesky + QR; for one concept it is eq. 3's
    e_perp = e - i_star sim / energy. Any scale of a row of D cancels.
    e (B, T, d), I and D (n, d) -> e_perp (B, T, d) in e's dtype, sims (B, T, n) in at least float32: the
    metric is ill-conditioned, so it is never computed in half precision.
    """
    with torch.autocast(e.device.type, enabled=False):
        x = _precise(e)
        I, D = I.to(x), D.to(x)
        similarity, energy = x @ D.T, I @ D.T
        e_perp = x - similarity @ torch.linalg.solve(energy, I)
        return e_perp.to(e.dtype), similarity / energy.diagonal()


def _precise(x: Tensor) -> Tensor:
    """float16 and bfloat16 -> float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gate(sims: Tensor, beta, tau) -> Tensor:
    """Eq. 3's sigmoid((sim / energy - beta) / tau). sims (B, T, n); beta, tau one number, or one per concept.

    It takes the place of the linear weight: words far from i_star are left alone; beta sets how near is near.
    """
    beta, tau = (torch.as_tensor(x, dtype=sims.dtype, device=sims.device) for x in (beta, tau))
    return torch.sigmoid((sims - beta) / tau)


def edit(project, e_perp: Tensor, gates: Tensor, targets: list[Tensor]) -> list[Tensor]:
    """Eq. 3 in every layer: h(e) = W e_perp + sum_j gate_j(e) o_star_j. With gates = sims it is ROME's edit.

    project: `unet.keys` or `unet.values`, (B, T, d) -> list of (B, T, width_l). gates (B, T, n).
    targets: per layer (n, width_l). Returns a list of (B, T, width_l).
    """
    return [h + (gates @ o).to(h.dtype) for h, o in zip(project(e_perp), targets, strict=True)]


def running_mean(i_star: Tensor, e_concept: Tensor, decay: float = 0.99) -> Tensor:
    """Section 4: i_star <- 0.99 i_star + 0.01 mean of e_concept (B, d), its encodings in a batch."""
    return decay * i_star + (1 - decay) * e_concept.detach().to(i_star).mean(0)


# ------------------------------------------------------------------------------------------------ the concept

@dataclass
class Concept:
    """A learned concept: the word embedding, i_star and one value target per layer are all there is to it.

    token          its name in a prompt, "<teddy>"
    super_category ordinary words for the kind of thing, "teddy bear"
    embedding      (k, d) word embedding, one row per token of the super-category
    i_star, d_star (d,); None for textual inversion
    values         o_star of the values: list over layers, in order of execution, of (width_l,)
    keys           o_star of the keys, the same; if locked, not in the file but computed by `prepare`
    beta, tau      the gate in training; inference chooses its own
    lock           one of LOCKS
    metadata       str -> str, stored in the file; "base" is the fingerprint of the base model
    layers         a name per layer, for the file: see `layer_names`
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
    metadata: dict[str, str] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)

    @property
    def words(self) -> str:
        """The ordinary words that hold the concept's place: as many tokens as the concept has embeddings.

        They are the super-category, or its last word when the concept is a single token of a longer one.
        """
        return self.super_category if len(self.embedding) > 1 else self.super_category.split()[-1]

    def save(self, path, dtype: torch.dtype = torch.float16) -> None:
        """Write a safetensors file, atomically. ValueError if a number is not finite in `dtype`."""
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
        header = {**self.metadata, "format": FORMAT, "token": self.token, "beta": self.beta, "tau": self.tau,
                  "super_category": self.super_category, "lock": self.lock}
        # The package writes metadata in random order; here equal concepts are equal files.
        content = save(tensors)
        length = int.from_bytes(content[:8], "little")
        strings = {key: str(value) for key, value in sorted(header.items())}
        text = json.dumps({"__metadata__": strings} | json.loads(content[8:8 + length])).encode()
        text += b" " * (-len(text) % 8)
        partial = Path(f"{path}.partial")
        partial.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length:])
        os.replace(partial, path)

    @classmethod
    def load(cls, path) -> "Concept":
        """Read a concept file into float32; its locked keys are still to `prepare`. ValueError, OSError."""
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name).float() for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a concept file, or is damaged: {error}") from error
        needed = {"embedding"} if header.get("lock") == "none" else {"embedding", "i_star", "d_star"}
        if not {"format", "token", "super_category", "lock", "beta", "tau"} <= header.keys() \
                or not needed <= tensors.keys():
            raise ValueError(f"{path} is a safetensors file but not a concept made by train.py")
        if header.pop("format") != str(FORMAT):
            raise ValueError(f"{path} has a format unknown to this version: use the version that wrote it")
        # In alphabetical order the blocks are in order of execution: down, mid, up.
        layers = sorted(name.removeprefix("values.") for name in tensors if name.startswith("values."))
        lock = header.pop("lock")
        return cls(token=header.pop("token"), super_category=header.pop("super_category"),
                   embedding=tensors["embedding"], i_star=tensors.get("i_star"), d_star=tensors.get("d_star"),
                   values=[tensors[f"values.{name}"] for name in layers],
                   keys=[tensors[f"keys.{name}"] for name in layers] if lock == "trained" else None,
                   beta=float(header.pop("beta")), tau=float(header.pop("tau")), lock=lock,
                   metadata=header, layers=layers)


def layer_names(unet) -> list[str]:
    """Names of the cross-attention layers in order of execution: down.0.0, ..., mid.0, up.1.0, ..."""
    names = {module: name for name, module in unet.named_modules()}
    short = re.compile(r"(down|mid|up)_block(?:s(\.\d+))?\.attentions(\.\d+)\.")
    return ["".join(part or "" for part in short.match(names[layer]).groups())
            for layer in unet.cross_attentions]


def prepare(concepts: list[Concept], model) -> list[Concept]:
    """Concepts as `Concept.load` returns them, checked against a base model and given their locked keys.

    model: anything with unet, text_encoder, tokenizer, fingerprint and name (`weights_loader.Model`).
    ValueError for a concept of another base model and for two concepts of one name.
    """
    prepared = []
    for concept in concepts:
        base = concept.metadata.get("base")
        if base != model.fingerprint:
            raise ValueError(f"{concept.token} was trained on another base model ({base}) than {model.name} "
                             f"({model.fingerprint}): load that one, or train the concept anew")
        if concept.token in [other.token for other in prepared]:
            raise ValueError(f"two concepts are called {concept.token}: train one again with another --token")
        keys = locked_keys(model, concept.super_category) if concept.lock == "locked" else concept.keys
        prepared.append(dataclasses.replace(concept, keys=keys))
    return prepared


# ----------------------------------------------------------------------------------------- prompts to K and V

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
    return torch.stack([_precise(e[b, found["<super>"][0][-1]]) for b, found in enumerate(positions)]).mean(0)


@torch.no_grad()
def locked_keys(model, super_category: str) -> list[Tensor]:
    """The key lock, o_star_K = W_K i_super (section 4): per layer (width_l,)."""
    i_super = super_encoding(model.text_encoder, model.tokenizer, super_category)
    return [_precise(o) for o in model.unet.keys(i_super.to(next(model.unet.parameters())))]


def keys_and_values(unet, e: Tensor, e_super: Tensor | None, concepts: list[Concept], beta: list[float],
                    tau: list[float], lock: str = "local") -> tuple[list[Tensor], list[Tensor]]:
    """K and V of every layer with the concepts' edits: the method, in training and at inference.

    e, e_super (B, T, d) from `encode`; beta, tau one number per concept. lock "local": every concept brings
    its own key target. lock "global": the keys of the whole prompt are those of e_super, needed only then.
    Returns two lists of (B, T, width_l), ready for `unet(z, t, keys, values)`; compute them once per prompt.
    """
    if lock not in ("local", "global"):
        raise ValueError(f'the lock is "local" or "global", not "{lock}"')
    edited = [(c, b, t) for c, b, t in zip(concepts, beta, tau, strict=True) if c.lock != "none"]
    if not edited:
        return unet.keys(e_super if lock == "global" else e), unet.values(e)
    concepts, beta, tau = zip(*edited)
    I, D = torch.stack([c.i_star for c in concepts]), torch.stack([c.d_star for c in concepts])
    e_perp, sims = split(e, I, D)
    gates = gate(sims, beta, tau)
    values = edit(unet.values, e_perp, gates, _stacked([c.values for c in concepts], gates))
    if lock == "global":
        return unet.keys(e_super), values
    if any(c.keys is None for c in concepts):
        raise ValueError("a concept's locked keys are missing: call prepare(concepts, model)")
    return edit(unet.keys, e_perp, gates, _stacked([c.keys for c in concepts], gates)), values


def _stacked(targets: list[list[Tensor]], gates: Tensor) -> list[Tensor]:
    """n lists over layers of (width_l,) -> a list over layers of (n, width_l), in the dtype of gates."""
    return [torch.stack(layer).to(gates) for layer in zip(*targets, strict=True)]
