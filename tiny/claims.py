"""Measure the claims of the paper on the embedded model: one command, from training to tables.

    python tiny/claims.py               # everything: two hours of one core
    python tiny/claims.py --workers 14 --device cuda --only pair "beta 0.7" --skip "400 steps"

--only and --skip choose rows by parts of their titles. First every concept is trained in several ways
(`train.py`, on the CPU), then all draw the same prompts from the same seeds on --device. They are measured
with the judge (judge.py), the small CLIP and the renderer's true masks. What is trained or measured is a file
in --workdir at once: after an interruption the same command goes on from there. The results are claims.md,
pareto.png and records.json there, of the rows that are whole, and the pictures of every row.
Intervals are 95 %, Student's t over concepts, as the pictures of one concept are not independent; differences
are paired by concept.
"""
import argparse
import functools
import json
import math
import multiprocessing
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library files lie one folder up
from tqdm import tqdm

import covariance
import diffusion
import judge as judges
import perfusion
import weights_loader
import world
from attention_maps import noised_map, share_inside
from concept import Concept, prepare
from make_examples import NEW_PAIRS, NEW_SCENES, PAIRS, individual_and_specs, write_pictures
from perfusion import DRAWING_TAU
from support import clip_image, command_line, fast_cpu
from support.command_line import between
from support.files import replacing
from support.intervals import mean_and_interval
from support.plots import Figure

ROOT = Path(__file__).resolve().parents[1]
BETA, GLOBAL_BETA = perfusion.DRAWING_BETA.values()
TRAININGS = {  # name: (arguments of train.py, number of pictures)
    "locked keys": ("--keys locked", 5),
    "trained keys": ("--keys trained", 5),
    "textual inversion": ("--keys none", 5),
    "locked keys, 400 steps": ("--keys locked --steps 400", 5),
    "trained keys, 400 steps": ("--keys trained --steps 400", 5),
    "no masks": ("--masks none", 5),
    "one image": ("", 1),
    "training beta 0.5": ("--beta 0.5", 5),
}
SWEEP, LONG_SWEEP = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1), (0.5, 0.7, 0.9)
RENDERS, TIMESTEPS = 8, (200, 400, 600, 800)  # noised renders of a concept whose attention is measured
PAIR_SCENE = "on the grass"
MEASURES = {  # of a concept alone; key of a record: (its title, factor)
    "first": ("identity: first among 50, %", 100), "pattern": ("pattern right, %", 100),
    "kept": ("kept of what was asked for, %", 100), "scene": ("scene, %", 100), "prop": ("prop, %", 100),
    "accessory": ("accessory, %", 100), "gesture": ("arms up, %", 100), "second": ("second thing, %", 100),
    "image": ("image similarity", 1), "text": ("text similarity", 1),
    "share": ("attention inside the true mask", 1), "pose": ("pose variety: 1 - IoU of silhouettes", 1),
}
PAIR_MEASURES = {"kinds": ("both kinds, %", 100), "one": ("and an individual first among 50, %", 100),
                 "both": ("and both individuals first among 50, %", 100)}


@dataclass(frozen=True)
class Row:
    """One way of drawing, of a concept alone or of two.

    training: a name of TRAININGS, None for ordinary words: the super-category, or with `details` all that
    words can say about the individual. lock: "local", "global", or "ungated": ROME's linear weight in the
    gate's place. who: "alone", or another of `cases`.
    """
    title: str
    training: str | None
    lock: str = "local"
    beta: float = BETA
    tau: float = DRAWING_TAU
    who: str = "alone"
    details: bool = False


def sweep(training: str, betas: tuple = SWEEP) -> list[Row]:
    """One training over beta."""
    return [Row(f"{training}, beta {beta}", training, beta=beta) for beta in betas]


