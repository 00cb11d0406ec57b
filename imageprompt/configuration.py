"""Configuration of imageprompt models.

`ImagePromptConfig` joins a timm backbone (`vision_config`, the library's own `timm_wrapper`) and a causal language
model (`text_config`, GPT-2 by default). It is the one owner of every number that the model, the processor and the
connector share: the feature map that the backbone emits, the tokens per image and the placeholder's id. What is not
given is measured once, by running the backbone on the meta device (no weights, no download).
"""

import copy
import difflib
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging

from .checkpoints import FORMAT_VERSION, check_format
from .connectors import build_connector, connector_class, resolve_num_image_tokens
from .vision import (
    PREPROCESSING_KEYS,
    Backbone,
    probe_features,
    refuse_other_sources,
    registered_backbone,
    resolve_backbone,
)

logger = logging.get_logger(__name__)

PARTS = ("vision", "connector", "text")
FUSIONS = ("prefix", "cross_attention")

# Labels with this value are not supervised: torch's cross-entropy ignores it.
IGNORE_INDEX = -100
# Tokenizers may add these; GPT-2 would add them up as if they were words.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")

REQUIREMENTS = "requirements.txt"
# A file without this line is somebody's own, and stays as it is.
_REQUIREMENTS_TITLE = "# What loading this model takes where imageprompt is not installed; every save writes this file."
# What a checkpoint needs where imageprompt is not installed, and what besides if it is quantised.
_REQUIRED = ("torch", "torchvision", "transformers>=5.23,<6", "timm>=1.0.30", "safetensors", "pillow")
_REQUIRED_BY_QUANTIZER = {"bitsandbytes": ("accelerate", "bitsandbytes>=0.50"), "torchao": ("torchao>=0.18",)}

# Keywords that the library itself writes into config.json or passes on, besides the declared fields.
_LIBRARY_KEYWORDS = {
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "torch_dtype",
}


def _mirror(name: str) -> property:
    """A property that reads and writes `text_config.<name>`, for tools that look at the top level only."""

    def read(self):
        return getattr(self.text_config, name)

    def write(self, value):
        setattr(self.text_config, name, value)

    return property(read, write, doc=f"`text_config.{name}`.")


