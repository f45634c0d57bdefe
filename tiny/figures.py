"""The README's pictures of the embedded model: what it draws, and one concept learned in three ways.

    python tiny/figures.py base                                         # figures/base.png
    python tiny/figures.py concept out/teddy/teddy.safetensors out/trained/teddy.safetensors \\
        out/inversion/teddy.safetensors --images examples/teddy         # figures/concept.png
"""
import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library files lie one folder up
import drawing
import perfusion
import weights_loader

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (after the choice of the backend)

GUIDANCE, STEPS, BETA, TAU = 4.0, 50, 0.7, 0.15
ROWS = {"locked": "locked keys", "trained": "trained keys", "none": "textual inversion"}
BASE_PROMPTS = (
    "a photo of a teddy bear", "a photo of a cat", "a photo of a dog", "a photo of a robot",
    "a photo of a mug", "a photo of a ball", "a red teddy bear on the beach", "a turquoise cat in a room",
    "a yellow dog on the grass",
    "a green robot at night", "a blue mug in the snow", "an orange ball on the grass",
    "a teddy bear wearing a hat at night", "a cat wearing sunglasses on the beach",
    "a dog wearing a scarf in a room",
    "a robot holding a balloon on the grass", "a purple teddy bear with a yellow belly",
    "a white cat with a red heart on a blue background", "a mug with green dots on a pink background",
    "a teddy bear next to a ball on the grass", "a dog next to a mug on the beach",
    "a teddy bear in the snow (held out)", "a cat wearing a hat on the grass (held out)",
    "a robot on the beach (held out)")
CONCEPT_PROMPTS = ("a photo of a {} on the beach", "a photo of a {} at night",
                   "a photo of a {} wearing a hat on the grass",
                   "a photo of a {} holding a balloon on the beach",
                   "a photo of a {} next to a ball on the grass")


@torch.no_grad()
def draw(model, concepts: list, prompts: list, seeds: range) -> torch.Tensor:
    """Pictures (prompts, seeds, 3, 64, 64) in [0, 1]."""
    n, pictures = len(concepts), []
    for prompt in prompts:
        e, e_super, _ = perfusion.encode(model.text_encoder, model.tokenizer, ["", prompt], concepts)
        keys, values = perfusion.keys_and_values(model.unet, e, e_super, concepts, [BETA] * n, [TAU] * n)
        pictures.append(drawing.draw(model, keys, values, seeds, (64, 64), STEPS, GUIDANCE))
    return torch.stack(pictures)


def show(axis, image: torch.Tensor, title: str = ""):
    axis.imshow(drawing.to_bytes(image))
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=7, loc="left", pad=2)


def base(args):
    """24 prompts, 8 seeds each."""
    model = weights_loader.load("tiny")
    pictures = draw(model, [], [prompt.removesuffix(" (held out)") for prompt in BASE_PROMPTS], range(8))
    figure, axes = pyplot.subplots(12, 2, figsize=(9, 8), layout="constrained")
    for axis, prompt, row in zip(axes.flat, BASE_PROMPTS, pictures):
        show(axis, drawing.grid(row, 8), prompt)
    figure.savefig(args.out / "base.png", dpi=130)


def concept(args):
    """The training pictures, then the same prompts and seeds for each way of training."""
    model = weights_loader.load("tiny")
    files = sorted(args.images.glob("*.png"))
    shown = [torch.from_numpy(np.array(Image.open(file).convert("RGB"))) for file in files]
    shown = torch.stack(shown).permute(0, 3, 1, 2) / 255
    rows = [("training pictures", [drawing.grid(shown, len(shown))])]
    for file in args.files:
        mine = perfusion.prepare([perfusion.Concept.load(file)], model)
        pictures = draw(model, mine, [prompt.format(mine[0].token) for prompt in CONCEPT_PROMPTS], range(4))
        rows.append((ROWS[mine[0].lock], [drawing.grid(row, 2) for row in pictures]))
    figure = pyplot.figure(figsize=(9, 1.9 * len(rows)), layout="constrained")
    for part, (label, images) in zip(figure.subfigures(len(rows), 1), rows):
        part.suptitle(label, fontsize=9, fontweight="bold", x=0.01, ha="left")
        axes = part.subplots(1, len(images), squeeze=False)[0]
        for axis, image, prompt in zip(axes, images, CONCEPT_PROMPTS):
            show(axis, image, prompt.removeprefix("a photo of a {} ") if len(images) > 1 else "")
    figure.savefig(args.out / "concept.png", dpi=130)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("figure", choices=("base", "concept"))
    parser.add_argument("files", nargs="*", type=Path, help="concept files, for `concept`: one row each")
    parser.add_argument("--images", type=Path, default=Path("examples/teddy"), help="their training pictures")
    parser.add_argument("--out", type=Path, default=Path("figures"),
                        help="folder of the PNG (default: figures)")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        {"base": base, "concept": concept}[args.figure](args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
