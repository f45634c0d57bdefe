"""Time and memory against diffusers, in one run, at full Stable Diffusion v1 size with random weights.

    python tests/bench.py                                  # everything: ten minutes on two quiet cores, 9 GB
    python tests/bench.py step train                       # on a CPU; gpu_check.py does it on a GPU
    python tests/bench.py bf16 --latent 8                  # a CPU without bfloat16: diffusers takes minutes

`plain` are our networks as they are, `fast` after fast_cpu.enable. All hold the same weights and take turns,
so that a slow moment of the machine meets each; the number that counts is the ratio of the medians. With
OMP_NUM_THREADS=1, seconds of the processor are counted, not the clock's: other programs disturb them little.
Parts:

    memory  peak memory of loading from files and one guided step in float32
    step    one guided step (two latents) in float32
    bf16    the same in bfloat16, with each one's error against float32
    train   one training step (one latent): forward, and backward to the text encoding
"""

import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import clip_text
import diffusion
import models
import unet
import vae
import weights_loader
from support import command_line, fast_cpu, weight_names

PARTS = ("memory", "step", "bf16", "train")  # memory first: a child's peak counts from its parent's
MEASURED = ("plain", "fast", "diffusers")
PLAIN, FAST = 1.05, {"step": 0.92, "bf16": 0.90, "train": 0.90}  # bars of the time: it / diffusers
GUIDANCE, TIMESTEP, TOKENS = 7.5, 501, 77


def plain_unet(dtype: torch.dtype, device: str, config: unet.UNetConfig = unet.SD_V1) -> unet.UNet:
    """Our U-Net with random weights, numbers that bfloat16 holds exactly."""
    torch.manual_seed(0)
    with torch.device(device):
        network = unet.UNet(config)
    return network.bfloat16().to(dtype).eval().requires_grad_(False)


def build(dtype: torch.dtype, device: str, config: unet.UNetConfig = unet.SD_V1) -> dict[str, nn.Module]:
    """The networks that take turns, with the same weights."""
    from diffusers import UNet2DConditionModel
    networks = {"plain": plain_unet(dtype, device, config)}
    with torch.device("meta"):
        networks["diffusers"] = UNet2DConditionModel.from_config(weight_names.write_config("unet", config))
        if device == "cpu":
            networks["fast"] = unet.UNet(config)
    for network in networks.values():
        network.load_state_dict(networks["plain"].state_dict(), assign=True)
        network.eval().requires_grad_(False)
    if device != "cpu":  # as weights_loader leaves the weights of convolutions
        networks["plain"].to(memory_format=torch.channels_last)
    else:  # this is all that `enable` asks of a Model; memory is kept for all in the process
        fast, other = networks["fast"], vae.VAE(models.TINY["vae"])
        fast_cpu.enable(SimpleNamespace(device=torch.device("cpu"), unet=fast, vae=other, text_encoder=other))
    return networks


def inputs(side: int, dtype: torch.dtype, device: str = "cpu", n: int = 1, width: int = 768) -> tuple:
    """Latents of noise (n, 4, side, side) and text encodings (2n, 77, width)."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(n, 4, side, side, generator=generator)
    e = torch.randn(2 * n, TOKENS, width, generator=generator)
    return z.to(device), e.to(device, dtype)


def guided_step(network: nn.Module, z: Tensor, e: Tensor) -> Callable[[], Tensor]:
    """A job: the guided prediction of our network, or of diffusers', for a latent and two encodings."""
    if isinstance(network, unet.UNet):
        keys, values = network.keys(e), network.values(e)
        predict_noise = diffusion.guided(network, diffusion.Schedule.sd_v1(), keys, values, GUIDANCE)
        return lambda: predict_noise(z, TIMESTEP)

    def theirs():
        output = network(torch.cat([z, z]).to(e.dtype), TIMESTEP, encoder_hidden_states=e).sample
        without, with_text = output.float().chunk(2)
        return without + GUIDANCE * (with_text - without)
    return theirs


