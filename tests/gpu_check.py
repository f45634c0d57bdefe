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
is compared with the CPU is compared without that ("exact"), and what it changes is said ("as is").
"""

import argparse
import contextlib
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

BAR = 1.0                   # of the time: ours / diffusers
LEVELS = 1                  # of 255: exact pictures are equal up to the next level
ROUNDING = 10               # device and CPU may differ by this many times what two orders of summation differ
HOOK = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}    # rounding of two implementations of the U-Net
STEPS = 400                 # of a finished concept
SHAPES = ((1, 1, False), (4, 1, False), (16, 1, False), (16, 4, False), (16, 1, True))
SMALL_SHAPES = ((1, 1, False), (4, 2, True))        # batch, --accumulate, --checkpointing
PROMPT = "a <teddy> on the beach"


class Table:
    """Prints its lines as they come, in Markdown, and keeps them in a file, so that nothing is lost."""

    def __init__(self, path: Path | None):
        self.path, self.text, self.failed = path, "", 0

    def say(self, line: str):
        print(line, flush=True)
        self.text += line + "\n"
        if self.path:
            self.path.write_text(self.text, encoding="utf-8")

    def add(self, what: str, result: str, ok: bool | None = True):
        """ok: None for a number that no bar judges."""
        self.failed += ok is False
        self.say(f"| {what} | {result} | {'' if ok is None else 'ok' if ok else 'FAILED'} |")

    @contextlib.contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """A line that fails with its reason; the others go on. Too little memory is not a mistake."""
        try:
            yield
        except Exception as error:      # whatever a line meets
            reason = (str(error).splitlines() or [""])[0][:200].replace("|", "/")
            ok = None if "out of memory" in reason else False
            self.add(what, f"{type(error).__name__}: {reason}", ok)
        gc.collect()


# ------------------------------------------------------------------------------------------------ the scripts

def check_scripts(table: Table, args: argparse.Namespace, folder: Path):
    """Each script in this process, which spares its start, into a folder of its own."""
    common = "--weights", args.weights, "--device", args.device, "--steps", 4
    prompts, file = folder / "prompts.txt", {}
    prompts.write_text("a photo of a {}\na {} on the beach\n", encoding="utf-8")

    def line(what: str, *words):
        with table.guard(what):
            start = time.time()
            code, _, errors = models.run_script(*words)
            if code:
                raise RuntimeError(errors.strip().splitlines()[-1])
            table.add(what, f"{finite_files(words[-1])}, {time.time() - start:.0f} s")

    for precision, keys, name in (("fp32", "locked", "teddy"), ("bf16", "locked", "teddy"),
                                  ("fp16", "locked", "teddy"), ("bf16", "trained", "teddy"),
                                  ("bf16", "none", "teddy"), ("bf16", "locked", "cat")):
        out = folder / f"{precision}-{keys}-{name}"
        file[precision, keys, name] = out / f"{name}.safetensors"
        line(f"train.py {precision}, keys {keys}, {name}", "train.py", *common, "--batch", 4, "--images",
             ROOT / "examples" / name, "--super", name, "--precision", precision, "--keys", keys,
             "--preview", 4 * (keys == "none"), "--out", out)
    for precision in DTYPES:
        low = ["--low-vram"] * (precision == "fp16")
        line(" ".join(["sample.py", precision, *low]), "sample.py", PROMPT, *common, "--precision", precision,
             *low, "--concept", file[precision, "locked", "teddy"], "--out", folder / f"drawn-{precision}")
    locked, trained, none = (file["bf16", keys, "teddy"] for keys in ("locked", "trained", "none"))
    line("diagnostics.py", "diagnostics.py", *common, "--concept", locked, "--trained", trained,
         "--inversion", none, "--second", file["bf16", "locked", "cat"], "--out", folder / "figures")
    line("evaluate.py", "evaluate.py", *common, "--concept", locked, none, "--beta", "0.6,0.7",
         "--seeds", 2, "--prompts", prompts, "--out", folder / "evaluation")
    line("export.py", "export.py", "--weights", args.weights, "--concept", locked, "--out", folder / "lora")


def finite_files(folder: Path) -> str:
    """How many; ValueError unless concepts are finite and pictures have more than one colour."""
    files = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".png")]
    for path in files:
        if path.suffix == ".png":
            sound = np.asarray(Image.open(path).convert("L")).std() > 1
        else:
            sound = all(x.isfinite().all() for x in load_file(path).values())
        if not sound:
            raise ValueError(f"{path.name} is not as it should be")
    return f"{len(files)} files, finite"


def conditioned(args: argparse.Namespace, device: str, folder: Path, dtype=torch.float32) -> tuple:
    """The model, a concept whose values are far from its super-category's, keys and values of PROMPT."""
    model = weights_loader.load(args.weights, device, dtype)
    file = models.write_concept(args.weights, folder / "teddy.safetensors")
    concepts = prepare([Concept.load(file)], model)
    return model, concepts, *perfusion.condition(model, ["", PROMPT], concepts)[:2]


