"""Judges pictures of the world: what is in them, which individual it is, and where. Trained on renders only.

    python tiny/judge.py train          # draws its own training pictures; a few minutes on one core
    python tiny/judge.py accuracy       # on held-out renders
    python tiny/judge.py base           # the embedded model: prompt following, speed, VAE, attention

One small convolutional network with heads for subject, main colour, accessory, scene and second object, an
identity embedding of the subject and one of the second object (the same individual in other scenes, poses and
company is near, every other one is far), and a coarse mask. It never saw a generated picture; a slight random
blur, noise and shift of brightness in training keep it from relying on the renderer's sharp edges.
"""
import argparse
import math
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library files lie one folder up
import drawing
import make_examples
import weights_loader
import world
from attention_maps import MASK_TIMESTEPS, attention, record_queries, word_map, word_masks

FILE = Path(__file__).resolve().parent / "weights" / "judge.safetensors"
HEADS = {"subject": world.KINDS, "color": tuple(world.COLORS), "accessory": ("none", *world.ACCESSORIES),
         "scene": world.ALL_SCENES, "second": ("none", *world.KINDS)}
EMBEDDING = 64
TRAIN_STEPS = 1200
TEMPERATURE = 0.07  # of the contrastive loss
GALLERY, VIEWS = 50, 8  # individuals to choose from, and the renders that each is known by
GUIDANCE = 4.0  # of the generated pictures
BOTH = "both objects, in any order"
OVERLAP_DRAWS = 2  # of noise, at each timestep of the masks


class Judge(nn.Module):
    """The network: (B, 3, 64, 64) in [0, 1] -> a dict of logits, embeddings and mask logits."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in zip(widths, widths[1:]))
        self.shared = nn.Sequential(nn.Linear(128 * 16, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(labels)) for name, labels in HEADS.items()})
        self.identity, self.identity_second = nn.Linear(256, EMBEDDING), nn.Linear(256, EMBEDDING)
        self.lateral = nn.ModuleList(nn.Conv2d(width, 32, 1) for width in widths[2:])
        self.mask = nn.Conv2d(32, len(world.REGIONS), 3, padding=1)

    def forward(self, images: Tensor) -> dict:
        x, features = images * 2 - 1, []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        shared = self.shared(x.flatten(1))
        merged = sum(F.interpolate(lateral(feature), (16, 16), mode="bilinear")
                     for lateral, feature in zip(self.lateral, features[1:]))
        return {name: head(shared) for name, head in self.heads.items()} | {
            "identity": F.normalize(self.identity(shared), dim=-1),
            "identity_second": F.normalize(self.identity_second(shared), dim=-1),
            "mask": self.mask(F.relu(merged))}

    @classmethod
    def load(cls, path: Path = FILE) -> "Judge":
        """The trained judge, in eval mode. ValueError where there is none."""
        if not Path(path).exists():
            raise ValueError(f"{path} does not exist: make it with `python tiny/judge.py train`")
        judge = cls()
        state = load_file(path)
        judge.load_state_dict({name: x.float() if x.is_floating_point() else x for name, x in state.items()})
        return judge.eval().requires_grad_(False)

    @torch.no_grad()
    def classify(self, images: Tensor) -> list[dict]:
        """(B, 3, 64, 64) in [0, 1] -> per picture {"subject": "cat", "accessory": "none", ...}."""
        out = self(images)
        chosen = {name: out[name].argmax(1).tolist() for name in HEADS}
        return [{name: HEADS[name][chosen[name][b]] for name in HEADS} for b in range(len(images))]

    @torch.no_grad()
    def embed(self, images: Tensor, second: bool = False) -> Tensor:
        """Identity of the subject, or of the second object: unit vectors (B, EMBEDDING)."""
        return self(images)["identity_second" if second else "identity"]

    @torch.no_grad()
    def masks(self, images: Tensor) -> dict:
        """Where things are: region -> (B, 16, 16) shares between 0 and 1."""
        shares = self(images)["mask"].softmax(1)
        return {name: shares[:, k] for k, name in enumerate(world.REGIONS)}


# ---------------------------------------------------------------------------------------------------- renders

def to_images(pictures: list) -> Tensor:
    """uint8 arrays (64, 64, 3) -> (n, 3, 64, 64) in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def renders(specs: list) -> Tensor:
    """The pictures of specs (n, 3, 64, 64) in [0, 1]."""
    return to_images([world.render(spec)[0] for spec in specs])


