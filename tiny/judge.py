"""Judges pictures of the world: which things are in them, where, and who they are. Trained on renders only.

    python tiny/judge.py train          # draws its own training pictures; ten minutes on one core
    python tiny/judge.py accuracy       # on held-out renders
    python tiny/judge.py base           # how well the embedded model follows prompts

Two small convolutional networks. The finder looks at the whole picture: where things stand, how tall they
are, which scene it is, and a coarse mask. The expert looks at a square around each thing: kind, main colour,
pattern, accessory, and an embedding in which one individual is near to itself in other scenes, poses and
company, and far from every other. So a thing is judged alike alone and beside another. Neither ever saw a
generated picture; a slight random blur, noise and shift of brightness keeps them from relying on sharp edges.
"""
import argparse
import math
import random
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library files lie one folder up
import diffusion
import perfusion
import weights_loader
import world
from support import command_line, fast_cpu
from support.command_line import between
from support.files import read_tensors, replacing

FILE = Path(__file__).resolve().parent / "weights" / "judge.safetensors"
HEADS = {"kind": world.KINDS, "color": tuple(world.COLORS), "pattern": (None, *world.PATTERNS),
         "accessory": (None, *world.ACCESSORIES), "arms_up": (False, True)}
PROPS = (None, *world.ALL_PROPS)
LAYERS = ("background", "things", "accessories")  # of the coarse mask
SIDE, GRID, CROP = 64, 16, 48  # pixels that a picture is reduced to, cells of the map, pixels of a crop
CROP_SIDE = 1.4   # of a crop, in heights of the thing: a hat and a balloon lie inside
FOUND = 0.4       # how high a peak of the map must be
EMBEDDING = 64
TEMPERATURE = 0.07  # of a contrastive loss
GALLERY, VIEWS = 50, 8  # individuals to choose from, and the renders that each is known by


@dataclass(frozen=True)
class Found:
    """A thing in a picture. box: (x, base, height) as in `world.Thing.pose`; embedding: (EMBEDDING,), unit
    length."""
    kind: str
    color: str
    pattern: str | None
    accessory: str | None
    arms_up: bool
    box: tuple
    embedding: Tensor


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
                         nn.BatchNorm2d(outputs), nn.ReLU())


def reduced(images: Tensor) -> Tensor:
    """Pictures of any size -> (B, 3, SIDE, SIDE)."""
    return F.interpolate(images, (SIDE, SIDE), mode="area")