LOCKED, TRAINED, UNGATED = "locked keys, beta 0.7", "trained keys, beta 0.7", "locked keys, ungated"
GLOBAL, INVERSION = f"global lock, beta {GLOBAL_BETA}", "textual inversion"
LOW, HIGH = "locked keys, beta 0.5", "locked keys, beta 1.0"
ROWS = (  # in the order in which they are measured
    Row("pair: locked keys", "locked keys", who="different kinds"),
    Row("pair of examples: locked keys", "locked keys", who="examples"),
    Row("pair of new examples: locked keys", "locked keys", who="new examples"),
    Row("pair: trained keys", "trained keys", who="different kinds"),
    Row("pair: super-categories", None, who="different kinds"),
    Row("pair: textual inversion", "textual inversion", who="different kinds"),
    *sweep("locked keys"), *sweep("trained keys"), Row("super-category", None),
    Row("captions with all details", None, details=True),
    Row("textual inversion", "textual inversion"), Row(UNGATED, "locked keys", "ungated"),
    Row(GLOBAL, "locked keys", "global", GLOBAL_BETA),
    Row("no masks", "no masks"), Row("one image", "one image"),
    Row("training beta 0.5", "training beta 0.5"), Row("tau 0.1", "locked keys", tau=0.1),
    *sweep("locked keys, 400 steps", LONG_SWEEP), *sweep("trained keys, 400 steps", LONG_SWEEP),
)
COMPARISONS = (  # claim of the paper, measures in which A is then higher, other measures, row A, row B
    ("locked keys keep two concepts apart", "kinds both", "one", "pair: locked keys", "pair: trained keys"),
    ("better than textual inversion", "kinds both", "one", "pair: locked keys", "pair: textual inversion"),
    ("a trained key's attention leaks beyond the object", "share", "", LOCKED, TRAINED),
    ("locked keys keep more of the prompt", "kept text", "first pattern image", LOCKED, TRAINED),
    ("after 400 steps too", "kept text share", "first pattern image",
     "locked keys, 400 steps, beta 0.7", "trained keys, 400 steps, beta 0.7"),
    ("a low beta shows more of the concept", "first image", "", LOW, HIGH),
    ("a high beta keeps more of the prompt", "kept text", "", HIGH, LOW),
    ("global lock gives more freedom than local", "pose kept text", "first", GLOBAL, LOCKED),
    ("masks reduce overfitting", "kept text", "first image", LOCKED, "no masks"),
    ("a higher training beta helps", "kept text", "first image", LOCKED, "training beta 0.5"),
    ("tau above training's helps", "kept text", "first image", LOCKED, "tau 0.1"),
    ("one image works, with slight overfitting", "first kept text", "image", LOCKED, "one image"),
    ("textual inversion follows the prompt worst", "kept text", "first pattern image", LOCKED, INVERSION),
    ("the gate is better than ROME's linear weight", "first kept share", "image", LOCKED, UNGATED),
)
PARETO = (("first", "kept"), ("image", "text"))  # x, y
PUBLISHED = ("pair: locked keys", "pair: trained keys", "pair: textual inversion", LOCKED, TRAINED,
             INVERSION, "super-category")  # in records.json: what the page and the README show


def cases(who: str, concepts: int) -> list[tuple]:
    """Who is drawn together. c0, c1, ... are individuals that no training showed, the others examples."""
    names = [f"c{k}" for k in range(concepts)]
    if who == "alone":
        return [(name,) for name in names]
    if who == "different kinds":
        return list(zip(names, names[1:] + names[:1]))
    pairs = PAIRS if who == "examples" else [(f"e{2 * k}", f"e{2 * k + 1}") for k in range(len(NEW_PAIRS))]
    return [order for pair in pairs for order in (pair, pair[::-1])]


def chosen_rows(only: list, skip: list) -> list[Row]:
    """The rows that --only and --skip leave."""
    return [row for row in ROWS if any(text in row.title for text in only or [""])
            and not any(text in row.title for text in skip)]