def check_hook(table: Table, args: argparse.Namespace, folder: Path):
    """One guided prediction with a concept."""
    if not bench.has_diffusers():
        return table.add("diffusers_hook", "not run: diffusers is not installed", None)
    from diffusers import UNet2DConditionModel
    for precision, dtype in DTYPES.items():
        with table.guard(f"diffusers_hook {precision}"), torch.no_grad(), without_tf32(True):
            model, concepts, keys, values = conditioned(args, args.device, folder, dtype)
            path, shape = model.folder / "unet", (model.unet.config.in_channels, 16, 16)
            theirs = UNet2DConditionModel.from_pretrained(path, torch_dtype=dtype).to(args.device)
            z = diffusion.seeded_noise(0, shape).repeat(2, 1, 1, 1).to(args.device, dtype)
            with diffusers_hook.personal(theirs, model, concepts) as encode:
                e = encode(PROMPT)
                text = torch.cat([e["negative_prompt_embeds"], e["prompt_embeds"]])
                output = theirs(z, 501, encoder_hidden_states=text).sample
            found = bench.difference(output, model.unet(z, 501, keys, values))
            table.add(f"diffusers_hook {precision}", f"differs from our U-Net by {found:.1e}, bar "
                      f"{HOOK[precision]}", found <= HOOK[precision])


# -------------------------------------------------------------------------------- the same numbers as the CPU

def without_tf32(exact: bool):
    """A context in which convolutions in float32 are exact, or as torch has them."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=not exact)


def check_picture(table: Table, args: argparse.Namespace, folder: Path):
    def draw(device):
        model, _, keys, values = conditioned(args, device, folder)
        return diffusion.draw(model, keys, values, [0], model.size, 20, model.guidance)
    expected = draw("cpu")
    for name, exact in (("exact", True), ("as is", False)):
        with table.guard(f"picture, fp32 {name}"), without_tf32(exact):
            levels = (draw(args.device) - expected).abs() * 255
            most, mean = levels.max().item(), levels.mean().item()
            table.add(f"picture, fp32 {name}", f"differs from the CPU's by at most {most:.4f} and on average "
                      f"by {mean:.4f} of 255 levels", most <= LEVELS if exact else None)


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
    """Differences as shares of how far the CPU's training moved; what rounding does, the CPU itself shows."""
    what = f"concept after {args.steps} steps, fp32"
    with table.guard(what):
        start, expected, parts = (learn(make_training(args, "cpu", accumulate=accumulate), steps)
                                  for accumulate, steps in ((1, 0), (1, args.steps), (2, args.steps)))

        def shares(other):
            return [float((a - b).norm() / (b - c).norm()) for a, b, c in zip(other, expected, start)]
        rounding = shares(parts)
        for name, exact in (("exact", True), ("as is", False)):
            with without_tf32(exact):
                found = shares(learn(make_training(args, args.device), args.steps))
            near = all(a <= ROUNDING * b for a, b in zip(found, rounding))
            text = ("embedding and values differ from the CPU's by {:.1e} and {:.1e} of their way; the CPU's "
                    "own in two parts by {:.1e} and {:.1e}").format(*found, *rounding)
            table.add(f"{what} {name}", text, near if exact else None)


