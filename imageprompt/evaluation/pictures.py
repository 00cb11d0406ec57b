"""Pictures of what a model says: images in a grid with their texts underneath, and which classes it confuses."""

import os
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def save_grid(
    images: Sequence[Any], texts: Sequence[str], path: str | os.PathLike, *, columns: int = 4, wrap: int = 28
) -> None:
    """Write a picture of images with a text under each.

    Args:
        images: PIL images or arrays of (height, width[, channels]).
        texts: one per image; broken into lines of `wrap` characters.
        path: a `.png`, `.svg` or `.pdf` file.
        columns: images side by side.
        wrap: longest line, in characters.

    Raises:
        ValueError: if there are no images, or not one text for each.
    """
    if not images or len(images) != len(texts):
        raise ValueError(f"A grid needs one text per image; got {len(images)} images and {len(texts)} texts.")
    rows = -(-len(images) // columns)
    lines = [textwrap.fill(text, wrap) for text in texts]
    tallest = max(text.count("\n") + 1 for text in lines)
    # A canvas of its own: no global state, no display.
    figure = Figure(figsize=(2.1 * columns, (1.9 + 0.17 * tallest) * rows), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if index < len(images):
            axes.imshow(images[index], cmap="gray")
            axes.text(0.5, -0.04, lines[index], transform=axes.transAxes, ha="center", va="top", fontsize=8)
    figure.savefig(path)


def save_confusion(labels: Sequence[str], counts: Sequence[Sequence[int]], path: str | os.PathLike) -> None:
    """Write a picture of a confusion matrix, coloured by the share of each true class.

    Args:
        labels: of the columns.
        counts: rows of answers to each true class, in the order of `labels`; there may be fewer rows than columns.
        path: a `.png`, `.svg` or `.pdf` file.

    Raises:
        ValueError: if there are no rows, or one has not a count for each label.
    """
    if not counts or any(len(row) != len(labels) for row in counts):
        raise ValueError(f"A confusion matrix needs rows of {len(labels)} counts; got {[len(row) for row in counts]}.")
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    size = 2.5 + 0.35 * len(labels)
    figure = Figure(figsize=(size, size), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    axes.set_yticks(range(len(counts)), labels[: len(counts)])
    axes.set(xlabel="answer", ylabel="truth")
    for row, row_counts in enumerate(counts):
        for column, count in enumerate(row_counts):
            if count:
                colour = "white" if shares[row][column] > 0.5 else "black"
                axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=7, color=colour)
    figure.savefig(path)
