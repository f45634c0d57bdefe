"""Draw pictures from a prompt, with the base model or with personal concepts.

    python sample.py "a photo of a teddy bear on the beach" --n 4
    python sample.py "a <teddy> wearing a hat" --concept teddy.safetensors --beta 0.65
    python sample.py "a <teddy> next to a <cat>" --concept teddy.safetensors --concept cat.safetensors

Picture k starts from noise seeded with seed + k and is drawn alone: it does not depend on --n.
"""

import argparse
import math
import os
import re
import sys
import warnings
from pathlib import Path

# The paper's settings for drawing: the middle of its range of beta for each lock, and its softer gate.
BETA = {"local": 0.7, "global": 0.5}
TAU = 0.15
MAX_SIDE = 4096


def numbers(text):
    """'0.6' or '0.6,0.7' -> list of floats."""
    return [float(part) for part in text.split(",")]


def size(text):
    """'512' or '512x768' (height x width) -> (height, width); which multiples fit, the model says later."""
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) > 2 or not all(0 < side <= MAX_SIDE for side in sides):
        raise argparse.ArgumentTypeError(f"{text} is not SIDE or HEIGHTxWIDTH, of 1 to {MAX_SIDE} pixels")
    return sides[0], sides[-1]


def arguments(argv):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("prompt", help="what to draw; <name> stands for a loaded concept")
    add("--weights", default="tiny", help="tiny, sd15, a folder, a single file or a hub id (default tiny)")
    add("--tokenizer", metavar="DIR", help="folder with vocab.json and merges.txt, for a single file")
    add("--concept", metavar="FILE", action="append", default=[], help="concept file; repeat for several")
    add("--beta", type=numbers, action="extend", metavar="B[,B]", help="gate threshold, lower draws more "
        f"of the concept: one number or one each (default {BETA['local']}, global lock {BETA['global']})")
    add("--tau", type=numbers, action="extend", metavar="T[,T]",
        help=f"gate temperature above 0: one number or one each (default {TAU})")
    add("--lock", choices=("local", "global"), default="local",
        help="lock the keys of the concept's word, or of the whole prompt (default local)")
    add("--negative", default="", metavar="PROMPT", help="what to stay away from (default nothing)")
    add("--steps", type=int, default=30, help="denoising steps, 1 to 999 (default 30)")
    add("--sampler", choices=("ddim", "dpm++"), default="ddim",
        help="dpm++ is good from 20 steps, ddim from 30 (default ddim)")
    add("--guidance", type=float,
        help="weight of the prompt, 1 for no guidance (default 7.5, for the small model 4)")
    add("--size", type=size, help="pixels, 512 or HEIGHTxWIDTH (default what the model was trained at)")
    add("--seed", type=int, default=0, help="seed of the first picture (default 0)")
    add("--n", type=int, default=1, help="number of pictures (default 1)")
    add("--out", type=Path, default=Path("out"), help="folder of the numbered PNGs and grid (default out)")
    add("--device", choices=("cpu", "cuda", "mps"), help="default the best one present")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="default fp32 on a CPU, fp16 elsewhere")
    add("--low-vram", action="store_true", help="keep only the network in use on the device")
    args = parser.parse_args(argv)
    if not 1 <= args.steps <= 999:
        parser.error(f"--steps must be 1 to 999, not {args.steps}")
    if args.n < 1:
        parser.error(f"--n must be at least 1, not {args.n}")
    if not 0 <= args.seed <= 2 ** 63 - 1 - args.n:
        parser.error("--seed must be a number from 0 to 2**63 - 1")
    if args.guidance is not None and not abs(args.guidance) < float("inf"):
        parser.error(f"--guidance must be a finite number, not {args.guidance}")
    return args


def per_concept(name, given, default, concepts):
    """One number per concept from none, one or one per concept given on the command line."""
    given = given or [default]
    if len(given) not in (1, len(concepts)):
        raise ValueError(f"--{name} takes one number or one per concept: {len(given)} numbers for "
                         f"{len(concepts)} concepts")
    if not all(abs(value) < float("inf") for value in given) or name == "tau" and min(given) <= 0:
        raise ValueError(f"--{name} must be {'positive and ' if name == 'tau' else ''}finite")
    return given * len(concepts) if len(given) == 1 else given


def check_tokens(prompts, known):
    """ValueError for a <name> of the prompts that no loaded concept has; a warning for an unused concept."""
    used = {name for prompt in prompts for name in re.findall(r"<[^<>|]+>", prompt)}
    for name in sorted(used - set(known)):
        listing = "known are " + ", ".join(known) if known else "load its file with --concept"
        raise ValueError(f"the prompt uses {name}, which no concept file provides: {listing}")
    for token in known:
        if not any(token in prompt for prompt in prompts):
            warnings.warn(f"the prompt does not use {token}: write {token} where the concept should appear")