def view(rng: random.Random, individual: world.Individual, second: world.Individual | None = None,
         plain: bool = False) -> world.Spec:
    """One individual in a random scene and pose; with a random accessory, or none where `plain`."""
    scene = rng.choice(list(world.SCENES)) if rng.random() < 0.75 else rng.choice(world.BACKGROUNDS)
    wears = individual.kind in world.WEARERS and rng.random() < 0.5 and not plain
    return world.place(rng, individual, scene, rng.choice(list(world.ACCESSORIES)) if wears else None, second)


def labels(specs: list) -> dict:
    """Class numbers (n,) of every head."""
    names = [{"subject": s.individual.kind, "color": s.individual.colors["main"], "scene": s.scene,
              "accessory": s.accessory or "none", "second": s.second.kind if s.second else "none"}
             for s in specs]
    return {head: torch.tensor([HEADS[head].index(name[head]) for name in names]) for head in HEADS}


def couple(rng: random.Random, kind: str | None = None) -> tuple:
    """Two individuals of one kind, half of the time of one main colour too: hard to tell apart."""
    first = world.random_individual(rng, kind)
    color = first.colors["main"] if rng.random() < 0.5 else None
    return first, world.random_individual(rng, first.kind, color)


def training_batch(rng: random.Random, quads: int) -> tuple:
    """4 x quads specs; for each the number of the one with the same subject, of the one with the same second.

    A quad is two individuals twice, or (4 of 10) two individuals each beside each of two others: then neither
    embedding can gain from looking at the wrong object. Where there is no second object, its partner is -1.
    """
    specs, same, same_second = [], [], []
    for q in range(quads):
        a, b = couple(rng)
        seconds = (None, None)
        if rng.random() < 0.4:
            seconds = couple(rng, rng.choice([kind for kind in world.KINDS if kind != a.kind]))
        specs += [view(rng, me, other) for me in (a, b) for other in seconds]
        same += [4 * q + k for k in (1, 0, 3, 2)]
        same_second += [4 * q + k if seconds[0] else -1 for k in (2, 3, 0, 1)]
    return specs, torch.tensor(same), torch.tensor(same_second)


def soften(images: Tensor) -> Tensor:
    """A generated picture is a little soft, noisy and off in brightness: so is each of these, at random."""
    B = len(images)
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    images = images.lerp(blurred, torch.rand(B, 1, 1, 1))
    images = images * (1 + 0.05 * torch.randn(B, 3, 1, 1)) + 0.03 * torch.randn(B, 1, 1, 1)
    return images.add_(0.04 * torch.rand(B, 1, 1, 1) * torch.randn_like(images)).clamp_(0, 1)


def contrast(embeddings: Tensor, partner: Tensor) -> Tensor:
    """InfoNCE: of all others in the batch, the partner is the most similar. partner -1: not in the loss."""
    there = partner >= 0
    positions = torch.arange(len(partner))[there]
    similarity = embeddings[there] @ embeddings[there].T / TEMPERATURE
    similarity = similarity.masked_fill(torch.eye(len(positions), dtype=torch.bool), -1e9)
    return F.cross_entropy(similarity, torch.searchsorted(positions, partner[there]))


def train(steps: int, quads: int, path: Path, seed: int = 0) -> Judge:
    """Train on fresh renders and write the judge in float16."""
    torch.manual_seed(seed)
    rng, judge, start = random.Random(seed), Judge(), time.process_time()
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.2)
    for step in range(steps):
        specs, same, same_second = training_batch(rng, quads)
        # Exact masks cost most of the drawing time: a quarter of the pictures teaches where things are.
        images, masks = zip(*[world.render(spec, masks=n < quads) for n, spec in enumerate(specs)])
        regions = torch.from_numpy(np.stack([[mask[name] for name in world.REGIONS]
                                             for mask in masks[:quads]]))
        out, truth = judge(soften(to_images(images))), labels(specs)
        losses = [F.cross_entropy(out[head], truth[head]) for head in HEADS]
        losses += [contrast(out["identity"], same), contrast(out["identity_second"], same_second),
                   F.cross_entropy(out["mask"][:quads], F.avg_pool2d(regions, 4))]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        rate.step()
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step}: " + " ".join(f"{name} {loss:.3f}" for name, loss in zip(
                [*HEADS, "identity", "identity_second", "mask"], losses))
                + f"; {time.process_time() - start:.0f} s of processor", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: x.half() if x.is_floating_point() else x for name, x in judge.state_dict().items()}
    with weights_loader.replacing(path) as partial:
        save_file(state, partial)
    return judge.eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------------- measuring

