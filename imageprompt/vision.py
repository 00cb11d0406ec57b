"""The vision side: which timm backbone a name means, what it emits, and the tower that runs it.

timm models answer in many layouts. `read_features` runs any of them, for the features that `feature_layer` names, and
`flatten_features` turns each layout into the one contract that connectors build on: (images, rows * columns, width),
row by row, without class or register tokens.
"""

import difflib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch import Tensor
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel, TimmWrapperModelOutput

# What `resolve_data_config` resolves: the whole of timm's evaluation preprocessing.
PREPROCESSING_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")

# Keywords of `timm.create_model` that read files or the Hub.
_OTHER_SOURCES = ("cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")


@dataclass
class Backbone:
    """A timm backbone, resolved from a name: what `timm.create_model` needs, and where its weights are.

    `weights` is the name under which `timm.create_model(..., pretrained=True)` finds them; `notes` are timm's remarks
    on them. `layer_norm_eps` stands in every layer norm, where it is not timm's own.
    """

    architecture: str
    pretrained_cfg: dict[str, Any]
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: str = ""
    notes: tuple[str, ...] = ()
    layer_norm_eps: float | None = None


@dataclass
class FeatureShape:
    """What a backbone emits for one image: channels, layout, (rows, columns), and tokens before the grid.

    `layer` is the `feature_layer` that gives a feature map: the one asked for, unless the backbone's final features
    are none. `unused_parameters` are those that the features do not depend on, such as a pooling head's.
    """

    size: int
    layout: str
    grid: tuple[int, int]
    num_prefix: int
    layer: int | list[int] | str | None = None
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
    return checked_backbone(architecture, cfg, saved_args or {}, model_args, preprocessing, weights)


def registered_backbone(
    name: str,
    *,
    model_args: dict[str, Any] | None = None,
    preprocessing: dict[str, Any] | None = None,
) -> Backbone:
    """As `resolve_backbone`, for names in timm's registry alone: looks at neither files nor the Hub."""
    return checked_backbone(name.partition(".")[0], _registered_cfg(name), {}, model_args, preprocessing, name)


def hub_id(backbone: Backbone) -> str | None:
    """The Hub repository of a backbone's pretrained weights; `None` for weights that are in none, or in a folder."""
    source, _, name = backbone.weights.rpartition(":")
    if source:
        return name if source in ("hf-hub", "transformers") and not Path(name).is_dir() else None
    cfg = timm.get_pretrained_cfg(name)
    return cfg.hf_hub_id if cfg is not None else None


def checked_backbone(
    architecture: str,
    cfg: dict[str, Any],
    saved_args: dict[str, Any],
    model_args: dict[str, Any] | None,
    preprocessing: dict[str, Any] | None,
    weights: str,
) -> Backbone:
    """A backbone of which everything is known, with its settings checked and completed.

    Args:
        architecture: timm name without tag.
        cfg: timm's `pretrained_cfg` of the weights.
        saved_args: keywords for `timm.create_model` that the checkpoint itself asks for.
        model_args, preprocessing: see `resolve_backbone`.
        weights: where they are; see [`Backbone`].
    """
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


def refuse_other_sources(architecture: str, model_args: dict[str, Any] | None) -> None:
    """Refuse a configuration that makes timm read other files than the checkpoint's.

    Raises:
        ValueError: naming the architecture or the keywords.
    """
    if not timm.is_model(architecture):  # "hf-hub:…" and "local-dir:…" are none
        raise ValueError(f"{_unknown_name(architecture)} A checkpoint names one of timm's own.")
    sources = sorted((model_args or {}).keys() & set(_OTHER_SOURCES))
    if sources:
        raise ValueError(
            f"`model_args` holds {', '.join(sources)}: a configuration describes the backbone alone. Its weights come "
            "from the checkpoint, or from `compose(..., pretrained=True)`."
        )


def _unknown_name(name: str) -> str:
    bare = name.rpartition("/")[2].partition(".")[0]
    close = difflib.get_close_matches(bare, timm.list_models(), n=5, cutoff=0.5)
    hint = f" Close: {', '.join(close)}." if close else " `timm.list_models()` lists them."
    return f"timm {timm.__version__} knows no model {name!r}.{hint}"


