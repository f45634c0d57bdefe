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

VIRIDIS = matplotlib.colormaps["viridis"]
LOSS_WINDOW = 20            # steps over which a preview averages the loss


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


def panel(axes: matplotlib.axes.Axes, cell: Tensor, title: str = "", top: float = 1) -> None:
    """A picture (3, H, W) in [0, 1], or a map (h, w) in colours from 0 to top."""
    if cell.ndim == 3:
        axes.imshow(to_bytes(cell), interpolation="nearest" if cell.shape[-1] <= 128 else "auto")
    else:
        axes.imshow(cell.numpy(), cmap="magma", vmin=0, vmax=top, extent=(0, 1, 1, 0))
    axes.set(xticks=[], yticks=[])
    axes.set_title(label(title), fontsize=8)


def draw_preview(images: Tensor, maps: Tensor, titles: list[str], picture: Tensor, mask: Tensor,
                 losses: list[float]) -> Figure:
    """n >= 3 images (n, 3, H, W) in [0, 1], maps (n, h, w) on one scale, a training picture (3, H, W) with
    its mask (h, w), the loss."""
    n = len(images)
    figure = Figure(figsize=(2.6 * n, 7.8), layout="constrained")
    places = figure.add_gridspec(3, n)
    for i in range(n):
        panel(figure.add_subplot(places[0, i]), images[i], titles[i])
        panel(figure.add_subplot(places[1, i]), maps[i], "" if i else "attention of the word", maps.max())
    panel(figure.add_subplot(places[2, 0]), picture, "training picture")
    panel(figure.add_subplot(places[2, 1]), mask, "its mask on the loss")
    curve = figure.add_subplot(places[2, 2:])
    curve.plot(losses, color="0.8", linewidth=0.8)
    if len(losses) >= LOSS_WINDOW:
        smooth = np.convolve(losses, np.ones(LOSS_WINDOW) / LOSS_WINDOW, "valid")
        curve.plot(range(LOSS_WINDOW - 1, len(losses)), smooth, color="black")
    curve.set_title(f"loss, mean of {LOSS_WINDOW} steps", fontsize=8)
    curve.tick_params(labelsize=7)
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
    """A grid of pictures (3, H, W) and maps (h, w), with labels.

    tops: per column of maps the value where its colours end. objects: {(row, column): (mask, text)}, a mask
    (h, w) that is outlined on a map and the text below it.
    """
    figure = Figure(figsize=(1.4 * len(columns) + 0.5, 1.65 * len(rows) + 0.7), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for (r, c), axis in np.ndenumerate(axes):
        panel(axis, cells[r][c], "" if r else columns[c], tops[c] if tops else 1)
        axis.set_ylabel("" if c else label(rows[r]), fontsize=8)
        if objects and (r, c) in objects:
            mask, text = objects[r, c]
            axis.contour(mask, [0.5], origin="lower", extent=(0, 1, 0, 1), colors="white", linewidths=0.8)
            axis.set_xlabel(text, fontsize=8)
    figure.suptitle(label(title), fontsize=9)
    return figure
