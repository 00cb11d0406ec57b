"""Image processing: timm's evaluation transform, exactly, in a savable image processor.

Backbones are as good as the pixels they get. Instead of imitating timm's resize and crop, this image processor runs
timm's own `create_transform`; only the settings carry the library's names. `scripts/sweep_preprocessing.py` compares
the two over all of timm's pretrained configurations.
"""

import base64
import io
import os
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from timm.data import create_transform
from torchvision.transforms import CenterCrop
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import ImageInput, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType

from .checkpoints import FORMAT_VERSION, check_format

_INTERPOLATIONS = {
    "nearest": PILImageResampling.NEAREST,
    "bilinear": PILImageResampling.BILINEAR,
    "bicubic": PILImageResampling.BICUBIC,
    "box": PILImageResampling.BOX,
    "hamming": PILImageResampling.HAMMING,
    "lanczos": PILImageResampling.LANCZOS,
}


_CROP_MODES = ("center", "center_floor", "squash", "border")
_SOURCES = (str, os.PathLike, bytes, bytearray)
_CHANNELS = (1, 2, 3, 4)  # grey, grey with alpha, RGB, RGBA


class ImageFeatures(torch.Tensor):
    """What a frozen vision tower gave for an image before, to be passed in the image's place.

    (1, rows * columns, feature_size), of `model.get_image_features(...).last_hidden_state`, as
    `features.as_subclass(ImageFeatures)`.
    """


class ImagePromptImageKwargs(TypedDict, total=False):
    """All settings of timm's transform; the library's other switches would be ignored, so they are refused.

    share_images (`bool`): process an image object that comes several times once, and add `image_index`, which of
        `pixel_values` each image is: the model then encodes it once for all the rows that show it.
    crop_pct (`float`): share of the resized image that the crop keeps; timm's `crop_pct`.
    crop_mode (`str`): `"center"` (keep the aspect, cut the rest), `"squash"` (lose the aspect) or `"border"` (pad), as
        timm's; `"center_floor"`, as transformers' image processors crop: of an odd number of pixels to be cut off, the
        one more is always the last, where timm and torchvision round to even.
    """

    size: dict[str, int] | None
    image_mean: list[float] | tuple[float, ...] | None
    image_std: list[float] | tuple[float, ...] | None
    resample: int | None
    crop_pct: float | None
    crop_mode: str | None
    share_images: bool | None
    return_tensors: str | TensorType | None


