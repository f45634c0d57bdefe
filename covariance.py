"""The covariance C = mean(e e^T) of text encodings: the metric in which Perfusion's edit is orthogonal.

It belongs to a base model, not to a concept, is computed once over many captions, and is kept beside the
weights (or in the user's cache folder, where the weights' folder cannot be written).

    python covariance.py --weights sd15                                    # 10,000 built-in captions
    python covariance.py --weights sd15 --captions captions.txt            # one caption per line
"""

import contextlib
import json
import os
import random
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from support import command_line
from support.base_model import open_model
from support.files import read_lines, write

CAPTIONS = 10_000       # thirteen times SD v1's 768 dimensions
FILE = "covariance.safetensors"
BATCH = 64              # captions encoded at once: for speed only
MAX_CONDITION = 1e10    # largest over smallest eigenvalue of C: six digits are left in float64

# Words and scenes stand first, second and alone in the patterns, so that C prefers no place in a prompt.
WORDS = json.loads((Path(__file__).parent / "support" / "caption_words.json").read_text(encoding="utf-8"))


def built_in_captions(n: int, tokenizer, seed: int = 0) -> list[str]:
    """n varied captions in the manner of alternative texts of web pictures; the same for the same seed.

    Half of the nouns come from the tokenizer's vocabulary, so that C sees more words than the list holds.
    """
    rng = random.Random(seed)
    vocabulary = [word for word in tokenizer.tokens(range(len(tokenizer.vocabulary)))
                  if word.isascii() and word.isalpha() and len(word) > 2]

    def word(kind):
        if kind == "noun" and vocabulary and rng.random() < 0.5:
            return rng.choice(vocabulary)
        return rng.choice(WORDS[kind])
    return [re.sub(r"{(\w+)}", lambda found: word(found[1]), rng.choice(WORDS["pattern"])) for _ in range(n)]


@torch.no_grad()
def covariance(text_encoder, tokenizer, captions: list[str]) -> Tensor:
    """C (d, d) in float64 over the encodings of all tokens of all captions, padding included."""
    total, count = 0, 0
    for first in tqdm(range(0, len(captions), BATCH), desc="covariance", unit="batch", disable=None):
        with warnings.catch_warnings():         # a long caption loses its end: no matter here
            warnings.simplefilter("ignore")
            ids, _ = tokenizer.encode(captions[first:first + BATCH])
        e = text_encoder(text_encoder.embed(ids)).cpu().double().flatten(0, 1)
        total, count = total + e.T @ e, count + len(e)
    return total / count


def inverse(C: Tensor) -> Tensor:
    """C^-1 (d, d) in float64, without a regulariser; ValueError if C has seen too few captions for that."""
    eigenvalues, vectors = torch.linalg.eigh(C.double())
    seen = int((eigenvalues > eigenvalues[-1] / MAX_CONDITION).sum())
    if seen < len(C):
        raise ValueError(f"the encodings of the captions span only {seen} of {len(C)} dimensions: compute it "
                         "over more, and more varied, captions (covariance.py --captions)")
    vectors = vectors.contiguous()      # the last bits of the product depend on how it lies in memory
    return vectors / eigenvalues @ vectors.T


# -------------------------------------------------------------------------------------------------- the cache

def cached(model) -> Tensor:
    """C (d, d) float64 of a base model: read from its cache, or computed over the built-in captions and kept.

    The same numbers in the first and in every later run.
    """
    for path in _places(model):
        with contextlib.suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("base") == model.fingerprint:
                return file.get_tensor("C").double()
    print(f"computing the covariance of text encodings over {CAPTIONS:,} captions, once per base model")
    C = covariance(model.text_encoder, model.tokenizer, built_in_captions(CAPTIONS, model.tokenizer))
    try:
        store(C, model)
    except OSError as error:        # a cache is a convenience
        warnings.warn(f"{error}; the next run will compute it again", stacklevel=2)
    return C.float().double()       # as the file holds it


def store(C: Tensor, model) -> None:
    """Keep C for `cached`, as float32 (the sampling error is far larger), and say where. OSError."""
    for path in _places(model):     # the weights may lie in a folder that cannot be written
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, save({"C": C.float().contiguous()}, {"base": model.fingerprint}))
            print(f"{path}: the covariance, condition number {torch.linalg.cond(C):.1e}")
            return
    raise OSError(f"the covariance cannot be kept at {' or '.join(map(str, _places(model))) or 'home'}")


def _places(model) -> list[Path]:
    """Where the covariance of a model may lie: beside its weights, if they have a folder, or cached."""
    own = [model.folder / FILE] if model.folder and (model.folder / "unet").is_dir() else []
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    users = [Path(home, "perfusion", f"{model.fingerprint}-{FILE}")] if os.path.isabs(home) else []
    return [*own, *users]


# ------------------------------------------------------------------------------------------------- the script

def main(argv: list[str] | None = None) -> None:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    command_line.add_model(parser)
    add("--captions", type=Path, metavar="FILE", help="text file, one per line (default: built-in captions)")
    add("--n", type=command_line.between(1, 10 ** 7), default=CAPTIONS, help="number of built-in captions")
    args = parser.parse_args(argv)
    captions = read_lines(args.captions) if args.captions else None
    model = open_model(args, [], dtype=torch.float32)
    captions = captions or built_in_captions(args.n, model.tokenizer)
    C = covariance(model.text_encoder, model.tokenizer, captions)
    inverse(C)      # refused before it is kept
    store(C, model)


if __name__ == "__main__":
    command_line.run(main, memory="--device cpu needs no memory of a graphics card")
