"""Augmentation is timm's, keeps to the size asked for, and says which settings there are."""

import pytest
import torch
from conftest import picture
from timm.data.transforms_factory import transforms_imagenet_train

from imageprompt.data.augmenting import augmentation


def test_it_varies_and_has_the_size_asked_for():
    augment = augmentation((40, 30))
    first, second = augment(picture(0)), augment(picture(0))
    assert first.size == second.size == (30, 40)
    assert first.tobytes() != second.tobytes()


def test_it_is_timms(monkeypatch):
    settings = {
        "scale": [0.3, 0.9],
        "hflip": 0.0,
        "vflip": 1.0,
        "auto_augment": "rand-m7-n2",
        "train_crop_mode": "rkrc",
    }
    crop, change, _ = transforms_imagenet_train((32, 32), separate=True, interpolation="bilinear", **settings)
    torch.manual_seed(0)
    import random

    import numpy

    def seeded(transform):
        random.seed(3), numpy.random.seed(3), torch.manual_seed(3)
        return transform(picture(0).convert("RGB")).tobytes()

    assert seeded(augmentation((32, 32), settings)) == seeded(lambda image: change(crop(image)))


def test_colours_and_directions_stay_where_asked():
    still = augmentation((32, 32), {"scale": [1, 1], "ratio": [1, 1], "hflip": 0})
    image = picture(0).convert("RGB").resize((32, 32))
    assert still(image).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": 1}, "No such augmentation: flip. There are .*hflip"),
        ({"re_prob": 0.5}, "No such augmentation: re_prob"),
        ({"scale": 0.5}, "timm makes no augmentation of"),
        ({"train_crop_mode": "x"}, "timm makes no augmentation of"),
    ],
)
def test_what_timm_does_not_have_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        augmentation((32, 32), settings)
