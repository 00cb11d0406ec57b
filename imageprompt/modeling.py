"""The models: a timm vision tower, a connector and a causal language model behind the library's standard API.

`ImagePromptModel` puts projected image features in the places of the placeholder tokens, or hands them to the
language model's cross-attention, and runs the language model; `ImagePromptForConditionalGeneration` adds the head, the
loss, `score` and `generate`. Three rules hold throughout: positions are counted from the attention mask, so padding
never moves a row's result; a part that does not learn keeps no graph and stays in eval mode; and in training the head
runs on supervised positions only.
"""

import inspect
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto import AutoModel
from transformers.utils import logging, torch_compilable_check
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from .activations import fuse_gelu
from .checkpoints import check_loaded, reading
from .configuration import IGNORE_INDEX, PARTS, TOKEN_TYPES, ImagePromptConfig
from .connectors import build_connector
from .decoding import ImagePromptGenerationMixin, evaluating
from .fusion import (
    ImageCache,
    attention_to_images,
    cross_attention_parts,
    group_by_row,
    skip_positions_without_images,
)
from .linear import finish_quantization, is_quantized, replace_conv1d
from .vision import FeatureShape, VisionTower, flatten_features, probe_features

logger = logging.get_logger(__name__)


@dataclass
class ImagePromptModelOutput(BaseModelOutputWithPast):
    """Outputs of [`ImagePromptModel`].

    Args:
        last_hidden_state (`Tensor`): (rows, positions, text width).
        past_key_values (`Cache`, *optional*): keys and values of the positions so far.
        hidden_states, attentions (`tuple[Tensor]`, *optional*): of the language model, one per layer.
        cross_attentions (`tuple[Tensor]`, *optional*):
            With cross-attention, weights of each row's image tokens, (rows, heads, positions, image tokens) per layer.
        image_hidden_states (`Tensor`, *optional*): (images, num_image_tokens, text width), as put into the sequence.
    """

    image_hidden_states: Tensor | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class ImagePromptCausalLMOutput(ModelOutput):
    """Outputs of [`ImagePromptForConditionalGeneration`].

    Args:
        loss (`Tensor`, *optional*): scalar, when `labels` are given.
        logits (`Tensor`, *optional*):
            (rows, positions kept, vocabulary). `None` in training with `labels`: there the head runs only on the
            supervised positions, and nothing but the loss is kept.
        past_key_values, hidden_states, attentions, image_hidden_states, cross_attentions: as in
            [`ImagePromptModelOutput`].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


class ImagePromptPreTrainedModel(PreTrainedModel):
    """What both models share: which parts learn, and how checkpointing reaches them."""

    config: ImagePromptConfig
    config_class = ImagePromptConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _no_split_modules = ["VisionTower"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def initialize_weights(self):
        """As the library's, the language model first and by itself.

        Inside custom code the library skips modules whose weights are loaded, and with them constants that some
        language models keep outside their checkpoints (falcon_h1's multipliers).
        """
        self.base_model.language_model.initialize_weights()
        super().initialize_weights()

    @property
    def _parts(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of each part. Cross-attention is new, as the connector is; the head belongs to the text."""
        base = self.base_model
        connector = [base.connector]
        if self.config.fusion == "cross_attention":
            connector += cross_attention_parts(base.language_model)
        parts = {
            "vision": list(base.vision_tower.parameters()),
            "connector": [parameter for module in connector for parameter in module.parameters()],
        }
        taken = {id(parameter) for part in parts.values() for parameter in part}
        text = (parameter for parameter in self.parameters() if id(parameter) not in taken)
        return parts | {"text": list(text)}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike | None, *args, strict: bool = True, **kwargs
    ):
        """`PreTrainedModel.from_pretrained` that never starts a weight from random values unasked.

        The parts are frozen that the configuration says are frozen.

        Args:
            strict: refuse a checkpoint that lacks tensors of this model, or has others besides. `False` is the
                library's way: what is missing is random, what is too much is left out, and a warning lists both.
            kwargs: the library's. Other files than safetensors are read with `use_safetensors=False` alone, tensors
                of another shape are made anew with `ignore_mismatched_sizes=True`.

        Raises:
            ValueError: for files that are broken, pickles or outside the folder, and for weights of another model,
                with the names of files and tensors; if a torchao configuration quantises nothing, or cannot be used
                on this device.
        """
        source, with_report = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        any_size = kwargs.pop("ignore_mismatched_sizes", False)
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        with reading(source, pickles=not kwargs["use_safetensors"], **kwargs):
            # The library would refuse other shapes without saying which: here `check_loaded` does.
            loaded: Any = super().from_pretrained(  # declared to be a model, with or without a report
                source, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        model, report = loaded
        check_loaded(source, model, report, strict, any_size)
        finish_quantization(model)
        model.set_trainable(**model.config.trainable)  # the library loads every weight as one that learns
        model._suppress_placeholder()  # a checkpoint of the base model has no generation settings
        return (model, report) if with_report else model

    def save_pretrained(self, save_directory: str | PathLike, *args, **kwargs):
        """As the library's, and of quantised models also those that were loaded.

        Of a loaded model the library wants to save the form that it read, for which torchao has no way back.
        """
        if getattr(self, "hf_quantizer", None) is not None:
            kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)

    def _suppress_placeholder(self) -> None:
        """A placeholder is no word: by default it is not generated."""
        if self.can_generate() and self.generation_config.suppress_tokens is None:
            self.generation_config.suppress_tokens = [self.config.image_token_id]

    def set_trainable(self, vision: bool | None = None, connector: bool | None = None, text: bool | None = None):
        """Choose which parts learn; `None` leaves a part as it is. The choice is saved with the configuration.

        A frozen vision tower also stays in eval mode inside `model.train()`, so that its batch-norm statistics stay.
        """
        wanted = {"vision": vision, "connector": connector, "text": text}
        wanted = {part: learns for part, learns in wanted.items() if learns is not None}
        self.config.trainable = dict.fromkeys(PARTS, True) | self.config.trainable | wanted
        for part, learns in wanted.items():
            for parameter in self._parts[part]:
                parameter.requires_grad_(learns and parameter.is_floating_point() and not is_quantized(parameter))
        # What the features do not depend on gets no gradient, for which distributed training would wait.
        for name, parameter in self.base_model.vision_tower.timm_model.named_parameters():
            if name in self.config.unused_parameters:
                parameter.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        tower = self.base_model.vision_tower
        # Adapters may be trained inside a frozen tower: its statistics must stay all the same.
        if not (self.config.trainable["vision"] and _learns(tower)):
            tower.eval()
        return self

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs):
        super()._set_gradient_checkpointing(enable, **kwargs)
        tower = self.base_model.vision_tower
        if tower.supports_gradient_checkpointing:
            tower.timm_model.set_grad_checkpointing(enable)
        elif enable and _learns(tower):
            logger.warning_once(
                f"timm's {tower.config.architecture} cannot checkpoint activations: its own stay in memory."
            )