class Finder(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] -> a dict: "heat" (B, 16, 16), logits of a thing's centre; "box" (B, 3,
    16, 16), its distance in cells (right, down) and log height; "mask" (B, 3, 16, 16), "scene" and "prop",
    logits."""

    def __init__(self):
        super().__init__()
        widths = (3, 24, 48, 64, 96)
        self.stages = nn.ModuleList(convolution(a, b, stride=2) for a, b in zip(widths, widths[1:]))
        self.lateral = nn.ModuleList(nn.Conv2d(width, 48, 1) for width in widths[2:])
        self.out = nn.Sequential(nn.ReLU(), convolution(48, 48), nn.Conv2d(48, 4 + len(LAYERS), 1))
        self.scene = nn.Linear(96 * 16, len(world.ALL_SCENES))
        self.prop = nn.Linear(96 * 16, len(PROPS))

    def forward(self, images: Tensor) -> dict:
        x, features = reduced(images) * 2 - 1, []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        merged = self.out(sum(F.interpolate(lateral(feature), (GRID, GRID), mode="bilinear")
                              for lateral, feature in zip(self.lateral, features[1:])))
        return {"heat": merged[:, 0], "box": merged[:, 1:4], "mask": merged[:, 4:],
                "scene": self.scene(x.flatten(1)), "prop": self.prop(x.flatten(1))}


class Expert(nn.Module):
    """Crops (n, 3, 48, 48) in [0, 1] -> a dict: logits of each of HEADS, and "embedding" (n, EMBEDDING)."""

    def __init__(self):
        super().__init__()
        self.stages = nn.Sequential(convolution(3, 32, 2), convolution(32, 64, 2), convolution(64, 112, 2),
                                    convolution(112, 128, 2), nn.Flatten())
        self.shared = nn.Sequential(nn.Linear(128 * 9, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(labels)) for name, labels in HEADS.items()})
        self.embedding = nn.Linear(256, EMBEDDING)

    def forward(self, crops: Tensor) -> dict:
        shared = self.shared(self.stages(crops * 2 - 1))
        return {name: head(shared) for name, head in self.heads.items()} | {
            "embedding": F.normalize(self.embedding(shared), dim=-1)}


def crop(images: Tensor, which: Tensor, boxes: Tensor) -> Tensor:
    """Squares around things: images (B, 3, H, W), the image of each thing (n,), its box (n, 3) ->
    (n, 3, CROP, CROP)."""
    x, base, height = boxes.T
    zero = torch.zeros_like(x)
    squares = torch.stack([torch.stack([CROP_SIDE * height, zero, 2 * x - 1], 1),
                           torch.stack([zero, CROP_SIDE * height, 2 * base - height - 1], 1)], 1)
    grid = F.affine_grid(squares, [len(boxes), 3, CROP, CROP], align_corners=False)
    return F.grid_sample(reduced(images)[which], grid, padding_mode="border", align_corners=False)


class Judge(nn.Module):
    """Finder and expert together. All methods take pictures (B, 3, H, W) in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.finder, self.expert = Finder(), Expert()

    @classmethod
    def load(cls, path: Path = FILE) -> "Judge":
        """The trained judge, in eval mode; `python tiny/judge.py train` makes it. ValueError."""
        judge = cls()
        judge.load_state_dict(read_tensors(path))
        return judge.eval().requires_grad_(False)

    @torch.no_grad()
    def find(self, images: Tensor) -> list[list[Found]]:
        """The things in every picture, the surest first."""
        out = self.finder(images)
        heat = out["heat"].sigmoid()
        peaks = (heat > FOUND) & (heat == F.max_pool2d(heat, 5, stride=1, padding=2))
        which, row, column = peaks.nonzero()[heat[peaks].argsort(descending=True, stable=True)].T
        if len(which) == 0:         # no crops: torch samples none from nothing
            return [[] for _ in images]
        right, down, height = out["box"][which, :, row, column].T
        x, height = (column + 0.5 + right) / GRID, height.exp()
        boxes = torch.stack([x, (row + 0.5 + down) / GRID + height / 2, height], 1)
        seen = self.expert(crop(images, which, boxes))
        best = {name: seen[name].argmax(1).tolist() for name in HEADS}
        found = [[] for _ in images]
        for n, b in enumerate(which.tolist()):
            found[b].append(Found(**{name: labels[best[name][n]] for name, labels in HEADS.items()},
                                  box=tuple(boxes[n].tolist()), embedding=seen["embedding"][n]))
        return found

    @torch.no_grad()
    def places(self, images: Tensor) -> list[tuple]:
        """The scene of every picture and its prop, or None."""
        out = self.finder(images)
        return [(world.ALL_SCENES[n], PROPS[m])
                for n, m in zip(out["scene"].argmax(1).tolist(), out["prop"].argmax(1).tolist())]

    @torch.no_grad()
    def silhouettes(self, images: Tensor) -> Tensor:
        """Where things are, without what they wear: (B, 16, 16) shares between 0 and 1."""
        return self.finder(images)["mask"].softmax(1)[:, LAYERS.index("things")]


def recognise(found: list[Found], kind: str, known: Tensor, row: int = 0) -> set[int]:
    """Numbers of the found things that are of this kind and nearer to this row of `known` than to others."""
    return {n for n, thing in enumerate(found)
            if thing.kind == kind and (known @ thing.embedding).argmax().item() == row}


# ---------------------------------------------------------------------------------------------------- renders

