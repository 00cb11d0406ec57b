"""Image processing: timm's evaluation transform, exactly, in a savable image processor.

Backbones are as good as the pixels they get. Instead of imitating timm's resize, crop and normalisation, this image
processor runs timm's own `create_transform`; only the settings carry the library's names.
"""

import base64
import io
import os
import urllib.request
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import ImageInput, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

_INTERPOLATIONS = {
    "nearest": PILImageResampling.NEAREST,
    "bilinear": PILImageResampling.BILINEAR,
    "bicubic": PILImageResampling.BICUBIC,
    "box": PILImageResampling.BOX,
    "hamming": PILImageResampling.HAMMING,
    "lanczos": PILImageResampling.LANCZOS,
}


class ImagePromptImageKwargs(ImagesKwargs, total=False):
    """
    crop_pct (`float`): share of the resized image that the crop keeps; timm's `crop_pct`.
    crop_mode (`str`): `"center"` (keep the aspect, cut the rest), `"squash"` (lose the aspect) or `"border"` (pad).
    """

    crop_pct: float | None
    crop_mode: str | None


class ImagePromptImageProcessor(BaseImageProcessor):
    """Turns images into `pixel_values` as timm's evaluation transform does.

    Args:
        size (`dict[str, int]`): `height` and `width` in pixels that the vision tower takes.
        image_mean, image_std (`list[float]`): normalisation per channel; one channel means greyscale images.
        resample (`int`): PIL's resampling filter.
        crop_pct (`float`), crop_mode (`str`): see [`ImagePromptImageKwargs`].

    Images may be PIL images of any mode, arrays or tensors of shape (height, width), (height, width, channels) or
    (channels, height, width), file names, URLs or encoded bytes. Transparent pixels are laid on white, EXIF rotation
    is applied and 16-bit values are scaled to 8 bits.
    """

    valid_kwargs = ImagePromptImageKwargs
    model_input_names = ["pixel_values"]

    size = {"height": 224, "width": 224}
    image_mean = [0.485, 0.456, 0.406]
    image_std = [0.229, 0.224, 0.225]
    resample = PILImageResampling.BICUBIC
    crop_pct = 0.875
    crop_mode = "center"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)

    @classmethod
    def from_pretrained_cfg(cls, pretrained_cfg: dict[str, Any]) -> "ImagePromptImageProcessor":
        """The image processor that a backbone asks for.

        Args:
            pretrained_cfg: timm's data configuration: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`,
                `crop_mode`; `config.vision_config.pretrained_cfg` holds it.
        """
        interpolation = pretrained_cfg["interpolation"]
        if interpolation not in _INTERPOLATIONS:
            raise ValueError(f"Unknown interpolation {interpolation!r}; known: {', '.join(_INTERPOLATIONS)}.")
        return cls(
            size={"height": pretrained_cfg["input_size"][1], "width": pretrained_cfg["input_size"][2]},
            image_mean=list(pretrained_cfg["mean"]),
            image_std=list(pretrained_cfg["std"]),
            resample=_INTERPOLATIONS[interpolation],
            crop_pct=pretrained_cfg["crop_pct"],
            crop_mode=pretrained_cfg["crop_mode"],
        )

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """These settings in timm's words, the inverse of `from_pretrained_cfg`."""
        return {
            "input_size": [len(self.image_mean), self.size["height"], self.size["width"]],
            "mean": list(self.image_mean),
            "std": list(self.image_std),
            "interpolation": _timm_interpolation(self.resample),
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
        }

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open what is not an image yet: file names, URLs and bytes, in lists of any depth."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike, bytes, bytearray)):
            return open_image(image_url_or_urls)
        return image_url_or_urls

    def _preprocess_image_like_inputs(self, images: ImageInput, *args, return_tensors=None, **kwargs) -> BatchFeature:
        transform = _transform(
            height=kwargs["size"].height,
            width=kwargs["size"].width,
            mean=tuple(kwargs["image_mean"]),
            std=tuple(kwargs["image_std"]),
            interpolation=_timm_interpolation(kwargs["resample"]),
            crop_pct=kwargs["crop_pct"],
            crop_mode=kwargs["crop_mode"],
        )
        mode = "L" if len(kwargs["image_mean"]) == 1 else "RGB"
        pixel_values = []
        for index, image in enumerate(_flatten(self.fetch_images(images))):
            try:
                pixel_values.append(transform(to_mode(image, mode)))
            except (OSError, ValueError, TypeError, SyntaxError) as error:
                raise ValueError(f"Image {index} cannot be read: {error}") from error
        return BatchFeature({"pixel_values": torch.stack(pixel_values)}, tensor_type=return_tensors)

    def _validate_preprocess_kwargs(self, size: SizeDict | None = None, crop_pct=None, crop_mode=None, **kwargs):
        if size is None or not (size.height and size.width):
            raise ValueError(f"`size` needs `height` and `width`, got {size}.")
        if not crop_pct or not 0 < crop_pct <= 1:
            raise ValueError(f"`crop_pct` lies in (0, 1], got {crop_pct}.")
        if crop_mode not in ("center", "squash", "border"):
            raise ValueError(f"`crop_mode` is 'center', 'squash' or 'border', got {crop_mode!r}.")


