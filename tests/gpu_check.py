"""What whoever has a GPU can check with one command: one table, and exit code 1 if a line of it fails.

    python tests/gpu_check.py --out table.md                # the best device here; minutes on a large card
    python tests/gpu_check.py --parts picture resume        # some of the parts
    python tests/gpu_check.py --small --device cpu          # the same lines at tiny sizes, in seconds

Nothing is downloaded: the embedded model is used as it is, and Stable Diffusion v1 at full size with random
weights. Where diffusers is missing its lines say so. Parts:

    scripts   train, sample, diagnostics, evaluate and export run on the device, and what they write is finite
    hook      diffusers' U-Net with our hooks predicts what our own U-Net predicts
    picture   a picture drawn from one seed is that of the CPU
    training  a concept trained from one seed is that of the CPU
    resume    a training that was stopped and resumed gives the numbers of one that was not
    speed     seconds and memory of a guided step and of a training step, against diffusers in the same run

In float32, torch lets cuDNN round the inputs of convolutions to 11 bits (TF32) unless it is told not to. What
is compared with the CPU is compared without that ("exact") and as it comes ("as is").
"""

import argparse
import contextlib
import csv
import gc
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # cuBLAS repeats itself only with this

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import bench
import covariance
import diffusers_hook
import diffusion
import models
import perfusion
import train
import weights_loader
from concept import Concept, prepare
from support import pictures, training_files, weight_names
from support.command_line import DTYPES, pick_device

PARTS = ("scripts", "hook", "picture", "training", "resume", "speed")
BAR = 1.0                   # of the time: ours / diffusers
ROUNDING = 10               # device and CPU may differ by this many times what two orders of summation differ
STEPS = 400                 # of a finished concept
SHAPES = ((1, 1, False), (4, 1, False), (16, 1, False), (16, 4, False), (16, 1, True))
SMALL_SHAPES = ((1, 1, False), (4, 2, True))    # batch, --accumulate, --checkpointing
PROMPTS = "a photo of a {}\na {} on the beach\n"


class Table:
    """Prints its lines as they come, in Markdown, and keeps them in a file, so that nothing is lost."""

    def __init__(self, path: Path | None):
        self.path, self.lines, self.failed = path, [], 0

    def say(self, line: str):
        print(line, flush=True)
        self.lines.append(line)
        if self.path:
            self.path.write_text("\n".join([*self.lines, ""]), encoding="utf-8")

    def add(self, what: str, result: str, ok: bool | None = True):
        """ok: None for a number that no bar judges."""
        self.failed += ok is False
        self.say(f"| {what} | {result} | {'' if ok is None else 'ok' if ok else 'FAILED'} |")

    @contextlib.contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """A line that fails with its reason; the other lines go on. Too little memory is not a mistake."""
        try:
            yield
        except (Exception, SystemExit) as error:    # whatever a line meets
            reason = (str(error).splitlines() or [""])[0][:200]
            if "out of memory" in reason:
                self.add(what, "does not fit into the memory of this device", None)
            else:
                self.add(what, f"{type(error).__name__}: {reason}".replace("|", "/"), False)
        gc.collect()


def without_tf32(exact: bool):
    """A context in which convolutions in float32 are exact, or as torch has them."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=not exact)


# -------------------------------------------------------------------------------------------------- the scripts

def run(name: str, *words) -> None:
    """Run a script here, to spare the start of a process; RuntimeError with its last line if it fails."""
    code, _, errors = models.run_script(name, *words)
    if code:
        raise RuntimeError(f"{name}: {(errors.strip().splitlines() or ['?'])[-1]}")


def finite_files(folder: Path) -> str:
    """Raise ValueError unless a folder's concepts, numbers and pictures are as they should be."""
    files = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".csv", ".png")]
    for path in files:
        if path.suffix == ".safetensors":
            sound = all(x.isfinite().all() for x in load_file(path).values())
        elif path.suffix == ".csv":
            words = {word.lower() for row in csv.reader(open(path, encoding="utf-8")) for word in row}
            sound = not words & {"inf", "-inf"} and ("nan" not in words or path.stem == "results")
        else:
            sound = np.asarray(Image.open(path).convert("L")).std() > 1     # not one colour
        if not sound:
            raise ValueError(f"{path.name} is not as it should be")
    if not files:
        raise ValueError("nothing was written")
    return f"{len(files)} files, all finite"


