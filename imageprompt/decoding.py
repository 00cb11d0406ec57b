"""What a model is asked once it has learnt: `generate`, `score`, and `encode_prefix` for what many texts share.

The library's `generate` does the decoding. What is added here keeps an image prompt right in it: prompts that fit and
may be padded on either side, images that no way to decode loses, and prefixes that are not computed again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import DynamicCache
from transformers.utils import ModelOutput

from .configuration import IGNORE_INDEX, TOKEN_TYPES, ImagePromptConfig
from .fusion import ImageCache, group_by_row
from .prefix import ImagePrefix


class ImagePromptGenerationMixin(GenerationMixin):
    """Of a model with a head; see the file's purpose."""

    # What the class has that this is mixed into.
    config: ImagePromptConfig
    device: torch.device
    model: Any
    _supervised: Any
    get_input_embeddings: Any
    get_image_features: Any

    @property
    def has_recurrent_layers(self) -> bool:
        """Whether the language model goes on from what it has read by one token only."""
        return getattr(self.model.language_model, "_is_stateful", False)

    @torch.no_grad()
    def encode_prefix(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs) -> ImagePrefix:
        """Run images, and any text with them, once for all the texts that follow.

        Args:
            input_ids: (rows, positions), padded on either side.
            attention_mask: (rows, positions), 1 at tokens and 0 at padding.
            inputs: the processor's other outputs for images and prompts.

        Returns:
            What `generate` and `score` take as `prefix`. Texts behind it are tokenised by themselves: where the
            prefix ends with an image or a whole word, that is as in one piece.

        Raises:
            ValueError: for a language model with recurrent layers, which go on by one token only; and as `forward`.
        """
        if self.has_recurrent_layers:
            raise ValueError(
                f"A {self.config.text_config.model_type} language model has recurrent layers, which cannot go on from "
                "a prefix: pass the whole prompt."
            )
        prompt = _pad_left(_with_mask({"input_ids": input_ids, "attention_mask": attention_mask}))
        cache = DynamicCache()
        with evaluating(self):
            outputs = self.model(**prompt, **inputs, past_key_values=cache, use_cache=True, return_dict=True)
        return ImagePrefix(**prompt, last_hidden_state=outputs.last_hidden_state[:, -1:], cache=cache)

    @torch.no_grad()
    def score(self, labels: Tensor, prefix: ImagePrefix | None = None, **inputs) -> Tensor:
        """Log-likelihood of the labelled tokens, for ranking texts under an image.

        Args:
            labels: (rows, positions), as `processor(..., suffix=texts)` makes them.
            prefix: of `encode_prefix`, what comes before these rows.
            inputs: the processor's other outputs.

        Returns:
            (rows,), the sum over each row's labelled tokens in nats, in fp32, without dropout; 0 for a row without any.

        Raises:
            ValueError: as `forward`; or if the prefix has other rows.
        """
        with evaluating(self):
            if prefix is None:
                hidden_states = self.model(**inputs, use_cache=False, return_dict=True).last_hidden_state
            else:
                hidden_states, labels = self._states_behind(prefix, labels, inputs)
        logits, targets, rows = self._supervised(hidden_states, labels)
        log_likelihood = -F.cross_entropy(logits.float(), targets, reduction="none")
        return log_likelihood.new_zeros(labels.shape[0]).index_add_(0, rows, log_likelihood)

    def _states_behind(self, prefix: ImagePrefix, labels: Tensor, inputs: dict) -> tuple[Tensor, Tensor]:
        """Hidden states (rows, 1 + positions, text width) from the prefix's last on, and labels aligned with them."""
        self._refuse_behind_prefix(inputs)
        inputs = _with_mask(inputs)
        # Padding goes to the right, so that the first token follows what predicts it.
        order = inputs["attention_mask"].argsort(dim=-1, stable=True, descending=True)
        inputs, labels = inputs | _reorder(inputs, order), labels.gather(1, order.to(labels.device))
        behind = self.model(**prefix.followed_by(inputs), use_cache=True, return_dict=True).last_hidden_state
        last = prefix.last_hidden_state[prefix.rows_for(len(labels))]
        return torch.cat([last, behind], dim=1), F.pad(labels, (1, 0), value=IGNORE_INDEX)

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        prefix: ImagePrefix | None = None,
        **kwargs,
    ):
        """`GenerationMixin.generate` for prompts that fit, padded on either side.

        Args:
            prefix: of `encode_prefix`, what comes before these prompts. Neither its tokens nor its padding are
                returned.

        Raises:
            ValueError: if the longest prompt plus the new tokens needs more positions than the language model has, or
                if the library would lose the images on the way; images are not encoded then. If the prefix has other
                rows than the prompt, or would not be used.
        """
        for name in TOKEN_TYPES:
            kwargs.pop(name, None)
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if prefix is not None:
            self._refuse_unused_prefix(generation_config, kwargs)
            kwargs |= self._put_behind(prefix, kwargs)
        if (features := kwargs.pop("image_features", None)) is not None:
            if kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs"):
                raise ValueError("Pass one of `pixel_values`, `image_features` and `mm_encoder_outputs`.")
            index = kwargs.pop("image_index", None)
            with torch.no_grad():
                encoded = self.get_image_features(None, index, features, return_dict=True)
            kwargs["mm_encoder_outputs"] = {"image": encoded}
        if kwargs.get("pixel_values") is None:
            kwargs.pop("pixel_values", None)  # the library would encode what is not there
        mask = kwargs.get("attention_mask")
        prompt = kwargs.get("inputs_embeds") if kwargs.get("inputs_embeds") is not None else kwargs.get("input_ids")
        if prompt is not None:
            length = prompt.shape[1] if mask is None else int(mask.sum(-1).max())
            self.config.check_positions(length, self._count_new_tokens(prompt.shape[1], generation_config, kwargs))
        self._refuse_lost_images(generation_config, kwargs)
        if mask is not None and not mask[:, -1].all():
            kwargs |= _pad_left(kwargs)
        if kwargs.get("mm_encoder_outputs"):
            # The library repeats these in place for beams; the caller may want them again.
            kwargs["mm_encoder_outputs"] = {name: copy(output) for name, output in kwargs["mm_encoder_outputs"].items()}
        if self.config.fusion == "cross_attention":
            kwargs |= self._images_of_rows(kwargs)
        outputs = super().generate(None, generation_config, *args, **kwargs)
        return outputs if prefix is None else _without(prefix, outputs)

    def _put_behind(self, prefix: ImagePrefix, inputs: dict) -> dict:
        """The inputs of `generate` that differ behind a prefix: all ids and the whole mask, as of one prompt."""
        if inputs.get("input_ids") is None or inputs["input_ids"].shape[1] == 0:
            raise ValueError("A prefix is followed by `input_ids` of at least one token: leave its last words to them.")
        inputs = _with_mask(inputs)
        if not inputs["attention_mask"][:, -1].all():
            inputs = inputs | _pad_left(inputs)
        rows = prefix.rows_for(len(inputs["input_ids"]))
        ids = torch.cat([prefix.input_ids[rows], inputs["input_ids"]], dim=1)
        mask = torch.cat([prefix.attention_mask[rows], inputs["attention_mask"]], dim=1)
        if not inputs["attention_mask"].all() and self._counts_padding(ids.shape[1]):
            raise ValueError(
                f"A {self.config.text_config.model_type} language model counts padding between a prefix and the text "
                "as if it were text: pass prompts of one length at a time."
            )
        # A prefix takes a cache's place until `_prepare_cache_for_generation`.
        return {"input_ids": ids, "attention_mask": mask, "past_key_values": prefix}

    def _counts_padding(self, length: int) -> bool:
        """Whether a token's distance to those before it, in so long a row, includes padding between them."""
        config = self.config.text_config
        windows = [getattr(config, name, None) for name in ("sliding_window", "window_size")]
        return not self.model._takes_positions or any(window is not None and length > window for window in windows)

    def _refuse_behind_prefix(self, inputs: dict) -> None:
        for name in ("past_key_values", "inputs_embeds", "position_ids", "assistant_model"):
            if inputs.get(name) is not None:
                raise ValueError(f"Pass either `prefix` or `{name}`, not both.")
        images = ("pixel_values", "image_features", "mm_encoder_outputs")
        if self.config.fusion == "cross_attention" and any(inputs.get(name) is not None for name in images):
            raise ValueError(
                "With `fusion='cross_attention'` no images can follow a prefix: encode all of them into it, or pass "
                "the whole prompt."
            )

    def _refuse_unused_prefix(self, generation_config: GenerationConfig | None, kwargs: dict) -> None:
        self._refuse_behind_prefix(kwargs)
        if self._setting("use_cache", generation_config, kwargs) is False:
            raise ValueError("`use_cache=False` would compute the prefix again for every token: leave it out.")

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """The library's own cache, of the kind and size that this call needs, begun with the prefix."""
        prefix = model_kwargs.get("past_key_values")
        if isinstance(prefix, ImagePrefix):
            del model_kwargs["past_key_values"]
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        if isinstance(prefix, ImagePrefix):
            copies = max(generation_config.num_beams, generation_config.num_return_sequences)
            prefix.write_to(model_kwargs["past_key_values"], prefix.rows_for(batch_size).repeat_interleave(copies))

    @torch.no_grad()
    def _images_of_rows(self, inputs: dict) -> dict:
        """The inputs of `generate` with images encoded row by row, which the library repeats for beams as any input."""
        encoded = inputs.pop("mm_encoder_outputs", None) or {}
        pixel_values, image_index = inputs.pop("pixel_values", None), inputs.pop("image_index", None)
        if pixel_values is None and "image" not in encoded:
            return {}
        input_ids, inputs_embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if inputs_embeds is None:
            raise ValueError("Image features and image tokens do not match: there are images but no prompt.")
        if (cache := inputs.get("past_key_values")) is not None:
            self.model._make_room_for_images(ImageCache.of(cache, self.config.text_config))
        image = encoded.get("image") or self.get_image_features(pixel_values, image_index, return_dict=True)
        placeholders = self.model.get_placeholder_mask(input_ids, inputs_embeds, image.pooler_output).squeeze(-1)
        states, mask = group_by_row(placeholders, image.pooler_output)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def _count_new_tokens(self, padded_length: int, generation_config: GenerationConfig | None, kwargs: dict) -> int:
        """How many tokens `generate` may add; at least one."""
        new_tokens = self._setting("max_new_tokens", generation_config, kwargs)
        if new_tokens is not None:
            return new_tokens
        return max(1, (self._setting("max_length", generation_config, kwargs) or 0) - padded_length)

    def _setting(self, name: str, generation_config: GenerationConfig | None, kwargs: dict):
        """A generation setting, by the library's order of precedence."""
        sources = (kwargs, *(config.to_dict() for config in (generation_config, self.generation_config) if config))
        return next((source[name] for source in sources if source.get(name) is not None), None)

    def _refuse_lost_images(self, generation_config: GenerationConfig | None, kwargs: dict) -> None:
        if kwargs.get("inputs_embeds") is not None and self._setting("prefill_chunk_size", generation_config, kwargs):
            raise ValueError("`prefill_chunk_size` cuts ids, not embeddings: pass `input_ids`, or no chunk size.")
        if kwargs.get("pixel_values") is None and not kwargs.get("mm_encoder_outputs"):
            return
        assistant = kwargs.get("assistant_model")
        if assistant is not None and self.config.fusion == "cross_attention":
            raise ValueError("The library hands images on to the assistant: with cross-attention, leave it out.")
        early_exit = self._setting("assistant_early_exit", generation_config, kwargs)
        if early_exit or isinstance(assistant, ImagePromptGenerationMixin):
            raise ValueError(
                "The library shows an assistant no images: pass a language model without images as `assistant_model`, "
                "and no `assistant_early_exit`."
            )
        if assistant is not None:
            rows = assistant.get_input_embeddings().num_embeddings
            if rows <= self.config.image_token_id:
                raise ValueError(
                    f"`assistant_model` has {rows} tokens and none for the placeholder {self.config.image_token_id}: "
                    f"call `assistant_model.resize_token_embeddings({self.config.vocab_size})` first."
                )


