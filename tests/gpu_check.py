"""What whoever has a GPU can check with one command: one table, and exit code 1 if a line of it fails.

    python tests/gpu_check.py | tee table.md                # the best device here; minutes on a large card
    python tests/gpu_check.py --checks resume speed         # some of the checks
    python tests/gpu_check.py --small --device cpu          # the same lines at tiny sizes, in seconds

It needs requirements-dev.txt. Nothing is downloaded: the embedded model is used as it is, and Stable
Diffusion v1 at full size with random weights. Checks:

    script      train, sample, diagnostics, evaluate and export run on the device
    picture     what `script` drew from one seed is what the CPU draws
    concept     what `script` trained from one seed is what the CPU trains
    hook        diffusers' U-Net with our hooks predicts what our own U-Net predicts
    resume      a training that was stopped and resumed gives the numbers of one that was not
    speed       seconds and memory of the U-Net: a guided step, forward and backward, against diffusers'
    whole_step  seconds and memory of train.py's step, and what a finished concept takes by them

In float32, torch lets cuDNN round the inputs of convolutions to 11 bits (TF32) unless it is told not to. What
is compared is computed without that, what is timed with it.
"""

import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image, ImageChops

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import bench
import diffusers_hook
import models
import perfusion
import train
import weights_loader
from concept import Concept, prepare
from support import pictures, training_files, weight_names
from support.command_line import DTYPES, pick_device

BAR = 1.0                   # of the time: ours / diffusers
ROUNDING = 10               # device and CPU may differ by this many times what two orders of summation differ
HOOK = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}    # rounding of two implementations of the U-Net
STEPS = 400                 # of a finished concept
# of training steps: batch, --accumulate, --checkpointing; what takes most memory comes last
SHAPES = {"batch 1": (1, 1, False), "batch 4": (4, 1, False), "batch 16 --accumulate 4": (16, 4, False),
          "batch 16 --checkpointing": (16, 1, True), "batch 16": (16, 1, False)}
SMALL_SHAPES = {"batch 4 --accumulate 2 --checkpointing": (4, 2, True)}
TRAIN = "train.py --images {examples}/teddy --super teddy --preview 0 --precision"
# the folder that it writes: the command; {fp32} is the concept in the folder fp32
SCRIPTS = {
    "fp32": f"{TRAIN} fp32", "bf16": f"{TRAIN} bf16", "fp16": f"{TRAIN} fp16",
    "on-cpu": f"{TRAIN} fp32 --device cpu", "in-two": f"{TRAIN} fp32 --device cpu --accumulate 2",
    "trained": f"{TRAIN} bf16 --keys trained", "none": f"{TRAIN} bf16 --keys none --preview 4",
    "cat": "train.py --images {examples}/cat --super cat --preview 0 --precision bf16",
    "drawn": "sample.py {prompt} --concept {fp32} --precision fp32 --steps 20",
    "drawn-on-cpu": "sample.py {prompt} --concept {fp32} --precision fp32 --steps 20 --device cpu",
    "drawn-bf16": "sample.py {prompt} --concept {bf16} --precision bf16",
    "drawn-fp16": "sample.py {prompt} --concept {fp16} --precision fp16",
    "figures": "diagnostics.py --concept {bf16} --trained {trained} --inversion {none} --second {cat}",
    "curves": "evaluate.py --concept {bf16} {none} --beta 0.6,0.7 --seeds 2 --prompts tiny",
    "lora": "export.py --concept {bf16}"}
PROMPT = "a <teddy> on the beach"
VERDICTS = {True: "ok", False: "FAILED", None: ""}     # None where no bar judges
Lines = Iterator[tuple[str, str, bool | None]]          # what was checked, the result, the verdict


def script(args: Namespace, name: str) -> Lines:
    """In this process, which spares a start. The scripts see to it themselves that numbers are finite."""
    places = {path.parent.name: path for path in args.folder.glob("*/*.safetensors")}
    places |= {"prompt": PROMPT, "examples": models.ROOT / "examples"}
    program, *options = (word.format(**places) for word in SCRIPTS[name].split())
    common = ["--weights", args.weights, "--out", args.folder / name]
    if program != "export.py":
        common += ["--device", args.device, "--steps", 4]
    code, _, errors = models.run_script(program, *common, *options)
    yield f"`{SCRIPTS[name]}`", errors.strip().splitlines()[-1] if code else "runs", not code


