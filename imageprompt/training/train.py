"""Train or fine-tune an image-prompt model on a data set of images and texts.

Run it as `imageprompt train …`, `python scripts/train.py …` or `accelerate launch scripts/train.py …`. Every field of
`TrainingArguments` is an option as well.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import set_seed

from ..data import ImagePromptCollator
from ..data.arguments import training_data, training_texts
from .arguments import parse
from .building import build_model
from .trainer import ImagePromptTrainer


def main(argv: Sequence[str] | None = None) -> None:
    """Parse `argv` (the command line by default), train, and save model, processor and metrics."""
    options = parse(sys.argv[1:] if argv is None else argv)
    set_seed(options.training.seed)
    model, processor = build_model(options.model, training_texts(options.data))
    # The layout in which convolutions are fastest.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # the library's wrapper hides self
    learning = options.learning
    model.set_trainable(vision=learning.train_vision, connector=learning.train_connector, text=learning.train_text)
    train_rows, eval_rows = training_data(
        options.data,
        model.config.image_size,
        evaluates=options.training.eval_strategy != "no",
        seed=options.training.seed,
    )
    trainer = ImagePromptTrainer(
        model,
        options.training,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=ImagePromptCollator(processor, max_length=options.data.max_length),
        processing_class=processor,
    )
    result = trainer.train(resume_from_checkpoint=options.training.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    if trainer.is_world_process_zero():
        print(f"Saved to {Path(options.training.output_dir).resolve()}")


if __name__ == "__main__":
    main()