def check_resume(table: Table, args: argparse.Namespace, folder: Path):
    def differences(precision):
        """Between two whole trainings, and between a whole one and a resumed one."""
        whole, again, first, second = (make_training(args, args.device, precision) for _ in range(4))
        learn(first, args.steps)
        training_files.write(folder, first.result(), first.losses, first.state_dict())
        second.load_state_dict(training_files.read_checkpoint(folder / "checkpoint.pt", second.identity()))
        resumed = learn(second, args.steps)
        whole, again = learn(whole, 2 * args.steps), learn(again, 2 * args.steps)
        return [max(map(models.largest_difference, whole, other)) for other in (again, resumed)]

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

def peak(device: str, job: Callable, *networks) -> str:
    """GB of a job and its networks, whatever else lies on the device; '?' where torch does not count it."""
    if device != "cuda":
        return "?"
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated() - sum(p.nbytes for n in networks for p in n.parameters())
    job()
    torch.cuda.synchronize()
    return f"{(torch.cuda.max_memory_allocated() - others) / 1e9:.1f}"


def in_parts(job: Callable, parts: int, network, checkpointing: bool) -> Callable:
    """A job as often as there are parts, with or without checkpointing."""
    def whole():
        network.checkpointing = checkpointing           # ours
        if "diffusers" in type(network).__module__:
            getattr(network, f"{'enable' if checkpointing else 'disable'}_gradient_checkpointing")()
        for _ in range(parts):
            job()
    return whole


def compare(table: Table, what: str, networks: dict, jobs: dict[str, Callable], repeats: int,
            args: argparse.Namespace):
    """A line: our seconds and memory, diffusers', and the ratio of the medians.

    "plain" is our network. "contiguous": also ours, but the weights of convolutions lie as in the file, not
    channels last as we load them.
    """
    peaks = {name: peak(args.device, job, networks[name]) for name, job in jobs.items()}
    seconds = bench.measure(jobs, args.device, repeats)
    times = {name: statistics.median(each) for name, each in seconds.items()}
    found = ", ".join(f"{name} {times[name]:.4f} s {peaks[name]} GB" for name in jobs)
    if "diffusers" not in jobs:
        return table.add(what, f"{found}; diffusers is not installed", None)
    ratio = times["plain"] / times["diffusers"]
    table.add(what, f"{found}; ratio **{ratio:.3f}**, bar {BAR}", None if args.small else ratio <= BAR)


