"""Vision encoders of transformers, on their twins in timm: `TWINS` lists the kinds that have one.

A checkpoint is read by transformers' own class, which knows every older layout of its weights. The weights are put
into timm's architecture under timm's names, and both are run on the same pixels, in float64: what differs is not handed
out.
"""

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import timm
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..comparing import Difference, described, verify
from ..vision import Backbone, checked_backbone, set_layer_norm_eps
from .pixels import read_preprocessing

logger = logging.get_logger(__name__)

PREFIX = "transformers:"  # of `Backbone.weights` that are converted when they are loaded


@dataclass(frozen=True)
class Twin:
    """How timm builds what a class of transformers is.

    Args:
        model_class: its name in transformers.
        architecture: timm's, of the same layers; sizes come on top.
        gated: timm's, where the configuration asks for gated feed-forward layers.
        settings: what timm needs besides, from transformers' configuration.
        last_norm: the module that `last_hidden_state` has not passed yet, where timm's features have.
        summary: whether `pooler_output` is what timm calls the summary.
        without: keywords that leave out what timm has no place for.
    """

    model_class: str
    architecture: str
    settings: Callable[[PreTrainedConfig], dict[str, Any]]
    last_norm: str | None = None
    summary: bool = True
    gated: str | None = None
    without: tuple[str, ...] = ()


def _dinov2(config: PreTrainedConfig) -> dict[str, Any]:
    hidden = int(config.hidden_size * config.mlp_ratio)
    if config.use_swiglu_ffn:  # timm counts the gates, too
        hidden = 2 * ((int(hidden * 2 / 3) + 7) // 8 * 8)
    return {
        "mlp_ratio": _ratio(hidden, config.hidden_size),
        "init_values": float(config.layerscale_value),
        "qkv_bias": config.qkv_bias,
    }


def _ratio(part: int, whole: int) -> float:
    """part / whole, so that timm, which rounds `whole * ratio` down, comes back to `part`."""
    ratio = part / whole
    return ratio if int(whole * ratio) == part else math.nextafter(ratio, math.inf)


# By `model_type`, of the vision part where there is a text part too.
TWINS = {
    "vit": Twin(
        "ViTModel",
        "vit_base_patch16_224",
        lambda config: {"qkv_bias": config.qkv_bias},
        summary=False,  # its pooler goes on from the class token
        without=("add_pooling_layer",),
    ),
    "deit": Twin(
        "DeiTModel",
        "deit_base_distilled_patch16_224",
        lambda config: {"qkv_bias": config.qkv_bias},
        summary=False,
        without=("add_pooling_layer",),
    ),
    "clip_vision_model": Twin(
        "CLIPVisionModel", "vit_base_patch16_clip_224", lambda config: {}, last_norm="post_layernorm"
    ),
    "siglip_vision_model": Twin("SiglipVisionModel", "vit_base_patch16_siglip_224", lambda config: {}),
    "dinov2": Twin("Dinov2Model", "vit_base_patch14_dinov2", _dinov2, gated="vit_giant_patch14_dinov2"),
    "dinov2_with_registers": Twin(
        "Dinov2WithRegistersModel",
        "vit_base_patch14_reg4_dinov2",
        lambda config: _dinov2(config) | {"reg_tokens": config.num_register_tokens},
        gated="vit_giant_patch14_reg4_dinov2",
    ),
}

# Models that have a vision part, and its `model_type`.
WITH_TEXT = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}

# transformers' names of activations, and timm's.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}

