"""How likely texts are behind images and prompts, without running the images and prompts again for every text."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..configuration import IGNORE_INDEX
from ..modeling import ImagePromptForConditionalGeneration, evaluating
from ..processing import ImagePromptProcessor


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
        self.mask, pixel_values = inputs["attention_mask"], inputs.pop("pixel_values", None)
        with evaluating(model):
            if pixel_values is not None:
                inputs["mm_encoder_outputs"] = {"image": model.get_image_features(pixel_values, return_dict=True)}
            # Recurrent layers go on from a cache by one token only: their rows are run whole.
            if getattr(model.model.language_model, "_is_stateful", False):
                self.inputs = inputs
            else:
                self.inputs = None
                self.outputs = model(**inputs, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def log_likelihoods(self, suffixes: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The log-likelihood of one text behind each row, its end-of-text token included, as [`score`] gives it.

        Args:
            suffixes: appended to the prompts as they are.

        Returns:
            (rows,) in nats, in fp32, and (rows,), of how many tokens.

        Raises:
            ValueError: if there is not one text for each row, a text holds an image's mark, a row becomes longer than
                the language model's positions, or the model's logits are not numbers.
        """
        if len(suffixes) != len(self.mask):
            raise ValueError(f"{len(suffixes)} texts for {len(self.mask)} rows: pass one for each.")
        tokenizer = self.processor.tokenizer
        for suffix in suffixes:
            if self.processor.image_token in suffix:
                raise ValueError(f"A text to score holds {self.processor.image_token}: {suffix!r:.200}")
        ends = [suffix + tokenizer.eos_token for suffix in suffixes]
        encoded = tokenizer(ends, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
        ids, is_text = encoded["input_ids"].to(self.mask.device), encoded["attention_mask"].to(self.mask.device)
        labels = ids.masked_fill(is_text == 0, IGNORE_INDEX)
        counts = is_text.sum(-1)
        if self.inputs is not None:
            before = self.inputs["input_ids"]
            whole = {
                "input_ids": torch.cat([before, ids], dim=1),
                "attention_mask": torch.cat([self.mask, is_text], dim=1),
                "labels": torch.cat([torch.full_like(before, IGNORE_INDEX), labels], dim=1),
            }
            return _numbers(self.model.score(**{**self.inputs, **whole})), counts
        logits = self.outputs.logits
        if ids.shape[1] > 1:
            with evaluating(self.model):
                following = self.model(
                    input_ids=ids[:, :-1],
                    attention_mask=torch.cat([self.mask, is_text[:, :-1]], dim=1),
                    # A cache grows with what is run behind it; the next text begins again after the prompt.
                    past_key_values=copy.deepcopy(self.outputs.past_key_values),
                    use_cache=True,
                )
            logits = torch.cat([logits, following.logits], dim=1)
        losses = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORE_INDEX)
        return _numbers(-losses.sum(-1)), counts


def _numbers(values: Tensor) -> Tensor:
    """The values, unless one is none: it would be ranked first or last by chance."""
    if values.isnan().any():
        raise ValueError("The model's logits are not numbers: its weights are broken, or too large for its dtype.")
    return values
