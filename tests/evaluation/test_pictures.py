"""Grids of images with texts."""

import pytest
from conftest import picture
from PIL import Image

from imageprompt.evaluation.pictures import save_grid


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
