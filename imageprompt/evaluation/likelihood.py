"""How likely texts are behind images and prompts, without running the images and prompts again for every text."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..configuration import IGNORE_INDEX
from ..decoding import evaluating
from ..modeling import ImagePromptForConditionalGeneration
from ..processing import ImagePromptProcessor


class TextScores(NamedTuple):
    """How likely the texts behind some rows are.

    Args:
        log_likelihoods (`Tensor`): (rows,), of each whole text, in nats and fp32.
        tokens (`Tensor`): (rows,), how many tokens each has.
        is_greedy (`Tensor`): (rows,), whether greedy search would write just this text.
    """

    log_likelihoods: Tensor
    tokens: Tensor
    is_greedy: Tensor


class EncodedPrompts:
    """Rows of images and prompts, run through the model once.

    Args:
        images: a list of images for each row, which may be empty.
        texts: a prompt for each row; with `<image>` in it or not, as the processor takes it.

    Raises:
        ValueError: as the processor does; so for a row with neither image nor prompt.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: ImagePromptForConditionalGeneration,
        processor: ImagePromptProcessor,
        images: Sequence[Sequence[Any]],
        texts: Sequence[str],
    ):
        self.model, self.processor = model, processor
        inputs = processor(images=list(images), text=list(texts), padding=True, return_tensors="pt").to(model.device)
        self.count = len(inputs["input_ids"])
        if not model.has_recurrent_layers:
            self.prefix = model.encode_prefix(**inputs)
            return
        pixel_values = inputs.pop("pixel_values", None)
        with evaluating(model):
            if pixel_values is not None:
                inputs["mm_encoder_outputs"] = {"image": model.get_image_features(pixel_values, return_dict=True)}
        self.inputs = inputs

    @torch.no_grad()
    def score(self, suffixes: Sequence[str]) -> TextScores:
        """Score one text behind each row, its end-of-text token included, as the model's own `score` does.

        Args:
            suffixes: appended to the prompts as they are.

        Raises:
            ValueError: if there is not one text for each row, a text holds an image's mark, a row becomes longer than
                the language model's positions, or the model's logits are not numbers.
        """
        if len(suffixes) != self.count:
            raise ValueError(f"{len(suffixes)} texts for {self.count} rows: pass one for each.")
        tokenizer = self.processor.tokenizer
        for suffix in suffixes:
            if self.processor.image_token in suffix:
                raise ValueError(f"A text to score holds {self.processor.image_token}: {suffix!r:.200}")
        ends = [suffix + tokenizer.eos_token for suffix in suffixes]
        encoded = tokenizer(ends, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
        encoded = encoded.to(self.model.device)
        ids, is_text = encoded["input_ids"], encoded["attention_mask"]
        labels = ids.masked_fill(is_text == 0, IGNORE_INDEX)
        with evaluating(self.model):
            logits = self._logits(ids, is_text)
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=IGNORE_INDEX
        )
        log_likelihoods = -losses.view_as(labels).sum(-1)
        if log_likelihoods.isnan().any():  # such a text would be ranked first or last by chance
            raise ValueError("The model's logits are not numbers: its weights are broken, or too large for its dtype.")
        is_greedy = ((logits.argmax(-1) == ids) | (is_text == 0)).all(-1)
        return TextScores(log_likelihoods, is_text.sum(-1), is_greedy)

    def _logits(self, ids: Tensor, is_text: Tensor) -> Tensor:
        """What the model expects at each token of the texts, (rows, tokens, vocabulary)."""
        if self.model.has_recurrent_layers:  # no prefix: rows are run whole
            whole = {
                "input_ids": torch.cat([self.inputs["input_ids"], ids], dim=1),
                "attention_mask": torch.cat([self.inputs["attention_mask"], is_text], dim=1),
            }
            return self.model(**{**self.inputs, **whole}, logits_to_keep=ids.shape[1] + 1).logits[:, :-1]
        states = self.prefix.last_hidden_state
        if ids.shape[1] > 1:
            text = {"input_ids": ids[:, :-1], "attention_mask": is_text[:, :-1]}
            behind = self.model.model(**self.prefix.followed_by(text), use_cache=True, return_dict=True)
            states = torch.cat([states, behind.last_hidden_state], dim=1)
        return self.model.lm_head(states)
