"""The models: a timm vision tower, a connector and a causal language model behind the library's standard API.

`ImagePromptModel` puts projected image features in the places of the placeholder tokens and runs the language model;
`ImagePromptForConditionalGeneration` adds the head, the loss, `score` and `generate`. Three rules hold throughout:
positions are counted from the attention mask, so padding never moves a row's result; a part that does not learn keeps
no graph and stays in eval mode; and in training the head runs on supervised positions only.
"""

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto import AutoModel
from transformers.utils import logging, torch_compilable_check
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from .configuration import PARTS, ImagePromptConfig
from .connectors import build_connector
from .vision import VisionTower, flatten_features

logger = logging.get_logger(__name__)

IGNORE_INDEX = -100


@dataclass
class ImagePromptModelOutput(BaseModelOutputWithPast):
    """Outputs of [`ImagePromptModel`].

    Args:
        last_hidden_state (`Tensor`): (rows, positions, text width).
        past_key_values (`Cache`, *optional*): keys and values of the positions so far.
        hidden_states, attentions (`tuple[Tensor]`, *optional*): of the language model, one per layer.
        image_hidden_states (`Tensor`, *optional*): (images, num_image_tokens, text width), as put into the sequence.
    """

    image_hidden_states: Tensor | None = None


@dataclass
class ImagePromptCausalLMOutput(ModelOutput):
    """Outputs of [`ImagePromptForConditionalGeneration`].

    Args:
        loss (`Tensor`, *optional*): scalar, when `labels` are given.
        logits (`Tensor`, *optional*):
            (rows, positions kept, vocabulary). `None` in training with `labels`: there the head runs only on the
            supervised positions, and nothing but the loss is kept.
        past_key_values, hidden_states, attentions, image_hidden_states: as in [`ImagePromptModelOutput`].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


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

    @property
    def _parts(self) -> dict[str, list[nn.Module]]:
        """The modules of each trainable part; a head that is not tied belongs to the text."""
        base = self.base_model
        text = [base.language_model] + ([self.lm_head] if hasattr(self, "lm_head") else [])
        return dict(zip(PARTS, ([base.vision_tower], [base.connector], text), strict=True))

    def set_trainable(self, vision: bool | None = None, connector: bool | None = None, text: bool | None = None):
        """Choose which parts learn; `None` leaves a part as it is. The choice is saved with the configuration.

        A frozen vision tower also stays in eval mode inside `model.train()`, so that its batch-norm statistics stay.
        """
        wanted = {"vision": vision, "connector": connector, "text": text}
        self.config.trainable = self.config.trainable | {k: v for k, v in wanted.items() if v is not None}
        for part, modules in self._parts.items():
            for module in modules:
                module.requires_grad_(self.config.trainable[part])
        return self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        tower = self.base_model.vision_tower
        # Adapters may be trained inside a frozen tower: its statistics must stay all the same.
        if not self.config.trainable["vision"] or not _learns(tower):
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

    def __init__(self, config: ImagePromptConfig):
        super().__init__(config)
        self.vision_tower = VisionTower._from_config(config.vision_config)
        self.connector = build_connector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        # ALiBi models and others that count for themselves take no positions.
        self._takes_positions = "position_ids" in inspect.signature(self.language_model.forward).parameters
        self.post_init()
        self.set_trainable()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    @merge_with_config_defaults
    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encode images for the language model.

        Args:
            pixel_values: (images, channels, height, width), as the processor makes them.

        Returns:
            `last_hidden_state`: (images, rows * columns, feature_size), the backbone's features;
            `pooler_output`: (images, num_image_tokens, text width), the image tokens.

        Raises:
            ValueError: if the images do not have the size that the configuration states.
        """
        expected = (self.config.num_channels, *self.config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"This model takes pixel_values of shape (images, {', '.join(map(str, expected))}), not "
                f"{tuple(pixel_values.shape)}: use the processor that was saved with it."
            )
        # Nothing in front of a frozen tower can learn through it, unless the pixels themselves ask for a gradient.
        keep_graph = torch.is_grad_enabled() and (_learns(self.vision_tower) or pixel_values.requires_grad)
        with torch.set_grad_enabled(keep_graph):
            features = self.vision_tower(pixel_values, return_dict=True).last_hidden_state
        features = flatten_features(features, self.config.feature_layout, self.config.num_prefix_tokens)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=self.connector(features))

    def get_placeholder_mask(
        self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor | None
    ) -> Tensor:
        """Where the image tokens go: (rows, positions, 1), true at placeholders.

        Args:
            input_ids: (rows, positions), or `None`; then placeholders are recognised by their embedding.
            inputs_embeds: (rows, positions, text width).
            image_features: (images, num_image_tokens, text width), or `None` when there are no images.

        Raises:
            ValueError: if the placeholders do not match the features one to one.
        """
        if input_ids is None:
            token = torch.full((), self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        num_placeholders = mask.sum()
        num_features = 0 if image_features is None else image_features.shape[0] * image_features.shape[1]
        torch_compilable_check(
            num_placeholders == num_features,
            f"Image features and image tokens do not match: {num_placeholders} placeholders for {num_features} "
            f"features ({self.config.num_image_tokens} per image). Pass input_ids and pixel_values from one call of "
            "the processor that was saved with this model.",
        )
        return mask.unsqueeze(-1).to(inputs_embeds.device)

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
        **kwargs,
    ) -> ImagePromptModelOutput:
        """Run the language model over text and images.

        Args:
            input_ids: (rows, positions), with `num_image_tokens` placeholders for each image.
            pixel_values: (images, channels, height, width), in the order of the placeholders, row by row.
            attention_mask: (rows, past + positions), 1 at tokens and 0 at padding, on either side.
            position_ids: (rows, positions); counted from `attention_mask` by default.
            past_key_values: cache of the positions before.
            inputs_embeds: (rows, positions, text width), instead of `input_ids`.
            mm_encoder_outputs: `{"image": get_image_features(...)}`, instead of `pixel_values`.

        Raises:
            ValueError: for contradicting inputs, or more positions than the language model has.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if pixel_values is not None and mm_encoder_outputs:
            raise ValueError("Pass either `pixel_values` or `mm_encoder_outputs`, not both.")
        # GPT-2 would add these as if they were words.
        for name in ("token_type_ids", "mm_token_type_ids"):
            kwargs.pop(name, None)

        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        past_is_known = isinstance(past, int)  # a static cache counts in a tensor; reading it would stall the device
        _check_positions(self.config, length + (past if past_is_known and attention_mask is None else 0))
        is_prefill = length > 1 or (past_is_known and past == 0)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_outputs = (mm_encoder_outputs or {}).get("image")
        if image_outputs is None and pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values, return_dict=True)
        image_features = None
        if image_outputs is not None:
            image_features = image_outputs.pooler_output.to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)
        elif is_prefill and input_ids is not None:
            self.get_placeholder_mask(input_ids, inputs_embeds, None)
        if image_features is None and self._must_touch_image_parameters():
            inputs_embeds = inputs_embeds + self._zero_from_image_parameters().to(inputs_embeds)

        if self._takes_positions:
            if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
                position_ids = positions_from_mask(attention_mask, length)
            kwargs["position_ids"] = position_ids
        outputs = self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        return ImagePromptModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )

    def _must_touch_image_parameters(self) -> bool:
        """Whether a batch without images would leave other processes waiting for its gradients."""
        return (
            self.training
            and torch.is_grad_enabled()
            and torch.distributed.is_available()
            and torch.distributed.is_initialized()
            and (_learns(self.vision_tower) or _learns(self.connector))
        )

    def _zero_from_image_parameters(self) -> Tensor:
        """Zero, computed from one blank image, so that every image parameter takes part in the graph."""
        was_training = self.vision_tower.training
        self.vision_tower.eval()  # a blank image must not enter the batch-norm statistics
        blank = torch.zeros(1, self.config.num_channels, *self.config.image_size, device=self.device, dtype=self.dtype)
        zero = self.get_image_features(blank, return_dict=True).pooler_output.sum() * 0
        self.vision_tower.train(was_training)
        return zero


class ImagePromptForConditionalGeneration(ImagePromptPreTrainedModel, GenerationMixin):
    """The model with a language-modelling head: `generate`, training with `labels`, and `score`."""

    # The input embeddings' name depends on the language model's family.
    _tied_weights_keys = {
        "lm_head.weight": r"model\.language_model\.(wte|embed_tokens|embed_in|word_embeddings)\.weight"
    }
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: ImagePromptConfig):
        super().__init__(config)
        self.model = ImagePromptModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        self.set_trainable()
        # A placeholder is no word: it may not be generated.
        self.generation_config.suppress_tokens = [config.image_token_id]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """See [`ImagePromptModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

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
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
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
        )

    def _supervised(self, hidden_states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (n, vocabulary), targets (n,) and row indices (n,) of the n positions that predict a label."""
        targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].to(hidden_states.device)
        supervised = targets != IGNORE_INDEX
        return self.lm_head(hidden_states[supervised]), targets[supervised], supervised.nonzero()[:, 0]

    @torch.no_grad()
    def score(self, labels: Tensor, **inputs) -> Tensor:
        """Log-likelihood of the labelled tokens, for ranking texts under an image.

        Args:
            labels: (rows, positions), as `processor(..., suffix=texts)` makes them.
            inputs: the processor's other outputs.

        Returns:
            (rows,), the sum over each row's labelled tokens in nats, in fp32; 0 for a row without any.
        """
        hidden_states = self.model(**inputs, use_cache=False, return_dict=True).last_hidden_state
        logits, targets, rows = self._supervised(hidden_states, labels)
        log_likelihood = -F.cross_entropy(logits.float(), targets, reduction="none")
        return log_likelihood.new_zeros(labels.shape[0]).index_add_(0, rows, log_likelihood)

    def generate(self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs):
        """`GenerationMixin.generate`, after checking that prompt and new tokens fit the language model.

        Raises:
            ValueError: if the longest prompt plus `max_new_tokens` needs more positions than there are.
        """
        mask = kwargs.get("attention_mask")
        prompt = next(
            (t for t in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None), None
        )
        if prompt is not None:
            length = prompt.shape[1] if mask is None else int(mask.sum(-1).max())

            def setting(name):
                sources = (generation_config, self.generation_config)
                return kwargs.get(name) or next((v for s in sources if s and (v := getattr(s, name))), None)

            new = setting("max_new_tokens") or max((setting("max_length") or 0) - prompt.shape[1], 0)
            _check_positions(self.config, length, new)
        return super().generate(inputs, generation_config=generation_config, **kwargs)


def positions_from_mask(attention_mask: Tensor, length: int) -> Tensor:
    """Positions of the last `length` tokens, counting real tokens only: (rows, length).

    Args:
        attention_mask: (rows, past + length), 1 at tokens and 0 at padding.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def _check_positions(config: ImagePromptConfig, length: int, new_tokens: int = 0) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and length + new_tokens > positions:
        new = f" and {new_tokens} new ones" if new_tokens else ""
        raise ValueError(
            f"{length} tokens in a row (images take {config.num_image_tokens} each){new} need more than the language "
            f"model's {positions} positions. Shorten the text, pass fewer images, lower `max_new_tokens`, or compose "
            "the model with a smaller `num_image_tokens`."
        )


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


ImagePromptModel.register_for_auto_class("AutoModel")
ImagePromptForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["ImagePromptForConditionalGeneration", "ImagePromptModel", "ImagePromptPreTrainedModel"]