def read_features(
    timm_model: torch.nn.Module, images: Tensor, feature_layer: int | list[int] | str | None = None
) -> Any:
    """Run a timm model up to the features that are asked for.

    Args:
        timm_model: any model of timm.
        images: (images, channels, height, width).
        feature_layer: `None` for the backbone's final features; the index of a block (of a stage, for models that have
            stages: an entry of timm's `feature_info`), or several, for their maps as they come (without the
            backbone's last norm), joined along the channels at the coarsest of their grids; `"pooled"` for the
            backbone's own summary of the image, what timm's classifier reads, such as the class token; `"tokens"` for
            the final features of a transformer as one row, class and register tokens in front.

    Returns:
        What timm gives for `None` and `"tokens"`; (images, channels, rows, columns) for blocks; (images, channels) for
        `"pooled"`.
    """
    if feature_layer in (None, "tokens"):
        return timm_model.forward_features(images)
    if feature_layer == "pooled":
        return timm_model.forward_head(timm_model.forward_features(images), pre_logits=True)
    layers = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    maps = timm_model.forward_intermediates(
        images, indices=layers, stop_early=True, output_fmt="NCHW", intermediates_only=True
    )
    grid = min(tuple(each.shape[2:]) for each in maps)
    return torch.cat([each if each.shape[2:] == grid else F.adaptive_avg_pool2d(each, grid) for each in maps], 1)


