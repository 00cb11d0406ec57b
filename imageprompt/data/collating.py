"""From data set rows to training batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.image_processing_utils import BatchFeature

from ..processing import ImagePromptProcessor


@dataclass
class ImagePromptCollator:
    """Rows to a padded batch with labels, for `Trainer(..., data_collator=ImagePromptCollator(processor))`.

    A row is a mapping with `suffix`, the text to learn, and, where they apply, `text`, the prompt before it, and
    `image` or `images`, one image or a list of them. Rows with and without images or prompts mix freely.

    Args:
        processor: the model's processor.
        max_length: trims the suffix of rows that are longer than so many tokens, images included.

    Raises:
        ValueError: if a row has no `suffix`; the columns found are named.
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
    return list(images) if isinstance(images, (list, tuple)) else [images]