def interval(right: int, n: int) -> str:
    """A share of n with its 95 % interval (Wilson), in per cent."""
    if n == 0:
        return "none asked for"
    z, p = 1.96, right / n
    middle, half = (p + z * z / 2 / n), z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return f"{100 * p:.1f} % ({100 * low:.1f} to {100 * high:.1f}, n = {n})"


def gallery(judge: Judge, individuals: list, rng: random.Random, second: bool = False) -> Tensor:
    """What the judge knows individuals by: the mean embedding of VIEWS random renders, of unit length.

    Returns (n, EMBEDDING). second: as the second object, beside random things of other kinds.
    """
    specs = [companion_view(rng, me) if second else view(rng, me) for me in individuals for _ in range(VIEWS)]
    parts = [specs[k:k + 100] for k in range(0, len(specs), 100)]
    embeddings = torch.cat([judge.embed(renders(part), second) for part in parts])
    return F.normalize(embeddings.view(len(individuals), VIEWS, -1).mean(1), dim=-1)


def companion_view(rng: random.Random, individual: world.Individual) -> world.Spec:
    """A picture with this individual as its second object."""
    kind = rng.choice([kind for kind in world.KINDS if kind != individual.kind])
    return view(rng, world.random_individual(rng, kind), individual)


def lineup(judge: Judge, individual: world.Individual, seed: int, second: bool = False) -> Tensor:
    """The gallery of one individual (row 0) among GALLERY - 1 random others of its kind."""
    rng = random.Random(f"lineup {seed}")
    others = [world.random_individual(rng, individual.kind) for _ in range(GALLERY - 1)]
    return gallery(judge, [individual, *others], rng, second)


def measure_accuracy(judge: Judge, pictures: int = 2000, rounds: int = 2, seed: int = 10**9) -> dict:
    """Measure -> text, on renders that training never drew (held-out combinations included)."""
    rng, right, overlap = random.Random(seed), dict.fromkeys(HEADS, 0), []
    for k in range(0, pictures, 100):
        specs = [world.random_spec(rng, allow_held_out=True) for _ in range(min(100, pictures - k))]
        found = judge.classify(renders(specs))
        truth = labels(specs)
        for head in HEADS:
            right[head] += sum(HEADS[head].index(f[head]) == y for f, y in zip(found, truth[head].tolist()))
    report = {head: interval(right[head], pictures) for head in HEADS}
    for second in (False, True):
        first = {}
        for kind in world.KINDS * rounds:
            people = [world.random_individual(rng, kind) for _ in range(GALLERY)]
            known = gallery(judge, people, rng, second)
            specs = [companion_view(rng, me) if second else view(rng, me) for me in people]
            hits = (judge.embed(renders(specs), second) @ known.T).argmax(1) == torch.arange(GALLERY)
            first[kind] = first.get(kind, 0) + int(hits.sum())
        name = f"{'second object' if second else 'individual'} first among {GALLERY}"
        report[name] = interval(sum(first.values()), GALLERY * rounds * len(world.KINDS)) + "; " + ", ".join(
            f"{kind} {100 * n / GALLERY / rounds:.0f} %" for kind, n in first.items())
    for k in range(4):
        drawn = [world.render(world.random_spec(rng), masks=True) for _ in range(50)]
        truth = F.avg_pool2d(torch.from_numpy(np.stack([mask["subject"] for _, mask in drawn])), 4)
        guess = judge.masks(to_images([image for image, _ in drawn]))["subject"]
        overlap.append(intersection_over_union(guess > 0.5, truth > 0.5))
    report["mask of the subject, IoU at 16x16"] = f"{torch.cat(overlap).mean():.3f}"
    return report


