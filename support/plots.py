"""Plots: tensors in, a figure out."""

import io
import os
import sys

# A program started from a notebook's cell inherits the notebook's backend of matplotlib. Where that is not
# installed, matplotlib fails at its import.
if os.environ.get("MPLBACKEND", "").endswith("inline") and "ipykernel" not in sys.modules:
    del os.environ["MPLBACKEND"]

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from diffusion import to_bytes


def label(text: str) -> str:
    """A text that matplotlib shows as it is: a $ begins no formula, an _ at the start hides no legend."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def pareto(curves: dict[str, tuple[list, list]], x: str, y: str, title: str, caption: str) -> Figure:
    """Curves over two measures x and y, {name: (points, marks)}: points (x, y, half of x's interval, half of
    y's), joined, and a mark at each; crosses if there are no marks."""
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(curves)))
    for (name, (points, marks)), color in zip(curves.items(), colors):
        across, up, across_half, up_half = zip(*points)
        axes.errorbar(across, up, up_half, across_half, color=color, label=label(name), linewidth=1.5,
                      elinewidth=0.6, marker="o" if marks else "X", markersize=5 if marks else 9)
        for mark, place in zip(marks, zip(across, up)):
            axes.annotate(label(mark), place, fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel=x, ylabel=y, title=label(title))
    axes.legend(fontsize=8)
    figure.supxlabel(label(caption), fontsize=8)
    return figure


def png(figure: Figure) -> bytes:
    """A figure as a PNG file of 128 colours, which take a quarter of the bytes."""
    drawn, file = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=100)
    Image.open(drawn).convert("RGB").quantize(128, kmeans=1).save(file, "PNG")
    return file.getvalue()


def palette() -> list[int]:
    """The colours of maps, from 0 to 255: red, green, blue and opacity as a number's bytes, low to high."""
    colours = matplotlib.colormaps["magma"](range(256), bytes=True)
    return [int.from_bytes(bytes(colour), "little") for colour in colours]


def grid_figure(cells: list[list], rows: list[str], columns: list[str], title: str, tops: list | None = None,
                objects: dict | None = None) -> Figure:
    """A grid of pictures (3, H, W) in [0, 1] and maps (h, w) in colours from 0, with labels.

    tops: per column of maps the value where its colours end. objects: {(row, column): (mask, text)}, a mask
    (h, w) that is outlined on a map and the text below it.
    """
    figure = Figure(figsize=(1.4 * len(columns) + 0.5, 1.65 * len(rows) + 0.7), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for (r, c), axis in np.ndenumerate(axes):
        cell, top = cells[r][c], tops[c] if tops else 1
        if cell.ndim == 3:
            axis.imshow(to_bytes(cell), interpolation="nearest" if cell.shape[-1] <= 128 else "auto")
        else:
            axis.imshow(cell.numpy(), cmap="magma", vmin=0, vmax=top, extent=(0, 1, 1, 0))
        axis.set(xticks=[], yticks=[])
        axis.set_title("" if r else label(columns[c]), fontsize=8)
        axis.set_ylabel("" if c else label(rows[r]), fontsize=8)
        if objects and (r, c) in objects:
            mask, text = objects[r, c]
            across, down = ((np.arange(n) + 0.5) / n for n in reversed(mask.shape))
            axis.contour(across, down, mask.numpy(), levels=[0.5], colors="white", linewidths=0.8)
            axis.set_xlabel(text, fontsize=8)
    figure.suptitle(label(title), fontsize=9)
    return figure


def gates_figure(prompts: list[tuple[list[str], list[str], Tensor]], title: str) -> Figure:
    """How far gates are open: per prompt the texts of its tokens, the concepts' names, gates (tokens, n)."""
    figure = Figure(figsize=(8, 2.3 * len(prompts) + 0.4), layout="constrained")
    for axis, (pieces, names, gates) in zip(figure.subplots(len(prompts), 1, squeeze=False)[:, 0], prompts):
        at, width = np.arange(len(pieces)), 0.8 / len(names)
        for j, name in enumerate(names):
            axis.bar(at + width * (j + 0.5) - 0.4, gates[:, j].numpy(), width, label=label(name),
                     color=matplotlib.colormaps["viridis"](0.25 + 0.5 * j))
        axis.set_xticks(at, [label(piece) for piece in pieces], rotation=35, fontsize=9)
        axis.set(ylim=(0, 1), ylabel="gate")
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontsize=10)
    return figure