def prompts(name: str) -> list:
    """Two prompts for an unseen concept, each with what it asks for.

    The scenes are new to the concept, but no combination is new to the base model.
    """
    k, kind = int(name[1:]), individual_and_specs(name)[0].kind
    scenes = [scene for scene in NEW_SCENES if (kind, scene) not in world.HELD_OUT_SCENE]
    worn = [one for one in world.ACCESSORIES if (kind, one) not in world.HELD_OUT_ACCESSORY]
    others = [one for one in world.KINDS if one != kind and {one, kind} not in world.HELD_OUT_PAIR]
    accessory, second = worn[(k + k // 4) % len(worn)], others[(k + k // 4) % len(others)]
    asked = ((world.ACCESSORIES[accessory], {"accessory": accessory}),
             (f"{world.GESTURE} next to {world.article(second)}", {"gesture": True, "second": second}))
    found = []
    for n, (text, wish) in enumerate(asked):
        scene = scenes[(k // 4 + n) % len(scenes)]
        prop = world.PROPS[scene][(k + n) % 2]
        found.append((f"a photo of a {{}} {text} {world.scene_words(scene)} near {world.article(prop)}",
                      wish | {"scene": scene, "prop": prop}))
    return found


# ----------------------------------------------------------------------------------- training and measuring

@dataclass
class Study:
    """What all trainings and measurements share; opened once in every process."""
    model: weights_loader.Model
    judge: judges.Judge
    clip: clip_image.CLIP
    folder: Path
    args: argparse.Namespace

    @classmethod
    def open(cls, args: argparse.Namespace, device: str = "cpu") -> "Study":
        """Every base model has a folder of its own in --workdir."""
        torch.backends.cudnn.allow_tf32 = False     # so that devices differ by rounding only
        model = weights_loader.load("tiny", device)
        fast_cpu.enable(model)
        folder = args.workdir / model.fingerprint
        for name in ("records", "pictures"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        clip = clip_image.load(model.folder / "clip", model.text_encoder).to(device)
        return cls(model, judges.Judge.load(), clip, folder, args)

    def concept_file(self, training: str, name: str) -> Path:
        return self.folder / training.replace(" ", "_") / name / f"{name}.safetensors"

    def record_file(self, row: Row, names: tuple) -> Path:
        title = f"{row.title} {' '.join(names)}".replace(" ", "_").replace(":", "")
        return self.folder / "records" / f"{title}_{self.args.seeds}_{self.args.sampling_steps}.json"

    def load(self, training: str | None, names: tuple) -> list:
        """The concepts of one training, ready to use; none for None."""
        concepts = [Concept.load(self.concept_file(training, name)) for name in names if training]
        return prepare(concepts, self.model)


STUDY = None  # of a working process


def start_work(args: argparse.Namespace):
    """Make this process one of the working ones, with one thread."""
    global STUDY
    torch.set_num_threads(1)
    STUDY = Study.open(args, args.device)


@functools.cache
def lineup(name: str) -> torch.Tensor:
    """`judges.lineup` of a concept, computed once."""
    return judges.lineup(STUDY.judge, individual_and_specs(name)[0], name)


def train_one(job: tuple):
    """One concept by one training, in a process of its own. ValueError with its last words if it fails."""
    training, name = job
    individual, specs = individual_and_specs(name)
    arguments, count = TRAININGS[training]
    images, out = STUDY.folder / "images" / str(count) / name, STUDY.concept_file(training, name).parent
    write_pictures(specs[:count], images, size=STUDY.model.size[0])
    seed = name[1:] if name[1:].isdecimal() else "0"
    command = [sys.executable, ROOT / "train.py", "--images", images, "--super", individual.kind,
               "--token", name, "--out", out, "--device", "cpu", "--preview", "0", "--checkpoint", "0",
               "--seed", seed, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise ValueError(f"train.py failed for {name}, {training}: {done.stderr.strip().splitlines()[-1]}")


def called(row: Row, concepts: list, individual: world.Individual) -> str:
    """What an individual alone is called in the prompts of this row."""
    details = [*world.adjectives(individual), individual.colors["main"]] if row.details else []
    return concepts[0].token if concepts else " ".join([*details, individual.kind])


def encoded(row: Row, concepts: list, texts: list) -> tuple:
    """Keys, values and positions of prompts, as `perfusion.condition` gives them."""
    model, unet = STUDY.model, STUDY.model.unet
    if row.lock != "ungated":
        return perfusion.condition(model, texts, concepts, row.beta, row.tau, row.lock)[:3]
    concept, = concepts
    e, _, positions = perfusion.encode(model.text_encoder, model.tokenizer, texts, concepts)
    e_perp, ratio = perfusion.split(e, concept.i_star[None], concept.d_star[None])
    keys = perfusion.edit(unet.keys, e_perp, ratio, [o[None].to(ratio) for o in concept.o_keys])
    values = perfusion.edit(unet.values, e_perp, ratio, [o[None].to(ratio) for o in concept.o_values])
    return keys, values, positions


def draw(row: Row, concepts: list, texts: list, name: str) -> torch.Tensor:
    """Every prompt from every seed, (prompts * seeds, 3, H, W); keeps them as one PNG, a row per prompt."""
    model, seeds = STUDY.model, STUDY.args.seeds
    keys, values, _ = encoded(row, concepts, ["", *texts])
    each = [n for n in range(1, len(texts) + 1) for _ in range(seeds)]
    order = [0] * len(each) + each
    keys, values = ([x[order] for x in layers] for layers in (keys, values))
    images = diffusion.draw(model, keys, values, [*range(seeds)] * len(texts), model.size,
                            STUDY.args.sampling_steps, model.guidance)
    path = STUDY.folder / "pictures" / f"{row.title.replace(' ', '_').replace(':', '')}__{name}.png"
    Image.fromarray(diffusion.to_bytes(diffusion.grid(images, seeds))).save(path)
    return images


def share_on_renders(row: Row, concepts: list, name: str) -> list:
    """Share of the word's attention inside the true mask, on renders of the concept in new scenes."""
    (individual, _), model, rng = individual_and_specs(name), STUDY.model, random.Random(f"renders {name}")
    specs = [world.place(rng, [individual], NEW_SCENES[n % 3]) for n in range(RENDERS)]
    images, truth = judges.renders_and_truth(specs, model.size[0])
    word = called(row, concepts, individual)
    texts = [f"a photo of a {word} {world.scene_words(spec.scene)}" for spec in specs]
    keys, values, positions = encoded(row, concepts, texts)
    # all prompts begin alike
    words = positions[0][word][0] if concepts else model.tokenizer.find(texts[0], individual.kind)[0]
    latents = model.vae.encode(images.to(model.device) * 2 - 1)
    shares = [share_inside(noised_map(model, latents, t, keys, values, words), truth) for t in TIMESTEPS]
    return torch.stack(shares).mean(0).tolist()


def variety(silhouettes: torch.Tensor) -> float:
    """Mean of 1 - IoU over all pairs of soft masks (prompts, seeds, h, w), within a prompt."""
    a, b = silhouettes[:, :, None], silhouettes[:, None]
    overlap = torch.minimum(a, b).sum((-1, -2)) / torch.maximum(a, b).sum((-1, -2)).clamp(min=1e-6)
    p, n, _ = overlap.shape
    return (1 - overlap).sum().item() / (p * n * (n - 1))  # the diagonal adds nothing


def measure(row: Row, name: str) -> dict:
    """A concept alone: measure -> one number per picture, or per render, or one for all."""
    study, seeds, concepts = STUDY, STUDY.args.seeds, STUDY.load(row.training, (name,))
    (individual, specs), known = individual_and_specs(name), lineup(name)
    texts, wishes = zip(*prompts(name))
    word, kind = called(row, concepts, individual), individual.kind
    images = draw(row, concepts, [text.format(word) for text in texts], name)
    record = defaultdict(list)
    for n, (things, place) in enumerate(zip(study.judge.find(images), study.judge.places(images))):
        shown = judges.shown(things, place, kind, wishes[n // seeds])
        for wish, right in shown.items():
            record[wish].append(right)
        record["first"].append(bool(judges.recognise(things, kind, known)))
        record["kept"].append(sum(shown.values()) / len(shown))
        patterns = [thing.pattern for thing in judges.of_kind(things, kind)]
        record["pattern"].append(individual.pattern in patterns)
    pictures, training = (study.clip.image_embedding(x.to(study.model.device))
                          for x in (images, judges.renders(specs, study.model.size[0])))
    ids = study.model.tokenizer.encode([text.format(kind) for text in texts])[0]
    asked = study.clip.text_embedding(ids).repeat_interleave(seeds, 0)
    silhouettes = study.judge.silhouettes(images).unflatten(0, (len(texts), seeds))
    return record | {"share": share_on_renders(row, concepts, name), "pose": [variety(silhouettes)],
                     "image": (pictures @ training.mean(0)).tolist(),
                     "text": (pictures * asked).sum(-1).tolist()}


def measure_pair(row: Row, names: tuple) -> dict:
    """Two concepts in one picture: both kinds, both individuals; sim/energy of the second's own word."""
    concepts, model = STUDY.load(row.training, names), STUDY.model
    kinds = [individual_and_specs(name)[0].kind for name in names]
    words = [concept.token for concept in concepts] or kinds
    text = f"a photo of a {words[0]} next to a {words[1]} {PAIR_SCENE}"
    record = {name: [] for name in PAIR_MEASURES}
    for things in STUDY.judge.find(draw(row, concepts, [text], "_".join(names))):
        there = {*kinds} <= {one.kind for one in things}
        first, second = (judges.recognise(things, kind, lineup(name)) for kind, name in zip(kinds, names))
        record["kinds"].append(there)
        record["one"].append(there and bool(first | second))
        record["both"].append(there and bool(first and second))
    if concepts and concepts[1].edits:
        e, _, (places,) = perfusion.encode(model.text_encoder, model.tokenizer, [text], concepts)
        I, D = (torch.stack([getattr(one, name) for one in concepts]) for name in ("i_star", "d_star"))
        ratio = perfusion.split(e, I, D)[1]
        record["sim"] = [ratio[0, places[words[1]][0][-1], 1].item()]
    return record


@torch.no_grad()
def record(job: tuple):
    """Measure one case of a row, and keep what is found in --workdir."""
    row, names = job
    found = measure(row, *names) if len(names) == 1 else measure_pair(row, names)
    with replacing(STUDY.record_file(row, names)) as partial:
        partial.write_text(json.dumps(found), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- results

def read_row(study: Study, row: Row) -> list[dict]:
    """The records of a row; a pair in both orders is one."""
    records = {}
    for names in cases(row.who, study.args.concepts):
        record = records.setdefault(frozenset(names), defaultdict(list))
        for measure, values in json.loads(study.record_file(row, names).read_text(encoding="utf-8")).items():
            record[measure] += values
    return list(records.values())


def per_concept(records: list, measure: str) -> list:
    """One mean per concept; nan where a record lacks the measure."""
    return [sum(r[measure]) / len(r[measure]) if r.get(measure) else math.nan for r in records]


def interval(values: list, factor: float = 1) -> tuple:
    """Mean and half width of those that are numbers, and how many digits they deserve."""
    values = [factor * value for value in values if not math.isnan(value)]
    return *(mean_and_interval(values) if values else (math.nan, math.nan)), 0 if factor == 100 else 3


def written(values: list, factor: float = 1) -> str:
    """'0.512 ± 0.031', or in per cent with a factor of 100."""
    mean, half, digits = interval(values, factor)
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def verdict(differences: list, factor: float) -> str:
    """What the interval of A - B says of the claim that A is higher."""
    mean, half, digits = interval(differences, factor)
    if math.isnan(half):
        return "-"
    if abs(mean) > half:
        return "yes" if mean > 0 else "no"
    return f"at most {abs(mean) + half:.{digits}f}"


def comparison(claim: str, title: str, factor: float, a: tuple, b: tuple, claimed: bool = True) -> list:
    """The cells of one comparison. a and b: the name of a row and its values, of the same concepts."""
    difference = [p - q for p, q in zip(a[1], b[1])]
    return [claim, title if claimed else f"({title})", a[0], b[0],
            *(written(values, factor) for values in (a[1], b[1], difference)),
            verdict(difference, factor) if claimed else ""]


def at_equal(curve_a: list, curve_b: list) -> tuple:
    """Two curves of (x, y) points -> y of both in the middle of the x they share; nan if they share none."""
    a, b = sorted(curve_a), sorted(curve_b)
    low, high = max(a[0][0], b[0][0]), min(a[-1][0], b[-1][0])
    if not low <= high:  # also for nan
        return math.nan, math.nan
    return tuple(float(np.interp((low + high) / 2, *zip(*points))) for points in (a, b))


def curves(results: dict, training: str, x: str, y: str) -> list:
    """Per concept: the points (x, y) of a training's sweep over beta, as far as it is measured."""
    points = [zip(per_concept(results[row.title], x), per_concept(results[row.title], y))
              for row in sweep(training) if row.title in results]
    return list(zip(*points))


def comparison_lines(results: dict) -> list:
    """The claims whose rows are measured, as cells."""
    lines = []
    for claim, claimed, others, a, b in COMPARISONS:
        for name in f"{claimed} {others}".split() if {a, b} <= results.keys() else ():
            title, factor = (MEASURES | PAIR_MEASURES)[name]
            values = [(row, per_concept(results[row], name)) for row in (a, b)]
            lines.append(comparison(claim, title, factor, *values, name in claimed.split()))
    for length in ("", ", 400 steps"):
        names = [f"locked keys{length}", f"trained keys{length}"]
        for x, y in PARETO:
            locked, trained = (curves(results, name, x, y) for name in names)
            if not locked or not trained or min(len(locked[0]), len(trained[0])) < 2:
                continue
            a, b = zip(*map(at_equal, locked, trained))
            shared, (title, factor) = sum(not math.isnan(one) for one in a), MEASURES[y]
            claim = f"locked keys shift the Pareto curve ({shared} of {len(a)} curves overlap)"
            lines.append(comparison(claim, f"{title} at equal {MEASURES[x][0]}", factor,
                                    (names[0], a), (names[1], b)))
    return lines


def pair_lines(results: dict) -> list:
    """Two concepts in one picture: counts, shares, and sim/energy of the second word."""
    lines = []
    for title, records in results.items():
        cells = [title]
        for name in PAIR_MEASURES:
            hits = [hit for record in records for hit in record[name]]
            cells.append(f"{sum(hits)} of {len(hits)} ({written(per_concept(records, name), 100)})")
        lines.append([*cells, written(per_concept(records, "sim"))])
    return lines


def markdown(head: list, lines: list) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


def tables(results: dict, args: argparse.Namespace) -> str:
    """claims.md of the rows {title: records} that are measured."""
    alone = {title: records for title, records in results.items() if "first" in records[0]}
    pairs = {title: records for title, records in results.items() if title not in alone}
    table = [[title, *(written(per_concept(records, name), factor) for name, (_, factor) in MEASURES.items())]
             for title, records in alone.items()]
    return "\n\n".join((
        f"{args.concepts} concepts, {args.seeds} seeds, 2 prompts each; DDIM {args.sampling_steps}; "
        f"beta {BETA}, tau {DRAWING_TAU} unless named. "
        "Mean and half width of the 95 % interval over concepts.",
        markdown(["row", *(title for title, _ in MEASURES.values())], table),
        "A - B is paired by concept. The claim says that A is higher. The verdict says whether the interval "
        "is above 0, below, or else how large a difference can be. A measure in brackets is no claim.",
        markdown(["claim", "measure", "A", "B", "value of A", "value of B", "A - B", "verdict"],
                 comparison_lines(results)),
        f'Two concepts in one picture ("... next to ... {PAIR_SCENE}"), trained apart; intervals over pairs:',
        markdown(["row", *(title for title, _ in PAIR_MEASURES.values()), "sim/energy of the second word"],
                 pair_lines(pairs)), ""))


def published(results: dict, study: Study) -> str:
    """records.json. rows: {title: {measure: for every concept or pair a list of one value per picture}}."""
    rows, args = {}, study.args
    for title in [title for title in PUBLISHED if title in results]:
        measures = PAIR_MEASURES if "pair" in title else ("first", "pattern", "kept", "share")
        rows[title] = {name: [[round(value, 3) for value in record[name]] for record in results[title]]
                       for name in measures}
    command = "python tiny/claims.py --concepts {} --seeds {} --sampling-steps {}".format(
        args.concepts, args.seeds, args.sampling_steps)
    return json.dumps({"fingerprint": study.model.fingerprint, "command": command, "rows": rows})


def pareto_figure(results: dict) -> Figure:
    """Mean curves over beta, with 95 % intervals over concepts: locked keys and trained keys."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, names in zip(figure.subplots(1, 2), PARETO):
        for training, color, side in (("locked keys", "C0", 1), ("trained keys", "C1", -1)):
            rows = [row for row in sweep(training) if row.title in results]
            (x, x_half), (y, y_half) = (
                zip(*[interval(per_concept(results[row.title], name), MEASURES[name][1])[:2] for row in rows])
                if rows else ([], []) for name in names)
            axes.errorbar(x, y, y_half, x_half, color=color, label=training, marker="o", elinewidth=0.5)
            for row, *place in zip(rows, x, y):
                if row.beta > 0.7:
                    axes.annotate(row.beta, place, (0, 10 * side), textcoords="offset points", color=color,
                                  ha="center", va="center")
                elif row.beta == 0.6:   # of three points that lie on one another
                    axes.annotate("   0.5 to 0.7", place, color=color, va="center")
        axes.set(xlabel=MEASURES[names[0]][0], ylabel=MEASURES[names[1]][0])
        axes.margins(x=0.25)
        axes.legend(title="at the points: beta", loc="lower right")
    return figure


def write_results(study: Study, rows: list[Row]):
    """claims.md, pareto.png and records.json, of rows that are measured."""
    results = {row.title: read_row(study, row) for row in rows}
    with replacing(study.folder / "claims.md") as partial:
        partial.write_text(tables(results, study.args), encoding="utf-8")
    with replacing(study.folder / "pareto.png") as partial:
        pareto_figure(results).savefig(partial, dpi=130, format="png")
    with replacing(study.args.records or study.folder / "records.json") as partial:
        partial.write_text(published(results, study), encoding="utf-8")


def run(args: argparse.Namespace):
    """Train and measure what is not there yet; write the results whenever a row is whole."""
    study, rows = Study.open(args), chosen_rows(args.only, args.skip)
    covariance.cached(study.model)  # once, before several trainings need it at the same time
    jobs = [(row, names) for row in rows for names in cases(row.who, args.concepts)]
    needed = dict.fromkeys((row.training, name) for row, names in jobs for name in names if row.training)
    trainings = [job for job in needed if not study.concept_file(*job).exists()]
    missing = [job for job in jobs if not study.record_file(*job).exists()]
    waiting = Counter(row for row, _ in missing)
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), start_work, (args,)) as pool:
        list(tqdm(pool.map(train_one, trainings), "training", len(trainings)))   # raises what went wrong
        for _, (row, _) in tqdm(zip(pool.map(record, missing), missing), "measuring", len(missing)):
            waiting[row] -= 1
            if not waiting[row]:
                write_results(study, [row for row in rows if not waiting[row]])
    write_results(study, rows)
    print((study.folder / "claims.md").read_text(encoding="utf-8") + f"\n{study.folder}/claims.md")


def main(argv=None):
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", metavar="TEXT", help="only rows whose title holds one of these")
    add("--skip", nargs="+", metavar="TEXT", default=[], help="no rows whose title holds one of these")
    add("--concepts", type=between(2, 1000), default=24, help="individuals, 2 to 1000")
    add("--seeds", type=between(2, 1000), default=8, help="pictures per prompt, 2 to 1000")
    add("--sampling-steps", type=between(1, 999), default=20, help="DDIM steps, 1 to 999")
    add("--workdir", type=Path, default=Path("runs/claims"), help="what is trained and measured is kept here")
    add("--records", type=Path, metavar="FILE", help="where records.json goes (default: beside claims.md)")
    add("--device", choices=("cpu", "cuda", "mps"), default="cpu", help="where pictures are drawn")
    add("--workers", type=between(1, 100), default=2, help="processes of one thread each")
    args = parser.parse_args(argv)
    command_line.pick_device(args.device)
    if not chosen_rows(args.only, args.skip):
        parser.error("no row's title holds what --only and --skip leave")
    run(args)


if __name__ == "__main__":
    command_line.run(main, memory="fewer --seeds or --workers need less")
