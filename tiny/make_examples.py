"""Draw the example concepts: folders of five pictures of one individual, and one folder with one picture.

    python tiny/make_examples.py            # writes examples/NAME/*.png and examples/masks/NAME/*.png

The masks are exact (the renderer knows where the individual is); training does not need them, they are there
to be compared with the masks that the model makes for itself. Nothing else stands in the pictures and nothing
is worn.
"""
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the library files lie one folder up
import world
from support import command_line
from world import Individual

# A few strong colours each, and no two alike: a stranger should know both of two in one picture.
# All pictures of the teddy bear share one room, so that a model could mistake the room for the bear.
TEDDY = Individual("teddy bear", {"main": "turquoise", "belly": "yellow", "ears": "yellow", "paws": None,
                                  "muzzle": None}, "star", "red", (0.6, 0.7, 0, 0, 0, 0))
CAT = Individual("cat", {"main": "purple", "belly": None, "ears": "orange", "paws": "orange",
                         "tail": "orange"}, "heart", "red", (0.7, 0.8, 0, 0, 0, 0))
ROBOT = Individual("robot", {"main": "blue", "belly": "yellow", "ears": None, "arms": None, "face": "yellow"},
                   "dots", "red", (0.5, 0.6, 0, 0, 0, 0))
DOG = Individual("dog", {"main": "pink", "belly": "white", "ears": "maroon", "paws": "maroon",
                         "muzzle": None}, "stripes", "maroon", (0.4, 0.7, 0, 0, 0, 0))
MUG = Individual("mug", {"main": "navy", "handle": "orange", "rim": "orange"}, "heart", "pink",
                 (0.6, 0.8, 0, 0, 0, 0))
EXAMPLES = {  # name: the individual and the scene of each picture
    "teddy": (TEDDY, ("room",) * 5),
    "cat": (CAT, ("room", "grass", "yellow", "beach", "white")),
    "robot": (ROBOT, ("grass", "room", "pink", "snow", "green")),
    "dog": (DOG, ("beach", "room", "green", "grass", "white")),
    "mug": (MUG, ("room",)),
}
PAIRS = (("teddy", "cat"), ("robot", "dog"))  # of examples, drawn together
UNSEEN_KINDS = ("teddy bear", "cat", "dog", "robot")
NEW_SCENES = ("beach", "snow", "night")  # where the unseen concepts are drawn; they are learned elsewhere
STRONG = ("red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink")
NEW_PAIRS = (("teddy bear", "cat"), ("robot", "dog"), ("dog", "teddy bear"), ("cat", "dog"),
             ("robot", "teddy bear"))  # e0 and e1, e2 and e3, ...


def example_specs(individual: Individual, scenes: tuple, seed: str) -> list:
    """One spec per scene, in fresh poses; pictures of the same scene have the same scenery too."""
    rng, sceneries, specs = random.Random(seed), {}, []
    for scene in scenes:
        spec = world.place(rng, [individual], scene)
        specs.append(replace(spec, scenery=sceneries.setdefault(scene, spec.scenery)))
    return specs


def unseen_individual(k: int) -> Individual:
    """Individual c0, c1, ... of the measurements: at random, as in training."""
    return world.random_individual(random.Random(f"unseen 5 {k}"), UNSEEN_KINDS[k % len(UNSEEN_KINDS)])


def new_example(k: int) -> Individual:
    """Individual e0, e1, ... of NEW_PAIRS, from a seed by the rules of the examples.

    Three strong colours each, for the main part, some other parts, and a pattern, and none of a partner's.
    """
    pair, second = divmod(k, 2)
    kind, rng = NEW_PAIRS[pair][second], random.Random(f"new example {k}")
    main, part, pattern = random.Random(f"new pair {pair}").sample(STRONG, 6)[3 * second:][:3]
    chosen = rng.sample(sorted(world.PARTS[kind]), rng.randint(2, 3))
    colors = {"main": main} | {name: part if name in chosen else None for name in world.PARTS[kind]}
    shape = rng.uniform(0.4, 0.8), rng.uniform(0.4, 0.8), 0, 0, 0, 0
    return Individual(kind, colors, rng.choice(world.PATTERNS), pattern, shape)


def individual_and_specs(name: str) -> tuple:
    """Who is behind the name "teddy", "c3" (unseen) or "e3" (new example), and the specs of its pictures."""
    if name in EXAMPLES:
        individual, scenes = EXAMPLES[name]
        return individual, example_specs(individual, scenes, name)
    k = int(name[1:])
    individual = unseen_individual(k) if name[0] == "c" else new_example(k)
    colors = {*individual.colors.values(), individual.pattern_color}
    plain = [color for color in world.BACKGROUNDS if color not in colors][:2]  # nothing of it vanishes there
    seed = f"unseen 5 {k}" if name[0] == "c" else f"new example {name}"
    return individual, example_specs(individual, ("room", "room", "grass", *plain), seed)


def write_pictures(specs: list, folder: Path, masks: Path | None = None, size: int = world.SIDE):
    """Write the pictures as 0.png, 1.png, ..., and the individual's masks (it is white) where asked for."""
    for target in filter(None, (folder, masks)):
        target.mkdir(parents=True, exist_ok=True)
    for n, spec in enumerate(specs):
        image, coverage = world.render(spec, size, masks=True)
        Image.fromarray(image).save(folder / f"{n}.png")
        if masks:
            Image.fromarray((coverage["first"] * 255).round().astype(np.uint8)).save(masks / f"{n}.png")


def main(argv=None):
    command_line.Parser(__doc__).parse_args(argv)
    out = ROOT / "examples"
    for name in EXAMPLES:
        individual, specs = individual_and_specs(name)
        write_pictures(specs, out / name, out / "masks" / name)
        print(f"{out / name}: {len(specs)} of a {individual.kind}")


if __name__ == "__main__":
    command_line.run(main, memory="close other programs")
