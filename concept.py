"""A learned concept, its file, and what is checked before it is used.

    concepts = prepare([Concept.load("teddy.safetensors")], model)
    keys, values, positions, gates = perfusion.condition(model, ["", "a <teddy> on the beach"], concepts)
"""

import itertools
import json
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

import perfusion
from support.files import what_is, write

KEYS = ("locked", "trained", "none")        # what a concept's keys are; "none" is textual inversion: no edit
FORMAT = 2                                  # of the concept file
SAME = 0.999                                # squared cosine of two i_star, from which they count as equal


@dataclass
class Concept:
    """A learned concept: the word embedding, i_star with its d_star, and one value target per layer.

    token           its name in a prompt, "<teddy>"
    super_category  ordinary words for the kind of thing, "teddy bear"
    embedding       (k, d) word embedding, trained, one row per token of the super-category
    i_star, d_star  (d,); None for textual inversion
    o_values        o_star of the values, trained: list over layers, in order of execution, of (width_l,)
    o_keys          o_star of the keys, the same; if locked, not in the file but computed by `prepare`
    beta, tau       the gate in training; inference chooses its own
    keys            one of KEYS
    metadata        what else the file says, JSON; "base" is the fingerprint of the base model
    layers          a name per layer, for the file: `unet.layer_names()`
    """
    token: str
    super_category: str
    embedding: Tensor
    i_star: Tensor | None = None
    d_star: Tensor | None = None
    o_values: list[Tensor] = field(default_factory=list)
    o_keys: list[Tensor] | None = None
    beta: float = perfusion.TRAINING_BETA
    tau: float = perfusion.TRAINING_TAU
    keys: str = "locked"
    metadata: dict = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)

    @property
    def edits(self) -> bool:
        """Whether it edits keys and values; textual inversion does not."""
        return self.keys != "none"

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
        if self.edits:
            # The scale of d_star cancels in `split`; a largest entry of 1 keeps it inside float16's range.
            tensors |= {"i_star": self.i_star, "d_star": self.d_star / self.d_star.abs().max()}
            tensors |= {f"values.{name}": o for name, o in zip(self.layers, self.o_values, strict=True)}
        if self.keys == "trained":
            tensors |= {f"keys.{name}": o for name, o in zip(self.layers, self.o_keys, strict=True)}
        tensors = {name: x.detach().to("cpu", dtype).contiguous() for name, x in tensors.items()}
        for name, x in tensors.items():
            if not x.isfinite().all():
                raise ValueError(f"{self.token} cannot be saved: its {name} is not finite in {dtype}")
        header = {"format": FORMAT, "token": self.token, "super_category": self.super_category,
                  "lock": self.keys, "beta": self.beta, "tau": self.tau, "metadata": self.metadata}
        # One entry: the package writes several in random order.
        write(path, save(tensors, {"concept": json.dumps(header, sort_keys=True)}))

    @classmethod
    def load(cls, path: str | Path) -> "Concept":
        """Read a concept file into float32; its locked keys are still to `prepare`. ValueError, OSError."""
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("concept", "{}"))
                if header.get("format") != FORMAT:      # said before all tensors of a large file are read
                    raise ValueError(f"no concept of format {FORMAT} is in it")
                x = {name: file.get_tensor(name).float() for name in file.keys()}
            # In alphabetical order the blocks are in order of execution: down, mid, up.
            layers = sorted(name.removeprefix("values.") for name in x if name.startswith("values."))
            concept = cls(header["token"], header["super_category"], x["embedding"], x.get("i_star"),
                          x.get("d_star"), [x[f"values.{name}"] for name in layers],
                          [x[f"keys.{name}"] for name in layers] if header["lock"] == "trained" else None,
                          float(header["beta"]), float(header["tau"]), header["lock"],
                          dict(header["metadata"]), layers)
            if not concept._is_sound():
                raise ValueError("its names, numbers or shapes are not those of a concept")
        except Exception as error:      # a damaged file can fail in any way
            raise ValueError(f"{path} is {what_is(path)}, and not usable as a concept: {error}") from error
        return concept

    def _is_sound(self) -> bool:
        """True if types and numbers are those of a concept; may raise if not. `prepare` sees the shapes."""
        vectors = [self.i_star, self.d_star] if self.edits else []
        tensors = [self.embedding, *vectors, *self.o_values, *(self.o_keys or [])]
        return (bool(self.token.strip("<>") and self.super_category.strip())
                and self.keys in KEYS and 0 < self.tau < float("inf") and self.embedding.ndim == 2
                and all(x.shape == self.embedding.shape[1:] for x in vectors)
                and all(x.isfinite().all() for x in tensors)
                and (not vectors or bool(self.i_star @ self.d_star > 0)))


def prepare(concepts: list[Concept], model) -> list[Concept]:
    """Concepts as `Concept.load` returns them, checked against a base model and given their locked keys.

    model: anything with unet, text_encoder, tokenizer, fingerprint and name (`weights_loader.Model`).
    ValueError for a concept of another base model or that does not fit it, for two of one name, and for two
    that are equal; a warning for two of one kind.
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
        keys = perfusion.locked_keys(model, concept.super_category)
        if [len(place) for place in found[concept.token]] != [len(concept.embedding)] \
                or concept.embedding.shape[1] != model.text_encoder.config.width \
                or concept.edits and any([o.shape for o in side] != [o.shape for o in keys]
                                         for side in (concept.o_values, concept.o_keys or keys)):
            raise ValueError(f"{concept.token} does not fit {model.name}: its file is damaged")
        prepared.append(replace(concept, o_keys=keys) if concept.keys == "locked" else concept)
    _check_pairs([concept for concept in prepared if concept.edits])
    return prepared


def _check_pairs(concepts: list[Concept]) -> None:
    """Warn of two concepts of one kind, whose words open each other's gate; ValueError for two equal ones."""
    for a, b in itertools.combinations(concepts, 2):
        ab, ba = (float(x.i_star @ y.d_star / (y.i_star @ y.d_star)) for x, y in ((a, b), (b, a)))
        if ab * ba > SAME:          # the squared cosine in the metric: `split` would have no solution
            raise ValueError(f"{a.token} and {b.token} cannot be told apart, sim/energy {ab:.2f} and {ba:.2f}: "
                             "use only one of them")
        if max(ab, ba) > perfusion.DRAWING_BETA["local"]:
            warnings.warn(f"{a.token} and {b.token} are of one kind: the word of one opens the gate of the "
                          f"other (sim/energy {ab:.2f} and {ba:.2f}), so their looks will mix", stacklevel=3)
