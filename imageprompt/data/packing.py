"""Packing: rows one behind the other in a line, so that only the ends of lines are padding.

The library keeps rows of a line apart by their positions, which begin with 0 in each: attention stays within a row
(a block-diagonal mask), and so row, loss and gradients are what they are with padding. Which language models and
attention functions hold to that is tried, not listed.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.image_processing_utils import BatchFeature

from ..configuration import IGNORE_INDEX
from ..decoding import evaluating
from ..modeling import ImagePromptForConditionalGeneration

# Differences that rounding makes, as a share of the largest value, even in half precision.
_ROUNDING = 0.02


def pack(batch: BatchFeature, length: int) -> BatchFeature:
    """The rows of a batch in lines of at most so many tokens, in their order; a longer row has its own.

    Args:
        batch: of the collator, padded on the right.

    Returns:
        `input_ids`, `labels` and `position_ids`, (lines, positions), in place of the rows' values and mask. Each
        token that a line is padded with is a row by itself, of which nothing is learnt.
    """
    mask = batch.pop("attention_mask").bool()
    lines = _lines(mask.sum(-1).tolist(), length)

    def joined(values: Tensor, padding: int) -> Tensor:
        rows = [row[kept] for row, kept in zip(values, mask, strict=True)]
        return pad_sequence([torch.cat(rows[line]) for line in lines], batch_first=True, padding_value=padding)

    batch["input_ids"] = joined(batch["input_ids"], int(batch["input_ids"][0][mask[0]][-1]))  # the end of a text
    batch["labels"] = joined(batch["labels"], IGNORE_INDEX)
    batch["position_ids"] = joined(mask.cumsum(-1) - 1, 0)
    return batch


def _lines(lengths: list[int], limit: int) -> list[slice]:
    """Which rows come into each line."""
    lines, start, total = [], 0, 0
    for row, length in enumerate(lengths):
        if row > start and total + length > limit:
            lines.append(slice(start, row))
            start, total = row, 0
        total += length
    return [*lines, slice(start, len(lengths))]


@torch.no_grad()
def check_packable(model: ImagePromptForConditionalGeneration) -> None:
    """Refuse a model in which rows of one line see each other, as a trial with four short rows shows.

    Raises:
        ValueError: naming what to do instead.
    """
    kind, attention = model.config.text_config.model_type, model.model.language_model.config._attn_implementation
    advice = "leave out `--pack_length`, and group rows by length (`--train_sampling_strategy group_by_length`)."
    if model.config.fusion != "prefix":
        raise ValueError(f"Rows in one line would see each other's images with `fusion='cross_attention'`: {advice}")
    words = min(12, int(model.config.image_token_id))  # ids before the placeholder's
    rows = torch.arange(12, device=model.device).view(4, 3) % words
    packed = rows.view(2, 6)
    positions = torch.arange(3, device=model.device).repeat(2, 2)
    with evaluating(model):
        apart = model.model(input_ids=rows, use_cache=False).last_hidden_state.float()
        together = model.model(input_ids=packed, position_ids=positions, use_cache=False).last_hidden_state.float()
    if (together.view_as(apart) - apart).abs().max() > _ROUNDING * apart.abs().max():
        raise ValueError(f"Rows in one line see each other in a {kind} with {attention} attention: {advice}")
