"""Time and memory against diffusers, in one run, at full Stable Diffusion v1 size with random weights.

    python tests/bench.py                                  # everything: ten minutes on two quiet cores, 9 GB
    python tests/bench.py step train --device cuda
    python tests/bench.py bf16 --latent 8                  # a CPU without bfloat16: diffusers takes minutes

`plain` are our networks as they are, `fast` after fast_cpu.enable. All hold the same weights and take turns,
so that a slow moment of the machine meets each; the number that counts is the ratio of the medians. With one
thread, seconds of the processor are counted, not the clock's: other programs disturb them little. Parts:
    memory  peak memory of loading from files and one guided step in float32
    step    one guided step (two latents) in float32
    bf16    the same in bfloat16, with each one's error against float32
    train   one training step (one latent): forward, and backward to the text encoding
"""

import argparse
import gc
import importlib.util
import resource
import statistics
import subprocess
import sys
import tempfile
import time
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
import weights_loader
from support import fast_cpu, weight_names

PARTS = ("memory", "step", "bf16", "train")  # memory first: a child's peak counts from its parent's
BARS = {"step": 0.92, "bf16": 0.90, "train": 0.90}  # of the time: fast / diffusers
PLAIN_BAR = 1.05
GUIDANCE, TIMESTEP, TOKENS = 7.5, 501, 77


def plain_unet(dtype: torch.dtype, device: str, config: unet.UNetConfig = unet.SD_V1) -> unet.UNet:
    """Our U-Net with random weights, numbers that bfloat16 holds exactly."""
    torch.manual_seed(0)
    with torch.device(device):
        network = unet.UNet(config)
    return network.bfloat16().to(dtype).eval().requires_grad_(False)


def has_diffusers() -> bool:
    return importlib.util.find_spec("diffusers") is not None


def build(dtype: torch.dtype, device: str, config: unet.UNetConfig = unet.SD_V1) -> dict[str, nn.Module]:
    """The networks that take turns, with the same weights; without diffusers where it is not installed."""
    networks = {"plain": plain_unet(dtype, device, config)}
    with torch.device("meta"):
        if has_diffusers():
            from diffusers import UNet2DConditionModel
            networks["diffusers"] = UNet2DConditionModel.from_config(
                weight_names.write_config("unet", config))
        networks |= {"fast": unet.UNet(config)} if device == "cpu" else {"contiguous": unet.UNet(config)}
    for network in networks.values():
        network.load_state_dict(networks["plain"].state_dict(), assign=True)
        network.eval().requires_grad_(False)
    if device != "cpu":  # as weights_loader leaves the weights of convolutions
        networks["plain"].to(memory_format=torch.channels_last)
    else:  # this is all that `enable` asks of a Model; memory is kept for all in the process
        fast = networks["fast"]
        fast_cpu.enable(SimpleNamespace(device=torch.device("cpu"), unet=fast, vae=fast, text_encoder=fast))
    return networks


def inputs(args: argparse.Namespace, dtype: torch.dtype, n: int = 1,
           width: int = 768) -> tuple[Tensor, Tensor]:
    """Latents of noise (n, 4, side, side) and text encodings (2n, 77, width)."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(n, 4, args.latent, args.latent, generator=generator)
    e = torch.randn(2 * n, TOKENS, width, generator=generator)
    return z.to(args.device), e.to(args.device, dtype)


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


def measure(jobs: dict[str, Callable[[], Tensor]], device: str, repeats: int,
            clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """The seconds of each job, run in turn, after one warm-up each."""
    seconds = {name: [] for name in jobs}
    for k in range(repeats + 1):
        for name in [*jobs] if k % 2 else [*jobs][::-1]:
            start = clock()
            jobs[name]()
            getattr(torch, device).synchronize()
            if k > 0:
                seconds[name].append(clock() - start)
    return seconds


def compare(part: str, jobs: dict[str, Callable[[], Tensor]], args: argparse.Namespace):
    """Print the ratios of the jobs' median times to diffusers'."""
    clock = time.process_time if args.device == "cpu" and args.threads == 1 else time.perf_counter
    seconds = measure(jobs, args.device, args.repeats, clock)
    report(part, {name: statistics.median(times) for name, times in seconds.items()}, "s")
    print("    least to most: " + ", ".join(f"{name} {min(times):.3f} to {max(times):.3f} s"
                                            for name, times in seconds.items()), flush=True)


def report(part: str, numbers: dict[str, float], unit: str):
    """Print each of our numbers against diffusers', and whether a ratio of times meets its bar."""
    for name in [name for name in ("plain", "fast") if name in numbers]:
        ratio, bar = numbers[name] / numbers["diffusers"], BARS.get(part) if name == "fast" else PLAIN_BAR
        verdict = f"bar {bar:.2f} {'met' if ratio <= bar else 'MISSED'}" if part in BARS else ""
        print(f"{part:8} {name:6} {numbers[name]:8.3f} {unit}  diffusers {numbers['diffusers']:8.3f} {unit}  "
              f"ratio {ratio:.3f}  {verdict}", flush=True)


