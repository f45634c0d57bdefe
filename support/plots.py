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

from diffusion import to_bytes

VIRIDIS = matplotlib.colormaps["viridis"]


def label(text: str) -> str:
    """A text that matplotlib shows as it is: a $ begins no formula, an _ at the start hides no legend."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def pareto(rows: list[dict], caption: str) -> Figure:
    """Image similarity over text similarity, with intervals: the rows of a concept joined, and at each its
    beta; a cross where there is none."""
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row["concept"] for row in rows))
    for name, color in zip(names, VIRIDIS(np.linspace(0, 0.85, len(names)))):
        own = [row for row in rows if row["concept"] == name]
        swept = own[0]["beta"] != ""
        text, image, across, up = ([row[column] for row in own] for column in (
            "text_similarity", "image_similarity", "text_interval", "image_interval"))
        axes.errorbar(text, image, up, across, color=color, label=label(name), linewidth=1.5,
                      elinewidth=0.6, marker="o" if swept else "X", markersize=5 if swept else 9)
        for row, place in zip(own if swept else (), zip(text, image)):
            axes.annotate(f"{row['beta']:g}", place, fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="text similarity", ylabel="image similarity", title="Concepts over beta (at the points)")
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
            axis.contour(mask, [0.5], origin="lower", extent=(0, 1, 0, 1), colors="white", linewidths=0.8)
            axis.set_xlabel(text, fontsize=8)
    figure.suptitle(label(title), fontsize=9)
    return figure