class ImagePromptModel(ImagePromptPreTrainedModel):
    """Vision tower, connector and language model, without a head."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # of a checkpoint with a head

    def __init__(self, config: ImagePromptConfig):
        super().__init__(config)
        self.vision_tower = VisionTower._from_config(config.vision_config)
        self.connector = build_connector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        fuse_gelu(self.language_model)
        if config.conv1d_as_linear:
            replace_conv1d(self.language_model)
        if config.fusion == "cross_attention":
            skip_positions_without_images(self.language_model)
        # ALiBi models and others that count for themselves take no positions.
        self._takes_positions = "position_ids" in inspect.signature(self.language_model.forward).parameters
        self.post_init()
        self.set_trainable(**config.trainable)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    @merge_with_config_defaults
    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        image_index: Tensor | None = None,
        image_features: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode images for the language model.

        Args:
            pixel_values: (images, channels, height, width), as the processor makes them.
            image_index: (places,), which of them stands at each place for an image; by default each has one place.
            image_features: `last_hidden_state` of an earlier call, instead of `pixel_values`: the vision tower does
                not run.

        Returns:
            `last_hidden_state`: (images, rows * columns, feature_size), the backbone's features;
            `pooler_output`: (images, or places, num_image_tokens, text width), the image tokens.

        Raises:
            ValueError: if the images do not have the size that the configuration states, or, where it may change,
                a size that the backbone takes; if the features are not of that size.
        """
        if image_features is None:
            features, grid = self._run_tower(pixel_values)
        else:
            features, grid = self._check_features(image_features), tuple(self.config.feature_grid)
        image_tokens = self.connector(features, grid)
        if image_index is not None:
            image_tokens = image_tokens[image_index]
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=image_tokens)

    def _run_tower(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The backbone's features, (images, rows * columns, feature_size), and their (rows, columns)."""
        grid, num_prefix_tokens = self._check_images(pixel_values)
        # Nothing in front of a frozen tower can learn through it, unless the pixels themselves ask for a gradient.
        keep_graph = torch.is_grad_enabled() and (_learns(self.vision_tower) or pixel_values.requires_grad)
        with torch.set_grad_enabled(keep_graph):
            outputs = self.vision_tower(pixel_values, feature_layer=self.config.feature_layer, return_dict=True)
        return flatten_features(outputs.last_hidden_state, self.config.feature_layout, num_prefix_tokens), grid

    def _check_features(self, image_features: Tensor) -> Tensor:
        config = self.config
        expected = (math.prod(config.feature_grid), config.feature_size)
        if image_features.ndim != 3 or image_features.shape[1:] != expected:
            raise ValueError(
                f"This model's image_features have the shape (images, {expected[0]}, {expected[1]}), not "
                f"{tuple(image_features.shape)}: pass what its own `get_image_features` gave."
            )
        return image_features.to(self.device, self.dtype)

    def _check_images(self, pixel_values: Tensor) -> tuple[tuple[int, ...], int | None]:
        """The grid of these images, and how many tokens come before it."""
        config, size = self.config, tuple(pixel_values.shape[1:])
        expected = (config.num_channels, *config.image_size)
        if size == expected:
            return tuple(config.feature_grid), config.num_prefix_tokens
        if pixel_values.ndim != 4 or size[0] != expected[0] or not config.dynamic_image_size:
            edges = "height, width" if config.dynamic_image_size else f"{expected[1]}, {expected[2]}"
            raise ValueError(
                f"This model takes pixel_values of shape (images, {expected[0]}, {edges}), not "
                f"{tuple(pixel_values.shape)}: use the processor that was saved with it."
            )
        vision = config.vision_config
        shape = _probed(vision.architecture, json.dumps(vision.model_args), size, json.dumps(config.feature_layer))
        return shape.grid, shape.num_prefix

    def get_placeholder_mask(
        self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor | None
    ) -> Tensor:
        """Where images stand in the text: (rows, positions, 1), true at placeholders.

        Args:
            input_ids: (rows, positions), or `None`; then placeholders are recognised by their embedding.
            inputs_embeds: (rows, positions, text width).
            image_features: (images, num_image_tokens, text width), or `None` when there are no images.

        Raises:
            ValueError: if the placeholders do not match the features one to one.
        """
        mask = self._placeholders(input_ids, inputs_embeds)
        self._check_placeholders(mask, image_features)
        return mask.unsqueeze(-1)

    def _check_placeholders(self, mask: Tensor, image_features: Tensor | None) -> None:
        num_placeholders, expected = mask.sum(), 0
        if image_features is not None:
            num_images, num_tokens = image_features.shape[:2]
            expected = num_images * num_tokens if self.config.fusion == "prefix" else num_images
        torch_compilable_check(
            num_placeholders == expected,
            # Only written when it is needed: it reads a tensor.
            lambda: (
                f"Image features and image tokens do not match: {num_placeholders} placeholders for {expected} that "
                f"the images take ({self.config.image_seq_length} each). Pass input_ids and pixel_values from one call "
                "of the processor that was saved with this model."
            ),
        )

    def _placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        if input_ids is not None:
            return torch.eq(input_ids, self.config.image_token_id).to(inputs_embeds.device)
        token = torch.full((), self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        image_features: Tensor | None = None,
        **kwargs,
    ) -> ImagePromptModelOutput:
        """Run the language model over text and images.

        Args:
            input_ids: (rows, positions), with `config.image_seq_length` placeholders for each image.
            pixel_values: (images, channels, height, width), in the order of the placeholders, row by row.
            attention_mask: (rows, past + positions), 1 at tokens and 0 at padding, on either side.
            position_ids: (rows, positions); counted from `attention_mask` by default.
            past_key_values: cache of the positions before.
            inputs_embeds: (rows, positions, text width), instead of `input_ids`.
            mm_encoder_outputs: `{"image": get_image_features(...)}`, instead of `pixel_values`.
            encoder_hidden_states: for cross-attention, the image tokens of each row, (rows, image tokens, text
                width), instead of `pixel_values`.
            encoder_attention_mask: (rows, image tokens), which of them a row has.
            image_index: (places,), which image of `pixel_values` stands at each place in the rows, for images that
                several rows share; by default each has one place.
            image_features: (images, rows * columns, feature_size), `get_image_features(...).last_hidden_state`,
                instead of `pixel_values`: a frozen vision tower need not run for an image again.

        Raises:
            ValueError: for contradicting inputs, or more positions than the language model has.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        has_images = pixel_values is not None or image_features is not None
        if [pixel_values is not None, image_features is not None, bool(mm_encoder_outputs)].count(True) > 1:
            raise ValueError("Pass one of `pixel_values`, `image_features` and `mm_encoder_outputs`.")
        if encoder_hidden_states is not None and (self.config.fusion == "prefix" or has_images):
            raise ValueError(
                "`encoder_hidden_states` are for `fusion='cross_attention'`, and stand instead of `pixel_values`."
            )
        for name in TOKEN_TYPES:
            kwargs.pop(name, None)
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(self.config, name):
                kwargs.setdefault(name, True)

        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        past_is_known = isinstance(past, int)  # a static cache counts in a tensor; reading it would stall the device
        mask_is_2d = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
        if past_is_known:
            mask = attention_mask if mask_is_2d else None
            _check_mask_and_positions(self.config, past, length, mask, position_ids)
        is_prefill = length > 1 or (past_is_known and past == 0)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_tokens = None
        if mm_encoder_outputs:
            image_tokens = mm_encoder_outputs["image"].pooler_output
        elif has_images:
            encoded = self.get_image_features(pixel_values, image_index, image_features, return_dict=True)
            image_tokens = encoded.pooler_output
            if input_ids is not None:
                torch_compilable_check(
                    (torch.eq(input_ids, self.config.image_token_id).sum(-1) % self.config.image_seq_length == 0).all(),
                    f"A row holds a part of an image: each takes {self.config.image_seq_length} placeholders.",
                )
        if image_tokens is not None:
            image_tokens = image_tokens.to(inputs_embeds.device, inputs_embeds.dtype)

        if self.config.fusion == "prefix":
            inputs_embeds = self._put_images_in_text(input_ids, inputs_embeds, image_tokens, is_prefill)
        else:
            is_whole_prompt = past_key_values is None
            if kwargs.get("use_cache", self.config.use_cache) or not is_whole_prompt:
                past_key_values = ImageCache.of(past_key_values, self.config.text_config)
            kwargs |= self._put_images_beside_text(
                input_ids,
                inputs_embeds,
                image_tokens,
                is_prefill,
                is_whole_prompt,
                past_key_values,
                encoder_hidden_states,
                encoder_attention_mask,
            )

        if self._takes_positions:
            if position_ids is None and mask_is_2d:
                position_ids = positions_from_mask(attention_mask, length)
            kwargs["position_ids"] = position_ids
        if (layers := kwargs.get("attention_instances")) is not None:
            kwargs["attention_instances"] = {index: _BatchedAttention(layer) for index, layer in layers.items()}
        outputs = self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        return ImagePromptModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_tokens,
            cross_attentions=outputs.get("cross_attentions"),
        )

    def _put_images_in_text(
        self, input_ids: Tensor | None, inputs_embeds: Tensor, image_tokens: Tensor | None, is_prefill: bool
    ) -> Tensor:
        """Prefix fusion: image tokens in the places of the placeholders."""
        if image_tokens is not None:
            placeholders = self.get_placeholder_mask(input_ids, inputs_embeds, image_tokens)
            return inputs_embeds.masked_scatter(placeholders, image_tokens)
        if is_prefill:
            self.get_placeholder_mask(input_ids, inputs_embeds, None)
        if self._must_touch_image_parameters():
            return inputs_embeds + (self._blank_image_tokens() * 0).sum().to(inputs_embeds)
        return inputs_embeds

    def _put_images_beside_text(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor,
        image_tokens: Tensor | None,
        is_prefill: bool,
        is_whole_prompt: bool,
        cache: ImageCache | None,
        encoder_hidden_states: Tensor | None,
        encoder_attention_mask: Tensor | None,
    ) -> dict[str, Tensor]:
        """Cross-attention fusion: the image tokens of each row, and which of them each position reads."""
        placeholders = None
        if input_ids is not None or is_prefill or image_tokens is not None:
            placeholders = self._placeholders(input_ids, inputs_embeds)
        if image_tokens is not None:
            if cache is not None:
                self._make_room_for_images(cache)
            self._check_placeholders(placeholders, image_tokens)
            states, mask = group_by_row(placeholders, image_tokens)
        elif cache is not None and cache.holds_images:
            states, mask = inputs_embeds, cache.images.mask  # not read: their keys and values are in the cache
        elif encoder_hidden_states is not None:
            states = encoder_hidden_states.to(inputs_embeds.dtype)
            mask = torch.ones(states.shape[:2]) if encoder_attention_mask is None else encoder_attention_mask
            mask = mask.to(states.device, torch.bool)
        elif self._must_touch_image_parameters():
            states = self._blank_image_tokens().to(inputs_embeds).expand(len(inputs_embeds), -1, -1)
            mask = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
        else:
            if is_prefill:
                self._check_placeholders(placeholders, None)
            return {}

        passed = inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.long)
        if placeholders is not None:
            passed = placeholders.cumsum(-1)
        if cache is not None:
            passed = passed + cache.passed_before()
        if is_prefill:  # not in every step: it reads a tensor
            there_are, needed = mask.sum(-1), passed[:, -1] * self.config.num_image_tokens
            # A later chunk of the prompt may pass the rest.
            torch_compilable_check(
                (needed == there_are if is_whole_prompt else needed <= there_are).all(),
                "Image features and image tokens do not match: each image of a row needs one placeholder in it.",
            )
        if self.language_model.config._attn_implementation not in ("eager", "sdpa"):
            raise ValueError("Cross-attention runs with `attn_implementation` 'sdpa' or 'eager' only.")
        if cache is not None:
            cache.remember(mask, passed)
        scores = attention_to_images(mask, passed, self.config.num_image_tokens, inputs_embeds.dtype)
        return {"encoder_hidden_states": states, "encoder_attention_mask": scores}

    @staticmethod
    def _make_room_for_images(cache: ImageCache) -> None:
        if cache.holds_images and bool((torch.as_tensor(cache.passed_before()) > 0).any()):
            raise ValueError(
                "The cache already holds images, and with `fusion='cross_attention'` no more can follow: pass the "
                "whole prompt with all of its images, without the cache."
            )
        cache.forget_images()

    def _must_touch_image_parameters(self) -> bool:
        """Whether a batch without images would leave other processes waiting for its weights or gradients."""
        return self.training and torch.distributed.is_available() and torch.distributed.is_initialized()

    def _blank_image_tokens(self) -> Tensor:
        """The tokens of one blank image, (1, num_image_tokens, text width): every image parameter in one graph."""
        tower = self.vision_tower
        blank = torch.zeros(1, self.config.num_channels, *self.config.image_size, device=self.device, dtype=self.dtype)
        checkpoints = tower.supports_gradient_checkpointing and self.is_activation_checkpointing
        if checkpoints:  # recomputed later, in training mode, the tower would do something else
            tower.timm_model.set_grad_checkpointing(False)
        with evaluating(tower):  # a blank image must not enter the batch-norm statistics
            image_tokens = self.get_image_features(blank, return_dict=True).pooler_output
        if checkpoints:
            tower.timm_model.set_grad_checkpointing(True)
        return image_tokens


class ImagePromptForConditionalGeneration(ImagePromptPreTrainedModel, ImagePromptGenerationMixin):
    """The model with a language-modelling head: training with `labels`, and all of [`ImagePromptGenerationMixin`]."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: ImagePromptConfig):
        super().__init__(config)
        self.model = ImagePromptModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        # The input embeddings' name depends on the language model's family.
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()
        self.set_trainable(**config.trainable)
        self._suppress_placeholder()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        image_index: Tensor | None = None,
        image_features: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """See [`ImagePromptModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_index, image_features, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        image_features: Tensor | None = None,
        **kwargs,
    ) -> ImagePromptCausalLMOutput:
        """Next-token logits, and the loss when `labels` are given.

        Args:
            labels: (rows, positions), aligned with `input_ids` and shifted here; −100 is not supervised.
            logits_to_keep: compute logits for the last so many positions (0: all), or for those in a tensor.
            kwargs: `num_items_in_batch` (the Trainer's count of supervised tokens over all accumulated batches; the
                loss is then a sum divided by it), and what the language model takes.
            others: see [`ImagePromptModel.forward`].

        Raises:
            ValueError: as [`ImagePromptModel.forward`]; and if `labels` supervise nothing.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        if labels is not None and past_key_values is None:
            kwargs.setdefault("use_cache", False)  # nothing follows; and with a cache the library sees no packed rows
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            image_index=image_index,
            image_features=image_features,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            supervised_logits, targets, _ = self._supervised(hidden_states, labels)
            if num_items_in_batch is None and targets.numel() == 0:
                raise ValueError("`labels` supervise nothing: every one is -100. Pass `suffix=` to the processor.")
            loss = self.loss_function(
                logits=supervised_logits,
                labels=None,
                shift_labels=targets,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        if labels is None or not self.training:
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        return ImagePromptCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            cross_attentions=outputs.cross_attentions,
        )

    def _supervised(self, hidden_states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (n, vocabulary), targets (n,) and row indices (n,) of the n positions that predict a label."""
        targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].to(hidden_states.device)
        supervised = targets != IGNORE_INDEX
        return self.lm_head(hidden_states[supervised]), targets[supervised], supervised.nonzero()[:, 0]


class _BatchedAttention:
    """A layer of vLLM's attention, with its answer in the shape of the library's own attention functions.

    vLLM's is (tokens, width). GPT-2's layers fold the last two dimensions, whatever they are, and so need the four
    (1, tokens, heads, width of a head), of which one may stand for all heads.
    """

    def __init__(self, layer):
        self.layer = layer

    def __getattr__(self, name: str):
        return getattr(self.layer, name)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.layer.forward(query, key, value).view(1, len(query), 1, -1)


@lru_cache(maxsize=64)
def _probed(architecture: str, model_args: str, input_size: tuple[int, ...], feature_layer: str) -> FeatureShape:
    """`probe_features` for an image size that comes up again and again; dicts and lists as JSON, to be hashable."""
    return probe_features(architecture, json.loads(model_args), input_size, json.loads(feature_layer))


def positions_from_mask(attention_mask: Tensor, length: int) -> Tensor:
    """Positions of the last `length` tokens, counting real tokens only: (rows, length).

    Args:
        attention_mask: (rows, past + length), 1 at tokens and 0 at padding.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def _check_mask_and_positions(
    config: ImagePromptConfig, past: int, length: int, attention_mask: Tensor | None, position_ids: Tensor | None
) -> None:
    total = past + length
    if attention_mask is not None and attention_mask.shape[1] != total:
        raise ValueError(
            f"`attention_mask` covers {attention_mask.shape[1]} positions, but there are {past} in the cache and "
            f"{length} new ones: it must cover all {total}."
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and total > positions:
        if position_ids is not None:  # several sequences may lie in one row, as vLLM lays them
            total = int(position_ids.max()) + 1
        elif attention_mask is not None:
            total = int(attention_mask.sum(-1).max())  # padding takes no position
    config.check_positions(total)


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


ImagePromptModel.register_for_auto_class("AutoModel")
ImagePromptForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["ImagePromptForConditionalGeneration", "ImagePromptModel", "ImagePromptPreTrainedModel"]
