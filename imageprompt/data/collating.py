"""From data set rows to training batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.image_processing_utils import BatchFeature
from transformers.utils import logging

from ..processing import ImagePromptProcessor, holds_images
from .packing import pack

logger = logging.get_logger(__name__)

COLUMNS = {"suffix", "text", "image", "images"}


@dataclass
class ImagePromptCollator:
    """Rows to a padded batch with labels, for `Trainer(..., data_collator=ImagePromptCollator(processor))`.

    A row is a mapping with `suffix`, the text to learn, and, where they apply, `text`, the prompt before it, and
    `image` or `images`, one image or a list of them. Rows with and without images or prompts mix freely; what a row
    has besides is not used. `suffix` may also be a list, with `text` one prompt for all or a list of as many: several
    texts about the same images, which the model then encodes once for all of them.

    Args:
        processor: the model's processor.
        max_length: trims the suffix of rows that are longer than so many tokens, images included.
        pack_length: lays rows one behind the other, in their order, up to so many tokens in a line, instead of padding
            each; none sees another. A longer row has a line for itself. See [`imageprompt.data.packing`] for which
            models.

    Raises:
        ValueError: if the language model has fewer than `max_length` positions, or `pack_length` is less than 1; when
            called, if a row has no `suffix` (the columns found are named), not as many prompts as suffixes, or both
            `image` and `images`.
    """

    processor: ImagePromptProcessor
    max_length: int | None = None
    pack_length: int | None = None

    def __post_init__(self):
        if self.pack_length is not None and self.pack_length < 1:
            raise ValueError(f"`pack_length` is at least 1, got {self.pack_length}.")
        if self.max_length is None:
            return
        positions = self.processor.tokenizer.model_max_length
        if self.max_length > positions:
            raise ValueError(f"`max_length` {self.max_length} is more than the language model's {positions} positions.")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> BatchFeature:
        """Rows to `input_ids`, `attention_mask` and `labels`, (rows, positions), and `pixel_values`.

        Packed, `position_ids` stand in place of the mask: each row's begin with 0.
        """
        for index, row in enumerate(rows):
            if row.get("suffix") is None:
                raise ValueError(
                    f"Row {index} has no `suffix` (the text to learn); its columns are {sorted(row) or 'none'}. If "
                    "Trainer dropped them, set `remove_unused_columns=False`."
                )
            if row.get("image") is not None and row.get("images") is not None:
                raise ValueError(f"Row {index} has both `image` and `images`: keep one of them.")
            if unused := sorted(row.keys() - COLUMNS):
                # A misspelt prompt or picture would go missing without a sign.
                logger.warning_once(f"Not used for training: {', '.join(unused)}. Used: {', '.join(sorted(COLUMNS))}.")
        samples = [sample for index, row in enumerate(rows) for sample in _samples(index, row)]
        images, texts, suffixes = (list(column) for column in zip(*samples, strict=True))
        batch = self.processor(
            images=images,
            text=texts,
            suffix=suffixes,
            share_images=len(samples) > len(rows),
            padding=True,
            truncation=self.max_length is not None,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return batch if self.pack_length is None else pack(batch, self.pack_length)


def _samples(index: int, row: dict[str, Any]) -> list[tuple[list[Any], str, str]]:
    """Images, prompt and suffix of everything that a row has to learn."""
    images, texts, suffixes = _images(row), row.get("text") or "", row["suffix"]
    if isinstance(suffixes, str):
        return [(images, texts, suffixes)]
    if isinstance(texts, str):
        texts = [texts] * len(suffixes)
    if len(texts) != len(suffixes) or not suffixes:
        raise ValueError(f"Row {index} has {len(texts)} of `text` and {len(suffixes)} of `suffix`: one for each.")
    return [(images, text, suffix) for text, suffix in zip(texts, suffixes, strict=True)]


def _images(row: dict[str, Any]) -> list[Any]:
    images = row.get("images") if row.get("images") is not None else row.get("image")
    if images is None:
        return []
    return images if holds_images(images) else [images]