def open_image(source: str | os.PathLike | bytes) -> Image.Image:
    """Open a file, URL, `data:` URI, base64 text or encoded bytes, in the mode in which it is stored.

    Raises:
        ValueError: if there is no readable image.
    """
    try:
        if isinstance(source, (str, os.PathLike)):
            source = os.fspath(source)
            if source.startswith(("http://", "https://")):
                request = urllib.request.Request(source, headers={"User-Agent": "imageprompt"})
                with urllib.request.urlopen(request, timeout=30) as response:
                    source = response.read()
            elif os.path.exists(source):
                return Image.open(source)
            else:
                source = base64.b64decode(source.partition("base64,")[2] or source, validate=True)
        return Image.open(io.BytesIO(source))
    except (OSError, ValueError) as error:
        shown = f"{len(source)} bytes" if isinstance(source, (bytes, bytearray)) else f"{source:.100}"
        raise ValueError(
            f"No readable image in {shown}: {error}. Pass an existing file, an http(s) URL, base64 text or bytes."
        ) from error


def to_mode(image: Any, mode: str) -> Image.Image:
    """Any image as an upright PIL image of mode "RGB" or "L"; the first frame of an animation.

    Raises:
        ValueError: if the image has no pixels, or the array is no image.
    """
    if not isinstance(image, Image.Image):
        image = _array_to_pil(image)
    if 0 in image.size:
        raise ValueError(f"it has no pixels (width {image.width}, height {image.height}).")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # PIL clips these to 255 when it converts them; the full range belongs in 8 bits.
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _array_to_pil(image: Any) -> Image.Image:
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3):
        shape = getattr(image, "shape", "")
        raise ValueError(
            f"a {type(image).__name__} {shape} is no image: pass PIL, (height, width[, channels]) or a path."
        )
    if 0 in image.shape:
        raise ValueError(f"it has no pixels (shape {image.shape}).")
    if image.dtype == np.uint16:
        image = (image / 257).round().astype(np.uint8)
    if image.ndim == 2:
        image = image[..., None]
    return to_pil_image(image)


def _flatten(images: Any) -> list[Any]:
    """One flat list of images from one image, a batch array or nested lists."""
    if isinstance(images, (list, tuple)):
        return [flat for image in images for flat in _flatten(image)]
    if getattr(images, "ndim", 0) > 3:
        return [flat for image in images for flat in _flatten(image)]
    return [images]


@lru_cache(maxsize=8)
def _transform(height: int, width: int, mean: tuple, std: tuple, **settings):
    return create_transform(input_size=(len(mean), height, width), mean=mean, std=std, is_training=False, **settings)


def _timm_interpolation(resample: int) -> str:
    names = {filter_: name for name, filter_ in _INTERPOLATIONS.items()}
    if resample not in names:
        raise ValueError(f"`resample` is one of PIL's filters {sorted(map(int, names))}, got {resample!r}.")
    return names[PILImageResampling(resample)]


ImagePromptImageProcessor.register_for_auto_class("AutoImageProcessor")