def check_scripts(table: Table, args: argparse.Namespace, folder: Path):
    on = "--weights", args.weights, "--device", args.device
    few = "--steps", 4
    prompts, concepts = folder / "prompts.txt", {}
    prompts.write_text(PROMPTS, encoding="utf-8")

    def line(what: str, name: str, *words) -> Path:
        """A script into a folder of its own."""
        out = folder / what.translate({ord(c): "_" for c in " ,.()"})
        with table.guard(what):
            start = time.time()
            run(name, *words, "--out", out)
            table.add(what, f"{finite_files(out)}, {time.time() - start:.0f} s")
        return out

    trainings = [("teddy", precision, "locked") for precision in DTYPES]
    trainings += [("teddy", "bf16", "trained"), ("teddy", "bf16", "none"), ("cat", "bf16", "locked")]
    for name, precision, keys in trainings:
        out = line(f"train.py {precision}, {keys} keys, {name}", "train.py", *on, *few, "--batch", 4, "--images",
                   ROOT / "examples" / name, "--super", {"teddy": "teddy bear"}.get(name, name),
                   "--precision", precision, "--keys", keys, "--preview", 4 * ((name, keys) == ("teddy", "locked")))
        concepts[name, precision, keys] = out / f"{name}.safetensors"
    for precision in DTYPES:
        low = ["--low-vram"] * (precision == "fp16")
        line(f"sample.py {precision}{' with --low-vram' if low else ''}", "sample.py", "a <teddy> on the beach",
             *on, *few, "--precision", precision, "--concept", concepts["teddy", precision, "locked"], *low)
    line("diagnostics.py, its precision", "diagnostics.py", *on, *few,
         "--concept", concepts["teddy", "bf16", "locked"], "--trained", concepts["teddy", "bf16", "trained"],
         "--inversion", concepts["teddy", "bf16", "none"], "--second", concepts["cat", "bf16", "locked"])
    line("evaluate.py, its precision", "evaluate.py", *on, *few, "--beta", "0.6,0.7", "--seeds", 2, "--prompts",
         prompts, "--concept", concepts["teddy", "bf16", "locked"], concepts["teddy", "bf16", "none"])
    line("export.py of what was trained here", "export.py", "--weights", args.weights, "--concept",
         concepts["teddy", "fp32", "locked"])


def check_hook(table: Table, args: argparse.Namespace, folder: Path):
    """One guided prediction with a concept; the bars are the rounding of two implementations."""
    if not bench.has_diffusers():
        return table.add("diffusers_hook", "not run: diffusers is not installed", None)
    from diffusers import UNet2DConditionModel
    for (precision, dtype), bar in zip(DTYPES.items(), (1e-3, 0.1, 0.02)):
        with table.guard(f"diffusers_hook {precision}"), torch.no_grad(), without_tf32(True):
            model = weights_loader.load(args.weights, args.device, dtype)
            theirs = UNet2DConditionModel.from_pretrained(model.folder / "unet", torch_dtype=dtype).to(args.device)
            concepts = prepare([far_concept(model, args, folder)], model)
            z = torch.cat([first_noise(model)] * 2)
            keys, values, _, _ = perfusion.condition(model, ["", "a <teddy> on the beach"], concepts)
            expected = model.unet(z.to(dtype), 501, keys, values)
            with diffusers_hook.personal(theirs, model, concepts) as encode:
                e = encode("a <teddy> on the beach")
                text = torch.cat([e["negative_prompt_embeds"], e["prompt_embeds"]])
                output = theirs(z.to(dtype), 501, encoder_hidden_states=text).sample
            distance = bench.difference(output, expected)
            table.add(f"diffusers_hook {precision}", f"differs from our U-Net by {distance:.1e}, bar {bar:g}",
                      distance <= bar)


def far_concept(model, args: argparse.Namespace, folder: Path) -> Concept:
    """A concept whose values are far from its super-category's."""
    return Concept.load(models.write_concept(args.weights, folder / "teddy.safetensors"))


