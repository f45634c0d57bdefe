"""The covariance C = mean(e e^T) of text encodings: the metric in which Perfusion's edit is orthogonal.

It belongs to a base model, not to a concept, is computed once over many captions, and is kept beside the
weights (or in the user's cache folder, where the weights' folder cannot be written).

    python covariance.py --weights sd15                                    # 10,000 built-in captions
    python covariance.py --weights sd15 --captions captions.txt            # one caption per line
    python covariance.py --gates "teddy bear" "a photo of a teddy bear on the beach"
"""

import argparse
import os
import random
import sys
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import perfusion
from weights_loader import load

CAPTIONS = 10_000
FILE = "covariance.safetensors"
# On the embedded model both give the same gates to 0.01 (README, one prompt): the simpler one stays.
POSITIONS = "all"
BATCH = 64
MAX_CONDITION = 1e10    # six digits are left in float64; a direction with less than that is empty
COUNTS = (100, 300, 1000, 3000, 10_000, 30_000, 100_000)

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
PATTERNS = (
    "a {style} of a {adjective} {noun}", "a {style} of a {noun} {place}", "the {noun} {place}",
    "a {adjective} {noun} {action} {place}", "a {noun} and a {adjective} {noun}", "{style} {noun}",
    "a {noun} next to a {noun} {place}", "{noun} {noun}, {adjective}, {noun}", "{noun} for {noun}",
    "two {adjective} {noun}s {place}", "a {style} of the {noun} {action}", "{noun}",
    "a {adjective} {style} of a {noun} {action} {place}, {adjective} {noun}")


def built_in_captions(n: int, tokenizer, seed: int = 0) -> list[str]:
    """n varied captions in the manner of alternative texts of web pictures; the same for the same seed."""
    rng = random.Random(seed)
    vocabulary = [word for word in tokenizer.tokens(range(tokenizer.vocab_size))
                  if word.isascii() and word.isalpha() and len(word) > 2]
    choices = {"adjective": ADJECTIVES, "place": PLACES, "style": STYLES, "action": ACTIONS}

    def word(kind):
        if kind == "noun":
            return rng.choice(vocabulary if vocabulary and rng.random() < 0.5 else NOUNS)
        return rng.choice(choices[kind])

    def fill(pattern):
        head, *rest = pattern.split("{")
        return head + "".join(word(part.split("}")[0]) + part.split("}")[1] for part in rest)
    return [fill(rng.choice(PATTERNS)) for _ in range(n)]


@torch.no_grad()
def covariance(text_encoder, tokenizer, captions: list[str], positions: str = POSITIONS) -> Tensor:
    """C (d, d) in float64 over the encodings of all captions.

    positions "real": the tokens from the start of a caption to its first end token. "all": the padding too,
    which the U-Net attends to as well.
    """
    if positions not in ("real", "all"):
        raise ValueError(f'the positions are "real" or "all", not "{positions}"')
    if not captions:
        raise ValueError("there are no captions to take the covariance over")
    device = next(text_encoder.parameters()).device
    total, count = 0, 0
    for first in tqdm(range(0, len(captions), BATCH), desc="covariance", unit="batch", disable=None):
        with warnings.catch_warnings():         # a long caption loses its end: no matter here
            warnings.simplefilter("ignore")
            ids, _ = tokenizer.encode(captions[first:first + BATCH])
        if positions == "real":
            end = (ids == ids[:, -1:]).int().argmax(1)          # the last id is always an end token
            ids = ids[:, :int(end.max()) + 1]                   # the encoder is causal: this changes nothing
            used = torch.arange(ids.shape[1]) <= end[:, None]
        else:
            used = torch.ones_like(ids, dtype=torch.bool)
        e = text_encoder(text_encoder.embed(ids.to(device))).cpu()[used].double()
        total, count = total + e.T @ e, count + len(e)
    return total / count


def inverse(C: Tensor) -> Tensor:
    """C^-1 (d, d) in float64, without a regulariser; ValueError if C has not seen enough captions for that.

    One direction may be empty: a layer norm without scale and shift, in a network that was never trained,
    leaves no encoding a part along (1, ..., 1). The inverse is then taken among the others.
    """
    eigenvalues, vectors = torch.linalg.eigh(C.double())
    used = eigenvalues > eigenvalues[-1] / MAX_CONDITION
    if len(C) - int(used.sum()) > 1:
        raise ValueError(f"the encodings of the captions span only {int(used.sum())} of {len(C)} dimensions: "
                         "compute it over more, and more varied, captions (covariance.py --captions)")
    return vectors[:, used] / eigenvalues[used] @ vectors[:, used].T


def condition_number(C: Tensor) -> float:
    """Largest over smallest eigenvalue, of those that `inverse` uses."""
    eigenvalues = torch.linalg.eigvalsh(C.double())
    used = eigenvalues[eigenvalues > eigenvalues[-1] / MAX_CONDITION]
    return float(used[-1] / used[0])


# -------------------------------------------------------------------------------------------------- the cache