class ImagePromptImageProcessor(BaseImageProcessor):
    """Turns images into `pixel_values` as timm's evaluation transform does.

    Args:
        size (`dict[str, int]`): `height` and `width` in pixels that the vision tower takes.
        image_mean, image_std (`list[float]`): normalisation per channel; one channel means greyscale images.
        resample (`int`): PIL's resampling filter.
        crop_pct (`float`), crop_mode (`str`), share_images (`bool`): see [`ImagePromptImageKwargs`].

    Images may be PIL images of any mode, arrays or tensors of shape (height, width), (height, width, channels) or
    (channels, height, width), file names, URLs or encoded bytes. Values are integers from 0 to 255 (uint16: to 65535)
    or floats from 0 to 1 or to 255. Transparent pixels are laid on white and EXIF rotation is applied. An animation
    gives its first frame; an open PIL image, the frame to which it was sought. For [`ImageFeatures`] instead of images,
    `image_features` come instead of `pixel_values`.

    Raises:
        ValueError: for impossible settings, for images that cannot be read, with the image's index, and for images
            among features.
    """

    valid_kwargs = ImagePromptImageKwargs
    model_input_names = ["pixel_values"]

    size = {"height": 224, "width": 224}
    image_mean = [0.485, 0.456, 0.406]
    image_std = [0.229, 0.224, 0.225]
    resample = PILImageResampling.BICUBIC
    crop_pct = 0.875
    crop_mode = "center"
    share_images = False

    def __init__(self, **kwargs):
        foreign = kwargs.keys() & (ImagesKwargs.__annotations__.keys() - ImagePromptImageKwargs.__annotations__.keys())
        if foreign:
            raise ValueError(
                f"{', '.join(sorted(foreign))}: timm's transform has no such setting. It always resizes, crops and "
                f"normalises; its settings are {', '.join(ImagePromptImageKwargs.__annotations__)}."
            )
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)
        self._validate_preprocess_kwargs(**{name: getattr(self, name) for name in self._valid_kwargs_names})

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs):
        """As the library's, for settings that this version reads.

        Raises:
            ValueError: if a newer version of this package wrote them.
        """
        settings = dict(image_processor_dict)
        if settings.get("rescale_factor") == 1 / 255:  # the first versions wrote down what is always done
            del settings["rescale_factor"]
        known = {"auto_map", "image_processor_type", "processor_class", *ImagePromptImageKwargs.__annotations__}
        check_format("the image processor's settings", settings.pop("format_version", None), settings.keys() - known)
        return super().from_dict(settings, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, with the format in which they are written."""
        return super().to_dict() | {"format_version": FORMAT_VERSION}

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
            images = []
            for index, image in enumerate(image_url_or_urls):
                with _named(index):
                    images.append(self.fetch_images(image))
            return images
        return open_image(image_url_or_urls) if isinstance(image_url_or_urls, _SOURCES) else image_url_or_urls

    def _preprocess_image_like_inputs(self, images: ImageInput, *args, return_tensors=None, **kwargs) -> BatchFeature:
        flat = _flatten(images)
        if not flat:
            raise ValueError("There is no image in `images`.")
        image_index = _places(flat) if kwargs["share_images"] else range(len(flat))
        firsts = [image_index.index(place) for place in range(max(image_index) + 1)]
        if any(isinstance(image, ImageFeatures) for image in flat):
            features = {"image_features": _stacked([flat[index] for index in firsts])}
        else:
            features = {"pixel_values": self._pixels(flat, firsts, **kwargs)}
        if kwargs["share_images"]:
            features["image_index"] = torch.tensor(image_index)
        return BatchFeature(features, tensor_type=return_tensors)

    def _pixels(self, images: list[Any], chosen: list[int], **kwargs) -> torch.Tensor:
        """The chosen images as the vision tower takes them, (chosen, channels, height, width)."""
        transform, mean, std = _transform(
            height=kwargs["size"].height,
            width=kwargs["size"].width,
            mean=tuple(kwargs["image_mean"]),
            std=tuple(kwargs["image_std"]),
            interpolation=_timm_interpolation(kwargs["resample"]),
            crop_pct=kwargs["crop_pct"],
            crop_mode=kwargs["crop_mode"],
        )
        mode = "L" if len(mean) == 1 else "RGB"
        # timm's transform would end with the same steps in the same order, but with a new tensor for each of them.
        shape = (len(chosen), len(mean), kwargs["size"].height, kwargs["size"].width)
        pixel_values = torch.empty(shape, dtype=torch.float32, device="cpu")
        for place, index in enumerate(chosen):
            with _named(index):
                levels = torch.from_numpy(np.array(_cut(to_mode(images[index], mode), transform), ndmin=3))
                channels = levels if mode == "L" else levels.permute(2, 0, 1)
                pixel_values[place].copy_(channels).div_(255).sub_(mean).div_(std)
        return pixel_values

    def _validate_preprocess_kwargs(
        self, size: SizeDict, image_mean, image_std, resample, crop_pct: float, crop_mode: str, **kwargs
    ):
        if not all(isinstance(edge, int) and edge > 0 for edge in (size.height, size.width)):
            raise ValueError(f"`size` needs a positive `height` and `width`, got {dict(size)}.")
        if len(image_mean) != len(image_std) or len(image_mean) not in (1, 3):
            raise ValueError(
                f"`image_mean` and `image_std` have one value (grey) or three (RGB), got {image_mean}, {image_std}."
            )
        if min(image_std) <= 0:
            raise ValueError(f"`image_std` is positive, got {image_std}.")
        if not 0 < crop_pct < 2:  # timm has some above 1: the crop is then larger than the image
            raise ValueError(f"`crop_pct` is a share, about 1, got {crop_pct}.")
        if crop_mode not in _CROP_MODES:
            raise ValueError(f"`crop_mode` is one of {', '.join(_CROP_MODES)}; got {crop_mode!r}.")
        if crop_mode == "center_floor" and crop_pct > 1:
            raise ValueError(
                f"With `crop_mode='center_floor'` the crop is at most the image, `crop_pct` 1; got {crop_pct}."
            )
        _timm_interpolation(resample)


@contextmanager
def _named(index: int) -> Iterator[None]:
    """Say which image of many an error is about. What Pillow raises for broken files is of many classes."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"Image {index}: {error}") from error


def open_image(source: str | os.PathLike | bytes | bytearray) -> Image.Image:
    """Read a file, URL, `data:` URI, base64 text or encoded bytes, in the mode in which it is stored.

    Raises:
        ValueError: if there is no readable image, or only a part of one.
    """
    try:
        image = Image.open(_file_or_bytes(source))
        image.load()  # closes the file, and meets its end if that comes too early
        return image
    except Exception as error:
        shown = f"{len(source)} bytes" if isinstance(source, (bytes, bytearray)) else repr(f"{source!s:.100}")
        raise ValueError(
            f"no readable image in {shown} ({error}). Pass an existing file, an http(s) URL, base64 text or bytes."
        ) from error


def _file_or_bytes(source: str | os.PathLike | bytes | bytearray) -> str | io.BytesIO:
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source)
    source = os.fspath(source)
    if source.startswith(("http://", "https://")):
        request = urllib.request.Request(source, headers={"User-Agent": "imageprompt"})
        with urllib.request.urlopen(request, timeout=30) as response:
            return io.BytesIO(response.read())
    if os.path.exists(source):
        return source
    encoded = "".join((source.partition("base64,")[2] or source).split())
    try:
        return io.BytesIO(base64.b64decode(encoded, validate=True))
    except ValueError as error:
        raise FileNotFoundError("there is no such file, and it is no base64 text") from error


