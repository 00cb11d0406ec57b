"""Train a language model on plain text: a new GPT-2, or a model to go on with.

Run it as `imageprompt pretrain …`. The folder that it writes is a plain model of transformers' with its tokenizer:
`imageprompt train --text` puts a vision backbone in front of it.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)

from ..activations import fuse_gelu
from ..composing import load_tokenizer, loading
from ..data.sources import Source
from ..options import new_gpt2, spell_out_recipe
from ..provenance import provenance
from .arguments import LanguageModelArguments
from .checkpoints import refuse_earlier_run
from .steady import SteadyTrainer, SteadyTrainingArguments
from .text import Blocks, Documents, measure, read_documents
from .tokenizing import train_tokenizer


@dataclass
class TextArguments:
    """Which text."""

    dataset: str = field(metadata={"help": "Hub name, local folder or file: txt, parquet, csv, json, jsonl, …"})
    subset: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    text_column: str = field(default="text", metadata={"help": "Texts, or lists of texts; of a txt file, its lines."})
    documents: Documents = field(
        default="rows", metadata={"help": "A document ends with each row, with an empty row, or only with the last."}
    )
    train_split: str = field(default="train", metadata={"help": 'Such as train or "train[:90%%]".'})
    eval_split: str = field(default="validation", metadata={"help": 'For the perplexity, such as "train[90%%:]".'})
    shuffle_rows: int | None = field(
        default=None, metadata={"help": "Seed to shuffle the rows with before a split such as train[:80%%] is cut."}
    )

    def __post_init__(self):
        if self.shuffle_rows is not None and self.documents != "rows":
            raise ValueError(
                f"`--shuffle_rows` would tear documents apart that have several rows (--documents {self.documents})."
            )


@dataclass
class BlockArguments(LanguageModelArguments):
    """Which model: one to go on with (`--text`), or a new one (`--text_config`) with a tokenizer; and its rows."""

    block_size: int | None = field(
        default=None, metadata={"help": "Tokens in a row of training; by default all of the model's positions."}
    )


class Options(NamedTuple):
    """All options of one run."""

    text: TextArguments
    model: BlockArguments
    training: SteadyTrainingArguments


def parse(argv: Sequence[str]) -> Options:
    """The options of a command line, which may begin with a recipe."""
    types = tuple(Options.__annotations__.values())
    parser = HfArgumentParser(types, description="Train a language model on plain text.", prog="imageprompt pretrain")
    return Options(*parser.parse_args_into_dataclasses(spell_out_recipe(argv)))


def build(args: LanguageModelArguments, documents: Sequence[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that the options ask for, and its tokenizer.

    Args:
        args: the options.
        documents: what a new tokenizer is made from.

    Raises:
        ValueError: for a model or tokenizer that is missing, named twice, or cannot be used.
    """
    if (args.text is None) == (args.text_config is None):
        raise ValueError("Pass one of --text, a model to go on with, and --text_config, a new one.")
    given = [name for name in ("tokenizer", "new_tokenizer") if getattr(args, name) is not None]
    if len(given) != (args.text is None):
        raise ValueError(
            "A new model takes one of --tokenizer and --new_tokenizer, such as 8000; one to go on with brings its own."
        )
    if args.new_tokenizer is not None:
        tokenizer = train_tokenizer(documents, args.new_tokenizer)
    else:
        source = args.text if args.tokenizer is None else args.tokenizer
        tokenizer = load_tokenizer(source)
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no `eos_token`, by which a model knows where a document ends.")
    if args.text is not None:
        with loading(args.text):
            model = AutoModelForCausalLM.from_pretrained(args.text)
    else:
        config = new_gpt2("--text_config", args.text_config, len(tokenizer))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
        model = AutoModelForCausalLM.from_config(config)
    fuse_gelu(model)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"The tokenizer has {len(tokenizer)} tokens, the model only {model.config.vocab_size}.")
    return model, tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Parse `argv` (the command line by default), train, save, and write the perplexity to `perplexity.json`."""
    options = parse(sys.argv[1:] if argv is None else argv)
    text, args = options.text, options.training
    refuse_earlier_run(args.output_dir, args.resume_from_checkpoint)
    columns = {"image_column": "none", "suffix_column": text.text_column}
    source = Source(text.dataset, text.subset, **columns, shuffle_rows=text.shuffle_rows)
    documents = {split: read_documents(source, split, text.documents) for split in (text.train_split, text.eval_split)}
    set_seed(args.seed)
    model, tokenizer = build(options.model, documents[text.train_split])
    positions: Any = getattr(model.config, "max_position_embeddings", None)
    block_size = options.model.block_size or positions or 1024
    if not 2 <= block_size <= (positions or block_size):
        raise ValueError(f"--block_size is between 2 and the model's {positions} positions, got {block_size}.")
    blocks = {split: Blocks(texts, tokenizer, block_size) for split, texts in documents.items()}

    trainer = SteadyTrainer(
        model,
        args,
        train_dataset=blocks[text.train_split],
        eval_dataset=blocks[text.eval_split],
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_run(result)
    measured = measure(trainer, blocks[text.eval_split])
    if trainer.is_world_process_zero():
        learnt = {"tokens": len(blocks[text.train_split].tokens) - 1, "bytes": blocks[text.train_split].num_bytes}
        facts = {"trained_on": learnt, "parameters": model.num_parameters(), "vocabulary": len(tokenizer)}
        facts |= {"text": asdict(text), "block_size": block_size, "seed": args.seed}
        file = Path(args.output_dir) / "perplexity.json"
        file.write_text(json.dumps(measured | facts | provenance(), indent=2) + "\n")
        measures = f"perplexity {measured['perplexity']:.2f}, {measured['bits_per_byte']:.3f} bits per byte"
        print(f"On {text.eval_split}: {measures}.")
        print(f"Saved to {Path(args.output_dir).resolve()}")


if __name__ == "__main__":
    main()