def _pad_left(inputs: dict) -> dict:
    """The inputs of `generate` with padding moved to the left, as new tokens follow the last position."""
    mask, past = inputs["attention_mask"], inputs.get("past_key_values")
    if past is not None and past.get_seq_length() > 0:
        raise ValueError("Padding on the right cannot be moved behind a cache: pad on the left.")
    return _reorder(inputs, mask.argsort(dim=-1, stable=True))


def _reorder(inputs: dict, order: Tensor) -> dict:
    """What of the inputs has a value for each position, (rows, positions, …), in another order in each row."""
    rows = torch.arange(len(order), device=order.device)[:, None]
    names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
    return {name: inputs[name][rows, order] for name in names if inputs.get(name) is not None}


def _with_mask(inputs: dict) -> dict:
    mask = inputs.get("attention_mask")
    return inputs | {"attention_mask": torch.ones_like(inputs["input_ids"]) if mask is None else mask}


def _without(prefix: ImagePrefix, outputs: Tensor | ModelOutput) -> Tensor | ModelOutput:
    """What `generate` returns for the prompts as they were passed, without the prefix in front of them."""
    if isinstance(outputs, Tensor):
        return outputs[:, prefix.num_positions :]
    outputs["sequences"] = outputs["sequences"][:, prefix.num_positions :]
    return outputs


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards every module is in the mode in which it was."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