def probe_features(
    architecture: str,
    model_args: dict[str, Any] | None,
    input_size: list[int] | tuple[int, ...],
    feature_layer: int | list[int] | str | None = None,
) -> FeatureShape:
    """Run a backbone on the meta device and report the shape of its features; no weights are made.

    Some backbones end in several maps, or in class tokens alone; for them `layer` of the answer names the last
    block, whose map is used instead.

    Args:
        architecture: timm name without tag.
        model_args: keywords for `timm.create_model`.
        input_size: (channels, height, width) in pixels.
        feature_layer: see `read_features`.

    Raises:
        ValueError: if the backbone does not take this input, or has no feature map.
    """
    if any("patch_drop" in name and value for name, value in (model_args or {}).items()):
        raise ValueError(
            f"{model_args}: dropping patches changes the grid in training, so images would not fill their "
            "placeholders. Leave it out."
        )
    try:
        # Gradients tell which parameters the features depend on, whatever mode the caller is in.
        with torch.device("meta"), torch.inference_mode(False), torch.enable_grad():
            images = torch.empty(1, *input_size)
            model = timm.create_model(architecture, pretrained=False, num_classes=0, **(model_args or {})).eval()
            _check_layers(model, feature_layer)
            shape = _feature_shape(model, images, feature_layer)
            if shape is None and feature_layer is None:
                shape = _feature_shape(model, images, _last_layers(model))
    except (
        AssertionError,
        AttributeError,
        IndexError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        layer = "" if feature_layer is None else f" with feature_layer={feature_layer!r}"
        raise ValueError(
            f"{architecture} with model_args={model_args or {}} does not run on {tuple(input_size)} images{layer}: "
            f"{error or type(error).__name__}"
        ) from error
    if shape is None:
        what = {"pooled": "no summary", "tokens": "no row of tokens"}.get(str(feature_layer), "no feature map")
        raise ValueError(f"{architecture} gives {what} for {tuple(input_size)} images: it cannot be a vision tower.")
    return shape


def _check_layers(model: torch.nn.Module, feature_layer: int | list[int] | str | None) -> None:
    """timm returns maps in the network's order, each once, whatever the order of the indices."""
    if not isinstance(feature_layer, list):
        return
    count = len(model.feature_info)
    indices = [layer + count if layer < 0 else layer for layer in feature_layer]
    if not indices or sorted(set(indices)) != indices:
        raise ValueError("name at least one block, each once, in the order of the network, for example [-2, -1]")


def _feature_shape(
    model: torch.nn.Module, images: Tensor, feature_layer: int | list[int] | str | None
) -> FeatureShape | None:
    """The shape of these features, or `None` if they are not one map (`"pooled"`: one vector, `"tokens"`: one row)."""
    features = read_features(model, images, feature_layer)
    expected_ndim = {"pooled": 2, "tokens": 3}.get(feature_layer) if isinstance(feature_layer, str) else None
    if not isinstance(features, Tensor) or expected_ndim not in (None, features.ndim):
        return None
    num_prefix = 0
    if feature_layer == "pooled":
        layout, size, grid = "NC", features.shape[1], (1, 1)
    elif feature_layer == "tokens":
        layout, size, grid = "NLC", features.shape[2], (1, features.shape[1])
    elif features.ndim == 3:
        placed = _grid_of_tokens(model, images, features.shape[1])
        if placed is None:
            return None
        layout, size = "NLC", features.shape[2]
        grid, num_prefix = placed
    elif feature_layer is None and (
        getattr(model, "output_fmt", "NCHW") == "NHWC" or features.shape[1] != model.num_features
    ):
        layout, size, grid = "NHWC", features.shape[3], tuple(features.shape[1:3])
    else:
        layout, size, grid = "NCHW", features.shape[1], tuple(features.shape[2:])
    return FeatureShape(size, layout, grid, num_prefix, feature_layer, _unused_parameters(model, features))


def _grid_of_tokens(model: torch.nn.Module, images: Tensor, count: int) -> tuple[tuple[int, int], int] | None:
    """(rows, columns) of a row of tokens, and how many come before them; `None` if they are no grid."""
    try:
        maps = model.forward_intermediates(images, indices=1, output_fmt="NCHW", intermediates_only=True)
        rows, columns = maps[-1].shape[2:]
        # Not every model with a class token says so: what is more than its last map comes before the map.
        if count >= rows * columns:
            return (rows, columns), count - rows * columns
    except RuntimeError:
        pass  # gemma4_vit looks at values, which the meta device does not have
    # Models that merge neighbouring tokens at the end keep the shape of the image.
    height, width = images.shape[2:]
    rows = round(math.sqrt(count * height / width))
    columns = count // max(rows, 1)
    is_grid = rows > 1 and columns > 1 and rows * columns == count and rows * width == columns * height
    return ((rows, columns), 0) if is_grid else None


def _last_layers(model: torch.nn.Module) -> int | list[int]:
    """Every map that the last block emits: one, or one of each branch."""
    names = [info["module"] for info in model.feature_info]
    layers = [index for index, name in enumerate(names) if name == names[-1]]
    return layers if len(layers) > 1 else layers[0]


def _unused_parameters(model: torch.nn.Module, features: Tensor) -> list[str]:
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(features.sum(), list(learning.values()), allow_unused=True)
    used = {name for name, gradient in zip(learning, gradients, strict=True) if gradient is not None}
    return [name for name, _ in model.named_parameters() if name not in used]


def flatten_features(features: Tensor, layout: str, num_prefix_tokens: int) -> Tensor:
    """Any timm layout to (images, rows * columns, width).

    Args:
        features: (images, width, rows, columns) for "NCHW", (images, rows, columns, width) for "NHWC",
            (images, prefix + rows * columns, width) for "NLC", (images, width) for "NC".
    """
    if layout == "NCHW":
        return features.flatten(2).transpose(1, 2)
    if layout == "NHWC":
        return features.flatten(1, 2)
    if layout == "NC":
        return features.unsqueeze(1)
    return features[:, num_prefix_tokens:]


def set_layer_norm_eps(timm_model: torch.nn.Module, eps: float | None) -> None:
    """Put this epsilon into every layer norm; timm itself takes none as a keyword. `None` leaves them as they are."""
    for module in timm_model.modules() if eps is not None else ():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = eps


class VisionTower(TimmWrapperModel):
    """The library's timm wrapper, with timm's own initialisation kept.

    The wrapper's `post_init` redraws every weight from N(0, 0.02), which convolutional networks do not learn from.
    Weights that timm has just initialised are marked so that the library leaves them; under `from_pretrained` the
    model is on the meta device, nothing is marked, and missing weights are still initialised.
    """

    _no_split_modules = ["VisionTower"]

    def __init__(self, config):
        super().__init__(config)
        set_layer_norm_eps(self.timm_model, getattr(config, "layer_norm_eps", None))

    @property
    def device(self) -> torch.device:
        """Where the tower runs. Offloaded weights wait on the meta device, but their hook knows better."""
        where = getattr(getattr(self, "_hf_hook", None), "execution_device", None)
        return next(self.parameters()).device if where is None else torch.device(where)

    def forward(
        self, pixel_values: Tensor, feature_layer: int | list[int] | str | None = None, **kwargs
    ) -> TimmWrapperModelOutput:
        """As the library's; `last_hidden_state` holds the features that `feature_layer` names, see `read_features`."""
        if feature_layer is None:
            return super().forward(pixel_values, **kwargs)
        features = read_features(self.timm_model, pixel_values.to(self.device, self.dtype), feature_layer)
        return TimmWrapperModelOutput(last_hidden_state=features)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """As the library's, whatever the configuration says of word embeddings."""
        return dict(self._tied_weights_keys)

    def post_init(self):
        # coat has modules in two places; their weights are saved once.
        first_names: dict[int, str] = {}
        named = self.named_parameters(remove_duplicate=False)
        firsts = {name: first_names.setdefault(id(parameter), name) for name, parameter in named}
        self._tied_weights_keys = {name: first for name, first in firsts.items() if name != first}
        for tensor in (*self.parameters(), *self.buffers()):
            if not tensor.is_meta:
                setattr(tensor, "_is_hf_initialized", True)  # noqa: B010
        super().post_init()