def training_step(network: nn.Module, z: Tensor, e: Tensor, parts: int = 1) -> Callable[[], Tensor]:
    """A job, as often as there are parts: the gradient of the loss of latents with respect to as many text
    encodings, in e's precision."""
    z = z.to(e.dtype)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(2)).to(z)

    def step():
        for _ in range(parts):
            text = e[:len(z)].clone().requires_grad_()
            if isinstance(network, unet.UNet):
                output = network(z, TIMESTEP, network.keys(text), network.values(text))
            else:
                output = network(z, TIMESTEP, encoder_hidden_states=text).sample
            (noise - output).square().mean().backward()
        return text.grad
    return step


def measure(jobs: dict[str, Callable], device: str, repeats: int) -> dict[str, float]:
    """The median seconds of each job, run in turn, after one warm-up each."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    seconds = {name: [] for name in jobs}
    for k in range(repeats + 1):
        for name in [*jobs] if k % 2 else [*jobs][::-1]:
            start = clock()
            jobs[name]()
            getattr(torch, device).synchronize()
            seconds[name].append(clock() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def report(part: str, numbers: dict[str, float], unit: str):
    """Print each number against diffusers', and whether a ratio of our times meets its bar."""
    bars = {"plain": PLAIN, "fast": FAST[part]} if part in FAST else {}
    for name, number in numbers.items():
        ratio = number / numbers["diffusers"]
        verdict = f"bar {bars[name]:.2f} {'met' if ratio <= bars[name] else 'MISSED'}" if name in bars else ""
        print(f"{part:8} {name:9} {number:8.3f} {unit}  ratio {ratio:.3f}  {verdict}", flush=True)


def difference(a: Tensor, b: Tensor) -> float:
    """The root mean square of a - b, against that of b."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def bench_time(part: str, args: Namespace):
    make = training_step if part == "train" else guided_step
    dtype = torch.bfloat16 if part == "bf16" else torch.float32
    networks, data = build(dtype, "cpu"), inputs(args.latent, dtype)
    jobs = {name: make(network, *data) for name, network in networks.items()}
    against, exact = "diffusers", jobs["diffusers"]
    if part == "bf16":
        against = "float32"
        exact = make(plain_unet(torch.float32, "cpu"), *inputs(args.latent, torch.float32))
    expected = exact()
    errors = ", ".join(f"{name} {difference(job(), expected):.2e}" for name, job in jobs.items())
    print(f"{part:8} difference to {against}: {errors}")
    report(part, measure(jobs, "cpu", args.repeats), "s")


def bench_memory(args: Namespace):
    """Each in a process of its own, whose peak is clean."""
    processes = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    with processes, tempfile.TemporaryDirectory() as folder:
        write, *peaks = (processes.apply(peak, (who, Path(folder), args)) for who in ("write", *MEASURED))
        report("memory", dict(zip(MEASURED, peaks)), "GB")


@torch.no_grad()
def peak(who: str, folder: Path, args: Namespace) -> float:
    """Write a random model, or load it and take one guided step; the peak in GB of this process."""
    if who == "write":
        configs = weight_names.SD_V1 | {"text_encoder": clip_text.TextConfig(vocab_size=514)}  # the toy one's
        weights_loader.save(models.toy_model(configs, models.toy_tokenizer(TOKENS), "random"), folder)
    elif who == "diffusers":
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel
        parts = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
        loaded = {part: network.from_pretrained(folder / part) for part, network in parts.items()}
        guided_step(loaded["unet"], *inputs(args.latent, torch.float32))()
    else:
        model = weights_loader.load(folder)
        if who == "fast":
            fast_cpu.enable(model)
        guided_step(model.unet, *inputs(args.latent, torch.float32))()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main():
    parser = command_line.Parser(__doc__)
    add, count = parser.add_argument, command_line.between(1, 1000)
    add("parts", nargs="*", choices=PARTS, help="(default: all)")
    add("--repeats", type=count, default=5, help="timed runs of each")
    add("--latent", type=count, default=64, help="side of the latents")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"{torch.backends.cpu.get_cpu_capability()}")
    for part in [part for part in PARTS if part in (args.parts or PARTS)]:
        with torch.set_grad_enabled(part == "train"):
            bench_memory(args) if part == "memory" else bench_time(part, args)


if __name__ == "__main__":
    command_line.run(main, memory="a smaller --latent needs less")
