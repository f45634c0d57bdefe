"""Time and memory against diffusers, in one run, at full Stable Diffusion v1 size with random weights.

    python bench.py                       # everything: about ten minutes on two quiet cores, 9 GB of memory
    python bench.py step --precision bf16 --profile
    python bench.py step train --threads 1 --latent 32        # on a busy machine

Both libraries hold the same weights and take turns, so that a slow moment of the machine meets both; the
number that counts is the ratio of the medians. With one thread, seconds of the processor are counted instead
of the clock's, which other programs disturb little. Parts:
    memory    peak resident memory of loading from files plus one guided step, against the size of the weights
    step      one guided step (batch 2 of 64x64 latents), in fp32 and bf16
    train     one training step of a concept (batch 1), against our forward pass and against diffusers
    personal  one guided step with a concept's edit, against the base model's
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import clip_text
import diffusion
import perfusion
import unet
import vae
import weight_configs
import weights_loader

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEP_BAR = {"fp32": 1.00, "bf16": 0.90}      # ours / diffusers
GUIDANCE = 7.5
TIMESTEP = 501


def build(config, dtype, reference=True):
    """Our U-Net with random weights, and diffusers' with the same (None without reference).

    Each has its convolutions' weights in memory as its own loader leaves them: channels last, contiguous.
    """
    torch.manual_seed(0)
    ours = unet.UNet(config).to(dtype).eval().requires_grad_(False)
    state = ours.state_dict()  # keeps the contiguous tensors
    ours.to(memory_format=torch.channels_last)
    weights_loader.keep_freed_memory()  # as load() does; both libraries have the benefit
    if not reference:
        return ours, None
    from diffusers import UNet2DConditionModel
    from diffusers.utils import logging
    logging.set_verbosity_error()
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(weight_configs.WRITE["unet"](config))
    theirs.load_state_dict(state, assign=True)
    return ours, theirs.eval().requires_grad_(False)


def inputs(config, dtype, batch, side):
    """Noise (batch, c, side, side) and text encodings (2, 77, d): what one step starts from."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(batch, config.in_channels, side, side, generator=generator)
    e = torch.randn(2, 77, config.cross_attention_dim, generator=generator)
    return z, e.to(dtype)


def random_concept(network, e):
    """A concept of two tokens with targets of the right sizes."""
    i_super = e[0, 5].float()
    d_star = torch.randn(len(i_super), generator=torch.Generator().manual_seed(2)) + i_super
    to_float = [[o.float() for o in project(e[0, 5])] for project in (network.values, network.keys)]
    return perfusion.Concept("<it>", "it", torch.randn(2, len(i_super)), i_super, d_star, *to_float)


def take_turns(jobs, repeats):
    """Run the jobs {name: function} in turn, after one warm-up each; seconds of every run, per name."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = {name: [] for name in jobs}
    for k in range(repeats + 1):
        for name, job in jobs.items():
            start = clock()
            job()
            if k > 0:
                seconds[name].append(clock() - start)
    return seconds


def report(what, seconds, bar):
    """Print the medians of two jobs, their spread and ratio, and whether the ratio meets its bar."""
    (a, a_times), (b, b_times) = seconds.items()
    ratio = statistics.median(a_times) / statistics.median(b_times)
    times = ", ".join(f"{name} {statistics.median(t):.3f} s ({min(t):.3f} to {max(t):.3f})"
                      for name, t in seconds.items())
    verdict = "met" if ratio <= bar else "MISSED"
    print(f"{what:30} {a} / {b} = {ratio:.3f}   bar {bar:.2f} {verdict}   {times}", flush=True)


def profile(job, rows=14):
    """Print where the time of one call goes, by operator."""
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU]) as result:
        job()
    events = sorted(result.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    for event in events[:rows]:
        seconds, share = event.self_cpu_time_total / 1e6, event.self_cpu_time_total / total
        print(f"    {event.key:44} {event.count:5} calls {seconds:8.3f} s {share:6.1%}")


# -------------------------------------------------------------------------------------------------- the parts

@torch.no_grad()
def bench_step(args, precision):
    config, dtype = args.config, PRECISIONS[precision]
    ours, theirs = build(config, dtype)
    z, e = inputs(config, dtype, 1, args.side)
    predict_noise = diffusion.guided(ours, diffusion.Schedule.sd_v1(), ours.keys(e), ours.values(e), GUIDANCE)

    def reference():
        both = torch.cat([z, z]).to(dtype)
        without, with_text = theirs(both, TIMESTEP, encoder_hidden_states=e).sample.float().chunk(2)
        return without + GUIDANCE * (with_text - without)

    jobs = {"ours": lambda: predict_noise(z, TIMESTEP), "diffusers": reference}
    difference = (jobs["ours"]() - reference()).abs().max() / reference().abs().max()
    print(f"guided step, {precision}: largest difference {difference:.1e} of the largest output")
    report(f"guided step, {precision}", take_turns(jobs, args.repeats), STEP_BAR[precision])
    if args.profile:
        for name, job in jobs.items():
            print(f"  {name}:")
            profile(job)


@torch.no_grad()
def bench_personal(args):
    config = args.config
    ours, _ = build(config, torch.float32, reference=False)
    z, e = inputs(config, torch.float32, 1, args.side)
    concept, schedule = random_concept(ours, e), diffusion.Schedule.sd_v1()
    edit = lambda: perfusion.keys_and_values(ours, e, e, [concept], [0.7], [0.15])
    edited = diffusion.guided(ours, schedule, *edit(), GUIDANCE)
    plain = diffusion.guided(ours, schedule, ours.keys(e), ours.values(e), GUIDANCE)
    jobs = {"personal": lambda: edited(z, TIMESTEP), "base": lambda: plain(z, TIMESTEP)}
    report("personal guided step, fp32", take_turns(jobs, args.repeats), 1.01)
    seconds = statistics.median(take_turns({"edit": edit}, args.repeats)["edit"])
    print(f"the edit itself, once per picture: {seconds:.3f} s")


def bench_train(args):
    config = args.config
    ours, theirs = build(config, torch.float32)
    z, e = inputs(config, torch.float32, 1, args.side)
    e, noise = e[:1], torch.randn_like(z)
    concept = random_concept(ours, e)
    for target in concept.values:
        target.requires_grad_()

    def step(network_output):
        """Forward and backward to the word embedding's encoding (and, ours, to the value targets)."""
        text = e.clone().requires_grad_()
        (noise - network_output(text)).square().mean().backward()
        return text.grad

    def ours_output(text):
        keys, values = perfusion.keys_and_values(ours, text, None, [concept], [0.75], [0.1])
        return ours(z, TIMESTEP, keys, values)

    @torch.no_grad()
    def forward():
        return ours_output(e)

    def their_output(text):
        return theirs(z, TIMESTEP, encoder_hidden_states=text).sample

    ours_step, their_step = lambda: step(ours_output), lambda: step(their_output)
    seconds = take_turns({"ours": ours_step, "diffusers": their_step, "forward": forward}, args.repeats)
    report("training step, fp32", {name: seconds[name] for name in ("ours", "diffusers")}, 0.90)
    report("training step, fp32", {name: seconds[name] for name in ("ours", "forward")}, 2.30)
    if args.profile:
        profile(ours_step)