@strict
class ImagePromptConfig(PreTrainedConfig):
    r"""
    Configuration of [`ImagePromptModel`] and [`ImagePromptForConditionalGeneration`].

    Args:
        vision_config (`TimmWrapperConfig` or `dict`):
            `architecture` and `model_args` for `timm.create_model`, and `pretrained_cfg` with the preprocessing
            (`input_size` as channels, height, width; `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`);
            `layer_norm_eps`, where the layer norms' is not timm's.
        text_config (`PreTrainedConfig` or `dict`): the language model's configuration, GPT-2 by default.
        connector (`str`): name in `imageprompt.connectors.CONNECTORS`.
        connector_args (`dict`, *optional*): what the connector takes besides, such as `depth`; see its class.
        fusion (`str`):
            `"prefix"`: image tokens are part of the language model's input sequence. `"cross_attention"`: one
            placeholder per image is, and GPT-2's own cross-attention reads the image tokens beside it.
        num_image_tokens (`int`, *optional*): tokens per image; by default what the connector makes of the grid.
        image_token_id (`int`, *optional*):
            Id of the placeholder token. By default one row is added to the vocabulary for it.
        trainable (`dict[str, bool]`):
            Which of `"vision"`, `"connector"` and `"text"` learn. Cross-attention layers belong to the connector.
        dynamic_image_size (`bool`):
            Take images of any size that the backbone takes (those of one call alike); they become as many tokens.
        feature_layer (`int`, `list[int]`, `"pooled"` or `"tokens"`, *optional*):
            Which features to read: of a block, of several blocks joined along the channels, the backbone's own summary
            of the image, or all of a transformer's final tokens, as a grid of one row. By default the final feature
            map, or what the connector is made for.
        feature_size (`int`, *optional*): channels of the backbone's features; probed.
        feature_grid (`list[int]`, *optional*): rows and columns of the backbone's feature map; probed.
        feature_layout (`str`, *optional*): `"NCHW"`, `"NHWC"`, `"NLC"` or `"NC"` (a summary); probed.
        num_prefix_tokens (`int`, *optional*): class and register tokens before an NLC grid; probed.
        unused_parameters (`list[str]`, *optional*):
            The backbone's parameters behind its features, such as pooling heads, which can never learn; probed.
        base_models (`dict[str, str]`, *optional*):
            Hub ids of the models whose weights the `"vision"` and `"text"` parts began with, as far as they are known.
        tie_word_embeddings (`bool`, *optional*): share input embeddings and head; taken from `text_config`.
        conv1d_as_linear (`bool`):
            Hold GPT-2's `Conv1D` layers as `nn.Linear`, with the weights the other way round; set by quantised loading.
        format_version (`int`): what a checkpoint was written in; always the present one once it is read.

    Raises:
        ValueError: for unknown keywords, unknown timm names, impossible token counts or budgets.
        StrictDataclassError: for values of a wrong type.
    """

    model_type = "imageprompt"
    keys_to_ignore_at_inference = ["past_key_values", "image_hidden_states"]
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            AutoConfig, model_type="timm_wrapper", init_kwargs={"architecture": "vit_small_patch16_224"}
        ),
        "text_config": SubConfigSpec(AutoConfig, model_type="gpt2"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    connector: str = "mlp"
    connector_args: dict[str, Any] | None = None
    fusion: str = "prefix"
    num_image_tokens: int | None = None
    image_token_id: int | None = None
    trainable: dict[str, bool] | None = None
    dynamic_image_size: bool = False
    feature_layer: int | list[int] | tuple[int, ...] | Literal["pooled", "tokens"] | None = None
    feature_size: int | None = None
    feature_grid: list[int] | tuple[int, ...] | None = None
    feature_layout: Literal["NCHW", "NHWC", "NLC", "NC"] | None = None
    num_prefix_tokens: int | None = None
    unused_parameters: list[str] | None = None
    base_models: dict[str, str] | None = None
    tie_word_embeddings: bool | None = None
    conv1d_as_linear: bool = False
    format_version: int = FORMAT_VERSION

    hidden_size = _mirror("hidden_size")
    num_hidden_layers = _mirror("num_hidden_layers")
    num_attention_heads = _mirror("num_attention_heads")
    vocab_size = _mirror("vocab_size")
    max_position_embeddings = _mirror("max_position_embeddings")
    use_cache = _mirror("use_cache")

    def __post_init__(self, **kwargs):
        check_format("The configuration", self.format_version)
        self.format_version = FORMAT_VERSION
        self._refuse_unknown(kwargs)
        # The caller's stay as they are; the library writes into sub-configurations.
        self.vision_config, self.text_config = copy.deepcopy(self.vision_config), copy.deepcopy(self.text_config)
        super().__post_init__(**kwargs)
        # Every class that one checkpoint serves; saving rewrites the entries to the copied files.
        self.auto_map = {
            "AutoConfig": "configuration.ImagePromptConfig",
            "AutoModel": "modeling.ImagePromptModel",
            "AutoModelForImageTextToText": "modeling.ImagePromptForConditionalGeneration",
            "AutoModelForMultimodalLM": "modeling.ImagePromptForConditionalGeneration",
        }
        self._complete_vision()
        if self.image_token_id is None:
            # A row of its own: no word of the language model may double as the placeholder.
            self.image_token_id = self.text_config.vocab_size
            self.text_config.vocab_size += 1
        if hasattr(self.text_config, "add_cross_attention"):
            self.text_config.add_cross_attention = self.fusion == "cross_attention"
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self.trainable = dict.fromkeys(PARTS, True) | (self.trainable or {})
        self.num_image_tokens = resolve_num_image_tokens(self.connector, self.feature_grid, self.num_image_tokens)
        self.validate_parts()  # `@strict` would wrap the ValueError in an error class of its own

    @classmethod
    def from_backbones(
        cls,
        timm_name: str,
        text_config: PreTrainedConfig | None = None,
        *,
        model_args: dict[str, Any] | None = None,
        preprocessing: dict[str, Any] | None = None,
        **config_fields,
    ) -> "ImagePromptConfig":
        """Configure any timm backbone with a language model, loading no weights.

        Args:
            timm_name: a timm name (`"resnet18"`, `"resnet18.a1_in1k"`), a Hub id (`"timm/resnet18.a1_in1k"`) or a
                local folder in timm's Hub layout.
            text_config: the language model's configuration; GPT-2's own by default.
            model_args: further keywords for `timm.create_model`, for example `{"depth": 4}`.
            preprocessing: overrides of timm's data configuration: `input_size` as (channels, height, width), `mean`,
                `std`, `interpolation`, `crop_pct`, `crop_mode`.
            config_fields: any field of [`ImagePromptConfig`].

        Raises:
            ValueError: for an unknown timm name, with the closest ones.
        """
        backbone = resolve_backbone(timm_name, model_args=model_args, preprocessing=preprocessing)
        return cls(vision_config=vision_config_of(backbone), text_config=text_config, **config_fields)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As the library's; keys that this version does not know do nothing, and a warning names them.

        Other tools write such keys, and a checkpoint must still load. They are kept, except those that would pass for
        something of ours, or for generation settings, which a configuration may not save.

        Raises:
            ValueError: if this is the configuration of another kind of model, or of a newer version of this package.
        """
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"This is a {config_dict['model_type']!r} checkpoint, not one of imageprompt; `compose` makes it one."
            )
        foreign = {key: value for key, value in config_dict.items() if not cls._knows(key)}
        check_format("config.json", config_dict.get("format_version"), foreign.keys())
        loaded = super().from_dict({key: config_dict[key] for key in config_dict.keys() - foreign.keys()}, **kwargs)
        for key, value in foreign.items():
            if not hasattr(cls, key) and (key.endswith("_token_id") or key not in GenerationConfig().to_dict()):
                setattr(loaded[0] if isinstance(loaded, tuple) else loaded, key, value)
        return loaded

    @property
    def image_seq_length(self) -> int | None:
        """Placeholders, and so positions of the language model, that an image takes."""
        return self.num_image_tokens if self.fusion == "prefix" else 1

    def check_positions(self, length: int, new_tokens: int = 0) -> None:
        """Refuse more tokens in a row than the language model has positions for.

        Raises:
            ValueError: with both numbers.
        """
        positions = getattr(self, "max_position_embeddings", None)
        if positions is not None and length + new_tokens > positions:
            new = f" and {new_tokens} new ones" if new_tokens else ""
            raise ValueError(
                f"{length} tokens in a row (images take {self.image_seq_length} each){new} need more than the language "
                f"model's {positions} positions. Shorten the text, pass fewer images, lower `max_new_tokens`, or "
                "compose the model with a smaller `num_image_tokens`."
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels that the vision tower takes."""
        return tuple(self.vision_config.pretrained_cfg["input_size"][1:])

    @property
    def num_channels(self) -> int:
        """Channels of an input image."""
        return self.vision_config.pretrained_cfg["input_size"][0]

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The settings with which the weights are quantised, as plain values; `None` if they are not."""
        settings = getattr(self, "quantization_config", None)
        return settings if settings is None or isinstance(settings, dict) else settings.to_dict()

    @property
    def requirements(self) -> str:
        """A `requirements.txt` of what loading the model takes where imageprompt is not installed."""
        quantizer = (self.quantization or {}).get("quant_method")
        return "\n".join((_REQUIREMENTS_TITLE, *_REQUIRED, *_REQUIRED_BY_QUANTIZER.get(quantizer, ()), ""))

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As the library's, with a `requirements.txt` beside it, unless somebody else wrote the one that is there."""
        super().save_pretrained(save_directory, *args, **kwargs)
        file = Path(save_directory, REQUIREMENTS)
        if not file.is_file() or _REQUIREMENTS_TITLE.encode() in file.read_bytes():
            file.write_text(self.requirements, encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, of the parts only what concerns a model.

        The classifier labels of a timm configuration do not, nor does where a part was loaded from, which may be a
        folder of this machine (`base_models` names those on the Hub).
        """
        output = super().to_dict()
        for key in ("num_classes", "label_names"):
            output["vision_config"].pop(key, None)
        for part in ("vision_config", "text_config"):
            for key in ("_name_or_path", "name_or_path"):
                output[part].pop(key, None)
        return output

    @classmethod
    def _knows(cls, key: str) -> bool:
        return key.startswith("_") or key in _LIBRARY_KEYWORDS or key in {field.name for field in fields(cls)}

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        for key in kwargs:
            if self._knows(key):
                continue
            if key in GenerationConfig().to_dict():
                raise ValueError(f"`{key}` steers generation: set it on `model.generation_config`, not on the config.")
            close = difflib.get_close_matches(key, [field.name for field in fields(self)], n=3)
            hint = f" Did you mean {' or '.join(f'`{name}`' for name in close)}?" if close else ""
            raise ValueError(f"ImagePromptConfig knows no field `{key}`.{hint}")

    def _complete_vision(self) -> None:
        """Fill in what a hand-written `vision_config` leaves out: preprocessing, and the shape of the features."""
        vision = self.vision_config
        if vision.model_type != "timm_wrapper":
            raise ValueError(f"`vision_config` must be a timm_wrapper configuration, not {vision.model_type!r}.")
        refuse_other_sources(vision.architecture, vision.model_args)
        given = getattr(vision, "pretrained_cfg", None) or {}
        if not given.keys() >= set(PREPROCESSING_KEYS):
            backbone = registered_backbone(
                vision.architecture,
                model_args=vision.model_args,
                preprocessing={key: given[key] for key in PREPROCESSING_KEYS if key in given},
            )
            backbone.layer_norm_eps = getattr(vision, "layer_norm_eps", None)
            self.vision_config = vision = vision_config_of(backbone)
        if self.feature_layer is None:
            self.feature_layer = connector_class(self.connector).feature_layer
        if isinstance(self.feature_layer, tuple):
            self.feature_layer = list(self.feature_layer)
        if self.feature_grid is not None:
            self.feature_grid = list(self.feature_grid)
        probed_names = ("feature_size", "feature_grid", "feature_layout", "num_prefix_tokens", "unused_parameters")
        if any(getattr(self, name) is None for name in probed_names):
            input_size = vision.pretrained_cfg["input_size"]
            shape = probe_features(vision.architecture, vision.model_args, input_size, self.feature_layer)
            probed = (shape.size, list(shape.grid), shape.layout, shape.num_prefix, shape.unused_parameters)
            for name, value in zip(probed_names, probed, strict=True):
                if getattr(self, name) not in (None, value):
                    raise ValueError(f"`{name}={getattr(self, name)}`, but {vision.architecture} has {value}.")
                setattr(self, name, value)
            self.feature_layer = shape.layer
            if self.dynamic_image_size:
                channels, height, width = input_size
                try:
                    probe_features(vision.architecture, vision.model_args, (channels, height, 2 * width), shape.layer)
                except ValueError as error:
                    raise ValueError(
                        f"`dynamic_image_size=True`, but {error} Vision transformers of timm may take "
                        "`model_args={'dynamic_img_size': True}`."
                    ) from error
        if self.feature_layer is None:
            fits = self.feature_layout != "NC"
        else:
            layouts = {"pooled": "NC", "tokens": "NLC"}
            fits = self.feature_layout == layouts.get(str(self.feature_layer), "NCHW")
        if not fits:
            raise ValueError(
                f"`feature_layer={self.feature_layer!r}` does not go with `feature_layout={self.feature_layout!r}`, "
                "which was measured for other features: compose the model anew, or leave out what is measured."
            )

    def validate_parts(self):
        """Fusion, connector, the trainable parts, the placeholder and the position budget."""
        if self.fusion not in FUSIONS:
            raise ValueError(f"Unknown `fusion={self.fusion!r}`; known: {', '.join(FUSIONS)}.")
        if self.fusion == "cross_attention" and self.text_config.model_type != "gpt2":
            raise ValueError(
                f"`fusion='cross_attention'` needs GPT-2, which has cross-attention layers; "
                f"{self.text_config.model_type} goes with 'prefix'."
            )
        if self.dynamic_image_size and not connector_class(self.connector).takes_any_grid:
            raise ValueError(f"The tokens of {self.connector!r} follow the image's size: it cannot be dynamic.")
        with torch.device("meta"):
            build_connector(self)  # raises for arguments that do not go together
        if set(self.trainable) != set(PARTS):
            wrong = sorted(set(self.trainable) ^ set(PARTS))
            raise ValueError(f"`trainable` has the keys {', '.join(PARTS)}; unknown or missing: {', '.join(wrong)}.")
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"`image_token_id={self.image_token_id}` lies outside the vocabulary of {self.text_config.vocab_size}."
            )
        positions = getattr(self.text_config, "max_position_embeddings", None)
        if positions is not None and self.image_seq_length >= positions:
            counts = connector_class(self.connector).possible_counts(self.feature_grid)
            fitting = [count for count in counts if count <= max(1, positions // 4)]
            example = f"a smaller `num_image_tokens`, for example {fitting[-1]}" if fitting else "another `connector`"
            raise ValueError(
                f"An image takes {self.image_seq_length} tokens, but the language model has only {positions} "
                f"positions, text included. Pass {example}."
            )


def vision_config_of(backbone: Backbone) -> PreTrainedConfig:
    """The library's configuration of a backbone."""
    eps = {} if backbone.layer_norm_eps is None else {"layer_norm_eps": backbone.layer_norm_eps}
    return AutoConfig.for_model(
        "timm_wrapper",
        architecture=backbone.architecture,
        model_args=backbone.model_args or None,
        pretrained_cfg=backbone.pretrained_cfg,
        do_pooling=False,
        **eps,
    )


# Where the library goes by names, not classes: pipelines warn about other names, the Trainer's label smoothing would
# compare each prediction with the token before it, and `transformers serve` looks here before it loads a model's code.
for _names in (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
):
    _names[ImagePromptConfig.model_type] = "ImagePromptForConditionalGeneration"

ImagePromptConfig.register_for_auto_class()