def check_speed(table: Table, args: argparse.Namespace, folder: Path):
    """bench.py's networks and jobs, and train.py's whole step."""
    config = args.configs["unet"]
    for precision in ("bf16", "fp16", "fp32"):
        with table.guard(f"speed, {precision}"):
            networks = bench.build(DTYPES[precision], args.device, config)
            networks.pop("fast", None)

            def line(what, batch, make, repeats):
                with table.guard(f"{what}, {precision}"):
                    data = bench.inputs(args, DTYPES[precision], batch, config.cross_attention_dim)
                    jobs = {name: make(network, *data) for name, network in networks.items()}
                    compare(table, f"{what}, {precision}", networks, jobs, repeats, args)
            with torch.no_grad():
                line("guided step", 1, bench.guided_step, 4 * args.repeats)
            for batch, parts, checkpointing in args.shapes:
                def make(network, z, e):
                    return in_parts(bench.training_step(network, z, e), parts, network, checkpointing)
                what = f"U-Net forward and backward, {written(batch, parts, checkpointing)}"
                line(what, batch // parts, make, args.repeats)
            del networks
    with table.guard("train.py's whole step"):
        model = random_model(args)
        for precision in ("bf16", "fp16", "fp32"):
            for shape in args.shapes:
                with table.guard(f"train.py's whole step, {written(*shape)}, {precision}"):
                    whole_step(table, model, precision, shape, args)


def written(batch: int, accumulate: int, checkpointing: bool) -> str:
    parts = f" --accumulate {accumulate}" * (accumulate > 1)
    return f"batch {batch}{parts}{' --checkpointing' * checkpointing}"


def random_model(args: argparse.Namespace) -> weights_loader.Model:
    """U-Net and text encoder with random weights, made on the device and laid out as the loader does."""
    with torch.device(args.device):
        unet, text_encoder = (weights_loader.NETWORKS[part](args.configs[part]).eval().requires_grad_(False)
                              for part in ("unet", "text_encoder"))
    tokenizer = models.toy_tokenizer(text_encoder.config.max_length, models.WORDS)
    return weights_loader.Model(unet.to(memory_format=torch.channels_last), text_encoder, None, tokenizer,
                                diffusion.Schedule.sd_v1(), fingerprint="", name="random", folder=None)


def whole_step(table: Table, model: weights_loader.Model, precision: str, shape: tuple,
               args: argparse.Namespace):
    """A line: train.py's step on random latents, text encoder and optimizer and all."""
    batch, accumulate, model.unet.checkpointing = shape
    latents = torch.randn(5, 2, 4, args.latent, args.latent, device=args.device)
    data = pictures.Data(latents[:, 0], latents, torch.ones_like(latents[:, :, :1]))
    settings = train.Settings("teddy bear", "<teddy>", STEPS, batch, precision=precision,
                              accumulate=accumulate)
    metric = torch.eye(model.text_encoder.config.width, dtype=torch.float64)    # any one takes this long
    training = train.Training(model, data, settings, metric)
    memory = peak(args.device, training.step, model.unet, model.text_encoder)
    times = bench.measure({"step": training.step}, args.device, args.repeats)
    seconds = statistics.median(times["step"])
    result = f"{seconds:.4f} s {memory} GB; {STEPS} steps, extrapolated: {STEPS * seconds / 60:.1f} minutes"
    table.add(f"train.py's whole step, {written(*shape)}, {precision}", result,
              math.isfinite(training.losses[-1]))


# ------------------------------------------------------------------------------------------------- the script

CHECKS = {"scripts": check_scripts, "hook": check_hook, "picture": check_picture, "training": check_training,
          "resume": check_resume, "speed": check_speed}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--device", choices=("cuda", "mps", "cpu"), help="(default: the best one present)")
    add("--parts", nargs="+", choices=CHECKS, default=CHECKS, help="(default: all)")
    add("--small", action="store_true", help="tiny sizes, and no bar for their speed")
    add("--repeats", type=int, default=3, help="timed runs of a training step; a guided step has four "
        "times as many (default: 3)")
    add("--out", type=Path, metavar="FILE", help="keep the table here")
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    args.configs, args.shapes, args.steps, args.latent = (
        (models.TINY, SMALL_SHAPES, 2, 8) if args.small else (weight_names.SD_V1, SHAPES, 4, 64))
    return args


def small_weights(folder: Path) -> str:
    """The folder of a tiny random model, with a covariance of few captions."""
    model = weights_loader.load(models.write_weights(folder))
    captions = covariance.built_in_captions(200, model.tokenizer)
    covariance.store(covariance.covariance(model.text_encoder, model.tokenizer, captions), model)
    return str(folder)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    warnings.filterwarnings("ignore", ".*not as in Stable Diffusion v1")     # of a small run
    table, start = Table(args.out), time.time()
    card = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    table.say(f"{card}, torch {torch.__version__}{', tiny sizes' * args.small}\n")
    table.say("| what | result | |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        args.weights = small_weights(Path(folder) / "weights") if args.small else "tiny"
        for part in [part for part in CHECKS if part in args.parts]:
            (Path(folder) / part).mkdir()
            with table.guard(part):
                CHECKS[part](table, args, Path(folder) / part)
    table.say(f"\n{time.time() - start:.0f} s in all; {table.failed} lines failed")
    return int(table.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
