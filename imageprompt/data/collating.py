"""From data set rows to training batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.image_processing_utils import BatchFeature
from transformers.utils import logging

from ..processing import ImagePromptProcessor, holds_images

logger = logging.get_logger(__name__)

COLUMNS = {"suffix", "text", "image", "images"}


@dataclass
class ImagePromptCollator:
    """Rows to a padded batch with labels, for `Trainer(..., data_collator=ImagePromptCollator(processor))`.

    A row is a mapping with `suffix`, the text to learn, and, where they apply, `text`, the prompt before it, and
    `image` or `images`, one image or a list of them. Rows with and without images or prompts mix freely; what a row
    has besides is not used.

    Args:
        processor: the model's processor.
        max_length: trims the suffix of rows that are longer than so many tokens, images included.

    Raises:
        ValueError: if a row has no `suffix` (the columns found are named), or both `image` and `images`.
    """

    processor: ImagePromptProcessor
    max_length: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> BatchFeature:
        """Rows to `input_ids`, `attention_mask` and `labels`, (rows, positions), and `pixel_values`."""
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
        return self.processor(
            images=[_images(row) for row in rows],
            text=[row.get("text") or "" for row in rows],
            suffix=[row["suffix"] for row in rows],
            padding=True,
            truncation=self.max_length is not None,
            max_length=self.max_length,
            return_tensors="pt",
        )


def _images(row: dict[str, Any]) -> list[Any]:
    images = row.get("images") if row.get("images") is not None else row.get("image")
    if images is None:
        return []
    return images if holds_images(images) else [images]
