"""Augmentation of training images: timm's own training transforms, from PIL image to PIL image."""

import inspect
from collections.abc import Callable
from typing import Any

from timm.data.transforms_factory import transforms_imagenet_train
from torchvision.transforms import Compose

# Crops of at least half of the picture, mirrored at random; colours stay, since texts tell of them.
DEFAULTS = {"scale": (0.5, 1.0), "hflip": 0.5, "color_jitter": None, "interpolation": "bilinear"}
# What concerns tensors, which the processor makes, or sequences of patches.
_NOT_HERE = {
    "img_size",
    "mean",
    "std",
    "normalize",
    "separate",
    "use_prefetcher",
    "naflex",
    "patch_size",
    "max_seq_len",
}


def augmentation(image_size: tuple[int, int], settings: dict[str, Any] | None = None) -> Callable[[Any], Any]:
    """Random changes of an RGB image, which becomes one of (height, width) pixels.

    Args:
        image_size: (height, width) of the model's input.
        settings: of timm's `transforms_imagenet_train`, over the defaults: `scale`, `ratio`, `train_crop_mode`,
            `hflip`, `vflip`, `color_jitter`, `grayscale_prob`, `auto_augment` (such as "rand-m7-n2"), …

    Raises:
        ValueError: if timm has no such setting, or it cannot be made of these values.
    """
    settings = settings or {}
    known = {
        name
        for name in inspect.signature(transforms_imagenet_train).parameters
        if name not in _NOT_HERE and not name.startswith(("re_", "patchify"))
    }
    if unknown := sorted(settings.keys() - known):
        raise ValueError(f"No such augmentation: {', '.join(unknown)}. There are {', '.join(sorted(known))}.")
    try:
        crop, change, _ = transforms_imagenet_train(image_size, separate=True, **DEFAULTS | settings)
    except (AssertionError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"timm makes no augmentation of {settings}: {error or type(error).__name__}") from error
    return Compose([crop, change])
