"""Reproduce the claims of the paper on the embedded model, each with a number, in one command.

    python tiny/claims.py --concepts 8 --seeds 8 --workdir runs/claims

Trains every concept in several ways (`train.py`, two at a time, one thread each), draws the same prompts from
the same seeds with all of them, and measures with the judge (see judge.py), the small CLIP and the renderer's
true masks. Everything trained or measured stays in --workdir: after an interruption the same command goes on
from there. Results: claims.md and claims.csv in --workdir, and grids of the pictures. Intervals are 95 %,
Student's t over concepts, as the pictures of one concept are not independent; differences are paired by
concept, prompt and seed.
"""
import argparse
import csv
import json
import math
import multiprocessing
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library files lie one folder up
import clip_image
import covariance
import drawing
import judge as judges
import make_examples
import perfusion
import weights_loader
import world
from attention_maps import attention, record_queries, share_inside, word_map

ROOT = Path(__file__).resolve().parents[1]
TRAININGS = {  # name: (arguments of train.py, number of pictures)
    "locked": (("--lock", "locked", "--masks", "auto"), 5),
    "trained": (("--lock", "trained", "--masks", "auto"), 5),
    "inversion": (("--lock", "none", "--masks", "auto"), 5),
    "no masks": (("--lock", "locked", "--masks", "none"), 5),
    "one image": (("--lock", "locked", "--masks", "auto"), 1),
}
BETA, TAU, GLOBAL_BETA = 0.7, 0.15, 0.5  # the middle of the paper's ranges
SWEEP = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)  # beyond 0.8 the gate of the concept itself closes
RENDERS = 8  # noised renders of a concept whose attention is measured
RENDER_TIMESTEPS, PICTURE_TIMESTEPS = (200, 400, 600, 800), (200, 400, 600)
PAIR_SCENE = "on the grass"
MEASURES = {  # key of a record: (its title, factor)
    "first": ("identity: first among 50, %", 100), "identity": ("identity: cosine", 1),
    "scene": ("scene kept, %", 100), "accessory": ("accessory kept, %", 100),
    "image": ("image similarity", 1), "text": ("text similarity", 1),
    "share_renders": ("attention inside the true mask, renders", 1),
    "share_pictures": ("attention inside the judge's mask, pictures", 1),
    "pose": ("pose variety: 1 - IoU of silhouettes", 1), "pixels": ("pixel variety", 1),
}
PAIR_MEASURES = {"kinds": "both kinds", "one": "and at least one individual first among 50",
                 "both": "and both individuals, each first among 50"}


@dataclass(frozen=True)
class Row:
    """One way of drawing every concept: training (None: the super-category), lock and gate."""
    title: str
    training: str | None
    lock: str = "local"
    beta: float = BETA
    tau: float = TAU