def bench_memory(args):
    """In child processes: one writes the files, another loads them and takes a step: its peak is clean."""
    with tempfile.TemporaryDirectory() as folder:
        for job in ("write", "load"):
            subprocess.run([sys.executable, __file__, f"memory-{job}", "--folder", folder,
                            "--model", args.model], check=True)


def write_random_model(args):
    """A folder in the published layout with random weights and a vocabulary of bytes."""
    import json

    from tokenizers import pre_tokenizers
    sizes = {"sd_v1": (unet.SD_V1, clip_text.SD_V1, vae.SD_V1), "tiny": (unet.TINY, clip_text.TINY, vae.TINY)}
    unet_config, text_config, vae_config = sizes[args.model]
    folder = Path(args.folder)
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*characters, *(c + "</w>" for c in characters)][:text_config.vocab_size - 2]
    vocabulary = {name: k for k, name in enumerate([*names, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = clip_text.Tokenizer.load(folder / "tokenizer", text_config.max_length)
    model = weights_loader.Model(
        unet=unet.UNet(unet_config), text_encoder=clip_text.TextEncoder(text_config), vae=vae.VAE(vae_config),
        tokenizer=tokenizer, schedule=diffusion.Schedule.sd_v1(), fingerprint="", name="random", folder=None)
    weights_loader.save(model, folder)


@torch.no_grad()
def load_and_step(args):
    start = time.perf_counter()
    model = weights_loader.load(args.folder)
    seconds = time.perf_counter() - start
    z, e = inputs(model.unet.config, torch.float32, 1, args.side)
    keys, values = model.unet.keys(e), model.unet.values(e)
    diffusion.guided(model.unet, model.schedule, keys, values, GUIDANCE)(z, TIMESTEP)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    weights = sum(path.stat().st_size for path in Path(args.folder).rglob("*.safetensors")) / 1e9
    limit = 1.05 * weights + 1.5
    verdict = "met" if peak <= limit else "MISSED"
    print(f"{'load and one guided step, fp32':30} peak {peak:.2f} GB, weights {weights:.2f} GB   "
          f"bar {limit:.2f} GB {verdict}   loaded in {seconds:.1f} s", flush=True)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    names = ("memory", "step", "train", "personal")  # memory first: a child's peak counts from its parent's
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(names)} (default all)")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), help="of the part step (default both)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default all cores")
    parser.add_argument("--profile", action="store_true", help="also print the time of each operator")
    parser.add_argument("--latent", type=int, help="side of the latents (default 64)")
    parser.add_argument("--model", choices=("sd_v1", "tiny"), default="sd_v1", help="sizes (default sd_v1)")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.config, side = (unet.SD_V1, 64) if args.model == "sd_v1" else (unet.TINY, 16)
    args.side = args.latent or side
    children = {"memory-write": write_random_model, "memory-load": load_and_step}
    if args.parts and args.parts[0] in children:
        return children[args.parts[0]](args)
    unknown = set(args.parts) - set(names)
    if unknown or args.repeats < 1:
        parser.error(f"the parts are {', '.join(names)}, and --repeats is at least 1")
    capability = torch.backends.cpu.get_cpu_capability()
    bf16 = "with" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "without"
    print(f"torch {torch.__version__}, {args.threads} threads, {capability} {bf16} bf16 instructions, "
          f"{args.side}x{args.side} latents; seconds are medians (least to most)", flush=True)
    for part in sorted(args.parts or names, key=names.index):
        if part == "step":
            for precision in [args.precision] if args.precision else PRECISIONS:
                bench_step(args, precision)
        else:
            {"memory": bench_memory, "train": bench_train, "personal": bench_personal}[part](args)


if __name__ == "__main__":
    main()
