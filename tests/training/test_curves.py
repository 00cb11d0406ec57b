"""The picture of a run: which curves it shows, and that it is drawn."""

import numpy as np
import pytest
from PIL import Image

from imageprompt.training.curves import read_curves, save_curves

HISTORY = [
    {"step": 5, "epoch": 1.0, "loss": 3.0, "grad_norm": 1.0, "learning_rate": 1e-3},
    {"step": 5, "epoch": 1.0, "eval_loss": 3.5, "eval_CIDEr": 0.1, "eval_BLEU-4": 0.0, "eval_runtime": 2.0},
    {"step": 10, "epoch": 2.0, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 5e-4},
    {"step": 10, "eval_loss": 3.0, "eval_CIDEr": 0.4, "eval_BLEU-4": 0.2, "eval_samples_per_second": 9.0},
    {"step": 10, "train_runtime": 60.0, "train_loss": 2.5, "total_flos": 1e9},
]


def test_curves_are_those_of_the_log():
    assert read_curves(HISTORY) == {
        "loss": {"loss": ([5, 10], [3.0, 2.0]), "eval_loss": ([5, 10], [3.5, 3.0])},
        "CIDEr": {"eval_CIDEr": ([5, 10], [0.1, 0.4])},
        "BLEU-4": {"eval_BLEU-4": ([5, 10], [0.0, 0.2])},
        "learning rate": {"learning_rate": ([5, 10], [1e-3, 5e-4])},
    }


def test_learning_rates_of_parts_and_losses_of_data_sets_share_their_axes():
    curves = read_curves(
        [
            {"step": 1, "loss": 1.0, "learning_rate": 1e-3, "vision_learning_rate": 1e-3, "text_learning_rate": 1e-4},
            {"step": 1, "eval_mnist_loss": 2.0, "eval_flickr_loss": 3.0, "eval_mnist_runtime": 1.0},
        ]
    )
    assert curves.keys() == {"loss", "learning rate"}
    assert curves["loss"].keys() == {"loss", "eval_mnist_loss", "eval_flickr_loss"}
    assert curves["learning rate"].keys() == {"vision_learning_rate", "text_learning_rate"}


def colours(path) -> set:
    return {tuple(colour) for colour in np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)}


def test_a_picture_is_drawn(tmp_path):
    save_curves(HISTORY, tmp_path / "curves.png", stages=[6])
    first, second = (31, 119, 180), (255, 127, 14)  # matplotlib's first two colours: training and evaluation loss
    assert {first, second} <= colours(tmp_path / "curves.png")
    save_curves(HISTORY[:1], tmp_path / "short.png")
    assert first in colours(tmp_path / "short.png") and second not in colours(tmp_path / "short.png")


def test_a_log_without_losses_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        save_curves(HISTORY[-1:], tmp_path / "curves.png")
