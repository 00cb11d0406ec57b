"""Plain text for a language model: documents, blocks of their tokens, and how well a model expects them.

Documents are tokenised, each closed with the tokenizer's end of text, joined, and cut into blocks. A block begins with
the last token of the one before, so that every token is predicted once, and a perplexity is that of the whole text.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedTokenizerBase, default_data_collator

from ..configuration import IGNORE_INDEX
from ..data.sources import Source, load
from .steady import SteadyTrainer

# Where a document ends: with each row, with an empty row, or only with the last.
Documents = Literal["rows", "paragraphs", "whole"]


def read_documents(source: Source, split: str, documents: Documents = "rows") -> list[str]:
    """The documents of a split.

    Args:
        source: its `suffix_column` holds texts, or lists of texts, each of them a row; of a `.txt` file, the lines.
        split: as of [`load`].
        documents: where one ends: "rows", "paragraphs" or "whole".

    Raises:
        ValueError: if there is no such data, split or column, or no text in it.
    """
    rows = list(_texts(load(source, split)[source.suffix_column], source))
    if documents == "whole":
        rows = ["\n".join(rows)]
    elif documents == "paragraphs":
        rows = "\n".join(row.rstrip() for row in rows).split("\n\n")
    kept = [text for row in rows if (text := row.strip("\n"))]
    if not kept:
        raise ValueError(f"The split {split!r} of {source.dataset} has no text in its column {source.suffix_column!r}.")
    return kept


def _texts(column: Sequence[Any], source: Source) -> Iterator[str]:
    for number, value in enumerate(column):
        for text in value if isinstance(value, list) else [value]:
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"Row {number} of {source.dataset} has no text in {source.suffix_column!r}: {text!r:.90}."
                )
            yield text or ""


class Blocks(Dataset):
    """The tokens of documents in blocks, as inputs of a causal language model.

    A block is a dictionary of `input_ids`, `attention_mask` and `labels`, (block size,); only the last one is padded. A
    model predicts all of its tokens but the first.

    Args:
        documents: texts.
        tokenizer: its `eos_token` stands before the first document and after each.
        block_size: tokens in a block, at least two.
    """

    def __init__(self, documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, block_size: int):
        self.block_size, self.end = block_size, tokenizer.eos_token_id
        parts = [[self.end]]
        for start in range(0, len(documents), 1000):
            batch = tokenizer(list(documents[start : start + 1000]), add_special_tokens=False, verbose=False)
            parts += [[*ids, self.end] for ids in batch["input_ids"]]
        self.tokens = np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])
        self.num_bytes = sum(len(text.encode()) for text in documents)

    def __len__(self) -> int:
        return math.ceil((len(self.tokens) - 1) / (self.block_size - 1))

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        start = index * (self.block_size - 1)
        ids = self.tokens[start : start + self.block_size].tolist()
        # Labels are masked here, by place: DataCollatorForLanguageModeling masks padding by its id, and so every end of
        # a document, where the two are the same token.
        padding = self.block_size - len(ids)
        return {
            "input_ids": ids + [self.end] * padding,
            "attention_mask": [1] * len(ids) + [0] * padding,
            "labels": ids + [IGNORE_INDEX] * padding,
        }


@torch.no_grad()
def measure(trainer: SteadyTrainer, blocks: Blocks) -> dict[str, float]:
    """How well the trainer's model expects a text; processes share the work.

    Returns:
        `perplexity` and `nats_per_token`, ends of documents among the tokens; `bits_per_byte` of the text, by which
        models with different tokenizers can be compared; `tokens` and `bytes`.
    """
    model, args = trainer.plain_model.eval(), trainer.args
    own = Subset(blocks, range(args.process_index, len(blocks), args.world_size))
    nats = torch.zeros((), dtype=torch.float64)
    for batch in DataLoader(own, batch_size=args.per_device_eval_batch_size, collate_fn=default_data_collator):
        batch = {name: value.to(args.device) for name, value in batch.items()}
        targets = batch.pop("labels")[:, 1:]
        with trainer.compute_loss_context_manager():  # autocast, as in training
            logits = model(**batch).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")  # 0 where ignored
        nats += losses.double().sum().cpu()
    total = trainer.accelerator.reduce(nats.to(args.device)).item()
    num_tokens = len(blocks.tokens) - 1
    return {
        "perplexity": math.exp(total / num_tokens),
        "nats_per_token": total / num_tokens,
        "bits_per_byte": total / math.log(2) / blocks.num_bytes,
        "tokens": num_tokens,
        "bytes": blocks.num_bytes,
    }
