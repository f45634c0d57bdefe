"""Plots: tensors in, a figure out."""

import io
import itertools
import os
import sys

from PIL import Image
from torch import Tensor, arange

from diffusion import to_bytes

# A program started from a notebook's cell inherits the notebook's backend of matplotlib. Where that is not
# installed, matplotlib fails at its import.
if os.environ.get("MPLBACKEND", "").endswith("inline") and "ipykernel" not in sys.modules:
    del os.environ["MPLBACKEND"]

from matplotlib import colormaps  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


def png(figure: Figure) -> bytes:
    """A figure as a PNG file of 128 colours, which take a quarter of the bytes."""
    drawn, file = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=100)
    Image.open(drawn).convert("RGB").quantize(128, kmeans=1).save(file, "PNG")
    return file.getvalue()


def palette() -> list[int]:
    """The colours of maps, from 0 to 255: red, green, blue and opacity as a number's bytes, low to high."""
    return [int.from_bytes(bytes(colour), "little") for colour in colormaps["magma"](range(256), bytes=True)]


def grid_figure(cells: list[list], rows: list[str], columns: list[str], title: str, tops: list | None = None,
                objects: list | None = None) -> Figure:
    """A grid of pictures (3, H, W) and maps (h, w), with labels.

    tops: per column of maps the value where its colours end. objects: [row][column] None, or the mask (h, w)
    that is outlined on a map and the text below it.
    """
    R, C = len(cells), len(cells[0])
    figure = Figure(figsize=(1.4 * C + 0.5, 1.65 * R + 0.7), layout="constrained")
    axes = figure.subplots(R, C, squeeze=False)
    for r, c in itertools.product(range(R), range(C)):
        axis, cell = axes[r, c], cells[r][c]
        axis.set(xticks=[], yticks=[])
        axis.set_title(columns[c] if r == 0 else "", fontsize=8)
        axis.set_ylabel(rows[r] if c == 0 else "", fontsize=8)
        if cell.ndim == 3:
            axis.imshow(to_bytes(cell), interpolation="nearest" if cell.shape[-1] <= 128 else "auto")
        else:
            axis.imshow(cell.numpy(), cmap="magma", vmin=0, vmax=tops[c], extent=(0, 1, 1, 0))
        if objects and objects[r][c]:
            mask, text = objects[r][c]
            across, down = ((arange(n) + 0.5) / n for n in reversed(mask.shape))
            axis.contour(across, down, mask.numpy(), levels=[0.5], colors="white", linewidths=0.8)
            axis.set_xlabel(text, fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def gates_figure(prompts: list[tuple[list, list[str], Tensor]], title: str) -> Figure:
    """How far gates are open: per prompt its tokens [(place, text)], the concepts' names, gates (T, n)."""
    figure = Figure(figsize=(8, 2.3 * len(prompts) + 0.4), layout="constrained")
    for axis, (places, names, gates) in zip(figure.subplots(len(prompts), 1, squeeze=False)[:, 0], prompts):
        n = len(names)
        for j, name in enumerate(names):
            axis.bar([t + 0.8 * (j + 0.5) / n - 0.4 for t, _ in places],
                     [gates[t, j].item() for t, _ in places], 0.8 / n, label=name,
                     color=colormaps["viridis"](0.25 + 0.5 * j))
        axis.set_xticks(*zip(*places), rotation=35, fontsize=9)
        axis.set(ylim=(0, 1), ylabel="gate")
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontsize=10)
    return figure