def to_mode(image: Any, mode: str) -> Image.Image:
    """Any image as an upright PIL image of mode "RGB" or "L"; the current frame of an animation.

    What already is such an image is returned itself, not a copy.

    Raises:
        ValueError: if the image cannot be read or has no pixels, or the array is no image.
    """
    if isinstance(image, _SOURCES):
        image = open_image(image)
    elif not isinstance(image, Image.Image):
        image = _array_to_pil(image)
    if 0 in image.size:
        raise ValueError(f"it has no pixels (width {image.width}, height {image.height}).")
    image.load()  # which meets a file's missing end, and turns a TIFF upright
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # integers or floats of 16 or 32 bits, which PIL would clip at 255
        image = _array_to_pil(_deep_pixels(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _orientation(image: Image.Image) -> int:
    """EXIF's number for how a photo was held, 1 for upright, as is a photo whose EXIF data cannot be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # of many classes
        return 1


def _deep_pixels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # Pillow reads their 16 bits into 32
        pixels = pixels.astype(np.uint16)
    transparent = image.info.get("transparency")
    return pixels if transparent is None else np.where(pixels == transparent, pixels.dtype.type(65535), pixels)


def _array_to_pil(image: Any) -> Image.Image:
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(f"a {type(image).__name__} is no image: pass PIL, an array, a tensor, a path, a URL or bytes.")
    if image.size == 0:
        raise ValueError(f"it has no pixels (shape {image.shape}).")
    if image.ndim == 3:
        first, last = image.shape[0] in _CHANNELS, image.shape[2] in _CHANNELS
        if first == last:
            raise ValueError(
                f"an array of shape {image.shape} {'may have its channels first or last' if first else 'is no image'}: "
                "pass PIL, (height, width), (height, width, channels) or (channels, height, width)."
            )
        image = np.moveaxis(image, 0, 2) if first else image
        image = image[..., 0] if image.shape[2] == 1 else image
    elif image.ndim != 2:
        raise ValueError(f"an array of shape {image.shape} is no image: pass (height, width[, channels]).")
    return Image.fromarray(np.ascontiguousarray(_to_8_bits(image)))


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    low, high = pixels.min(), pixels.max()
    limit, slack = 255.0, 0.0
    if pixels.dtype == bool:
        limit = 1
    elif pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:
        limit = 65535
    elif pixels.dtype.kind == "f":
        # Just above 1 may be white that overshoots or black out of 255: only what rounding adds is taken.
        limit = 1 if high < 2 else 255
        slack = limit / 512
    if not (-slack <= low and high <= limit + slack):
        raise ValueError(
            f"its values go from {low} to {high}: pass integers from 0 to 255 (uint16: to 65535), or floats from 0 to "
            "1 or to 255, clipped and not yet normalised."
        )
    return (pixels.astype(np.float64) * (255 / limit)).round().astype(np.uint8)


def _flatten(images: Any) -> list[Any]:
    """One flat list of images from one image, a batch array or nested lists."""
    if isinstance(images, (list, tuple)):
        return [flat for image in images for flat in _flatten(image)]
    if getattr(images, "ndim", 0) > 3:
        return [flat for image in images for flat in _flatten(image)]
    return [images]


def _stacked(images: list[Any]) -> torch.Tensor:
    if not all(isinstance(image, ImageFeatures) for image in images):
        raise ValueError("Pass images or `ImageFeatures`, not both in one batch.")
    return torch.cat([image.as_subclass(torch.Tensor) for image in images])


def _places(images: list[Any]) -> list[int]:
    """For each image, its place among those that are different objects."""
    places: dict[int, int] = {}
    return [places.setdefault(id(image), len(places)) for image in images]


def _cut(image: Image.Image, transform: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        return transform(image)
    except ValueError as error:
        raise ValueError(
            f"timm's transform cannot resize {image.width}x{image.height} pixels ({error}): cut the image to a less "
            "extreme shape."
        ) from error


class _FloorCrop(CenterCrop):
    """The middle of a PIL image that is at least as large, rounded as in transformers."""

    def forward(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))


@lru_cache(maxsize=8)
def _transform(
    height: int, width: int, mean: tuple, std: tuple, crop_mode: str, **settings
) -> tuple[Callable[[Image.Image], Image.Image], torch.Tensor, torch.Tensor]:
    """timm's resize and crop, and mean and deviation of shape (channels, 1, 1)."""
    floors, mode = crop_mode == "center_floor", crop_mode.removesuffix("_floor")
    transform = create_transform(
        input_size=(len(mean), height, width), mean=mean, is_training=False, normalize=False, crop_mode=mode, **settings
    )
    del transform.transforms[-1]  # makes a tensor on the caller's default device
    if floors:
        transform.transforms[-1] = _FloorCrop((height, width))
    statistics = torch.tensor([mean, std], dtype=torch.float32, device="cpu")
    return transform, *statistics[..., None, None]


def _timm_interpolation(resample: int) -> str:
    names = {filter_: name for name, filter_ in _INTERPOLATIONS.items()}
    if resample not in names:
        raise ValueError(f"`resample` is one of PIL's filters {sorted(map(int, names))}, got {resample!r}.")
    return names[PILImageResampling(resample)]


ImagePromptImageProcessor.register_for_auto_class("AutoImageProcessor")
