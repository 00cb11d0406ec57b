"""One training, from a model and its rows to a folder with the model, its metrics and its curves."""

from collections.abc import Sized
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from ..compression import KeepZeros
from ..data import ImagePromptCollator
from ..data.arguments import data_facts
from ..data.feature_cache import cache_features, check_cacheable, without_features
from ..evaluation.learnt import learnt_data
from ..modeling import ImagePromptForConditionalGeneration
from ..options import json_object
from ..processing import ImagePromptProcessor
from ..provenance import provenance
from .arguments import Arguments, LearningArguments
from .lora import add_lora, merge_lora
from .trainer import ImagePromptTrainer

# Options that say how a model was trained.
_TOLD = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "learning_rate",
    "vision_learning_rate",
    "connector_learning_rate",
    "text_learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "bf16",
    "fp16",
    "seed",
)


class TrainingRows(NamedTuple):
    """Rows to train on, and those to evaluate on, if there are any."""

    train: Any
    evaluation: Any


def choose_what_learns(model: ImagePromptForConditionalGeneration, args: LearningArguments) -> Any:
    """The model with the parts frozen that are not to learn, or with LoRA adapters in it.

    Raises:
        ValueError: if nothing would learn, the model is quantised, or LoRA is asked for and parts as well, or zeros
            that it would fill.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("Quantised weights do not learn: train the model that this one was made of, then compress it.")
    parts = {"vision": args.train_vision, "connector": args.train_connector, "text": args.train_text}
    if args.lora is not None:
        if given := [f"--train_{part}" for part, learns in parts.items() if learns is not None]:
            raise ValueError(
                f"--lora says what learns: leave out {', '.join(given)}, and name what is to learn as a whole in its "
                "modules_to_save."
            )
        if args.keep_zeros:
            raise ValueError("--keep_zeros: adapters merged into the weights would fill the zeros. Leave out --lora.")
        return add_lora(model, json_object("--lora", args.lora))
    model.set_trainable(**parts)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("Every part is frozen: let at least the connector learn, with --train_connector true.")
    return model


def learning_callbacks(args: LearningArguments) -> list[TrainerCallback]:
    """What has to happen in every step for these arguments."""
    return [KeepZeros()] if args.keep_zeros else []


def run_training(
    model: ImagePromptForConditionalGeneration, processor: ImagePromptProcessor, rows: TrainingRows, options: Arguments
) -> None:
    """Train, and write model, processor, metrics and curves to `options.training.output_dir`.

    `training.json` says what it came from: data, also that of the model that it started from, options, metrics, broken
    rows, versions and machine, and which weights it is of. With LoRA, the folder holds the merged model, and `adapter/`
    the adapter.
    """
    trainable, cache = dict(model.config.trainable), options.learning.feature_cache
    args, folder = options.training, Path(options.training.output_dir)
    learning = choose_what_learns(model, options.learning)
    if cache is not None:
        check_cacheable(model, rows.train)
    trainer = ImagePromptTrainer(
        learning,
        args,
        train_dataset=rows.train,
        eval_dataset=rows.evaluation,
        data_collator=ImagePromptCollator(processor, options.data.max_length, options.data.pack_length),
        processing_class=processor,
        callbacks=learning_callbacks(options.learning),
    )
    if cache is not None:
        cache_features(
            Path(cache).expanduser(),
            trainer.plain_model,  # on its device
            processor,
            rows.train,
            dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
            batch_size=args.per_device_eval_batch_size,
            num_workers=args.dataloader_num_workers,
        )
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.broken_rows.share()
    if cache is not None:
        without_features(rows.train)  # which the next stage may augment, or encode with a tower that learns
    if options.learning.lora is not None:
        trainer.save_model(str(folder / "adapter"))
        trainer.model = merge_lora(trainer.model, processor, trainable)
    # A stream's rows are not counted in one place.
    record = {
        "data": data_facts(options.data),
        "base_data": learnt_data(Path(options.model.model).expanduser()) if options.model.model else [],
        "model_options": {name: value for name, value in vars(options.model).items() if value is not None},
        "rows": len(rows.train) if isinstance(rows.train, Sized) else None,
        "options": {name: getattr(args, name) for name in _TOLD},
        "learns": None if options.learning.lora is not None else dict(model.config.trainable),
        "lora": options.learning.lora,
        "metrics": result.metrics,
        "broken_rows": getattr(rows.train, "broken", None),
        **provenance(),
    }
    if trainer.is_world_process_zero():
        for name in record["broken_rows"] or []:
            print(f"Left out: {name}")
    trainer.save_run(result, record)
