"""Features of images that a frozen vision tower computes once, in a folder, for all epochs and all runs.

The folder holds three files. `about.json` says what features depend on: the tower's weights and settings, the
preprocessing, the dtype and the libraries' versions. `features.bin` has the features, one image after the other,
memory-mapped when they are read. `images.txt` names the images in the same order, each by the SHA-256 of its file: an
image that several rows show is there once, and one that has changed is another. A name is written when its features
are, so that a run that was stopped goes on where it was.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from ..decoding import evaluating
from ..folders import write_whole
from ..image_processing import ImageFeatures, ImagePromptImageProcessor
from ..modeling import ImagePromptForConditionalGeneration
from ..processing import ImagePromptProcessor
from ..provenance import differences, provenance
from .rows import Mixture, Rows, parts_of

# What decodes, resizes and computes.
_LIBRARIES = ("imageprompt", "pillow", "timm", "torch", "torchvision")


def cache_features(
    folder: Path,
    model: ImagePromptForConditionalGeneration,
    processor: ImagePromptProcessor,
    rows: Rows | Mixture,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 32,
    num_workers: int = 0,
) -> None:
    """Let rows give features in the place of images, of which those that the folder lacks are computed now.

    Several processes may do so at once, with one folder or with one on each machine.

    Args:
        folder: new, or of an earlier call.
        dtype: in which features are computed (under autocast, for less than fp32) and kept.
        batch_size, num_workers: of the images that are encoded.

    Raises:
        ValueError: as [`check_cacheable`]; if the processor makes images of another size; if the folder's features are
            of another tower, preprocessing or version, which are named; or if there is no room for those to come.
    """
    parts = check_cacheable(model, rows)
    folder, digests = Path(folder), [part.image_digests() for part in parts]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # those who come later find all of it there
        cache = FeatureCache(folder, model, processor, dtype)
        cache.read()
        images = {
            digest: (part, row, number)
            for part, own in zip(parts, digests, strict=True)
            for row, of_row in enumerate(own)
            for number, digest in enumerate(of_row)
            if digest not in cache
        }
        cache.compute(images, batch_size, num_workers)
    for part, own in zip(parts, digests, strict=True):
        part.use_features(_Reader(cache, own))


def check_cacheable(model: ImagePromptForConditionalGeneration, rows: Any) -> list[Rows]:
    """The rows of every source, if an image's features are the same whenever it is read.

    Raises:
        ValueError: if the tower learns, images are augmented, or rows are a stream.
    """
    if any(parameter.requires_grad for parameter in model.model.vision_tower.parameters()):
        raise ValueError("Features are kept of a vision tower only that does not learn: pass `--train_vision false`.")
    parts = parts_of(rows)
    for part in parts:
        if not isinstance(part, Rows):
            raise ValueError("Features are not kept of a stream, whose images are not known: leave out `--streaming`.")
        if part.augment is not None:
            raise ValueError(
                f"Features are kept of images that are the same in every epoch: leave out the augmentation of "
                f"{part.source.dataset}, or the feature cache."
            )
    return parts


def without_features(rows: Any) -> None:
    """Let rows give images again."""
    for part in parts_of(rows):
        part.use_features(None)


class FeatureCache:
    """The folder; see the file's purpose and [`cache_features`]."""

    def __init__(
        self,
        folder: Path,
        model: ImagePromptForConditionalGeneration,
        processor: ImagePromptProcessor,
        dtype: torch.dtype,
    ):
        self.folder, self.model, self.image_processor = folder, model, processor.image_processor
        self.dtype, config = dtype, model.config
        self.shape = (math.prod(config.feature_grid), config.feature_size)
        size, expected = self.image_processor.pretrained_cfg["input_size"], [config.num_channels, *config.image_size]
        if size != expected:
            raise ValueError(
                f"Features are kept of images of the size of the configuration, {expected}, not of the processor's "
                f"{size}: train without a feature cache, or compose the model with that `input_size`."
            )
        versions = provenance()["versions"]
        self._about = {
            "weights_sha256": _digest(model.model.vision_tower),
            "backbone": config.vision_config.architecture,
            "model_args": config.vision_config.model_args,
            "feature_layer": config.feature_layer,
            "preprocessing": processor.image_processor.pretrained_cfg,
            "features": [*self.shape, str(dtype).removeprefix("torch.")],
            "versions": {name: versions[name] for name in _LIBRARIES},
        }
        self._check_origin()
        self._places: dict[str, int] = {}
        self._mapped: Tensor | None = None

    @property
    def bytes_per_image(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __contains__(self, digest: str) -> bool:
        return digest in self._places

    def __getitem__(self, digest: str) -> ImageFeatures:
        """Those of one image, memory-mapped; a KeyError if they are not there."""
        place = self._places[digest]
        if self._mapped is None:
            size = len(self._places) * math.prod(self.shape)
            flat = torch.from_file(str(self._features), shared=False, size=size, dtype=self.dtype)
            self._mapped = flat.view(-1, *self.shape)
        return self._mapped[place : place + 1].as_subclass(ImageFeatures)

    def __getstate__(self) -> dict[str, Any]:
        """For data loading processes that are started anew: they map the file themselves."""
        return vars(self) | {"_mapped": None, "model": None}

    def read(self) -> None:
        """Find out which images are there."""
        names = self._names.read_bytes().split(b"\n")[:-1] if self._names.exists() else []
        there = self._features.stat().st_size // self.bytes_per_image if self._features.exists() else 0
        self._places = {name.decode(): place for place, name in enumerate(names[:there])}
        self._mapped = None

    def compute(self, images: dict[str, tuple[Rows, int, int]], batch_size: int, num_workers: int) -> None:
        """Encode images and keep their features; one that cannot be read is left out.

        Args:
            images: for each SHA-256, where the image is: its rows, the row and its number in it.

        Raises:
            ValueError: if the disk has no room for them.
        """
        needed, free = len(images) * self.bytes_per_image, shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"Features of {len(images):,} images take {needed / 1e9:.1f} GB ({self.bytes_per_image:,} bytes each), "
                f"but {self.folder} has room for {free / 1e9:.1f} GB: choose a folder on another disk."
            )
        if not images:
            return
        for file, size in ((self._features, self.bytes_per_image), (self._names, 65)):
            with file.open("ab") as content:
                content.truncate(len(self._places) * size)  # what was being written when a run was stopped
        loader = DataLoader(
            _Images(images, self.image_processor),
            batch_size,
            num_workers=num_workers,
            collate_fn=_readable,
            generator=torch.Generator(),  # its own, so that training draws what it would have drawn
        )
        with (
            evaluating(self.model.model.vision_tower),
            tqdm(total=len(images), desc="Encoding images once", unit="image") as bar,
            self._features.open("ab") as features,
            self._names.open("ab") as names,
        ):
            for digests, pixel_values, count in loader:
                if digests:
                    encoded = self._encode(pixel_values)
                    features.write(encoded.view(torch.uint8).numpy().tobytes())
                    features.flush()
                    names.write("".join(f"{digest}\n" for digest in digests).encode())
                    names.flush()
                bar.update(count)
        self.read()

    @torch.inference_mode()
    def _encode(self, pixel_values: Tensor) -> Tensor:
        device = self.model.device
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            features, _ = self.model.model._run_tower(pixel_values.to(device, self.model.dtype))
        return features.to("cpu", self.dtype).contiguous()

    def _check_origin(self) -> None:
        file = self.folder / "about.json"
        about = json.loads(json.dumps(self._about))
        if not file.exists():
            if strangers := sorted({path.name for path in self.folder.iterdir()} - {"lock", "about.json.draft"}):
                raise ValueError(f"{self.folder} holds something else ({', '.join(strangers[:3])}): name a new folder.")
            write_whole(file, json.dumps(about, indent=2) + "\n")
            return
        if different := differences(json.loads(file.read_text()), about):
            raise ValueError(
                f"The features in {self.folder} are not what this model would compute, with {'; '.join(different)}. "
                "Name another folder, or delete this one."
            )

    @property
    def _features(self) -> Path:
        return self.folder / "features.bin"

    @property
    def _names(self) -> Path:
        return self.folder / "images.txt"


