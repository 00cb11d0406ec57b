"""Runs of `ImagePromptTrainer` that take a second."""

from conftest import picture, tiny

from imageprompt import ImagePromptCollator
from imageprompt.training import ImagePromptTrainer, ImagePromptTrainingArguments

SUFFIXES = ["A red sofa!", "!", "Two cats...", "A photo of a dog on a red sofa.", " What is it?", "A dog.", "It", "No"]


def eight_rows() -> list[dict]:
    return [{"image": picture(seed), "text": "A photo of", "suffix": text} for seed, text in enumerate(SUFFIXES)]


def trainer_of(tokenizer, folder, rows=None, model=None, callbacks=None, eval_rows=None, **settings):
    """A trainer of a tiny model (or of `model`, with its processor) on eight rows, for two steps."""
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no"} | settings
    args = ImagePromptTrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, logging_steps=1, **settings)
    model, processor = model or tiny(tokenizer)
    rows = rows or eight_rows()
    return ImagePromptTrainer(
        model,
        args,
        train_dataset=rows,
        eval_dataset=rows if eval_rows is None else eval_rows,
        data_collator=ImagePromptCollator(processor),
        processing_class=processor,
        callbacks=callbacks,
    )
