"""Pictures of what a model says: images in a grid with their texts underneath."""

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
