"""Configuration of imageprompt models.

`ImagePromptConfig` joins a timm backbone (`vision_config`, the library's own `timm_wrapper`) and a causal language
model (`text_config`, GPT-2 by default). It is the one owner of every number that the model, the processor and the
connector share: the feature map that the backbone emits, the tokens per image and the placeholder's id. What is not
given is measured once, by running the backbone on the meta device (no weights, no download).
"""

import copy
import difflib
from dataclasses import fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto import AutoConfig

from .connectors import resolve_num_image_tokens
from .vision import Backbone, probe_features, resolve_backbone

PARTS = ("vision", "connector", "text")

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
            (`input_size` as channels, height, width; `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`).
        text_config (`PreTrainedConfig` or `dict`): the language model's configuration, GPT-2 by default.
        connector (`str`): name in `imageprompt.connectors.CONNECTORS`.
        fusion (`str`): `"prefix"`: image tokens are part of the language model's input sequence.
        num_image_tokens (`int`, *optional*): tokens per image; by default what the connector makes of the grid.
        image_token_id (`int`, *optional*):
            Id of the placeholder token. By default one row is added to the vocabulary for it.
        trainable (`dict[str, bool]`): which of `"vision"`, `"connector"` and `"text"` learn.
        feature_size (`int`, *optional*): channels of the backbone's features; probed.
        feature_grid (`list[int]`, *optional*): rows and columns of the backbone's last feature map; probed.
        feature_layout (`str`, *optional*): `"NCHW"`, `"NHWC"` or `"NLC"`; probed.
        num_prefix_tokens (`int`, *optional*): class and register tokens before an NLC grid; probed.
        tie_word_embeddings (`bool`, *optional*): share input embeddings and head; taken from `text_config`.

    Raises:
        ValueError: for unknown keywords, unknown timm names, impossible token counts or budgets.
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
    fusion: Literal["prefix"] = "prefix"
    num_image_tokens: int | None = None
    image_token_id: int | None = None
    trainable: dict[str, bool] | None = None
    feature_size: int | None = None
    feature_grid: list[int] | tuple[int, ...] | None = None
    feature_layout: Literal["NCHW", "NHWC", "NLC"] | None = None
    num_prefix_tokens: int | None = None
    tie_word_embeddings: bool | None = None

    hidden_size = _mirror("hidden_size")
    num_hidden_layers = _mirror("num_hidden_layers")
    num_attention_heads = _mirror("num_attention_heads")
    vocab_size = _mirror("vocab_size")
    max_position_embeddings = _mirror("max_position_embeddings")
    use_cache = _mirror("use_cache")

    def __post_init__(self, **kwargs):
        self._refuse_unknown(kwargs)
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
            self.text_config = copy.deepcopy(self.text_config)
            self.image_token_id = self.text_config.vocab_size
            self.text_config.vocab_size += 1
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        self.trainable = dict.fromkeys(PARTS, True) | (self.trainable or {})
        self.num_image_tokens = resolve_num_image_tokens(self.connector, self.feature_grid, self.num_image_tokens)

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
        return cls(vision_config=_vision_config(backbone), text_config=text_config, **config_fields)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels that the vision tower takes."""
        return tuple(self.vision_config.pretrained_cfg["input_size"][1:])

    @property
    def num_channels(self) -> int:
        """Channels of an input image."""
        return self.vision_config.pretrained_cfg["input_size"][0]

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, without the classifier labels that a timm configuration drags along."""
        output = super().to_dict()
        for key in ("num_classes", "label_names"):
            output["vision_config"].pop(key, None)
        return output

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        known = {field.name for field in fields(self)}
        for key in kwargs:
            if key in _LIBRARY_KEYWORDS or key.startswith("_"):
                continue
            if key in GenerationConfig().to_dict():
                raise ValueError(f"`{key}` steers generation: set it on `model.generation_config`, not on the config.")
            close = difflib.get_close_matches(key, known, n=3)
            hint = f" Did you mean {' or '.join(f'`{name}`' for name in close)}?" if close else ""
            raise ValueError(f"ImagePromptConfig knows no field `{key}`.{hint}")

    def _complete_vision(self) -> None:
        """Fill in what a hand-written `vision_config` leaves out: preprocessing, and the shape of the features."""
        vision = self.vision_config
        if vision.model_type != "timm_wrapper":
            raise ValueError(f"`vision_config` must be a timm_wrapper configuration, not {vision.model_type!r}.")
        if getattr(vision, "pretrained_cfg", None) is None:
            self.vision_config = vision = _vision_config(
                resolve_backbone(vision.architecture, model_args=vision.model_args)
            )
        if None in (self.feature_size, self.feature_grid, self.feature_layout, self.num_prefix_tokens):
            shape = probe_features(vision.architecture, vision.model_args, vision.pretrained_cfg["input_size"])
            self.feature_size, self.feature_layout, self.num_prefix_tokens = shape.size, shape.layout, shape.num_prefix
            self.feature_grid = shape.grid
        self.feature_grid = list(self.feature_grid)

    def validate_parts(self):
        """Part of `@strict` validation: the trainable parts, the placeholder and the position budget."""
        if set(self.trainable) != set(PARTS):
            raise ValueError(f"`trainable` has the keys {', '.join(PARTS)}; got {sorted(self.trainable)}.")
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"`image_token_id={self.image_token_id}` lies outside the vocabulary of {self.text_config.vocab_size}."
            )
        positions = getattr(self.text_config, "max_position_embeddings", None)
        if positions is not None and self.num_image_tokens >= positions:
            raise ValueError(
                f"An image takes {self.num_image_tokens} tokens, but the language model has only {positions} "
                f"positions, text included. Pass a smaller `num_image_tokens`, for example {min(64, positions // 4)}."
            )


def _vision_config(backbone: Backbone) -> PreTrainedConfig:
    return AutoConfig.for_model(
        "timm_wrapper",
        architecture=backbone.architecture,
        model_args=backbone.model_args or None,
        pretrained_cfg=backbone.pretrained_cfg,
        do_pooling=False,
    )


ImagePromptConfig.register_for_auto_class()