def intersection_over_union(a: Tensor, b: Tensor) -> Tensor:
    """Two boolean masks (B, H, W) -> (B,)."""
    return (a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp(min=1)


# --------------------------------------------------------------------------------------------- the base model

def prompts_of_the_world(n: int, held_out: bool, seed: int) -> list:
    """n pairs (spec, prompt): combinations seen in training, or only such as were kept out of it."""
    rng, pairs = random.Random(seed), []
    while len(pairs) < n:
        spec = world.random_spec(rng, allow_held_out=held_out)
        if world.held_out(spec) == held_out:
            pairs.append((spec, world.describe(spec, rng)))
    return pairs


@torch.no_grad()
def draw_prompts(model, prompts: list, steps: int, batch: int = 32):
    """Yield the pictures (b, 3, 64, 64) of successive batches of prompts; picture k starts from seed k."""
    for k in range(0, len(prompts), batch):
        part = prompts[k:k + batch]
        e = model.text_encoder(model.text_encoder.embed(model.tokenizer.encode([""] * len(part) + part)[0]))
        keys, values = model.unet.keys(e), model.unet.values(e)
        yield drawing.draw(model, keys, values, range(k, k + len(part)), (64, 64), steps, GUIDANCE)


def follow(found: list, pairs: list) -> dict:
    """Measure -> [one bool per prompt that asks for it]: does the picture show what the prompt names?"""
    kept = {name: [] for name in ("subject", "scene", "color", "accessory", "second object", BOTH)}
    for judged, (spec, prompt) in zip(found, pairs):
        kind, color = spec.individual.kind, spec.individual.colors["main"]
        kept["subject"].append(judged["subject"] == kind)
        if world.scene_words(spec.scene) in prompt:
            kept["scene"].append(judged["scene"] == spec.scene)
        if f"{color} {kind}" in prompt:
            kept["color"].append(judged["color"] == color)
        if spec.accessory:
            kept["accessory"].append(judged["accessory"] == spec.accessory)
        if spec.second:
            kept["second object"].append(judged["second"] == spec.second.kind)
            kept[BOTH].append({judged["subject"], judged["second"]} == {kind, spec.second.kind})
    return kept


def identity_of_captions(judge: Judge, model, steps: int, people: int = 8, seeds: int = 8) -> list:
    """How well words alone can say who it is: a caption with every detail of an individual that no training
    showed, drawn from several seeds. [one bool per picture: the right individual is first of GALLERY]."""
    hits = []
    for k in range(people):
        me = make_examples.unseen_concept(k)[1]
        prompt = f"a photo of a {' '.join(world.adjectives(me))} {me.colors['main']} {me.kind} on the grass"
        known = lineup(judge, me, k)
        for images in draw_prompts(model, [prompt] * seeds, steps):
            hits += ((judge.embed(images) @ known.T).argmax(1) == 0).tolist()
    return hits


@torch.no_grad()
def attention_overlap(model, renders: int = 12, seed: int = 3 * 10**9) -> dict:
    """Kind -> IoU at half maximum of its word's map with the true mask, on noised renders; both at 64x64.

    The map is averaged over MASK_TIMESTEPS and OVERLAP_DRAWS of noise, as the masks of a training are.
    """
    rng, generator, overlaps = random.Random(seed), torch.Generator().manual_seed(0), {}
    for kind in world.KINDS:
        specs = [world.place(rng, world.random_individual(rng, kind), rng.choice(list(world.SCENES)))
                 for _ in range(renders)]
        images, masks = zip(*[world.render(spec, masks=True) for spec in specs])
        z = model.vae.encode(to_images(images) * 2 - 1)
        prompts = [f"a photo of {world.article(kind)} {world.scene_words(spec.scene)}" for spec in specs]
        ids, _ = model.tokenizer.encode(prompts)
        e = model.text_encoder(model.text_encoder.embed(ids))
        keys, values = model.unet.keys(e), model.unet.values(e)
        word, total = model.tokenizer.find(prompts[0], kind)[0], 0
        for t in MASK_TIMESTEPS * OVERLAP_DRAWS:
            noise = torch.randn(z.shape, generator=generator)
            with record_queries(model.unet) as queries:
                model.unet(model.schedule.add_noise(z, noise, torch.full((renders,), t)), t, keys, values)
            maps = attention(queries, keys, model.unet.config.attention_heads)
            total = total + word_map(maps, word, (64, 64))
        truth = torch.from_numpy(np.stack([mask["subject"] for mask in masks])) > 0.5
        half = total.amax((1, 2), keepdim=True) / 2
        overlaps[kind] = intersection_over_union(total > half, truth).mean().item()
    return overlaps


@torch.no_grad()
def mask_overlap(model) -> dict:
    """Example -> IoU of the masks that train.py makes for its pictures, at one half, with the true ones."""
    overlaps = {}
    for name, (individual, scenes) in make_examples.EXAMPLES.items():
        drawn = [world.render(spec, masks=True)
                 for spec in make_examples.example_specs(individual, scenes, name)]
        images, masks = zip(*drawn)
        soft = word_masks(model, model.vae.encode(to_images(images) * 2 - 1), individual.kind)
        soft = F.interpolate(soft, (64, 64), mode="bilinear")[:, 0]
        truth = torch.from_numpy(np.stack([mask["subject"] for mask in masks]))
        overlaps[name] = intersection_over_union(soft > 0.5, truth > 0.5).mean().item()
    return overlaps


@torch.no_grad()
def vae_psnr(vae, renders: int = 256, seed: int = 10**9) -> float:
    """Mean peak signal-to-noise ratio of reconstructed held-out renders, in dB."""
    images = to_images([world.picture(random.Random(seed + k)).image for k in range(renders)])
    parts = [vae.decode(vae.encode(part * 2 - 1)).clamp(-1, 1) / 2 + 0.5 for part in images.split(32)]
    error = (torch.cat(parts) - images).square().mean((1, 2, 3))
    return (-10 * error.log10()).mean().item()


def measure_base(judge: Judge, args):
    """Print everything about the base model, each line as soon as it is known."""
    start = time.perf_counter()
    model = weights_loader.load(args.weights)
    print(f"loaded in {time.perf_counter() - start:.2f} s", flush=True)
    print(f"VAE, 256 held-out renders: {vae_psnr(model.vae):.2f} dB", flush=True)
    for title, overlaps in (("attention of the subject's word", attention_overlap(model)),
                            ("masks of the examples", mask_overlap(model))):
        each = ", ".join(f"{name} {value:.3f}" for name, value in overlaps.items())
        mean = sum(overlaps.values()) / len(overlaps)
        print(f"{title}, IoU with the true mask: {mean:.3f} ({each})", flush=True)
    start = time.perf_counter()
    next(draw_prompts(model, ["a photo of a cat"], 30))
    seconds = time.perf_counter() - start
    print(f"one guided picture of 30 steps: {seconds:.2f} s, {torch.get_num_threads()} threads", flush=True)
    hits = identity_of_captions(judge, model, args.steps)
    print(f"individuals from captions with all details, first among {GALLERY}: "
          f"{interval(sum(hits), len(hits))}", flush=True)
    for title, n, held_out in (("combinations seen in training", args.pictures, False),
                               ("held-out combinations", args.held_out, True)):
        pairs = prompts_of_the_world(n, held_out, seed=2 * 10**9 + held_out)
        found = [one for images in draw_prompts(model, [prompt for _, prompt in pairs], args.steps)
                 for one in judge.classify(images)]
        print(f"{title}, {n} pictures, DDIM {args.steps}, guidance {GUIDANCE}, seeds 0 to {n - 1}:")
        for name, kept in follow(found, pairs).items():
            print(f"  {name}: {interval(sum(kept), len(kept))}", flush=True)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("command", choices=("train", "accuracy", "base"))
    parser.add_argument("--judge", type=Path, default=FILE, help="file of the judge (default: tiny/weights)")
    parser.add_argument("--weights", default="tiny", help="base model (default: tiny)")
    parser.add_argument("--train-steps", type=int, default=TRAIN_STEPS, help="batches of 128 renders")
    parser.add_argument("--pictures", type=int, default=500, help="of combinations seen in training")
    parser.add_argument("--held-out", type=int, default=200, help="of held-out combinations")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the processor")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        if args.command == "train":
            train(args.train_steps, 32, args.judge)
        elif args.command == "accuracy":
            for name, text in measure_accuracy(Judge.load(args.judge)).items():
                print(f"{name}: {text}", flush=True)
        else:
            measure_base(Judge.load(args.judge), args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