# transformers' names of weights, and timm's: the same for all kinds, where each has some of them.
RENAMES = [
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.attention\.in_proj_", "attn_pool.qkv."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
    (r"^(encoder\.)?layers?\.", "blocks."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.(attention|self_attn)\.([qkv])_proj\.", r".attn.\2."),
    (r"\.(attention|self_attn)\.(o|out)_proj\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^embeddings\.patch_embedding(s\.projection)?\.", "patch_embed.proj."),
    (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embedding(s|\.weight)$", "pos_embed"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(post_)?layernorm\.", "norm."),
]
UNUSED = r"(^|\.)(embeddings\.mask_token|pooler\.)"  # only in pretraining, or behind the features


@dataclass
class ConvertedBackbone:
    """A timm backbone with weights of transformers, in eval mode, and how far the two are apart.

    Args:
        differences: of their features for sample inputs, in "float64" and in "float32".
    """

    timm_model: torch.nn.Module
    differences: dict[str, Difference]


def read_transformers_config(source: str | os.PathLike, revision: str | None = None) -> dict[str, Any] | None:
    """The settings in a folder's or Hub id's config.json, if it is transformers' and not timm's; else `None`.

    Raises:
        OSError, ValueError: if there is none that can be read.
    """
    settings, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    return settings if "model_type" in settings and "architecture" not in settings else None


def is_of_transformers(source: str | os.PathLike) -> bool:
    """Whether a folder or Hub id holds a config.json of transformers; also false where none can be read."""
    try:
        return read_transformers_config(source) is not None
    except (OSError, ValueError):
        return False


def read_backbone(
    source: str | os.PathLike,
    *,
    model_args: dict[str, Any] | None = None,
    preprocessing: dict[str, Any] | None = None,
) -> Backbone:
    """What timm needs to run a vision encoder of transformers, pixels included; no weights are read.

    Args:
        source: local folder or Hub id with `config.json` and `preprocessor_config.json`.
        model_args, preprocessing: as for `resolve_backbone`.

    Raises:
        ValueError: if the encoder has no twin in timm, or its pixels cannot be made here.
    """
    settings = read_transformers_config(source)
    if settings is None:
        raise ValueError(f"{os.fspath(source)!r} has no config.json of transformers.")
    find_twin(settings["model_type"])  # before the library looks for code that it does not have
    config = vision_config(AutoConfig.from_pretrained(source))
    return read_encoder(source, config, model_args, preprocessing)


def read_encoder(
    source: str | os.PathLike,
    config: PreTrainedConfig,
    model_args: dict[str, Any] | None = None,
    preprocessing: dict[str, Any] | None = None,
    revision: str | None = None,
) -> Backbone:
    """As `read_backbone`, where the encoder's configuration is known."""
    args = twin_args(config)
    pretrained_cfg = read_preprocessing(source, revision)
    height, width = pretrained_cfg["input_size"][1:]
    if pretrained_cfg["input_size"][0] != config.num_channels:
        raise ValueError(
            f"{source}: the preprocessing gives {pretrained_cfg['input_size'][0]} channels, the encoder takes "
            f"{config.num_channels}."
        )
    if not interpolates(config) and (height, width) != (config.image_size, config.image_size):
        raise ValueError(
            f"{source}: its preprocessor_config.json makes {height}x{width} pixels, its encoder takes "
            f"{config.image_size}x{config.image_size}. Mend `size` (or `crop_size`) in preprocessor_config.json."
        )
    backbone = checked_backbone(
        architecture(config),
        pretrained_cfg,
        args | {"img_size": [height, width]},
        model_args,
        preprocessing,
        f"{PREFIX}{os.fspath(source)}",
    )
    if backbone.pretrained_cfg["input_size"][0] != config.num_channels:
        raise ValueError(f"The weights of {source} take {config.num_channels} channels: leave `input_size` as it is.")
    backbone.layer_norm_eps = config.layer_norm_eps
    return backbone


def vision_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The vision part of a configuration that has one, as CLIP's; else itself."""
    return getattr(config, "vision_config", config)


def find_twin(model_type: str) -> Twin:
    """The entry of `TWINS` for a `model_type`, or ValueError with what there is instead."""
    twin = TWINS.get(WITH_TEXT.get(model_type, model_type))
    if twin is None:
        raise ValueError(
            f"There is no twin in timm for transformers' {model_type!r}; there is one for "
            f"{', '.join([*TWINS, *WITH_TEXT])}. Choose one of these, or a timm backbone."
        )
    return twin


def architecture(config: PreTrainedConfig) -> str:
    """timm's name for an encoder of this configuration."""
    twin = find_twin(config.model_type)
    return (twin.gated if getattr(config, "use_swiglu_ffn", False) else None) or twin.architecture


def interpolates(config: PreTrainedConfig) -> bool:
    """Whether the encoder fits its positions to images of another size by itself."""
    return config.model_type.startswith("dinov2")


def twin_args(config: PreTrainedConfig) -> dict[str, Any]:
    """timm's keywords for an encoder of this configuration, but for the image's size.

    Raises:
        ValueError: for what timm does not have.
    """
    twin = find_twin(config.model_type)
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"timm has no activation {config.hidden_act!r}; it has {', '.join(ACTIVATIONS)}.")
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(config, name), int):
            raise ValueError(f"`{name}={getattr(config, name)}`: only encoders of square ones have twins.")
    args = {
        "patch_size": config.patch_size,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
    }
    if not getattr(config, "use_swiglu_ffn", False):
        args["act_layer"] = ACTIVATIONS[config.hidden_act]
    if config.num_channels != 3:
        args["in_chans"] = config.num_channels
    if hasattr(config, "intermediate_size"):
        args["mlp_ratio"] = _ratio(config.intermediate_size, config.hidden_size)
    if not getattr(config, "vision_use_head", True):
        args |= {"global_pool": "avg", "fc_norm": False}
    return args | twin.settings(config)


