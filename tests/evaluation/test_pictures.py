"""Grids of images with texts, and confusion matrices."""

import pytest
from conftest import picture
from matplotlib import colormaps
from PIL import Image

from imageprompt.evaluation.pictures import save_confusion, save_grid


def test_a_grid_shows_every_image(tmp_path):
    red = [Image.new("RGB", (20, 20), "red")] * 5
    save_grid(
        red, ["a rather long caption that must be broken into several lines"] * 5, tmp_path / "grid.png", columns=3
    )
    pixels = Image.open(tmp_path / "grid.png").convert("RGB")
    colours = {colour: count for count, colour in pixels.getcolors(maxcolors=1_000_000)}
    assert colours[(255, 0, 0)] > 5 * 80 * 80


def test_texts_must_match_images(tmp_path):
    with pytest.raises(ValueError, match="2 images and 1 texts"):
        save_grid([picture(), picture()], ["one"], tmp_path / "grid.png")


def test_a_confusion_matrix_is_coloured_by_shares(tmp_path):
    save_confusion(["cat", "dog", "other"], [[50, 0, 0], [1, 0, 1]], tmp_path / "confusion.png")
    pixels = Image.open(tmp_path / "confusion.png").convert("RGB")
    colours = {colour: count for count, colour in pixels.getcolors(maxcolors=1_000_000)}
    whole, half = (colours[colormaps["Blues"](share, bytes=True)[:3]] for share in (1.0, 0.5))
    assert half > 1.5 * whole > 0  # all cats in one cell, the dogs in two


def test_a_confusion_matrix_must_have_a_count_for_each_label(tmp_path):
    with pytest.raises(ValueError, match=r"rows of 2 counts; got \[2, 1\]"):
        save_confusion(["cat", "dog"], [[1, 0], [1]], tmp_path / "confusion.png")
    with pytest.raises(ValueError, match=r"got \[\]"):
        save_confusion(["cat", "dog"], [], tmp_path / "confusion.png")