def cached(model, report=print) -> Tensor:
    """C (d, d) float64 of a base model: read from its cache, or computed over the built-in captions and kept.

    report: called with each line that the user should see.
    """
    for path in _places(model):
        C = _read(path, model.fingerprint)
        if C is not None:
            return C
    captions = built_in_captions(CAPTIONS, model.tokenizer)
    report(f"computing the covariance of text encodings over {len(captions):,} captions, once per base model")
    C = covariance(model.text_encoder, model.tokenizer, captions)
    path = store(C, model, len(captions))
    report(f"condition number {condition_number(C):.1e}, kept in {path}")
    return C


def store(C: Tensor, model, captions: int | None = None, positions: str = POSITIONS) -> Path:
    """Keep C for `cached`, as float32 (the sampling error is far larger); returns the path of the file.

    captions: over how many C was taken, positions: which tokens entered; both only for the file's header.
    """
    header = {"base": model.fingerprint, "positions": positions}
    header |= {"captions": str(captions)} if captions else {}
    for path in _places(model):
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"C": C.float().contiguous()}, partial, header)
            os.replace(partial, path)
            return path
        except (OSError, SafetensorError):      # the weights may lie in a folder that cannot be written
            continue
    raise OSError(f"the covariance can be kept in none of {', '.join(map(str, _places(model)))}")


def _places(model) -> list[Path]:
    """Where the covariance of a model may lie: beside its weights, if they have a folder, or cached."""
    user = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "perfusion"
    own = [model.folder / FILE] if model.folder and (model.folder / "unet").is_dir() else []
    return [*own, user / f"{model.fingerprint}-{FILE}"]


def _read(path: Path, fingerprint: str) -> Tensor | None:
    """C from a file, None if the file is absent, damaged or of another base model."""
    try:
        with safe_open(path, "pt") as file:
            same = (file.metadata() or {}).get("base") == fingerprint
            return file.get_tensor("C").double() if same else None
    except (OSError, SafetensorError):
        return None


# ------------------------------------------------------------------------------------------------- the script

@torch.no_grad()
def gate_table(model, prompt: str, super_category: str, captions: list[str], positions: str) -> list[str]:
    """Lines of a table: sim / energy of every token of a prompt against a super-category, and its gate at
    beta 0.7 and tau 0.15, for covariances over more and more captions."""
    ids, _ = model.tokenizer.encode([prompt])
    i_star = perfusion.super_encoding(model.text_encoder, model.tokenizer, super_category).cpu()
    device = next(model.text_encoder.parameters()).device
    e = model.text_encoder(model.text_encoder.embed(ids.to(device))).cpu()
    length = int((ids[0] == ids[0, -1]).int().argmax()) + 2     # up to the first padding token
    words = model.tokenizer.tokens(ids[0, :length].tolist())
    lines = [f"positions: {positions}", "captions condition " + " ".join(f"{word[:9]:>10}" for word in words)]
    for count in [n for n in COUNTS if n < len(captions)] + [len(captions)]:
        C = covariance(model.text_encoder, model.tokenizer, captions[:count], positions)
        condition = condition_number(C)
        d_star = torch.linalg.pinv(C, hermitian=True, rtol=1 / MAX_CONDITION) @ i_star.double()
        _, sims = perfusion.split(e.double(), i_star.double()[None], d_star[None])
        gates = perfusion.gate(sims, 0.7, 0.15)
        cells = [f"{s:5.2f}/{g:.2f}" for s, g in zip(sims[0, :length, 0], gates[0, :length, 0])]
        lines.append(f"{count:8} {condition:9.1e} " + " ".join(f"{cell:>10}" for cell in cells))
    return lines


def main(argv=None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--weights", default="tiny", help="tiny, sd15, a folder, a single file or a hub id (default: tiny)")
    add("--tokenizer", metavar="DIR", help="folder with vocab.json and merges.txt, for a single file")
    add("--captions", type=Path, metavar="FILE", help="text file, one per line (default: built-in captions)")
    add("--n", type=int, default=CAPTIONS, help=f"number of built-in captions (default: {CAPTIONS})")
    add("--positions", choices=("real", "all"), default=POSITIONS,
        help="tokens that enter (default: %(default)s)")
    add("--gates", nargs=2, metavar=("SUPER", "PROMPT"),
        help="keep nothing; print the gates of a prompt's tokens against the number of captions")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.n < 1:
        parser.error(f"--n must be at least 1, not {args.n}")
    try:
        captions = None
        if args.captions:
            lines = args.captions.read_text("utf-8").splitlines()
            captions = [line.strip() for line in lines if line.strip()]
            if not captions:
                raise ValueError(f"{args.captions} holds no captions: it needs one per line")
        model = load(args.weights, device=args.device, tokenizer=args.tokenizer)
        captions = captions or built_in_captions(args.n, model.tokenizer)
        if args.gates:
            print("\n".join(gate_table(model, args.gates[1], args.gates[0], captions, args.positions)))
            return 0
        C = covariance(model.text_encoder, model.tokenizer, captions, args.positions)
        inverse(C)
        path = store(C, model, len(captions), args.positions)
        print(f"{len(captions):,} captions, condition number {condition_number(C):.1e}: {path}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