@dataclass
class Study:
    """What all measurements share."""
    model: weights_loader.Model
    judge: judges.Judge
    clip: clip_image.CLIP | None
    folder: Path
    concepts: list
    args: argparse.Namespace
    lineups: dict = field(default_factory=dict)

    def lineup(self, k: int, second: bool = False) -> torch.Tensor:
        """`judges.lineup` of concept k, computed once."""
        if (k, second) not in self.lineups:
            self.lineups[k, second] = judges.lineup(self.judge, self.concepts[k][1], k, second)
        return self.lineups[k, second]

    @property
    def training_length(self) -> str:
        """Part of the names of all results, so that those of other lengths are not mixed in."""
        return f"{self.args.steps or 'standard'}x{self.args.batch or 'standard'}"

    def prompts(self, k: int) -> list:
        """Two prompts for concept k, each with its scene and accessory (or None).

        The scenes are new to the concept, but no combination is new to the base model.
        """
        kind = self.concepts[k][1].kind
        scenes = [s for s in make_examples.NEW_SCENES if (kind, s) not in world.HELD_OUT_SCENE]
        worn = [a for a in world.ACCESSORIES if (kind, a) not in world.HELD_OUT_ACCESSORY]
        first, second = scenes[k // 4 % len(scenes)], scenes[(k // 4 + 1) % len(scenes)]
        accessory = worn[(k + k // 4) % len(worn)]
        wearing = f"{world.ACCESSORIES[accessory]} {world.scene_words(second)}"
        return [(f"a photo of a {{}} {world.scene_words(first)}", first, None),
                (f"a photo of a {{}} {wearing}", second, accessory)]

    def file(self, training: str, k: int) -> Path:
        """The concept file of one training."""
        name = self.concepts[k][0]
        folder = f"{training.replace(' ', '_')}_{self.training_length}"
        return self.folder / folder / name / f"{name}.safetensors"

    def load(self, training: str | None, k: int) -> list:
        """The concept of one training, ready to use, as a list of one; no concept for None."""
        if training is None:
            return []
        return perfusion.prepare([perfusion.Concept.load(self.file(training, k))], self.model)


PAIR_ROWS = (Row("super-categories", None), Row("locked keys", "locked"), Row("trained keys", "trained"),
             Row("textual inversion", "inversion"))
STUDY = None  # of a measuring process


def rows(training_betas) -> list:
    """Every way of drawing that the table needs."""
    sweep = [Row(f"{training} keys, beta {beta}", training, beta=beta)
             for training in ("locked", "trained") for beta in SWEEP]
    return [Row("super-category", None), *sweep,
            *[Row(f"global lock, beta {beta}", "locked", "global", beta) for beta in (0.4, 0.5, 0.6)],
            Row("textual inversion", "inversion"), Row("locked keys, no masks", "no masks"),
            Row("locked keys, one image", "one image"),
            *[Row(f"locked keys, tau {tau}", "locked", tau=tau) for tau in (0.1, 0.2)],
            *[Row(f"locked keys, training beta {beta}", f"beta {beta}") for beta in training_betas]]


# --------------------------------------------------------------------------------------------------- training

def train_all(study: Study, trainings: dict):
    """Run train.py for every concept file that is not there yet, two at a time with one thread each."""
    jobs = [(training, k) for training in trainings for k in range(len(study.concepts))
            if not study.file(training, k).exists()]
    start = time.time()
    with ThreadPoolExecutor(study.args.workers) as pool:
        for n, (training, k) in enumerate(pool.map(lambda job: train_one(study, trainings, *job), jobs), 1):
            print(f"trained {n} of {len(jobs)} after {(time.time() - start) / 60:.1f} minutes: "
                  f"{study.concepts[k][0]}, {training}", flush=True)


def train_one(study: Study, trainings: dict, training: str, k: int) -> tuple:
    """One concept by one training, in a process of its own. ValueError with its last words if it fails."""
    name, individual, specs = study.concepts[k]
    arguments, pictures = trainings[training]
    images = study.folder / "images" / str(pictures) / name
    make_examples.write_pictures(specs[:pictures], images)
    command = [sys.executable, ROOT / "train.py", "--images", images, "--super", individual.kind,
               "--token", name, "--out", study.file(training, k).parent, "--weights", study.args.weights,
               "--preview", 0, "--checkpoint", 0, "--seed", k, *arguments]
    for option in ("steps", "batch"):
        command += [f"--{option}", getattr(study.args, option)] if getattr(study.args, option) else []
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise ValueError(f"train.py failed for {name}, {training}: {done.stderr.strip().splitlines()[-1]}")
    return training, k


# -------------------------------------------------------------------------------------------------- measuring

@torch.no_grad()
def draw_prompts(study: Study, concepts: list, row: Row, prompts: list) -> tuple:
    """Draw every prompt from every seed.

    Returns latents (p * seeds, c, h, w), keys and values of the prompts, per layer (p, T, width), and the
    positions of the concepts' words in each prompt.
    """
    model, seeds = study.model, study.args.seeds
    e, e_super, positions = perfusion.encode(model.text_encoder, model.tokenizer, ["", *prompts], concepts)
    keys, values = perfusion.keys_and_values(model.unet, e, e_super, concepts, [row.beta] * len(concepts),
                                             [row.tau] * len(concepts), row.lock)
    each = [n for n in range(1, len(prompts) + 1) for _ in range(seeds)]
    order = [0] * len(each) + each
    size = (make_size(model),) * 2
    latents = drawing.draw_latents(model.unet, model.schedule, [x[order] for x in keys],
                                   [x[order] for x in values], [s for _ in prompts for s in range(seeds)],
                                   size, study.args.sampling_steps, judges.GUIDANCE)
    return latents, [x[1:] for x in keys], [x[1:] for x in values], positions[1:]


def make_size(model) -> int:
    """The side of a latent of the judge's 64 pixels."""
    return 64 // model.vae.factor


@torch.no_grad()
def word_share(model, latents, keys, values, words, masks, timesteps, seed: int = 0) -> list:
    """Share of a word's attention inside masks (B, H, W), on noised latents (B, ...), mean over timesteps.

    keys, values per layer (B, T, width); words: the word's token indices, the same in all prompts.
    """
    generator, shares = torch.Generator().manual_seed(seed), []
    for t in timesteps:
        noise = torch.randn(latents.shape, generator=generator)
        noised = model.schedule.add_noise(latents, noise, torch.full((len(latents),), t))
        with record_queries(model.unet) as queries:
            model.unet(noised, t, keys, values)
        maps = attention(queries, keys, model.unet.config.attention_heads)
        shares.append(share_inside(word_map(maps, words, tuple(latents.shape[-2:])), masks))
    return torch.stack(shares).mean(0).tolist()


def places(study: Study, k: int, concepts: list, prompts: list, positions: list) -> list:
    """Token indices of the concept's or super-category's word: the same in all prompts, which begin alike."""
    if concepts:
        return positions[0][concepts[0].token][0]
    return study.model.tokenizer.find(prompts[0], study.concepts[k][1].kind)[0]


@torch.no_grad()
def share_on_renders(study: Study, k: int, concepts: list, row: Row) -> list:
    """Share of the word's attention inside the true mask, on renders of the concept in new scenes."""
    name, individual, _ = study.concepts[k]
    rng, model = random.Random(f"renders {k}"), study.model
    specs = [world.place(rng, individual, make_examples.NEW_SCENES[n % 3]) for n in range(RENDERS)]
    images, masks = zip(*[world.render(spec, masks=True) for spec in specs])
    word = concepts[0].token if concepts else individual.kind
    prompts = [f"a photo of a {word} {world.scene_words(spec.scene)}" for spec in specs]
    e, e_super, positions = perfusion.encode(model.text_encoder, model.tokenizer, prompts, concepts)
    keys, values = perfusion.keys_and_values(model.unet, e, e_super, concepts, [row.beta] * len(concepts),
                                             [row.tau] * len(concepts), row.lock)
    truth = torch.stack([torch.from_numpy(mask["subject"]) for mask in masks])
    latents = model.vae.encode(judges.to_images(images) * 2 - 1)
    return word_share(model, latents, keys, values, places(study, k, concepts, prompts, positions), truth,
                      RENDER_TIMESTEPS)


def variety(x: torch.Tensor, distance) -> float:
    """Mean distance of all pairs of x (prompts, seeds, ...), within a prompt."""
    p, n = x.shape[:2]
    pairs = [distance(x[i, a], x[i, b]).item() for i in range(p) for a in range(n) for b in range(a)]
    return sum(pairs) / len(pairs) if pairs else math.nan


def silhouette_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1 - IoU of two soft masks."""
    return 1 - torch.minimum(a, b).sum() / torch.maximum(a, b).sum().clamp(min=1e-6)


def root_mean_square(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The size of the difference of two pictures."""
    return (a - b).square().mean().sqrt()


@torch.no_grad()
def measure(study: Study, row: Row, k: int) -> dict:
    """Everything about one concept drawn in one way: measure -> one number per picture (pictures of a prompt
    together), or per render, or one for all."""
    name, individual, specs = study.concepts[k]
    asked, concepts, seeds = study.prompts(k), study.load(row.training, k), study.args.seeds
    word = name if not concepts else concepts[0].token
    prompts = [text.format(word if concepts else individual.kind) for text, _, _ in asked]
    latents, keys, values, positions = draw_prompts(study, concepts, row, prompts)
    images = drawing.decode(study.model.vae, latents)
    keep_pictures(study, images, row.title, name)
    found, known = study.judge.classify(images), study.lineup(k)
    similarity, silhouettes = study.judge.embed(images) @ known.T, study.judge.masks(images)["subject"]
    each = [n for n in range(len(prompts)) for _ in range(seeds)]
    record = {
        "first": [best == 0 for best in similarity.argmax(1).tolist()], "identity": similarity[:, 0].tolist(),
        "scene": [judged["scene"] == asked[n][1] for judged, n in zip(found, each)],
        "accessory": [judged["accessory"] == asked[n][2] for judged, n in zip(found, each) if asked[n][2]],
        "share_renders": share_on_renders(study, k, concepts, row),
        "share_pictures": word_share(study.model, latents, [x[each] for x in keys], [x[each] for x in values],
                                     places(study, k, concepts, prompts, positions), silhouettes,
                                     PICTURE_TIMESTEPS),
        "pose": [variety(silhouettes.unflatten(0, (len(prompts), seeds)), silhouette_distance)],
        "pixels": [variety(images.unflatten(0, (len(prompts), seeds)), root_mean_square)],
    }
    if study.clip:
        pictures = study.clip.image_embedding(images)
        training = study.clip.image_embedding(judges.to_images([world.render(spec)[0] for spec in specs]))
        ids, _ = study.model.tokenizer.encode([text.format(individual.kind) for text, _, _ in asked])
        texts = torch.cat([study.clip.text_embedding(one[None]) for one in ids])
        record |= {"image": (pictures @ training.mean(0)).tolist(),
                   "text": (pictures * texts[each]).sum(-1).tolist()}
    return record


@torch.no_grad()
def measure_pair(study: Study, row: Row, k: int) -> dict:
    """Concepts k and k + 1 in one picture: are both kinds there, and each individual first among 50?"""
    pair = [k, (k + 1) % len(study.concepts)]
    names, people = zip(*[study.concepts[j][:2] for j in pair])
    concepts = [concept for j in pair for concept in study.load(row.training, j)]
    words = [concept.token for concept in concepts] or [person.kind for person in people]
    prompt = f"a photo of a {words[0]} next to a {words[1]} {PAIR_SCENE}"
    latents, *_ = draw_prompts(study, concepts, row, [prompt])
    images = drawing.decode(study.model.vae, latents)
    keep_pictures(study, images, f"pair {row.title}", names[0])
    found, kinds = study.judge.classify(images), [person.kind for person in people]
    record = {name: [] for name in PAIR_MEASURES}
    embeddings = [study.judge.embed(images, second) for second in (False, True)]
    known = [[study.lineup(j, second) for j in pair] for second in (False, True)]
    for b, judged in enumerate(found):
        seen = [judged["subject"], judged["second"]]
        record["kinds"].append(sorted(seen) == sorted(kinds))
        order = (0, 1) if seen == kinds else (1, 0)  # which of the two is the bigger object
        first = [(embeddings[place][b] @ known[place][who].T).argmax().item() == 0
                 for place, who in enumerate(order)]
        record["one"].append(record["kinds"][-1] and any(first))
        record["both"].append(record["kinds"][-1] and all(first))
    return record


def keep_pictures(study: Study, images: torch.Tensor, title: str, name: str):
    """One PNG, a row per prompt and a column per seed."""
    grid = drawing.to_bytes(drawing.grid(images, study.args.seeds))
    Image.fromarray(grid).save(study.folder / "pictures" / f"{title.replace(' ', '_')}__{name}.png")


def cached(study: Study, name: str, compute) -> dict:
    """A record from --workdir, or computed and kept there."""
    a = study.args
    name = f"{name.replace(' ', '_')}_{study.training_length}_{a.seeds}_{a.sampling_steps}"
    file = study.folder / "records" / f"{name}.json"
    if not file.exists():
        weights_loader.write_json(file, compute())
    return json.loads(file.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------- results

def mean_and_interval(values: list) -> tuple:
    """Mean of one number per concept, and half the width of its 95 % interval (nan for fewer than two).

    Student's t quantile by Fisher's expansion, exact to 2 % from 4 degrees of freedom on.
    """
    values = [value for value in values if not math.isnan(value)]
    n = len(values)
    if n < 2:
        return (values[0] if values else math.nan), math.nan
    mean = sum(values) / n
    t = {1: 12.706, 2: 4.303, 3: 3.182}.get(n - 1, 1.960 + 2.372 / (n - 1) + 2.823 / (n - 1) ** 2)
    return mean, t * math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def per_concept(records: list, measure: str) -> list:
    """One mean per concept; nan where a record lacks the measure."""
    return [sum(r[measure]) / len(r[measure]) if r.get(measure) else math.nan for r in records]


def written(values: list, factor: float = 1) -> str:
    """'0.512 ± 0.031', or in per cent with a factor of 100."""
    mean, half = (factor * x for x in mean_and_interval(values))
    digits = 0 if factor == 100 else 3
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def at(points: list, x: float) -> float:
    """The polygon through points (x, y), sorted by x, read at x."""
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * ((x - x0) / (x1 - x0) if x1 > x0 else 0.5)
    raise ValueError(f"{x} lies outside the curve")


def at_equal(curve_a: list, curve_b: list) -> tuple:
    """Two curves of (x, y) points -> y of both in the middle of the x they share; nan if they share none."""
    a, b = sorted(curve_a), sorted(curve_b)
    low, high = max(a[0][0], b[0][0]), min(a[-1][0], b[-1][0])
    if not low <= high:  # also for nan
        return math.nan, math.nan
    return at(a, (low + high) / 2), at(b, (low + high) / 2)


def pareto(records: dict, x: str, y: str) -> list:
    """Per concept: y of locked and of trained keys at equal x, over their sweeps of beta."""
    curves = {}
    for training in ("locked", "trained"):
        titles = [title for title in records if title.startswith(f"{training} keys, beta")]
        points = [zip(per_concept(records[title], x), per_concept(records[title], y)) for title in titles]
        curves[training] = list(zip(*points))  # per concept: its points
    return [at_equal(a, b) for a, b in zip(curves["locked"], curves["trained"])]


LOCKED, TRAINED = f"locked keys, beta {BETA}", f"trained keys, beta {BETA}"
GLOBAL = f"global lock, beta {GLOBAL_BETA}"
COMPARISONS = (  # claim of the paper, measures, row A, row B
    ("attention with trained keys leaks beyond the object; locked keys do not",
     ("share_renders", "share_pictures"), LOCKED, TRAINED),
    ("the same for textual inversion", ("share_renders", "share_pictures"), LOCKED, "textual inversion"),
    ("locked keys keep more of the prompt at the same beta", ("text", "scene", "accessory", "image", "first"),
     LOCKED, TRAINED),
    ("global lock gives more freedom than local", ("text", "pose", "pixels", "image", "first"),
     GLOBAL, LOCKED),
    ("masks reduce overfitting", ("text", "image", "scene", "accessory", "first"), LOCKED,
     "locked keys, no masks"),
    ("tau above training's helps", ("text", "image", "scene", "first"), LOCKED, "locked keys, tau 0.1"),
    ("one image works, with slight overfitting", ("image", "text", "scene", "first"),
     "locked keys, one image", LOCKED),
    ("textual inversion follows the prompt worst", ("text", "image", "scene", "accessory", "first"), LOCKED,
     "textual inversion"),
)


def comparison_lines(records: dict) -> list:
    """The claims as rows of cells: claim, measure, A, B, their values, the paired difference."""
    lines = []
    extra = [("higher training beta helps", ("text", "image", "scene", "first"), LOCKED, title)
             for title in records if "training beta" in title]
    for claim, measures, a, b in (*COMPARISONS, *extra):
        for name in measures:
            title, factor = MEASURES[name]
            left, right = per_concept(records[a], name), per_concept(records[b], name)
            difference = [x - y for x, y in zip(left, right)]
            lines.append([claim, title, a, b, written(left, factor), written(right, factor),
                          written(difference, factor)])
    for x, y in (("image", "text"), ("identity", "text"), ("identity", "scene")):
        pairs = pareto(records, x, y)
        left, right = ([pair[side] for pair in pairs] for side in (0, 1))
        (title, factor), shared = MEASURES[y], sum(not math.isnan(a) for a in left)
        lines.append([f"locked keys shift the Pareto curve ({shared} of {len(pairs)} curves overlap)",
                      f"{title} at equal {MEASURES[x][0]}", "locked keys, all beta", "trained keys, all beta",
                      written(left, factor), written(right, factor),
                      written([a - b for a, b in pairs], factor)])
    return lines


def pair_lines(pairs: dict) -> list:
    """Two concepts in one picture: counts and shares."""
    lines = []
    for title, records in pairs.items():
        cells = [title]
        for name in PAIR_MEASURES:
            hits = [hit for record in records for hit in record[name]]
            cells.append(f"{sum(hits)} of {len(hits)} ({written(per_concept(records, name), 100)} %)")
        lines.append(cells)
    return lines


def markdown(head: list, lines: list) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


def write_results(study: Study, records: dict, pairs: dict):
    """claims.md and claims.csv in --workdir; prints the former."""
    args, count = study.args, len(study.concepts)
    sizes = {training: study.file(training, 0).stat().st_size for training in TRAININGS}
    table = [[title, *[written(per_concept(found, name), factor) for name, (_, factor) in MEASURES.items()]]
             for title, found in records.items()]
    parts = [f"{count} concepts, {args.seeds} seeds, 2 prompts each; DDIM {args.sampling_steps}, guidance "
             f"{judges.GUIDANCE}, tau {TAU} unless named; steps and batch of a training: "
             f"{args.steps or 'standard'}, {args.batch or 'standard'}. "
             "Mean and half width of the 95 % interval over concepts.",
             markdown(["row", *[title for title, _ in MEASURES.values()]], table),
             "A - B is paired by concept, prompt and seed.",
             markdown(["claim", "measure", "A", "B", "value of A", "value of B", "A - B"],
                      comparison_lines(records)),
             f"Two concepts in one picture (\"... next to ... {PAIR_SCENE}\"), trained apart:",
             markdown(["row", *PAIR_MEASURES.values()], pair_lines(pairs)),
             f"Bytes of a concept file: {', '.join(f'{name} {size:,}' for name, size in sizes.items())}."]
    text = "\n\n".join(parts) + "\n"
    (study.folder / "claims.md").write_text(text, encoding="utf-8")
    with open(study.folder / "claims.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", *[f"{name}{part}" for name in MEASURES for part in ("", "_interval")]])
        for title, found in records.items():
            numbers = [mean_and_interval(per_concept(found, name)) for name in MEASURES]
            writer.writerow([title, *[x for pair in numbers for x in pair]])
    print(text + f"{study.folder}/claims.md, {study.folder}/claims.csv, {study.folder}/pictures")


@torch.no_grad()
def estimate(study: Study, trainings: dict, drawn: list) -> str:
    """How long what is not in --workdir yet will take, from one timed forward pass."""
    model, args, count = study.model, study.args, len(study.concepts)
    side, steps = make_size(model), args.steps or 250
    e = model.text_encoder(model.text_encoder.embed(model.tokenizer.encode(["a photo of a cat"])[0]))
    keys, values = model.unet.keys(e), model.unet.values(e)
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        model.unet(torch.randn(16, model.unet.config.in_channels, side, side), 500, keys, values)
        forward = (time.perf_counter() - start) / 16
    missing = sum(not study.file(training, k).exists() for training in trainings for k in range(count))
    training = missing * (steps * (args.batch or 16) * 3.3 * forward + 5) / args.workers
    pictures = (len(drawn) * 2 + 4) * count * args.seeds
    drawing_time = pictures * (2 * args.sampling_steps + 12) * forward / args.workers
    return (f"{missing} trainings, about {training / 60:.0f} minutes; then {pictures} pictures, about "
            f"{drawing_time / 60:.0f} minutes ({1000 * forward:.0f} ms per latent and forward pass)")


def arguments(argv) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--concepts", type=int, default=8, help="individuals that no training ever showed (default: 8)")
    add("--seeds", type=int, default=8, help="pictures per prompt (default: 8)")
    add("--steps", type=int, default=0, help="training steps (default: train.py's)")
    add("--batch", type=int, default=0, help="noised images per training step (default: train.py's)")
    add("--sampling-steps", type=int, default=20, help="DDIM steps (default: 20)")
    add("--training-betas", type=float, nargs="*", default=(0.5,),
        help="training betas to compare with train.py's own, 0.75 (default: 0.5)")
    add("--weights", default="tiny", help="base model (default: tiny)")
    add("--judge", type=Path, default=judges.FILE, help="file of the judge (default: tiny/weights)")
    add("--workdir", type=Path, default=Path("runs/claims"), help="what is trained and measured is kept here")
    add("--workers", type=int, default=2,
        help="trainings or measurements at a time, one thread each (default: 2)")
    args = parser.parse_args(argv)
    if args.concepts < 2 or args.seeds < 2:
        parser.error("--concepts and --seeds must be at least 2: intervals and variety need them")
    least = min(args.steps, args.batch, args.sampling_steps - 1, args.workers - 1)
    if least < 0 or args.sampling_steps > 999:
        parser.error("--steps, --batch must not be negative, --sampling-steps 1 to 999, --workers at least 1")
    return args


def open_study(args) -> Study:
    """Load what the measurements share; every base model has its own folder of results in --workdir."""
    model = weights_loader.load(args.weights)
    folder = args.workdir / model.fingerprint
    for name in ("records", "pictures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    clip_folder = model.folder and Path(model.folder) / "clip"
    clip = clip_image.load(clip_folder, model.text_encoder) if clip_folder and clip_folder.is_dir() else None
    return Study(model, judges.Judge.load(args.judge), clip, folder,
                 [make_examples.unseen_concept(k) for k in range(args.concepts)], args)


def start_measuring(args):
    """Make this process one of the measuring ones."""
    global STUDY
    torch.set_num_threads(1)
    STUDY = open_study(args)


def record(measurement, row: Row, k: int) -> dict:
    """What `measure` or `measure_pair` finds, from --workdir if it is there; runs in a measuring process."""
    pair = "pair " if measurement is measure_pair else ""
    return cached(STUDY, f"{pair}{row.title} c{k}", lambda: measurement(STUDY, row, k))


def run(args):
    study = open_study(args)
    if study.clip is None:
        print("this model has no CLIP of its own: image and text similarity are left out")
    trainings = TRAININGS | {f"beta {beta}": (("--lock", "locked", "--masks", "auto", "--beta", beta), 5)
                             for beta in args.training_betas}
    drawn = rows(args.training_betas)
    print(estimate(study, trainings, drawn), flush=True)
    covariance.cached(study.model)  # once, before several trainings need it at the same time
    train_all(study, trainings)
    found, start = {measure: {}, measure_pair: {}}, time.time()
    jobs = [(measure, row) for row in drawn] + [(measure_pair, row) for row in PAIR_ROWS]
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), start_measuring,
                             (args,)) as pool:
        for n, (measurement, row) in enumerate(jobs, 1):
            found[measurement][row.title] = list(pool.map(partial(record, measurement, row),
                                                          range(args.concepts)))
            print(f"measured {n} of {len(jobs)} after {(time.time() - start) / 60:.1f} minutes: {row.title}",
                  flush=True)
    write_results(study, found[measure], found[measure_pair])


def main(argv=None):
    args = arguments(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
