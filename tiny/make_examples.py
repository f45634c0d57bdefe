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
from support.command_line import between
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
UNSEEN_KINDS = ("teddy bear", "cat", "dog", "robot")
NEW_SCENES = ("beach", "snow", "night")  # where the unseen concepts are drawn; they are learned elsewhere


def example_specs(individual: Individual, scenes: tuple, seed: str) -> list:
    """One spec per scene, in fresh poses; pictures of the same scene have the same scenery too."""
    rng, sceneries, specs = random.Random(seed), {}, []
    for scene in scenes:
        spec = world.place(rng, [individual], scene)
        specs.append(replace(spec, scenery=sceneries.setdefault(scene, spec.scenery)))
    return specs


def unseen_concept(k: int, seed: int = 5) -> tuple:
    """Concept k of the measurements: its name, a random individual, the specs of its five pictures."""
    rng = random.Random(f"unseen {seed} {k}")
    individual = world.random_individual(rng, UNSEEN_KINDS[k % len(UNSEEN_KINDS)])
    colors = {*individual.colors.values(), individual.pattern_color}
    plain = [name for name in world.BACKGROUNDS if name not in colors][:2]  # nothing of it vanishes there
    scenes = ("room", "room", "grass", *plain)
    return f"c{k}", individual, example_specs(individual, scenes, f"unseen {seed} {k}")


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
    parser = command_line.Parser(__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "examples", help="folder of the concept folders")
    parser.add_argument("--size", type=between(8, 4096), default=world.SIDE,
                        help="pixels of a side, 8 to 4096")
    args = parser.parse_args(argv)
    for name, (individual, scenes) in EXAMPLES.items():
        specs = example_specs(individual, scenes, name)
        write_pictures(specs, args.out / name, args.out / "masks" / name, args.size)
        print(f"{args.out / name}: {len(scenes)} of a {individual.kind}")


if __name__ == "__main__":
    with command_line.plain_errors(memory="a smaller --size needs less"):
        main()
