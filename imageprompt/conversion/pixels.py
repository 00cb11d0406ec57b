"""The preprocessing of a checkpoint of transformers, in timm's words: the same pixels, or none.

What `preprocessor_config.json` says is translated into timm's settings, and both are run on sample pictures. The
library resizes with Pillow or with torchvision, which differ; its Pillow way, as when these checkpoints were trained,
is the one that is kept.
"""

import math
import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor

from ..image_processing import ImagePromptImageProcessor

PICTURES = ((60, 120), (1400, 700))  # (height, width): to be enlarged and made smaller, wide and tall
LONGER = range(1, 5)  # pixels by which more pictures are longer than wide, so that odd numbers are cut off as well
MEND = "Mend preprocessor_config.json, or compose with a timm backbone."


def read_preprocessing(source: str | os.PathLike, revision: str | None = None) -> dict[str, Any]:
    """timm's data configuration for the image processor of a checkpoint.

    Args:
        source: local folder or Hub id.
        revision: of a Hub id.

    Returns:
        `input_size` as [channels, height, width], `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`.

    Raises:
        ValueError: if there is none, or it does what timm's evaluation transform cannot do.
    """
    try:
        theirs = AutoImageProcessor.from_pretrained(source, backend="pil", revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(source)!r} says nothing of its pixels (no preprocessor_config.json that can be read): {error}"
        ) from error
    mine = _translated(theirs, source)
    edge = int(mine.size["height"] / mine.crop_pct)  # so that these are not resized
    odd = [size for more in LONGER for size in ((edge + more, edge), (edge, edge + more))]
    for height, width in (*PICTURES, *odd):
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).convert("L" if len(mine.image_mean) == 1 else "RGB")
        expected = torch.as_tensor(np.asarray(theirs(picture, return_tensors="np")["pixel_values"]))
        got = mine(picture, return_tensors="pt")["pixel_values"]
        same_shape = expected.shape == got.shape
        difference = (got - expected).abs().max().item() if same_shape else float("inf")
        if not difference <= 1e-5:
            what = f"values that differ by {difference:.1e}" if same_shape else f"shapes {list(expected.shape)}"
            raise ValueError(
                f"{os.fspath(source)!r}: its {type(theirs).__name__} gives {what} where timm's transform, with the "
                f"same settings, gives {list(got.shape)}. {MEND}"
            )
    return mine.pretrained_cfg


def _translated(theirs: Any, source: str | os.PathLike) -> ImagePromptImageProcessor:
    def refuse(what: str) -> ValueError:
        return ValueError(f"{os.fspath(source)!r}: {what} Here images are resized and normalised. {MEND}")

    if not theirs.do_resize:
        raise refuse("its preprocessing does not resize.")
    factor = getattr(theirs, "rescale_factor", 1 / 255)
    if not getattr(theirs, "do_rescale", True) or abs(factor * 255 - 1) > 1e-6:
        raise refuse("its preprocessing does not divide the pixels by 255.")
    mean, std = (list(theirs.image_mean), list(theirs.image_std)) if theirs.do_normalize else ([0.0] * 3, [1.0] * 3)
    size = {name: value for name, value in dict(theirs.size).items() if value is not None}
    crop = dict(theirs.crop_size) if getattr(theirs, "do_center_crop", False) else None
    if size.keys() == {"height", "width"}:
        mode, resized = "squash", (size["height"], size["width"])
    elif size.keys() == {"shortest_edge"} and crop is not None:
        mode, resized = "center_floor", (size["shortest_edge"],) * 2
    else:
        raise refuse(f"its `size` {size} gives images of several sizes.")
    height, width = resized if crop is None else (crop["height"], crop["width"])
    if height * resized[1] != width * resized[0]:
        raise refuse(f"its `crop_size` {crop} has not the shape of its `size` {size}.")
    if height > resized[0]:
        raise refuse(f"its `crop_size` {crop} is larger than its `size` {size}.")
    return ImagePromptImageProcessor(
        size={"height": height, "width": width},
        image_mean=mean,
        image_std=std,
        resample=int(theirs.resample),
        crop_pct=_share(height, resized[0]),
        crop_mode=mode,
    )


def _share(part: int, whole: int) -> float:
    """part / whole, so that timm, which rounds `part / share` down, comes back to `whole`."""
    share = part / whole
    return share if int(part / share) == whole else math.nextafter(share, 0)