class _Reader:
    """The features of the images of a row."""

    def __init__(self, cache: FeatureCache, digests: Sequence[Sequence[str]]):
        self.cache, self.digests = cache, digests

    def __call__(self, row: int) -> list[ImageFeatures]:
        try:
            return [self.cache[digest] for digest in self.digests[row]]
        except KeyError as error:
            raise ValueError("an image could not be read when features were computed.") from error


class _Images(TorchDataset):
    """(SHA-256, pixels) of images; no pixels of one that cannot be read."""

    def __init__(self, images: dict[str, tuple[Rows, int, int]], image_processor: ImagePromptImageProcessor):
        self.images, self.image_processor = list(images.items()), image_processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str, Tensor | None]:
        digest, (rows, row, number) = self.images[index]
        try:
            image = rows.read_image(row, number)
            return digest, self.image_processor(image, return_tensors="pt")["pixel_values"]
        except (OSError, ValueError):
            return digest, None


def _readable(batch: list[tuple[str, Tensor | None]]) -> tuple[list[str], Tensor | None, int]:
    """(names, pixels, number of all) of the images of a batch that could be read."""
    found = [(digest, pixels) for digest, pixels in batch if pixels is not None]
    if not found:
        return [], None, len(batch)
    digests, pixels = zip(*found, strict=True)
    return list(digests), torch.cat(pixels), len(batch)


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
