"""Draw pictures from a prompt, with the base model or with personal concepts.

    python sample.py "a photo of a teddy bear on the beach" --n 4
    python sample.py "a <teddy> wearing a hat" --concept teddy.safetensors --beta 0.65
    python sample.py "a <teddy> next to a <cat>" --concept teddy.safetensors --concept cat.safetensors

Picture k starts from noise seeded with seed + k and is drawn alone: it does not depend on --n.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import re
import warnings
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

import diffusion
import perfusion
from concept import Concept, prepare
from support import command_line
from support.base_model import open_model
from support.command_line import DTYPES, between, numbers, pick_device, unquoted
from support.files import write

BETA, TAU = perfusion.DRAWING_BETA, perfusion.DRAWING_TAU
WEB_UI = {"ddim": "DDIM", "dpm++": "DPM++ 2M"}      # what the web UI calls our samplers


def size(text: str) -> tuple[int, int]:
    """'512' or '512x768' (height x width) -> (height, width); which multiples fit, the model says later."""
    height, _, width = text.lower().partition("x")
    return between(1, 4096)(height), between(1, 4096)(width or height)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("prompt", type=unquoted, help="what to draw; <name> stands for a loaded concept")
    command_line.add_model(parser)
    add("--concept", metavar="FILE", action="append", default=[], help="concept file; repeat for several")
    add("--beta", type=numbers, action="extend", metavar="B[,B]", help="gate threshold, lower draws more of "
        f"the concept: one or one each (default: {BETA['local']}, global lock {BETA['global']})")
    add("--tau", type=numbers, action="extend", metavar="T[,T]", help=f"gate temperature (default: {TAU})")
    add("--lock", choices=("local", "global"), default="local",
        help="lock the keys of the concept's word, or of the whole prompt")
    add("--negative", type=unquoted, default="", metavar="PROMPT", help="what to stay away from")
    add("--steps", type=between(1, 999), default=30, help="denoising steps, 1 to 999")
    add("--sampler", choices=WEB_UI, default="ddim", help="dpm++ is good from 20 steps, ddim from 30")
    add("--guidance", type=between(-1000, 1000, float),
        help="weight of the prompt, 1 for no guidance (default: what suits the model)")
    add("--size", type=size, help="pixels, 512 or HEIGHTxWIDTH (default: as the model was trained)")
    add("--seed", type=between(0, 2 ** 62), default=0, help="seed of the first picture")
    add("--n", type=between(1, 10_000), default=1, help="number of pictures")
    add("--out", type=Path, default=Path("out"), help="folder of the numbered PNGs and their grid")
    add("--precision", choices=DTYPES, help="of the networks (default: fp32 on a CPU, fp16 elsewhere)")
    args = parser.parse_args(argv)
    args.beta, args.tau = args.beta or [BETA[args.lock]], args.tau or [TAU]
    if min(args.tau) <= 0:
        parser.error("--tau must be above 0")
    n = len(args.concept)
    for name, given in (("beta", args.beta), ("tau", args.tau)):
        if len(given) not in (1, n):
            parser.error(f"--{name} takes one number, or one for each of {n} concepts, not {len(given)}")
        setattr(args, name, given * (n // len(given)))
    return args


def png(image: Tensor, settings: dict[str, object]) -> bytes:
    """An image (3, H, W) in [0, 1] as a PNG file that says how it was drawn.

    Under `parameters` in the form of Stable Diffusion's web UI, which other programs read too; under
    `perfusion` all the settings as JSON.
    """
    s, (height, width) = settings, settings["size"].split("x")
    negative = f"Negative prompt: {s['negative']}\n" if s["negative"] else ""
    model = re.sub("[,:]", "", Path(s["weights"]).name)             # they would end it
    fields, file = PngImagePlugin.PngInfo(), io.BytesIO()
    fields.add_itxt("parameters", (
        f"{s['prompt']}\n{negative}Steps: {s['steps']}, Sampler: {WEB_UI[s['sampler']]}, "
        f"CFG scale: {s['guidance']}, Seed: {s['seed']}, Size: {width}x{height}, Model: {model}"))
    fields.add_itxt("perfusion", json.dumps(settings))
    Image.fromarray(diffusion.to_bytes(image)).save(file, format="PNG", pnginfo=fields)
    return file.getvalue()


def add_picture(folder: Path, content: bytes) -> Path:
    """Write a PNG under the next free number of a folder, 0000.png and on; return its path. OSError.

    Of several programs at once only one holds the claim on a number, so that no picture takes another's
    place. A claim that a killed program left behind costs its number and nothing else.
    """
    taken = [int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal()]
    for number in itertools.count(max(taken, default=-1) + 1):
        path, claim = folder / f"{number:04d}.png", folder / f".{number:04d}.claim"
        with contextlib.suppress(FileExistsError):
            claim.touch(exist_ok=False)
            try:
                if not path.exists():
                    write(path, content)
                    return path
            finally:
                claim.unlink()


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    device = pick_device(args.device)
    precision = args.precision or ("fp32" if device == "cpu" else "fp16")
    variant = "fp16" if args.weights == "sd15" and precision != "fp32" else None      # half the download
    # Everything that can be wrong in the command is checked before gigabytes of weights are read.
    concepts = [Concept.load(path) for path in args.concept]
    tokens = [concept.token for concept in concepts]
    for name in re.findall(r"<[^<>|]+>", f"{args.prompt} {args.negative}"):
        if name not in tokens:
            known = "known are " + ", ".join(tokens) if tokens else "load its file with --concept"
            raise ValueError(f"the prompt uses {name}, which no concept file provides: {known}")
    args.out.mkdir(parents=True, exist_ok=True)
    if not os.access(args.out, os.W_OK):
        raise ValueError(f"--out {args.out} cannot be written")

    model = open_model(args, concepts, DTYPES[precision], device, variant)
    height, width = args.size or model.size
    if height % model.size_step or width % model.size_step:
        raise ValueError(f"--size {height}x{width} is not possible: both sides must be multiples of "
                         f"{model.size_step} for this model")
    guidance = model.guidance if args.guidance is None else args.guidance
    concepts = prepare(concepts, model)
    keys, values, positions, _ = perfusion.condition(model, [args.negative, args.prompt], concepts, args.beta,
                                                     args.tau, args.lock)
    for token in tokens:
        if not any(found[token] for found in positions):
            warnings.warn(f"the prompt does not use {token}: write {token} where the concept should appear")

    settings = {"prompt": args.prompt, "negative": args.negative, "steps": args.steps,
                "sampler": args.sampler, "guidance": guidance, "size": f"{height}x{width}",
                "weights": model.name, "prediction": model.schedule.prediction_type, "precision": precision,
                "concepts": " ".join(args.concept), "beta": " ".join(map(str, args.beta)),
                "tau": " ".join(map(str, args.tau)), "lock": args.lock if concepts else ""}
    print("; ".join(f"{key}: {value}" for key, value in settings.items() if value != ""))
    images, paths = [], []
    with tqdm(total=args.n * args.steps, unit="step", desc="drawing") as bar:
        for seed in range(args.seed, args.seed + args.n):
            images.append(diffusion.draw(model, keys, values, [seed], (height, width), args.steps, guidance,
                                         args.sampler, on_step=lambda z: bar.update()))
            paths.append(add_picture(args.out, png(images[-1][0], settings | {"seed": seed})))
            bar.write(str(paths[-1]))
    if args.n > 1:
        sheet = diffusion.grid(torch.cat(images), columns=math.ceil(math.sqrt(args.n)))
        path = args.out / f"grid_{paths[0].stem}-{paths[-1].stem}.png"
        write(path, png(sheet, settings | {"seed": args.seed, "n": args.n}))
        print(path)


if __name__ == "__main__":
    command_line.run(main, memory="a smaller --size, or --precision fp16, needs less")