# ---------------------------------------------------------------------------------------- the same numbers

def picture(args: Namespace, precision: str) -> Lines:
    ours, expected = (Image.open(args.folder / name / "0000.png") for name in ("drawn", "drawn-on-cpu"))
    levels = max(most for least, most in ImageChops.difference(ours, expected).getextrema())
    yield f"picture, {precision}", f"differs from the CPU's by {levels} of 255 levels", levels <= 1


def concept(args: Namespace, precision: str) -> Lines:
    ours, expected, in_two = (torch.load(args.folder / name / "checkpoint.pt", map_location="cpu")["learned"]
                              for name in ("fp32", "on-cpu", "in-two"))
    found, rounding = (max(map(bench.difference, learned, expected)) for learned in (ours, in_two))
    yield (f"concept, {precision}", f"differs from the CPU's by {found:.1e}, the CPU's own in two parts by "
           f"{rounding:.1e}", found <= ROUNDING * rounding)


@torch.no_grad()
def hook(args: Namespace, precision: str) -> Lines:
    """One guided prediction with a concept whose values are far from its super-category's."""
    from diffusers import UNet2DConditionModel
    model = weights_loader.load(args.weights, args.device, DTYPES[precision])
    file = models.write_concept(args.weights, args.folder / "teddy.safetensors")
    concepts = prepare([Concept.load(file)], model)
    keys, values, *_ = perfusion.condition(model, ["", PROMPT], concepts)
    theirs = UNet2DConditionModel.from_pretrained(model.folder / "unet", torch_dtype=DTYPES[precision])
    z = torch.randn(2, model.unet.config.in_channels, 16, 16).to(args.device, DTYPES[precision])
    with diffusers_hook.personal(theirs.to(args.device), model, concepts) as encode:
        e = encode(PROMPT)
        text = torch.cat([e["negative_prompt_embeds"], e["prompt_embeds"]])
        output = theirs(z, 501, encoder_hidden_states=text).sample
    found, bar = bench.difference(output, model.unet(z, 501, keys, values)), HOOK[precision]
    yield f"diffusers_hook, {precision}", f"differs from our U-Net by {found:.1e}, bar {bar}", found <= bar


def begin(args: Namespace, model: weights_loader.Model, precision: str, batch=4, parts=1):
    """A Training before its first step, on random latents and with C = 1: they take the time of real ones."""
    shape = model.unet.config.in_channels, args.latent, args.latent
    latents = torch.randn(5, 2, *shape, device=args.device)
    data = pictures.Data(latents[:, 0], latents, torch.ones_like(latents[:, :, :1]))
    settings = train.Settings("teddy bear", "<teddy>", STEPS, batch, precision=precision, accumulate=parts)
    return train.Training(model, data, settings, torch.eye(model.text_encoder.config.width).double())


def resume(args: Namespace, precision: str) -> Lines:
    """Two steps, the same once more, and the second of them from a checkpoint after the first."""
    model = weights_loader.load(args.weights, args.device)
    whole = begin(args, model, precision)
    again, resumed = (train.Training(model, whole.data, whole.settings, whole.C_inverse) for _ in range(2))
    whole.step(), again.step(), again.step()
    training_files.write(args.folder, whole.concept, whole.state_dict())
    resumed.load_state_dict(training_files.read_checkpoint(args.folder / "checkpoint.pt", resumed.identity()))
    whole.step(), resumed.step()
    repeat, found = (max(map(models.largest_difference, whole.learned, x.learned)) for x in (again, resumed))
    yield (f"training resumed, {precision}", f"two whole runs differ by {repeat:.1e}, a resumed one by "
           f"{found:.1e}", found <= ROUNDING * repeat)


# ------------------------------------------------------------------------------------------- time and memory

def cost(args: Namespace, jobs: dict, networks: dict, repeats: int = 3) -> tuple[dict, str]:
    """Median seconds of jobs that take turns, and a text with them and with the peaks of memory.

    Of the networks on the device, only a job's own one counts.
    """
    memory = dict.fromkeys(jobs, "? GB")        # where torch does not count it
    for name, job in jobs.items() if args.device == "cuda" else ():
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - sum(p.nbytes for p in networks[name].parameters())
        job()
        torch.cuda.synchronize()
        memory[name] = f"{(torch.cuda.max_memory_allocated() - others) / 1e9:.1f} GB"
    seconds = bench.measure(jobs, args.device, repeats)
    return seconds, ", ".join(f"{name} {seconds[name]:.4f} s {memory[name]}" for name in jobs)