def difference(a: Tensor, b: Tensor) -> float:
    """The root mean square of a - b, against that of b."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def bench_time(part: str, args: argparse.Namespace):
    make, dtype = (training_step if part == "train" else guided_step), torch.float32
    if part == "bf16":
        dtype = torch.bfloat16
        expected = guided_step(plain_unet(torch.float32, args.device), *inputs(args, torch.float32))()
    jobs = {name: make(network, *inputs(args, dtype)) for name, network in build(dtype, args.device).items()}
    results = {name: job() for name, job in jobs.items()}
    against = expected if part == "bf16" else results["diffusers"]
    print(f"{part:8} difference to {'float32' if part == 'bf16' else 'diffusers'}: " + ", ".join(
        f"{name} {difference(x, against):.2e}" for name, x in results.items() if x is not against))
    compare(part, jobs, args)


def bench_memory(args: argparse.Namespace):
    """Each in a process of its own, whose peak is clean."""
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, __file__, "--device", args.device, "--latent", str(args.latent),
               "--folder", folder]
        peaks = {}
        for who in ("write", "plain", "fast", "diffusers"):
            output = subprocess.run([*run, f"child-{who}"], check=True, capture_output=True, text=True).stdout
            peaks[who] = float(output.split()[-1])
        report("memory", peaks, "GB")


@torch.no_grad()
def child(who: str, args: argparse.Namespace):
    """Write a random model, or load it, take one guided step and print the peak in GB."""
    z, e = inputs(args, torch.float32)
    if who == "write":
        config = clip_text.TextConfig(vocab_size=514)  # the toy tokenizer's; full width and depth
        model = models.toy_model(weight_names.SD_V1 | {"text_encoder": config},
                                 models.toy_tokenizer(TOKENS), "random")
        weights_loader.save(model, args.folder)
    elif who == "diffusers":
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel
        parts = (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel))
        loaded = [network.from_pretrained(f"{args.folder}/{part}").to(args.device) for part, network in parts]
        guided_step(loaded[0], z, e)()
    else:
        model = weights_loader.load(args.folder, args.device)
        if who == "fast":
            fast_cpu.enable(model)
        guided_step(model.unet, z, e)()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print((torch.cuda.max_memory_allocated() if args.device == "cuda" else peak) / 1e9)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default: 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: all cores)")
    parser.add_argument("--latent", type=int, default=64, help="side of the latents (default: 64)")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.folder:
        return child(args.parts[0].removeprefix("child-"), args)
    if set(args.parts) - set(PARTS) or args.repeats < 1:
        parser.error(f"the parts are {', '.join(PARTS)}, and --repeats is at least 1")
    processor = torch.cuda.get_device_name() if args.device == "cuda" else (
        f"{args.threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"torch {torch.__version__}, {processor}, {args.latent}x{args.latent} latents", flush=True)
    for part in sorted(args.parts or PARTS, key=PARTS.index):
        with torch.set_grad_enabled(part == "train"):
            bench_memory(args) if part == "memory" else bench_time(part, args)
        gc.collect()


if __name__ == "__main__":
    main()
