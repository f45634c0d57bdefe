"""The covariance C = mean(e e^T) of text encodings: the metric in which Perfusion's edit is orthogonal.

It belongs to a base model, not to a concept, is computed once over many captions, and is kept beside the
weights (or in the user's cache folder, where the weights' folder cannot be written).

    python covariance.py --weights sd15                                    # 10,000 built-in captions
    python covariance.py --weights sd15 --captions captions.txt            # one caption per line
"""

import os
import random
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import weights_loader
from support import command_line
from support.command_line import between, pick_device
from support.files import read_lines, replacing

CAPTIONS = 10_000       # thirteen times SD v1's 768 dimensions
FILE = "covariance.safetensors"
BATCH = 64              # captions encoded at once: for speed only
MAX_CONDITION = 1e10    # largest over smallest eigenvalue: six digits are left in float64; SD v1 has 2e3 to 4e3

# Half of the nouns are drawn from the tokenizer's vocabulary instead, so that C sees more words than these.
NOUNS = """
airplane apple artist baby backpack ball balloon banana barn basket beach bear bed bee bench bicycle
bird boat book boots bottle bowl boy bread bridge bus butterfly cabin cake camera candle car castle
cat chair child church city clock clouds coat coffee cow crowd cup deer desk dog doll door dragon
dress drink duck elephant engine face family farm field fire fish flag flower forest fox fruit
garden girl glass glasses goat guitar hat helmet hill horse house island jacket jar kitchen kite
knife lake lamp laptop lion man map market monkey moon motorcycle mountain mug mushroom ocean orange
owl painting panda park phone piano pizza plant plate pumpkin queen rabbit rain river road robot
room rose scarf sculpture sea sheep ship shirt shoes skirt sky snake snow sofa soldier soup spoon
star statue street suitcase sun sunglasses sunset table teapot teddy temple tiger tower toy tractor
train tree truck turtle umbrella vase village violin wall watch water wedding whale wheel window
wolf woman zebra""".split()
ADJECTIVES = """
ancient beautiful big black blue bright broken brown cheap clean colorful cute dark dirty elegant
empty fluffy funny furry golden gray green happy huge little modern new old orange pink plastic
pretty purple red rusty sad shiny silver small soft striped tall tiny vintage white wild wooden
yellow young""".split()
PLACES = """on the beach, in the snow, in a room, on a table, at night, in the city, in the forest, on the
grass, under water, on the moon, in front of a house, in the kitchen, at sunset, in the rain, on a
street, in the mountains, near a lake, by a window, in a garden, on the sofa, at the market, in the
desert, on top of a hill, in a museum, against a white background""".replace("\n", " ").split(", ")
STYLES = """photo, photograph, painting, oil painting, watercolor, drawing, sketch, sculpture, close-up,
poster, cartoon, rendering, black and white photo, macro shot, illustration""".replace("\n", " ").split(", ")
ACTIONS = """sitting, standing, running, sleeping, wearing a hat, wearing sunglasses, holding a balloon,
eating, swimming, flying, jumping, playing the guitar, looking at the camera""".replace("\n", " ").split(", ")
COMPANY = ("and", "next to", "beside", "with")
# Words and scenes stand first, second and alone, so that the metric prefers no place in a prompt.
PATTERNS = (
    "a {style} of a {adjective} {noun}", "a {style} of a {noun} {place}", "the {noun} {place}",
    "a {adjective} {noun} {action} {place}", "a {noun} {company} a {adjective} {noun}", "{style} {noun}",
    "a {noun} {company} a {noun} {place}", "{noun} {noun}, {adjective}, {noun}", "{noun} for {noun}",
    "a {style} of a {noun} {company} a {noun}", "{noun} {company} {noun}", "{place}, a {adjective} {noun}",
    "{place} a {noun} {action}", "{place}, a {noun} {company} a {noun}",
    "two {adjective} {noun}s {place}", "a {style} of the {noun} {action}", "{noun}",
    "a {adjective} {style} of a {noun} {action} {place}, {adjective} {noun}")


def built_in_captions(n: int, tokenizer, seed: int = 0) -> list[str]:
    """n varied captions in the manner of alternative texts of web pictures; the same for the same seed."""
    rng = random.Random(seed)
    vocabulary = [word for word in tokenizer.tokens(range(tokenizer.vocab_size))
                  if word.isascii() and word.isalpha() and len(word) > 2]
    choices = {"adjective": ADJECTIVES, "place": PLACES, "style": STYLES, "action": ACTIONS,
               "company": COMPANY}

    def word(kind):
        if kind == "noun":
            return rng.choice(vocabulary if vocabulary and rng.random() < 0.5 else NOUNS)
        return rng.choice(choices[kind])

    def fill(pattern):
        head, *rest = pattern.split("{")
        return head + "".join(word(part.split("}")[0]) + part.split("}")[1] for part in rest)
    return [fill(rng.choice(PATTERNS)) for _ in range(n)]