def load_weights(backbone: Backbone) -> ConvertedBackbone:
    """The weights of a backbone of `read_backbone`, proven equal on sample inputs.

    Raises:
        ValueError: if weights are missing, cannot be read, or do not give transformers' features.
    """
    source = backbone.weights.removeprefix(PREFIX)
    config = vision_config(AutoConfig.from_pretrained(source))
    twin = find_twin(config.model_type)
    kind = getattr(transformers, twin.model_class)
    encoder = load_pretrained(kind, source, config=config, **dict.fromkeys(twin.without, False))
    size = backbone.pretrained_cfg["input_size"][1:]
    trained_size = size if interpolates(config) else [config.image_size] * 2
    converted = convert_encoder(encoder, trained_size, backbone.model_args)
    if size != trained_size:
        converted.timm_model.set_input_size(img_size=size)  # timm's way of fitting positions
    # No cause for worry, but what was found is to be seen, and information is hidden by default.
    logger.warning(f"{source}: timm's features differ from {kind.__name__}'s by {described(converted.differences)}.")
    return converted


def load_pretrained(kind: Any, source: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """A model of transformers, of the class `kind`, in float32 and eval mode, all of whose weights were there.

    Weights in a pickle are read without running anything in it, which torch refuses if there is more than tensors.
    """
    try:
        with without_reports():  # a text part beside the vision part is no cause for one
            model, found = kind.from_pretrained(
                source, dtype=torch.float32, weights_only=True, output_loading_info=True, **kwargs
            )
    except (KeyError, OSError, RuntimeError, SafetensorError, UnpicklingError, ValueError) as error:
        raise ValueError(f"Cannot load the weights of {os.fspath(source)!r}: {error}") from error
    missing = sorted(name for name in found["missing_keys"] if not re.search(UNUSED, name))
    if missing:
        raise ValueError(
            f"{os.fspath(source)!r} lacks {len(missing)} weights of a {kind.__name__}, such as {missing[0]}."
        )
    return model.eval()


@contextmanager
def without_reports() -> Iterator[None]:
    """Only errors of transformers are shown."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def convert_encoder(
    encoder: PreTrainedModel,
    image_size: list[int],
    model_args: dict[str, Any],
    last_norm: bool = True,
) -> ConvertedBackbone:
    """Put an encoder's weights into timm's architecture, and compare the two.

    Args:
        encoder: in eval mode and fp32, of a class in `TWINS`.
        image_size: (height, width) in pixels at which it runs.
        model_args: keywords for `timm.create_model`, `twin_args` and more.
        last_norm: compare behind the last norm; otherwise `last_hidden_state`.

    Raises:
        ValueError: if they do not give the same features.
    """
    config, twin = encoder.config, find_twin(encoder.config.model_type)
    timm_model = timm.create_model(architecture(config), num_classes=0, **model_args | {"img_size": image_size}).eval()
    set_layer_norm_eps(timm_model, config.layer_norm_eps)
    weights = _timm_weights(encoder, image_size, timm_model)
    try:
        timm_model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"timm's {architecture(config)} does not hold what {twin.model_class} has: {error}") from error

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, config.num_channels, *image_size, generator=generator)

    def features(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        outputs = encoder.to(dtype)(pixel_values=pixels.to(dtype))
        expected = outputs.last_hidden_state
        if twin.last_norm is not None and last_norm:
            expected = encoder.get_submodule(twin.last_norm)(expected)
        tokens = timm_model.to(dtype).forward_features(pixels.to(dtype))
        pairs = [(tokens, expected)]
        if last_norm and twin.summary and getattr(config, "vision_use_head", True):
            pairs.append((timm_model.forward_head(tokens, pre_logits=True), outputs.pooler_output))
        return pairs

    what = f"Features of timm's {architecture(config)} with {model_args} and of {twin.model_class}"
    return ConvertedBackbone(timm_model, verify(features, what, "Leave out `model_args`, or report this encoder."))


@torch.no_grad()
def _timm_weights(encoder: PreTrainedModel, image_size: list[int], timm_model: torch.nn.Module) -> dict[str, Tensor]:
    """The encoder's weights under timm's names and in timm's shapes."""
    weights = {_timm_name(name): value for name, value in encoder.state_dict().items() if not re.search(UNUSED, name)}
    if interpolates(encoder.config):
        # What the encoder does to its positions at this size, done once.
        patches = math.prod(edge // encoder.config.patch_size for edge in image_size)
        sample = weights["pos_embed"].new_empty(1, 1 + patches, encoder.config.hidden_size)
        weights["pos_embed"] = encoder.embeddings.interpolate_pos_encoding(sample, *image_size)
    if timm_model.num_reg_tokens:  # timm gives no positions to class and registers
        weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
    for block in range(encoder.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            names = [f"blocks.{block}.attn.{part}.{kind}" for part in "qkv"]
            if names[0] in weights:
                weights[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat([weights.pop(name) for name in names])
            names = [f"blocks.{block}.mlp.{part}_proj.{kind}" for part in ("gate", "up")]
            if names[0] in weights:
                weights[f"blocks.{block}.mlp.fc1.{kind}"] = torch.cat([weights.pop(name) for name in names])
                weights[f"blocks.{block}.mlp.fc2.{kind}"] = weights.pop(f"blocks.{block}.mlp.down_proj.{kind}")
    for kind in ("weight", "bias"):
        if (joined := weights.pop(f"attn_pool.qkv.{kind}", None)) is not None:
            query, *key_and_value = joined.chunk(3)
            weights[f"attn_pool.q.{kind}"], weights[f"attn_pool.kv.{kind}"] = query, torch.cat(key_and_value)
    if isinstance(timm_model.norm, torch.nn.Identity):
        weights = {name: value for name, value in weights.items() if not name.startswith("norm.")}
    # These have a dimension for the batch in timm.
    width = encoder.config.hidden_size
    for name in weights.keys() & {"cls_token", "pos_embed"}:
        weights[name] = weights[name].reshape(1, -1, width)
    return weights


def _timm_name(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name
