"""The vision side: which timm backbone a name means, what it emits, and the tower that runs it.

timm models answer in three layouts. `flatten_features` turns each into the one contract that connectors build on:
(images, rows * columns, width), row by row, without class or register tokens.
"""

import difflib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import load_model_config_from_hf
from torch import Tensor
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel

# What `resolve_data_config` resolves: the whole of timm's evaluation preprocessing.
PREPROCESSING_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


@dataclass
class Backbone:
    """A timm backbone, resolved from a name: what `timm.create_model` needs, and where its weights are.

    `weights` is the name under which `timm.create_model(..., pretrained=True)` finds them.
    """

    architecture: str
    pretrained_cfg: dict[str, Any]
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: str = ""


@dataclass
class FeatureShape:
    """What a backbone emits for one image: channels, layout, (rows, columns), and tokens before the grid."""

    size: int
    layout: str
    grid: tuple[int, int]
    num_prefix: int


def resolve_backbone(
    name: str | os.PathLike,
    *,
    model_args: dict[str, Any] | None = None,
    preprocessing: dict[str, Any] | None = None,
) -> Backbone:
    """Find the timm architecture, preprocessing and weights that a name stands for.

    Args:
        name: a timm name with or without tag, a Hub id, or a local folder that holds timm's `config.json`.
        model_args: keywords for `timm.create_model`, besides those that the checkpoint itself asks for.
        preprocessing: overrides of timm's data configuration (`PREPROCESSING_KEYS`).

    Raises:
        ValueError: if timm knows no such architecture (the closest names are listed), or for an unknown
            preprocessing key.
    """
    name = os.fspath(name)
    unknown = set(preprocessing or {}) - set(PREPROCESSING_KEYS)
    if unknown:
        raise ValueError(f"Unknown preprocessing {sorted(unknown)}; known: {', '.join(PREPROCESSING_KEYS)}.")

    registry_name = name.removeprefix("timm/")
    if Path(name).is_dir():
        cfg, architecture, saved_args = _read_timm_folder(Path(name))
        weights = f"local-dir:{name}"
    elif timm.is_model(registry_name.split(".")[0]):
        architecture = registry_name.split(".")[0]
        cfg, saved_args, weights = _registered_cfg(registry_name), {}, registry_name
    elif "/" in name:
        cfg, architecture, saved_args = load_model_config_from_hf(name.removeprefix("hf-hub:"))
        weights = name if name.startswith("hf-hub:") else f"hf-hub:{name}"
    else:
        raise ValueError(_unknown_name(name))
    if not timm.is_model(architecture):
        raise ValueError(_unknown_name(architecture))

    data_config = resolve_data_config(preprocessing, pretrained_cfg=cfg)
    model_args = {**(saved_args or {}), **(model_args or {})}
    channels, *image_size = data_config["input_size"]
    if channels != 3:
        model_args.setdefault("in_chans", channels)
    if cfg.get("fixed_input_size") and tuple(image_size) != tuple(cfg["input_size"][1:]):
        model_args.setdefault("img_size", list(image_size))
    for statistic in ("mean", "std"):
        if len(data_config[statistic]) != channels:
            data_config[statistic] = (sum(data_config[statistic]) / len(data_config[statistic]),) * channels

    # As in JSON (lists), so that a configuration equals its reloaded self.
    pretrained_cfg = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in data_config.items()
        if key in PREPROCESSING_KEYS
    }
    return Backbone(architecture, pretrained_cfg, model_args, weights)


def _registered_cfg(name: str) -> dict[str, Any]:
    architecture, _, tag = name.partition(".")
    known_tags = {full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")}
    if tag and tag not in known_tags:
        raise ValueError(
            f"timm has no weights {tag!r} for {architecture!r}; it has "
            f"{', '.join(sorted(known_tags)) or 'none: use the bare name with pretrained=False'}."
        )
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    return cfg.to_dict() if cfg is not None else {}


def _read_timm_folder(folder: Path) -> tuple[dict[str, Any], str, dict[str, Any]]:
    from timm.models import load_model_config_from_path

    try:
        return load_model_config_from_path(folder)
    except (FileNotFoundError, KeyError) as error:
        raise ValueError(
            f"{folder} is no timm checkpoint: it needs a config.json with `architecture`, as "
            "`timm.models.save_for_hf(model, folder)` writes it."
        ) from error


def _unknown_name(name: str) -> str:
    bare = name.removeprefix("timm/").split(".")[0]
    close = difflib.get_close_matches(bare, timm.list_models(), n=5, cutoff=0.5)
    hint = f" Close: {', '.join(close)}." if close else " `timm.list_models()` lists them."
    return f"timm {timm.__version__} knows no model {name!r}.{hint}"


def probe_features(architecture: str, model_args: dict[str, Any] | None, input_size: list[int]) -> FeatureShape:
    """Run a backbone on the meta device and report the shape of its features; no weights are made.

    Args:
        architecture: timm name without tag.
        model_args: keywords for `timm.create_model`.
        input_size: (channels, height, width) in pixels.

    Raises:
        ValueError: if the backbone does not take this input, or answers with anything but one feature map.
    """
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(architecture, pretrained=False, num_classes=0, **(model_args or {})).eval()
        try:
            features = model.forward_features(torch.empty(1, *input_size))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(f"{architecture} does not run on {tuple(input_size)} images: {error}") from error
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        kind = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"{architecture} answers with {kind}, not with one feature map: it cannot be a vision tower.")

    size = model.num_features
    if features.ndim == 3:
        num_prefix = getattr(model, "num_prefix_tokens", 0)
        return FeatureShape(size, "NLC", _token_grid(model, features.shape[1] - num_prefix), num_prefix)
    if getattr(model, "output_fmt", "NCHW") == "NHWC" or features.shape[1] != size:
        return FeatureShape(size, "NHWC", tuple(features.shape[1:3]), 0)
    return FeatureShape(size, "NCHW", tuple(features.shape[2:]), 0)


def _token_grid(model: torch.nn.Module, num_tokens: int) -> tuple[int, int]:
    """Rows and columns of a token sequence: the patch grid where it fits, else the squarest pair."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is not None and math.prod(grid) == num_tokens:
        return tuple(grid)
    rows = next(rows for rows in range(math.isqrt(num_tokens), 0, -1) if num_tokens % rows == 0)
    return rows, num_tokens // rows


def flatten_features(features: Tensor, layout: str, num_prefix_tokens: int) -> Tensor:
    """Any timm layout to (images, rows * columns, width).

    Args:
        features: (images, width, rows, columns) for "NCHW", (images, rows, columns, width) for "NHWC",
            (images, prefix + rows * columns, width) for "NLC".
    """
    if layout == "NCHW":
        return features.flatten(2).transpose(1, 2)
    if layout == "NHWC":
        return features.flatten(1, 2)
    return features[:, num_prefix_tokens:]


class VisionTower(TimmWrapperModel):
    """The library's timm wrapper, with timm's own initialisation kept.

    The wrapper's `post_init` redraws every weight from N(0, 0.02), which convolutional networks do not learn from.
    Weights that timm has just initialised are marked so that the library leaves them; under `from_pretrained` the
    model is on the meta device, nothing is marked, and missing weights are still initialised.
    """

    _no_split_modules = ["VisionTower"]

    def post_init(self):
        for tensor in (*self.parameters(), *self.buffers()):
            if not tensor.is_meta:
                tensor._is_hf_initialized = True
        super().post_init()
