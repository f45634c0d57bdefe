"""The README's pictures: what the embedded model draws, and what it learns.

    python tiny/figures.py base         # figures/base.png: the model without a concept
    python tiny/figures.py hero         # figures/hero.png: two concepts, each alone and both together
    python tiny/figures.py pairs        # figures/pairs.png: the example pairs, in both orders
    python tiny/figures.py lock         # figures/lock.png: two concepts, keys locked and keys trained

Hero, pairs and lock show concepts of the examples, as train.py leaves them in out/; lock those of
`--keys trained --token NAME --out out/NAME-trained` too, and the numbers of records.json, which claims.py
writes.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library files lie one folder up
import torch

import diffusion
import weights_loader
from concept import Concept, prepare
from judge import draw
from make_examples import PAIRS
from support import command_line, fast_cpu
from support.command_line import between
from support.files import replacing
from support.pictures import list_images, read_image
from support.plots import Figure

BASE_PROMPTS = (  # the last three are held out of training
    "a photo of a teddy bear", "a photo of a cat", "a photo of a dog", "a photo of a robot",
    "a photo of a mug", "a photo of a ball", "a red teddy bear on the beach near a palm",
    "a turquoise cat with arms up in a room", "a yellow dog on the grass near a house",
    "a green robot at night near a lamp", "a blue mug in the snow near a snowman",
    "in a room, an orange ball", "a teddy bear wearing a hat at night",
    "a cat wearing sunglasses on the beach", "a dog wearing a scarf in a room",
    "a robot holding a balloon on the grass", "a yellow bellied purple teddy bear in a room",
    "a white cat with a red heart on a blue background",
    "a teddy bear next to a cat on the grass near a tree", "a dog and a robot with arms up in the snow",
    "a red dog beside a blue mug on the beach", "a teddy bear in the snow",
    "a cat wearing a hat on the grass", "a cat next to a robot in a room")
HERO_PROMPTS = ("a photo of a {} at night", "a photo of a {} wearing sunglasses on the beach",
                "a photo of a {} holding a balloon on the grass", "a photo of a {} next to a mug in a room")


def show(axes, images: torch.Tensor, columns: int, title: str, seeds: range = range(0)):
    """A grid of pictures (n, 3, H, W) with a title above it, and seeds below its columns."""
    sheet = diffusion.to_bytes(diffusion.grid(images, columns, gap=6))
    axes.imshow(sheet)
    places = [(k + 0.5) * sheet.shape[1] / columns for k in range(len(seeds))]
    axes.set(xticks=places, yticks=[], frame_on=False)
    axes.set_xticklabels([f"seed {seed}" for seed in seeds], fontsize=7)
    axes.tick_params(length=0, pad=1)
    axes.set_title(title, fontsize=8, loc="left", pad=2)


def load(model, names: tuple, end: str = "") -> list:
    """The concepts of examples, as train.py left them, ready to use."""
    return prepare([Concept.load(f"out/{name}{end}/{name}.safetensors") for name in names], model)


def base(model, steps: int) -> Figure:
    """24 prompts, 4 seeds each."""
    figure = Figure(figsize=(9, 8.6), layout="constrained")
    pictures = draw(model, [prompt for prompt in BASE_PROMPTS for _ in range(4)], [*range(4)] * 24, steps)
    for axes, prompt, row in zip(figure.subplots(8, 3).flat, BASE_PROMPTS, pictures.split(4)):
        show(axes, row, 4, prompt + " (held out)" * (prompt in BASE_PROMPTS[-3:]))
    figure.supxlabel("seeds 0 to 3, from left to right", fontsize=8)
    return figure


def hero(model, steps: int) -> Figure:
    """Two concepts: their training pictures, each in new scenes, and both in one picture, in both orders."""
    concepts = load(model, PAIRS[0])
    figure = Figure(figsize=(9, 4.1), layout="constrained")
    *alone, both = figure.subfigures(3, 1)
    for part, name, concept in zip(alone, PAIRS[0], concepts):
        left, right = part.subplots(1, 2, width_ratios=(5, 4))
        given, _ = list_images(Path("examples") / name)
        given = torch.stack([read_image(one, model.size[0])[0] for one in given]) / 2 + 0.5
        show(left, given, len(given), f"{concept.token}: the training pictures")
        prompts = [prompt.format(concept.token) for prompt in HERO_PROMPTS]
        pictures = draw(model, prompts, [0] * 4, steps, concepts)
        show(right, pictures, 4, f"{concept.token} in new scenes, seed 0")
    for axes, (a, b) in zip(both.subplots(1, 2), (concepts, concepts[::-1])):
        together(axes, model, [a, b], 4, steps)
    return figure


def together(axes, model, concepts: list, seeds: int, steps: int, title: str = "{}"):
    """Two concepts in one picture, from several seeds. title: {} stands for the prompt."""
    prompt = f"a photo of a {concepts[0].token} next to a {concepts[1].token} on the grass"
    pictures = draw(model, [prompt] * seeds, range(seeds), steps, concepts)
    show(axes, pictures, seeds, title.format(prompt), range(seeds))


def pairs(model, steps: int) -> Figure:
    """Two concepts in one picture: each of PAIRS in both orders."""
    orders = [order for names in PAIRS for order in (names, names[::-1])]
    figure = Figure(figsize=(9, 1.45 * len(orders)), layout="constrained")
    for axes, names in zip(figure.subplots(len(orders)), orders):
        together(axes, model, load(model, names), 8, steps)
    return figure


def lock(model, steps: int) -> Figure:
    """Two concepts in one picture with locked and with trained keys, and how often it goes well."""
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(5, 2))
    for axes, keys, end in zip(left.subplots(2), ("locked", "trained"), ("", "-trained")):
        together(axes, model, load(model, PAIRS[0], end), 6, steps, f"keys {keys}: {{}}")
    rows = json.loads(Path("tiny/records.json").read_text(encoding="utf-8"))["rows"]
    axes = right.subplots()
    names = ("locked keys", "trained keys", "textual inversion")
    shown = (("kinds", "both kinds", "#9db8d8"), ("both", "both individuals", "#2a5d9c"))
    for k, name in enumerate(names):
        for n, (measure, title, color) in enumerate(shown):
            hits = sum(rows[f"pair: {name}"][measure], [])
            share = 100 * sum(hits) / len(hits)
            axes.barh(k + 0.38 * n, share, 0.36, color=color)
            axes.text(share + 3, k + 0.38 * n, f"{share:.0f} % {title}", va="center", fontsize=7)
    axes.set(xlim=(0, 200), xticks=[], ylim=(2.75, -0.6), yticks=[k + 0.19 for k in range(3)])
    axes.set_yticklabels([name.replace(" ", "\n") for name in names], fontsize=7)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    count = len(rows["pair: locked keys"]["kinds"])
    axes.set_title(f"{len(hits)} pictures of {count} other pairs", fontsize=8, loc="left")
    return figure


def main(argv=None):
    figures = {one.__name__: one for one in (base, hero, pairs, lock)}
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("figure", choices=figures)
    add("--steps", type=between(1, 999), default=30, help="denoising steps, 1 to 999")
    args = parser.parse_args(argv)
    model = weights_loader.load()
    fast_cpu.enable(model)
    figure = figures[args.figure](model, args.steps)
    with replacing(f"figures/{args.figure}.png") as partial:
        figure.savefig(partial, dpi=150, format="png")


if __name__ == "__main__":
    command_line.run(main, memory="close other programs")