@torch.no_grad()
def covariance(text_encoder, tokenizer, captions: list[str]) -> Tensor:
    """C (d, d) in float64 over the encodings of all tokens of all captions, padding too: the U-Net sees it."""
    if not captions:
        raise ValueError("there are no captions to take the covariance over")
    total, count = 0, 0
    for first in tqdm(range(0, len(captions), BATCH), desc="covariance", unit="batch", disable=None):
        with warnings.catch_warnings():         # a long caption loses its end: no matter here
            warnings.simplefilter("ignore")
            ids, _ = tokenizer.encode(captions[first:first + BATCH])
        e = text_encoder(text_encoder.embed(ids)).cpu().double().flatten(0, 1)
        total, count = total + e.T @ e, count + len(e)
    return total / count


def inverse(C: Tensor) -> Tensor:
    """C^-1 (d, d) in float64, without a regulariser; ValueError if C has not seen enough captions for that."""
    eigenvalues, vectors = torch.linalg.eigh(C.double())
    seen = int((eigenvalues > eigenvalues[-1] / MAX_CONDITION).sum())
    if seen < len(C):
        raise ValueError(f"the encodings of the captions span only {seen} of {len(C)} dimensions: compute it "
                         "over more, and more varied, captions (covariance.py --captions)")
    return vectors / eigenvalues @ vectors.T


# -------------------------------------------------------------------------------------------------- the cache

def cached(model, report=print) -> Tensor:
    """C (d, d) float64 of a base model: read from its cache, or computed over the built-in captions and kept.

    The same numbers in the first and in every later run. report: called with each line for the user.
    """
    for path in _places(model):
        C = _read(path, model.fingerprint)
        if C is not None:
            return C
    captions = built_in_captions(CAPTIONS, model.tokenizer)
    report(f"computing the covariance of text encodings over {len(captions):,} captions, once per base model")
    C = covariance(model.text_encoder, model.tokenizer, captions)
    try:
        where = f"kept in {store(C, model, f'built-in {len(captions)}')}"
    except OSError as error:        # a cache is a convenience
        warnings.warn(f"{error}; the next run will compute it again", stacklevel=2)
        where = "kept nowhere"
    report(f"condition number {torch.linalg.cond(C):.1e}, {where}")
    return C.float().double()       # as the file holds it


def store(C: Tensor, model, captions: str = "unknown") -> Path:
    """Keep C for `cached`, as float32 (the sampling error is far larger); returns the file's path. OSError.

    captions: over which C was taken; for the file's header.
    """
    header = {"base": model.fingerprint, "captions": captions}
    reasons = []
    for path in _places(model):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                save_file({"C": C.float().contiguous()}, partial, header)
            return path
        except OSError as error:            # the weights may lie in a folder that cannot be written
            reasons.append(str(error))
    raise OSError(f"the covariance cannot be kept: {'; '.join(reasons) or 'there is no home folder'}")


def _places(model) -> list[Path]:
    """Where the covariance of a model may lie: beside its weights, if they have a folder, or cached."""
    own = [model.folder / FILE] if model.folder and (model.folder / "unet").is_dir() else []
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    users = [Path(home, "perfusion", f"{model.fingerprint}-{FILE}")] if os.path.isabs(home) else []
    return [*own, *users]


def _read(path: Path, fingerprint: str) -> Tensor | None:
    """C from a file, None if the file is absent, damaged or of another base model."""
    try:
        with safe_open(path, "pt") as file:
            same = (file.metadata() or {}).get("base") == fingerprint
            return file.get_tensor("C").double() if same else None
    except (OSError, SafetensorError):
        return None


# ------------------------------------------------------------------------------------------------- the script

def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    command_line.add_model(parser)
    add("--captions", type=Path, metavar="FILE", help="text file, one per line (default: built-in captions)")
    add("--n", type=between(1, 10 ** 7), default=CAPTIONS, help="number of built-in captions")
    args = parser.parse_args(argv)
    captions = read_lines(args.captions) if args.captions else None
    if captions == []:
        raise ValueError(f"{args.captions} holds no captions: it needs one per line")
    model = weights_loader.load(args.weights, pick_device(args.device), tokenizer=args.tokenizer,
                                prediction=args.prediction)
    name = args.captions.name if captions else f"built-in {args.n}"
    captions = captions or built_in_captions(args.n, model.tokenizer)
    C = covariance(model.text_encoder, model.tokenizer, captions)
    inverse(C)
    path = store(C, model, name)
    print(f"{len(captions):,} captions, condition number {torch.linalg.cond(C):.1e}: {path}")


if __name__ == "__main__":
    with command_line.plain_errors(memory="--device cpu needs no memory of a graphics card"):
        main()