def speed(args: Namespace, precision: str) -> Lines:
    """bench.py's networks and jobs."""
    config, dtype = args.configs["unet"], DTYPES[precision]
    networks = bench.build(dtype, args.device, config)
    for name, (batch, parts, checkpointing) in ({"guided step": (1, 1, False)} | args.shapes).items():
        networks["plain"].checkpointing = checkpointing
        getattr(networks["diffusers"], f"{'en' if checkpointing else 'dis'}able_gradient_checkpointing")()
        data = bench.inputs(args.latent, dtype, args.device, batch // parts, config.cross_attention_dim)
        guided, jobs = name == "guided step", {}
        for who in ("plain", "diffusers"):
            jobs[who] = (bench.guided_step(networks[who], *data) if guided else
                         bench.training_step(networks[who], *data, parts))
        with torch.set_grad_enabled(not guided):
            seconds, text = cost(args, jobs, networks, 12 if guided else 3)
        ratio = seconds["plain"] / seconds["diffusers"]
        yield (f"U-Net, {name}, {precision}", f"{text}; ratio **{ratio:.3f}**, bar {BAR}",
               None if args.small else ratio <= BAR)


def whole_step(args: Namespace, precision: str) -> Lines:
    """Text encoder, optimizer and all, on weights made on the device and laid out as the loader does."""
    tokenizer = models.toy_tokenizer(args.configs["text_encoder"].max_length, models.WORDS)
    with torch.device(args.device):
        model = models.toy_model(args.configs, tokenizer, "random")
    networks = {"ours": torch.nn.ModuleList([model.unet, model.text_encoder])}
    model.unet.to(memory_format=torch.channels_last)
    for name, (batch, parts, model.unet.checkpointing) in args.shapes.items():
        training = begin(args, model, precision, batch, parts)
        seconds, text = cost(args, {"ours": training.step}, networks)
        minutes = STEPS * seconds["ours"] / 60
        yield (f"train.py's step, {name}, {precision}", f"{text}; {STEPS} steps, extrapolated: {minutes:.1f} "
               "minutes", None)


# ------------------------------------------------------------------------------------------------- the script

# each with the names that it is called with
CHECKS = {script: SCRIPTS, picture: ["fp32"], concept: ["fp32"], hook: DTYPES, resume: DTYPES, speed: DTYPES,
          whole_step: DTYPES}


def guarded(check: Callable, args: Namespace, name: str) -> Lines:
    """A check's lines; an error is a line that fails, but for too little memory."""
    try:
        yield from check(args, name)
    except Exception as error:      # whatever a check meets
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200].replace("|", "/")
        yield f"{check.__name__} {name}", reason, None if "out of memory" in reason else False


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    names = [check.__name__ for check in CHECKS]
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="(default: the best one present)")
    parser.add_argument("--checks", nargs="+", choices=names, default=names, help="(default: all)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, and no bar for their speed")
    args, start, failed = parser.parse_args(argv), time.time(), 0
    args.device, args.weights = pick_device(args.device), "tiny"
    args.configs, args.latent, args.shapes = weight_names.SD_V1, 64, SHAPES
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        if args.small:
            args.configs, args.latent, args.shapes = models.TINY, 8, SMALL_SHAPES
            args.weights = models.write_weights(args.folder / "weights", captions=200)
        card = torch.cuda.get_device_name() if args.device == "cuda" else args.device
        print(f"{card}, torch {torch.__version__}\n\n| what | result | |\n|---|---|---|")
        for check in [check for check in CHECKS if check.__name__ in args.checks]:
            torch.backends.cudnn.allow_tf32 = check in (speed, whole_step)
            for name in CHECKS[check]:
                for what, result, ok in guarded(check, args, name):
                    failed += ok is False
                    print(f"| {what} | {result} | {VERDICTS[ok]} |", flush=True)
    print(f"\n{time.time() - start:.0f} s in all; {failed} lines failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