def to_images(pictures: list) -> Tensor:
    """uint8 arrays (H, W, 3) -> (n, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def renders(specs: list, size: int = world.SIDE) -> Tensor:
    """The pictures of specs (n, 3, size, size) in [0, 1]."""
    return to_images([world.render(spec, size)[0] for spec in specs])


def renders_and_truth(specs: list, size: int) -> tuple:
    """The pictures of specs (n, 3, size, size) in [0, 1], and masks of their first things (n, size, size)."""
    images, masks = zip(*[world.render(spec, size, masks=True) for spec in specs])
    return to_images(images), torch.from_numpy(np.stack([mask["first"] for mask in masks]))


def view(rng: random.Random, *individuals: world.Individual) -> world.Spec:
    """One or two individuals in a random scene, in random poses; half of those that can wear something do."""
    scene = rng.choice(list(world.SCENES)) if rng.random() < 0.75 else rng.choice(world.BACKGROUNDS)
    worn = [rng.choice(list(world.ACCESSORIES)) if one.kind in world.WEARERS and rng.random() < 0.5 else None
            for one in individuals]
    return world.enliven(rng, world.place(rng, individuals, scene, worn))


def couple(rng: random.Random, kind: str | None = None) -> tuple:
    """Two individuals of one kind, half of the time of one main colour too: hard to tell apart."""
    first = world.random_individual(rng, kind)
    color = first.colors["main"] if rng.random() < 0.5 else None
    return first, world.random_individual(rng, first.kind, color)


def training_batch(rng: random.Random, groups: int) -> tuple:
    """4 x groups specs, and for each of their things, in order, the number of its individual's other view.

    In a group two, three or four individuals (of two couples) are seen twice each, alone or beside others: an
    embedding cannot gain from looking at the wrong thing.
    """
    specs, seen, partner = [], {}, {}
    for group in range(groups):
        a, b = couple(rng)
        c, d = couple(rng, a.kind if rng.random() < 0.25 else None)
        for who in rng.choice(((a, a, b, b), ((a, c), (a, d), (b, c), (b, d)), (a, (c, a), b, (b, c)))):
            specs.append(view(rng, *(who if isinstance(who, tuple) else (who,))))
            for thing in specs[-1].things:
                n = len(partner)
                partner[n] = seen.setdefault((group, id(thing.individual)), n)
                partner[partner[n]] = n     # of the first view: itself, until the second is there
    return specs, torch.tensor(list(partner.values()))


def soften(images: Tensor) -> Tensor:
    """A generated picture is a little soft, noisy and off in brightness: so is each of these, at random."""
    B = len(images)
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    images = images.lerp(blurred, torch.rand(B, 1, 1, 1))
    images = images * (1 + 0.05 * torch.randn(B, 3, 1, 1)) + 0.03 * torch.randn(B, 1, 1, 1)
    return images.add_(0.04 * torch.rand(B, 1, 1, 1) * torch.randn_like(images)).clamp_(0, 1)


# --------------------------------------------------------------------------------------------------- training

def labels_of(thing: world.Thing) -> dict:
    """What the HEADS should say of a thing."""
    one = thing.individual
    return {"kind": one.kind, "color": one.colors["main"], "pattern": one.pattern,
            "accessory": thing.accessory, "arms_up": thing.arms_up}


def things_of(specs: list) -> tuple:
    """All things of the specs: the number of their picture (n,), boxes (n, 3), class numbers {head: (n,)}."""
    which, boxes, classes = [], [], {head: [] for head in HEADS}
    for b, spec in enumerate(specs):
        for thing in spec.things:
            which.append(b)
            boxes.append(thing.pose[:3])
            for head, label in labels_of(thing).items():
                classes[head].append(HEADS[head].index(label))
    return torch.tensor(which), torch.tensor(boxes), {head: torch.tensor(n) for head, n in classes.items()}


def finder_loss(out: dict, specs: list, masks: Tensor) -> Tensor:
    """The map should show a round peak at every centre, and the box of the nearest thing around it.

    masks (m, len(LAYERS), 16, 16): coverages of the first m pictures.
    """
    # A thing that is alone is counted twice.
    poses = torch.tensor([[one.pose[:3] for one in (spec.things * 2)[:2]] for spec in specs])
    x, base, height = poses.unbind(-1)                                                  # (B, 2)
    cells = torch.arange(GRID) + 0.5
    right = (x * GRID)[..., None, None] - cells
    down = ((base - height / 2) * GRID)[..., None, None] - cells[:, None]
    near = torch.exp(-(right ** 2 + down ** 2) / 2)                                     # (B, 2, 16, 16)
    boxes = torch.stack(torch.broadcast_tensors(right, down, height.log()[..., None, None]), 2)
    heat, nearest = near.max(1)
    boxes = boxes.gather(1, nearest[:, None, None].expand(-1, 1, 3, -1, -1))[:, 0]
    away = (out["box"] - boxes).abs() * (heat * (heat > 0.4))[:, None]
    scenes = torch.tensor([world.ALL_SCENES.index(spec.scene) for spec in specs])
    props = torch.tensor([PROPS.index(spec.prop) for spec in specs])
    return (20 * F.binary_cross_entropy_with_logits(out["heat"], heat) + away.sum() / heat.sum()
            + F.cross_entropy(out["scene"], scenes) + F.cross_entropy(out["prop"], props)
            + F.cross_entropy(out["mask"][:len(masks)], masks))


def jitter(boxes: Tensor) -> Tensor:
    """Boxes (n, 3) as a finder might see them: a little off."""
    x, base, height = boxes.T
    return torch.stack([x + 0.03 * height * torch.randn(len(x)), base + 0.03 * height * torch.randn(len(x)),
                        height * torch.exp(0.05 * torch.randn(len(x)))], 1)


def contrast(embeddings: Tensor, partner: Tensor) -> Tensor:
    """InfoNCE: of all others in the batch, the partner is the most similar."""
    similarity = embeddings @ embeddings.T / TEMPERATURE
    return F.cross_entropy(similarity.masked_fill(torch.eye(len(partner), dtype=torch.bool), -1e9), partner)


def coarse(masks: list) -> Tensor:
    """Coverages of `world.REGIONS` -> (n, len(LAYERS), 16, 16)."""
    layers = [[mask["background"] + mask["prop"], mask["first"] + mask["second"],
               mask["first's accessory"] + mask["second's accessory"]] for mask in masks]
    return F.adaptive_avg_pool2d(torch.from_numpy(np.array(layers)), GRID)


def train(path: Path = FILE, steps: int = 900, groups: int = 24, seed: int = 0) -> Judge:
    """Train on fresh renders, 4 x groups in every step, and write the judge in float16."""
    torch.manual_seed(seed)
    rng, judge = random.Random(seed), Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.2)
    for step in range(steps):
        specs, partner = training_batch(rng, groups)
        # Exact masks cost most of the drawing time: a quarter of the pictures teaches where things are.
        images, masks = zip(*[world.render(spec, SIDE, masks=n < groups) for n, spec in enumerate(specs)])
        images = soften(to_images(images))
        which, boxes, truth = things_of(specs)
        seen = judge.expert(crop(images, which, jitter(boxes)))
        losses = {"finder": finder_loss(judge.finder(images), specs, coarse(masks[:groups])),
                  "identity": contrast(seen["embedding"], partner)}
        losses |= {head: F.cross_entropy(seen[head], truth[head]) for head in HEADS}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        rate.step()
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step}:", *(f"{name} {loss:.3f}" for name, loss in losses.items()), flush=True)
    state = {name: x.half() if x.is_floating_point() else x for name, x in judge.state_dict().items()}
    with replacing(path) as partial:
        save_file(state, partial)
    return judge.eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------------- measuring

def interval(right: list) -> str:
    """A share of independent trials, one bool each, with its 95 % interval (Wilson), in per cent."""
    n, z = len(right), 1.96
    p = sum(right) / n
    middle, half = (p + z * z / 2 / n), z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return f"{100 * p:.1f} % ({100 * low:.1f} to {100 * high:.1f}, n = {n})"


@torch.no_grad()
def gallery(judge: Judge, individuals: list, rng: random.Random) -> Tensor:
    """What the judge knows individuals by: the mean embedding of VIEWS random renders, of unit length.

    Half of the renders show another thing too. Returns (n, EMBEDDING).
    """
    specs = [view(rng, me, *[world.random_individual(rng)] * (n % 2))
             for me in individuals for n in range(VIEWS)]
    boxes = torch.tensor([spec.things[0].pose[:3] for spec in specs])
    seen = judge.expert(crop(renders(specs), torch.arange(len(specs)), boxes))["embedding"]
    return F.normalize(seen.view(len(individuals), VIEWS, -1).mean(1), dim=-1)


def lineup(judge: Judge, individual: world.Individual, seed: int) -> Tensor:
    """The gallery of one individual (row 0) among GALLERY - 1 random others of its kind."""
    rng = random.Random(f"lineup {seed}")
    others = [world.random_individual(rng, individual.kind) for _ in range(GALLERY - 1)]
    return gallery(judge, [individual, *others], rng)


def by_place(found: list[Found], spec: world.Spec) -> list:
    """(true thing, found thing) from left to right; nothing where their numbers differ."""
    if len(found) != len(spec.things):
        return []
    return list(zip(sorted(spec.things, key=lambda thing: thing.pose[0]),
                    sorted(found, key=lambda thing: thing.box[0])))


def measure_accuracy(judge: Judge, pictures: int, seed: int = 10**9) -> dict:
    """Measure -> text, on renders that training never drew (held-out combinations included)."""
    rng = random.Random(seed)
    specs = [world.random_spec(rng, allow_held_out=True) for _ in range(pictures)]
    images, report = renders(specs), defaultdict(list)
    for spec, found, (scene, prop) in zip(specs, judge.find(images), judge.places(images)):
        matched = by_place(found, spec)
        report["as many things as there are"].append(bool(matched))
        report["scene"].append(scene == spec.scene)
        report["prop"].append(prop == spec.prop)
        for thing, seen in matched:
            for head, label in labels_of(thing).items():
                report[head].append(getattr(seen, head) == label)
    for kind, other in zip(world.KINDS, (*world.KINDS[1:], world.KINDS[0])):
        groups = [[world.random_individual(rng, name) for _ in range(GALLERY)] for name in (kind, other)]
        known = {group[0].kind: gallery(judge, group, rng) for group in groups}
        for title, n in ((f"alone: first among {GALLERY}", 1), (f"in pairs: both first among {GALLERY}", 2)):
            seen = judge.find(renders([view(rng, *who) for who in zip(*groups[:n])]))
            for row, found in enumerate(seen):
                hits = [recognise(found, name, known[name], row) for name in (kind, other)[:n]]
                report[title].append(all(hits))
    return {name: interval(right) for name, right in report.items()}


# --------------------------------------------------------------------------------------------- the base model

def prompts_of_the_world(n: int, held_out: bool, seed: int) -> list:
    """n pairs (spec, prompt): combinations seen in training, or only such as were kept out of it."""
    rng, pairs = random.Random(seed), []
    while len(pairs) < n:
        spec = world.random_spec(rng, allow_held_out=held_out)
        if world.held_out(spec) == held_out:
            pairs.append((spec, world.describe(spec, rng)))
    return pairs


def draw(model, prompts: list, seeds: list, steps: int, concepts: tuple = (), batch: int = 32) -> Tensor:
    """Pictures (n, 3, H, W) in [0, 1]: number k shows prompts[k], from the noise of seeds[k]."""
    pictures = []
    for k in range(0, len(prompts), batch):
        part = prompts[k:k + batch]
        text = perfusion.condition(model, [""] * len(part) + part, concepts)
        pictures.append(diffusion.draw(model, text.keys, text.values, seeds[k:k + batch], model.size, steps,
                                       model.guidance))
    return torch.cat(pictures)


def of_kind(found: list[Found], kind: str) -> list[Found]:
    """The found things of a kind."""
    return [thing for thing in found if thing.kind == kind]


def shown(found: list[Found], place: tuple, kind: str, wish: dict) -> dict:
    """Which of the wishes a picture shows: {"scene", "prop", "second": another kind; of a thing of this kind
    "color", "pattern", "accessory", "gesture"} -> True or False."""
    mine, right = of_kind(found, kind), {}
    for name, value in wish.items():
        if name in ("scene", "prop"):
            right[name] = place[name == "prop"] == value
        elif name == "second":
            right[name] = bool(of_kind(found, value))
        else:
            attribute = "arms_up" if name == "gesture" else name
            right[name] = value in [getattr(thing, attribute) for thing in mine]
    return right


def wishes(spec: world.Spec, prompt: str) -> list:
    """(kind, wish) for every thing of a prompt; the first wish has the scene and the prop too."""
    asked, patterns = [], [thing.individual.pattern for thing in spec.things]
    for thing in spec.things:
        one, wish = thing.individual, {}
        color, pattern = one.colors["main"], one.pattern
        if f"{color} {one.kind}" in prompt:
            wish["color"] = color
        # Words do not say whose a pattern is that both have, nor who raises arms if one gesture is named.
        named = pattern and (pattern in prompt or world.ADJECTIVES[pattern] in prompt)
        if named and patterns.count(pattern) == 1:
            wish["pattern"] = pattern
        if thing.accessory:
            wish["accessory"] = thing.accessory
        if thing.arms_up and prompt.count(world.GESTURE) == sum(other.arms_up for other in spec.things):
            wish["gesture"] = True
        asked.append((one.kind, wish))
    if world.scene_words(spec.scene) in prompt:
        asked[0][1]["scene"] = spec.scene
    if spec.prop and spec.prop in prompt:
        asked[0][1]["prop"] = spec.prop
    return asked


def follow(found: list, places: list, pairs: list) -> dict:
    """Measure -> [one bool for each time it is asked for]: do pictures show what their prompts name?"""
    kept = defaultdict(list)
    for seen, place, (spec, prompt) in zip(found, places, pairs):
        asked = wishes(spec, prompt)
        checks = [shown(seen, place, kind, wish) for kind, wish in asked]
        title = "subject" if len(asked) == 1 else "both things"
        checks.append({title: all(of_kind(seen, kind) for kind, _ in asked)})
        for check in checks:
            for name, right in check.items():
                kept[name].append(right)
    return kept


def measure_base(judge: Judge, args: argparse.Namespace):
    """Print how well the base model follows prompts."""
    model = weights_loader.load()
    fast_cpu.enable(model)
    for title, n, held_out in (("combinations seen in training", args.pictures, False),
                               ("held-out combinations", args.held_out, True)):
        pairs = prompts_of_the_world(n, held_out, seed=2 * 10**9 + held_out)
        images = draw(model, [prompt for _, prompt in pairs], range(n), args.steps)
        print(f"{title}, {n} pictures, DDIM {args.steps}, guidance {model.guidance}, seeds 0 to {n - 1}:")
        for name, kept in follow(judge.find(images), judge.places(images), pairs).items():
            print(f"  {name}: {interval(kept)}", flush=True)


def main(argv=None):
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("command", choices=("train", "accuracy", "base"))
    add("--pictures", type=between(1, 10**6), default=500, help="of seen combinations, or renders")
    add("--held-out", type=between(1, 10**6), default=200, help="pictures of held-out combinations")
    add("--steps", type=between(1, 999), default=50, help="DDIM steps")
    args = parser.parse_args(argv)
    if args.command == "train":
        train()
    elif args.command == "accuracy":
        for name, text in measure_accuracy(Judge.load(), args.pictures).items():
            print(f"{name}: {text}", flush=True)
    else:
        measure_base(Judge.load(), args)


if __name__ == "__main__":
    command_line.run(main, memory="fewer --pictures need less")