def free_number(out):
    """The first number above those of the pictures already in the folder, so that nothing is overwritten."""
    taken = [int(path.stem) for path in out.glob("*.png") if path.stem.isdecimal()]
    return max(taken, default=-1) + 1


def save_png(image, path, text):
    """Write an image (3, H, W) in [0, 1] with text fields, whole or not at all."""
    from PIL import Image, PngImagePlugin

    from drawing import to_bytes
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(key, str(value))
    temporary = path.with_suffix(".tmp")
    Image.fromarray(to_bytes(image)).save(temporary, format="PNG", pnginfo=info)
    os.replace(temporary, path)


def text_projections(model, args, concepts, beta, tau, device):
    """Keys and values of (negative prompt, prompt): computed once, used by every picture and every step."""
    import torch

    import perfusion
    with torch.no_grad():
        prompts = [args.negative, args.prompt]
        model.text_encoder.to(device)
        e, e_super, _ = perfusion.encode(model.text_encoder, model.tokenizer, prompts, concepts)
        if args.low_vram:
            model.text_encoder.cpu()
        model.unet.to(device)
        return perfusion.keys_and_values(model.unet, e, e_super, concepts, beta, tau, lock=args.lock)


def run(args):
    """Load, check, draw, save."""
    import torch
    from tqdm import tqdm

    import perfusion
    import weights_loader
    from drawing import decode, draw_latents, grid, pick_device

    device = pick_device(args.device)
    precision = args.precision or ("fp32" if device == "cpu" else "fp16")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    variant = "fp16" if args.weights == "sd15" and precision != "fp32" else None      # half the download
    # Everything that can be wrong in the command is checked before gigabytes of weights are read.
    beta = per_concept("beta", args.beta, BETA[args.lock], args.concept)
    tau = per_concept("tau", args.tau, TAU, args.concept)
    concepts = [perfusion.Concept.load(path) for path in args.concept]
    check_tokens([args.prompt, args.negative], [concept.token for concept in concepts])
    args.out.mkdir(parents=True, exist_ok=True)

    model = weights_loader.load(args.weights, device="cpu" if args.low_vram else device, dtype=dtype,
                                tokenizer=args.tokenizer, variant=variant)
    height, width = args.size or model.size
    if height % model.size_step or width % model.size_step:
        raise ValueError(f"--size {height}x{width} is not possible: both sides must be multiples of "
                         f"{model.size_step} for this model")
    guidance = model.guidance if args.guidance is None else args.guidance
    concepts = perfusion.prepare(concepts, model)
    keys, values = text_projections(model, args, concepts, beta, tau, device)

    settings = {"prompt": args.prompt, "negative": args.negative, "steps": args.steps,
                "sampler": args.sampler, "guidance": guidance, "size": f"{height}x{width}",
                "weights": model.name, "precision": precision, "concepts": " ".join(args.concept),
                "beta": " ".join(map(str, beta)), "tau": " ".join(map(str, tau)), "lock": args.lock}
    latent_size = height // model.vae.factor, width // model.vae.factor
    seeds = range(args.seed, args.seed + args.n)
    images, first = [], free_number(args.out)
    with tqdm(total=args.n * args.steps, unit="step", desc="drawing") as bar:
        latents = (draw_latents(model.unet, model.schedule, keys, values, [seed], latent_size, args.steps,
                                guidance, args.sampler, on_step=lambda z: bar.update())
                   for seed in seeds)
        if args.low_vram:
            latents = list(latents)
            model.unet.cpu()
            model.vae.to(device)
        for k, latent in enumerate(latents):
            images.append(decode(model.vae, latent))
            save_png(images[-1][0], args.out / f"{first + k:04d}.png", settings | {"seed": seeds[k]})
    last = first + args.n - 1
    if args.n > 1:
        sheet = grid(torch.cat(images), columns=math.ceil(math.sqrt(args.n)))
        save_png(sheet, args.out / f"grid_{first:04d}-{last:04d}.png",
                 settings | {"seed": f"{seeds[0]}-{seeds[-1]}"})
    print(f"{args.out}/{first:04d}.png" + f" to {last:04d}.png, and a grid of them" * (args.n > 1))


def main(argv=None):
    args = arguments(argv)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(fail(error))
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        sys.exit(fail("out of memory: a smaller --size, --precision fp16 or --low-vram needs less"))
    except KeyboardInterrupt:
        sys.exit(130)


def fail(error):
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
