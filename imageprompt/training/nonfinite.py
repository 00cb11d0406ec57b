"""What is left to look at when a loss is not finite: the batch, with its texts, and a first guess at the cause."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn


def save_batch(file: Path, inputs: Mapping[str, Any], processor: Any, facts: dict[str, str]) -> None:
    """Write a batch so that it can be run again: `model(**safetensors.torch.load_file(file)).loss`.

    Args:
        file: a `.safetensors` file.
        inputs: of the model.
        processor: the model's processor or tokenizer, or `None`; then no texts are written.
        facts: for the file's metadata, beside `texts`, a JSON list with the text of each row.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in inputs.items() if torch.is_tensor(value)}
    if processor is not None:
        facts = facts | {"texts": json.dumps(_texts(tensors, processor), ensure_ascii=False)}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata=facts)


def _texts(tensors: dict[str, torch.Tensor], processor: Any) -> list[str]:
    """The text of each row, without padding and with one mark for each image."""
    ids, tokenizer = tensors["input_ids"], getattr(processor, "tokenizer", processor)
    mask = tensors.get("attention_mask", torch.ones_like(ids)).bool()
    texts = [tokenizer.decode(row[kept]) for row, kept in zip(ids, mask, strict=True)]
    if (mark := getattr(processor, "image_token", None)) is None:
        return texts
    return [re.sub(f"({re.escape(mark)}){{{processor.num_image_tokens}}}", mark, text) for text in texts]


def say_what_is_not_finite(inputs: Mapping[str, Any], model: nn.Module) -> str:
    """Where a loss that is not finite may come from."""
    inputs = {name: value for name, value in inputs.items() if torch.is_tensor(value) and value.is_floating_point()}
    if broken := [name for name, value in inputs.items() if not value.isfinite().all()]:
        return f"In the batch, {' and '.join(broken)} hold values that are not finite: mend the data."
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if broken:
        return (
            f"{len(broken)} weights are not finite any more, {broken[0]} the first, so a step before this one broke "
            "them: lower the learning rate, warm up longer, or use --bf16 in place of --fp16."
        )
    return (
        "Batch and weights are finite, so values overflow on the way: lower the learning rate, warm up longer, or use "
        "--bf16 in place of --fp16."
    )
