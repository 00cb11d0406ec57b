"""The vision side: which timm backbone a name means, what it emits, and the tower that runs it.

timm models answer in three layouts. `flatten_features` turns each into the one contract that connectors build on:
(images, rows * columns, width), row by row, without class or register tokens.
"""

import difflib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel

# What `resolve_data_config` resolves: the whole of timm's evaluation preprocessing.
PREPROCESSING_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


@dataclass
class Backbone:
    """A timm backbone, resolved from a name: what `timm.create_model` needs, and where its weights are.

    `weights` is the name under which `timm.create_model(..., pretrained=True)` finds them; `notes` are timm's remarks
    on them.
    """

    architecture: str
    pretrained_cfg: dict[str, Any]
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: str = ""
    notes: tuple[str, ...] = ()


@dataclass
class FeatureShape:
    """What a backbone emits for one image: channels, layout, (rows, columns), and tokens before the grid.

    `unused_parameters` are those that the features do not depend on, such as a pooling head's.
    """

    size: int
    layout: str
    grid: tuple[int, int]
    num_prefix: int
    unused_parameters: list[str] = field(default_factory=list)


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

    hub_id = name.removeprefix("hf-hub:")
    registry_name = hub_id.removeprefix("timm/")
    if Path(name).is_dir():
        cfg, architecture, saved_args = _read_timm_folder(Path(name))
        weights = f"local-dir:{name}"
    elif timm.is_model(registry_name.split(".")[0]):
        return registered_backbone(registry_name, model_args=model_args, preprocessing=preprocessing)
    elif "/" in name:
        cfg, architecture, saved_args = _read_timm_hub(hub_id)
        weights = f"hf-hub:{hub_id}"
    else:
        raise ValueError(_unknown_name(name))
    return _backbone(architecture, cfg, saved_args or {}, model_args, preprocessing, weights)


def registered_backbone(
    name: str,
    *,
    model_args: dict[str, Any] | None = None,
    preprocessing: dict[str, Any] | None = None,
) -> Backbone:
    """As `resolve_backbone`, for names in timm's registry alone: looks at neither files nor the Hub."""
    return _backbone(name.partition(".")[0], _registered_cfg(name), {}, model_args, preprocessing, name)


def _backbone(
    architecture: str,
    cfg: dict[str, Any],
    saved_args: dict[str, Any],
    model_args: dict[str, Any] | None,
    preprocessing: dict[str, Any] | None,
    weights: str,
) -> Backbone:
    if not timm.is_model(architecture):
        raise ValueError(_unknown_name(architecture))
    try:
        data_config = resolve_data_config(preprocessing, pretrained_cfg=cfg)
    except (AssertionError, TypeError) as error:
        raise ValueError(
            f"Impossible preprocessing {preprocessing}: `input_size` is (channels, height, width), and `mean` and "
            "`std` have one value per channel."
        ) from error
    channels, *image_size = data_config["input_size"]
    # Checkpoints may state their head, which is not built here, and the input that they were saved with.
    asked_for = {"in_chans": channels, "img_size": image_size}
    saved_args = {key: asked_for.get(key, value) for key, value in saved_args.items() if key != "num_classes"}
    model_args = saved_args | (model_args or {})
    if channels != 3:
        model_args.setdefault("in_chans", channels)
    if cfg.get("fixed_input_size") and tuple(image_size) != tuple(cfg["input_size"][1:]):
        model_args.setdefault("img_size", list(image_size))
    for statistic in ("mean", "std"):
        if len(data_config[statistic]) != channels:
            data_config[statistic] = (sum(data_config[statistic]) / len(data_config[statistic]),) * channels

    pretrained_cfg = {key: data_config[key] for key in PREPROCESSING_KEYS}
    notes = tuple(cfg.get("notes") or ())
    return Backbone(architecture, _as_json(pretrained_cfg), _as_json(model_args), weights, notes)


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as JSON gives them back (lists for tuples), so that a configuration equals its reloaded self."""
    try:
        return json.loads(json.dumps(settings))
    except TypeError as error:
        raise ValueError(f"{settings} cannot be saved: {error}. Pass numbers, texts, lists and dicts.") from error


def _registered_cfg(name: str) -> dict[str, Any]:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(_unknown_name(name))
    known_tags = {full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")}
    if tag and tag not in known_tags:
        raise ValueError(
            f"timm has no weights {tag!r} for {architecture!r}; it has "
            f"{', '.join(sorted(known_tags)) or 'none: use the bare name with pretrained=False'}."
        )
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    return cfg.to_dict() if cfg is not None else {}


def _read_timm_folder(folder: Path) -> tuple[dict[str, Any], str, dict[str, Any]]:
    # No public way to read a folder's configuration; only imported where one is read.
    from timm.models._hub import load_model_config_from_path

    try:
        return load_model_config_from_path(folder)
    except (FileNotFoundError, KeyError) as error:
        raise ValueError(
            f"{folder} is no timm checkpoint: it needs a config.json with `architecture`, as "
            "`timm.models.save_for_hf(model, folder)` writes it."
        ) from error


def _read_timm_hub(hub_id: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    from timm.models import load_model_config_from_hf

    try:
        return load_model_config_from_hf(hub_id)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{_unknown_name(hub_id)} And the Hub gives no timm config.json for it ({type(error).__name__}: {error})."
        ) from error


def _unknown_name(name: str) -> str:
    bare = name.rpartition("/")[2].partition(".")[0]
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
    maps = []
    try:
        # Gradients tell which parameters the features depend on, whatever mode the caller is in.
        with torch.device("meta"), torch.inference_mode(False), torch.enable_grad():
            images = torch.empty(1, *input_size)
            model = timm.create_model(architecture, pretrained=False, num_classes=0, **(model_args or {})).eval()
            features = model.forward_features(images)
            if isinstance(features, Tensor) and features.ndim == 3:
                maps = model.forward_intermediates(images, indices=1, output_fmt="NCHW", intermediates_only=True)
            unused = _unused_parameters(model, features)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{architecture} with model_args={model_args or {}} does not run on {tuple(input_size)} images: {error}"
        ) from error
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        kind = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"{architecture} answers with {kind}, not with one feature map: it cannot be a vision tower.")

    size = model.num_features
    if maps:
        # Not every model with a class token says so: what is more than its last map comes before the map.
        rows, columns = maps[-1].shape[2:]
        num_prefix = features.shape[1] - rows * columns
        if num_prefix < 0:
            raise ValueError(
                f"{architecture} keeps only {features.shape[1]} of the tokens of its {rows}x{columns} feature map: "
                "it cannot be a vision tower."
            )
        return FeatureShape(size, "NLC", (rows, columns), num_prefix, unused)
    if getattr(model, "output_fmt", "NCHW") == "NHWC" or features.shape[1] != size:
        return FeatureShape(size, "NHWC", tuple(features.shape[1:3]), 0, unused)
    return FeatureShape(size, "NCHW", tuple(features.shape[2:]), 0, unused)


def _unused_parameters(model: torch.nn.Module, features: Any) -> list[str]:
    if not isinstance(features, Tensor):
        return []
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]


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

    @property
    def device(self) -> torch.device:
        """Where the tower runs. Offloaded weights wait on the meta device, but their hook knows better."""
        where = getattr(getattr(self, "_hf_hook", None), "execution_device", None)
        return next(self.parameters()).device if where is None else torch.device(where)

    def post_init(self):
        for tensor in (*self.parameters(), *self.buffers()):
            if not tensor.is_meta:
                setattr(tensor, "_is_hf_initialized", True)  # noqa: B010
        super().post_init()