def first_noise(model) -> torch.Tensor:
    """The noise (1, c, h, w) of seed 0, on the model's device."""
    side = [n // model.vae.factor for n in model.size]
    return diffusion.seeded_noise(0, (model.unet.config.in_channels, *side)).to(model.device)


# ---------------------------------------------------------------------------------- the same numbers as the CPU

def check_picture(table: Table, args: argparse.Namespace, folder: Path):
    """Levels of 255. Exact: equal up to the next level. As is: a difference that nobody sees."""
    def draw(device):
        model = weights_loader.load(args.weights, device)
        concepts = prepare([far_concept(model, args, folder)], model)
        for prompt, used in (("a photo of a teddy bear on the beach", []), ("a <teddy> on the beach", concepts)):
            keys, values, _, _ = perfusion.condition(model, ["", prompt], used)
            yield diffusion.draw(model, keys, values, [0], model.size, 20, model.guidance)
    expected = list(draw("cpu"))
    for name, exact, most, mean in (("exact", True, 1, 0.1), ("as is", False, 16, 1)):
        with table.guard(f"picture, fp32 {name}"), without_tf32(exact):
            for kind, image, other in zip(("base model", "a concept"), draw(args.device), expected, strict=True):
                levels = (image - other).abs() * 255
                table.add(f"picture of the {kind.removeprefix('a ')}, fp32 {name}",
                          f"differs from the CPU's by at most {levels.max():.4f} and on average by "
                          f"{levels.mean():.4f} of 255 levels, bars {most} and {mean}",
                          bool(levels.max() <= most and levels.mean() <= mean))


def make_training(args: argparse.Namespace, device: str, precision: str = "fp32",
                  accumulate: int = 1) -> train.Training:
    """A training of the teddy, before its first step; pictures and masks are encoded on the CPU."""
    if "data" not in args:
        model = weights_loader.load(args.weights)
        files, _ = pictures.list_images(ROOT / "examples" / "teddy")
        args.data = pictures.prepare_data(model, files, "teddy bear", report=lambda line: None)
        args.C_inverse = covariance.inverse(covariance.cached(model, lambda line: None))
    data = pictures.Data(args.data.images, args.data.latents.to(device), args.data.masks.to(device))
    settings = train.Settings("teddy bear", "<teddy>", precision=precision, accumulate=accumulate)
    return train.Training(weights_loader.load(args.weights, device), data, settings, args.C_inverse)


def learn(training: train.Training, steps: int) -> list[torch.Tensor]:
    """The learned numbers after some steps: the word embedding, and all targets in one."""
    for _ in range(steps):
        training.step()
    embedding, *targets = (x.detach().cpu() for x in training.learned)
    return [embedding, torch.cat(targets)]


def check_training(table: Table, args: argparse.Namespace, folder: Path):
    """A difference is a share of how far the CPU's training moved; what rounding does, the CPU itself shows."""
    what = f"concept after {args.steps} steps, fp32"
    with table.guard(what):
        start, expected = learn(make_training(args, "cpu"), 0), learn(make_training(args, "cpu"), args.steps)
        moved = [(b - a).norm() for a, b in zip(start, expected)]

        def shares(other):
            return [float((a - b).norm() / m) for a, b, m in zip(other, expected, moved)]
        rounding = shares(learn(make_training(args, "cpu", accumulate=2), args.steps))
        for name, exact in (("exact", True), ("as is", False)):
            with without_tf32(exact):
                found = shares(learn(make_training(args, args.device), args.steps))
            table.add(f"{what} {name}", "embedding and values differ from the CPU's by {:.1e} and {:.1e} of their "
                      "way; the CPU's own in two parts by {:.1e} and {:.1e}".format(*found, *rounding),
                      all(a <= ROUNDING * b for a, b in zip(found, rounding)) if exact else None)


def check_resume(table: Table, args: argparse.Namespace, folder: Path):
    def differences(precision):
        """Between two whole trainings, and between a whole one and a resumed one."""
        half = args.steps // 2
        whole, again = (learn(make_training(args, args.device, precision), 2 * half) for _ in range(2))
        first = make_training(args, args.device, precision)
        learn(first, half)
        training_files.write(folder, first.result(), first.losses, first.state_dict())
        second = make_training(args, args.device, precision)
        state = training_files.read_checkpoint(folder / "checkpoint.pt", second.identity())
        second.load_state_dict(state)
        resumed = learn(second, half)
        return [max(models.largest_difference(a, b) for a, b in zip(whole, other)) for other in (again, resumed)]

    for precision in DTYPES:
        with table.guard(f"resumed training, {precision}"):
            repeat, resumed = differences(precision)
            text = f"two whole runs differ by {repeat:.1e}, a resumed one by {resumed:.1e}"
            if repeat:      # the device does not repeat itself: ask it to
                torch.use_deterministic_algorithms(True, warn_only=True)
                repeat, resumed = differences(precision)
                torch.use_deterministic_algorithms(False)
                text += f"; with deterministic algorithms by {repeat:.1e} and {resumed:.1e}"
            table.add(f"resumed training, {precision}", text, resumed <= ROUNDING * repeat)


# ------------------------------------------------------------------------------------------- time and memory

def bytes_of(network) -> int:
    return sum(p.nbytes for p in network.parameters())


def peak(device: str, job: Callable, weights: int) -> str:
    """GB of a job and its own weights, whatever else lies on the device; '?' where torch does not count it."""
    if device != "cuda":
        return "?"
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    job()
    torch.cuda.synchronize()
    return f"{(torch.cuda.max_memory_allocated() - before + weights) / 1e9:.1f}"


def in_parts(job: Callable, parts: int, network, checkpointing: bool) -> Callable:
    """A job as often as there are parts, with or without checkpointing."""
    def whole():
        network.checkpointing = checkpointing                       # ours
        if hasattr(network, "enable_gradient_checkpointing"):       # diffusers'
            (network.enable_gradient_checkpointing if checkpointing else network.disable_gradient_checkpointing)()
        for _ in range(parts):
            job()
    return whole


def compare(table: Table, what: str, networks: dict, jobs: dict[str, Callable], repeats: int,
            args: argparse.Namespace):
    """A line: our seconds and memory, diffusers', and the ratio of the medians.

    "contiguous": ours, but the weights of convolutions lie as in the file, not channels last as we load them.
    """
    peaks = {name: peak(args.device, job, bytes_of(networks[name])) for name, job in jobs.items()}
    times = bench.measure(jobs, args.device, repeats)
    times = {name: statistics.median(each) for name, each in times.items()}
    found = [f"{name.replace('plain', 'ours')} {times[name]:.4f} s {peaks[name]} GB" for name in jobs]
    if "diffusers" not in jobs:
        return table.add(what, f"{', '.join(found)}; diffusers is not installed", None)
    ratio = times["plain"] / times["diffusers"]
    table.add(what, f"{', '.join(found)}; ratio **{ratio:.3f}**, bar {BAR}", None if args.small else ratio <= BAR)


def check_speed(table: Table, args: argparse.Namespace, folder: Path):
    """bench.py's networks and jobs, and train.py's whole step."""
    config = (models.TINY if args.small else weight_names.SD_V1)["unet"]
    for precision in ("bf16", "fp16", "fp32"):
        with table.guard(f"speed, {precision}"):
            networks = bench.build(DTYPES[precision], args.device, config)
            networks.pop("fast", None)
            with table.guard(f"guided step, {precision}"), torch.no_grad():
                z, e = bench.inputs(args, DTYPES[precision], 1, config.cross_attention_dim)
                jobs = {name: bench.guided_step(network, z, e) for name, network in networks.items()}
                compare(table, f"guided step, {precision}", networks, jobs, 4 * args.repeats, args)
            for batch, accumulate, checkpointing in args.shapes:
                what = f"U-Net forward and backward, {precision}, {written(batch, accumulate, checkpointing)}"
                with table.guard(what):
                    z, e = bench.inputs(args, DTYPES[precision], batch // accumulate, config.cross_attention_dim)
                    jobs = {name: in_parts(bench.training_step(network, z, e), accumulate, network, checkpointing)
                            for name, network in networks.items()}
                    compare(table, what, networks, jobs, args.repeats, args)
            del networks, jobs
    with table.guard("a whole training step"):
        model = random_model(args)
        for precision in ("bf16", "fp16", "fp32"):
            for shape in args.shapes:
                whole_step(table, model, precision, shape, args)


def written(batch: int, accumulate: int, checkpointing: bool) -> str:
    return f"batch {batch}" + f" --accumulate {accumulate}" * (accumulate > 1) + " --checkpointing" * checkpointing


def random_model(args: argparse.Namespace) -> weights_loader.Model:
    """U-Net and text encoder with random weights, made on the device and laid out as the loader does."""
    configs, networks = models.TINY if args.small else weight_names.SD_V1, {}
    with torch.device(args.device):
        for part in ("unet", "text_encoder"):
            networks[part] = weights_loader.NETWORKS[part](configs[part]).eval().requires_grad_(False)
    networks["unet"].to(memory_format=torch.channels_last)
    tokenizer = models.toy_tokenizer(configs["text_encoder"].max_length, models.WORDS)
    return weights_loader.Model(**networks, vae=None, tokenizer=tokenizer, schedule=diffusion.Schedule.sd_v1(),
                                fingerprint="", name="random", folder=None)


def whole_step(table: Table, model: weights_loader.Model, precision: str, shape: tuple, args: argparse.Namespace):
    """A line: train.py's step on random latents, text encoder and optimizer and all."""
    batch, accumulate, model.unet.checkpointing = shape
    what = f"train.py's whole step, {precision}, {written(*shape)}"
    with table.guard(what):
        latents = torch.randn(5, 2, 4, args.latent, args.latent, device=args.device)
        data = pictures.Data(latents[:, :1], latents, torch.ones_like(latents[:, :, :1]))
        settings = train.Settings("teddy bear", "<teddy>", STEPS, batch, precision=precision,
                                  accumulate=accumulate)
        identity = torch.eye(model.text_encoder.config.width, dtype=torch.float64)  # any metric takes this long
        training = train.Training(model, data, settings, identity)
        memory = peak(args.device, training.step, bytes_of(model.unet) + bytes_of(model.text_encoder))
        seconds = statistics.median(bench.measure({"step": training.step}, args.device, args.repeats)["step"])
        if not math.isfinite(training.losses[-1]):
            raise ValueError("the loss is not a number")
        text = f"{seconds:.4f} s {memory} GB"
        if shape in args.shapes[-3:]:
            text += f"; extrapolated, {STEPS} steps take {STEPS * seconds / 60:.1f} minutes"
        table.add(what, text, None)


# ------------------------------------------------------------------------------------------------- the script

def settings(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="(default: the best one present)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument("--small", action="store_true", help="a tiny model, and no bar for its speed")
    parser.add_argument("--repeats", type=int, default=3,
                        help="timed runs of a training step, of a guided step four times as many (default: 3)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the table here")
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    args.shapes, args.steps, args.latent = (SMALL_SHAPES, 4, 8) if args.small else (SHAPES, 6, 64)
    args.repeats = 1 if args.small else args.repeats
    return args


def small_weights(folder: Path) -> str:
    """The folder of a tiny random model, with a covariance of few captions."""
    model = weights_loader.load(models.write_weights(folder))
    captions = covariance.built_in_captions(200, model.tokenizer)
    covariance.store(covariance.covariance(model.text_encoder, model.tokenizer, captions), model)
    return str(folder)


def main(argv: list[str] | None = None) -> int:
    args = settings(argv)
    warnings.filterwarnings("ignore", ".*not as in Stable Diffusion v1")     # of a small run
    table, start = Table(args.out), time.time()
    card = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    table.say(f"{card}, torch {torch.__version__}, {'tiny sizes' if args.small else 'full size'}\n")
    table.say("| what | result | |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        args.weights = small_weights(Path(folder) / "weights") if args.small else "tiny"
        for part in PARTS:
            if part in args.parts:
                own = Path(folder) / part
                own.mkdir()
                with table.guard(part):
                    globals()[f"check_{part}"](table, args, own)
    table.say(f"\n{time.time() - start:.0f} s in all; {table.failed} lines failed")
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
