"""Train or fine-tune an image-prompt model on a data set of images and texts, with transformers' own Trainer.

Run it as `imageprompt train …`, `python scripts/train.py …` or `accelerate launch scripts/train.py …`. Every field of
`TrainingArguments` is an option as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import (
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..composing import compose
from ..data import ImagePromptCollator
from ..data.arguments import DataArguments, training_data
from ..modeling import ImagePromptForConditionalGeneration
from ..options import feature_layer, json_object, new_gpt2
from ..processing import ImagePromptProcessor


@dataclass
class ModelArguments:
    """Which model: a saved one (`--model`), or parts to compose (`--vision` and `--text` or `--text_config`)."""

    model: str | None = field(default=None, metadata={"help": "Saved imageprompt model to go on with."})
    vision: str | None = field(default=None, metadata={"help": "timm name, Hub id or local folder of the backbone."})
    text: str | None = field(default=None, metadata={"help": "Hub id or local folder of the GPT-2 language model."})
    text_config: dict | str | None = field(
        default=None, metadata={"help": 'A new GPT-2 instead, as JSON: \'{"n_layer": 4, "n_embd": 256, "n_head": 4}\'.'}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Where to load the tokenizer from, if not --text."})
    pretrained: bool | None = field(default=None, metadata={"help": "Load the parts' weights (the default), or not."})
    connector: str | None = field(default=None, metadata={"help": "Connector between the parts; mlp by default."})
    connector_args: dict | str | None = field(default=None, metadata={"help": "What it takes, JSON: '{\"depth\": 2}'."})
    num_image_tokens: int | None = field(default=None, metadata={"help": "Tokens per image; the connector's default."})
    fusion: str | None = field(default=None, metadata={"help": "prefix (the default) or cross_attention."})
    feature_layer: str | None = field(
        default=None, metadata={"help": "Features of an earlier block (-2), several ([-2, -1]) or pooled."}
    )
    image_size: int | None = field(default=None, metadata={"help": "Square input in pixels; the backbone's own."})
    crop_pct: float | None = field(default=None, metadata={"help": "Share of the resized image that is kept."})
    preprocessing: dict | str | None = field(
        default=None, metadata={"help": "Overrides of the backbone's, JSON: '{\"input_size\": [3, 160, 320]}'."}
    )
    model_args: dict | str | None = field(default=None, metadata={"help": "Further timm.create_model keywords, JSON."})
    train_vision: bool | None = field(default=None, metadata={"help": "Whether the vision tower learns; as saved."})
    train_connector: bool | None = field(default=None, metadata={"help": "Whether the connector learns; as saved."})
    train_text: bool | None = field(default=None, metadata={"help": "Whether the language model learns; as saved."})


def build_model(args: ModelArguments) -> tuple[ImagePromptForConditionalGeneration, ImagePromptProcessor]:
    """The model that the arguments ask for, and its processor."""
    parts = {
        name: value
        for name, value in vars(args).items()
        if value is not None and name != "model" and not name.startswith("train_")
    }
    if args.model is not None:
        if parts:
            raise ValueError(f"--model is composed already: leave out {', '.join(f'--{name}' for name in parts)}.")
        model = ImagePromptForConditionalGeneration.from_pretrained(args.model)
        processor = ImagePromptProcessor.from_pretrained(args.model)
    else:
        if args.vision is None or (args.text is None) == (args.text_config is None):
            raise ValueError("Pass --model, or --vision with one of --text and --text_config.")
        preprocessing = json_object("--preprocessing", args.preprocessing)
        if args.image_size:
            preprocessing["input_size"] = (3, args.image_size, args.image_size)
        if args.crop_pct is not None:
            preprocessing["crop_pct"] = args.crop_pct
        model, processor = compose(
            args.vision,
            args.text or new_gpt2("--text_config", args.text_config),
            tokenizer=args.tokenizer,
            pretrained=args.pretrained is not False,
            model_args=json_object("--model_args", args.model_args),
            preprocessing=preprocessing,
            connector_args=json_object("--connector_args", args.connector_args) or None,
            feature_layer=feature_layer("--feature_layer", args.feature_layer),
            **{name: parts[name] for name in ("connector", "num_image_tokens", "fusion") if name in parts},
        )
    processor.check_model(model)
    model.set_trainable(vision=args.train_vision, connector=args.train_connector, text=args.train_text)
    return model, processor


def main(argv: Sequence[str] | None = None) -> None:
    """Parse `argv` (the command line by default), train, and save model, processor and metrics."""
    arguments = (ModelArguments, DataArguments, TrainingArguments)
    parser = HfArgumentParser(arguments, description=__doc__, prog="imageprompt train")
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(argv)
    training_args.remove_unused_columns = False  # the collator reads columns that the model does not name
    training_args.dataloader_pin_memory &= training_args.device.type != "cpu"
    set_seed(training_args.seed)

    model, processor = build_model(model_args)
    train_rows, eval_rows = training_data(
        data_args,
        model.config.image_size,
        evaluates=training_args.eval_strategy != "no",
        seed=training_args.seed,
    )
    trainer = Trainer(
        model,
        training_args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=ImagePromptCollator(processor, max_length=data_args.max_length),
        processing_class=processor,
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    if trainer.is_world_process_zero():
        print(f"Saved to {Path(training_args.output_dir).resolve()}")


if __name__ == "__main__":
    main()
