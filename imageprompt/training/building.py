"""From the options of a command to a model, its processor and what of it learns."""

from argparse import ArgumentTypeError
from collections.abc import Iterable
from typing import Any

import torch
from transformers.hf_argparser import string_to_bool

from ..composing import compose
from ..data.arguments import DataArguments, read_sources
from ..modeling import ImagePromptForConditionalGeneration
from ..options import feature_layer, json_object, new_gpt2
from ..processing import ImagePromptProcessor
from .arguments import ModelArguments
from .tokenizing import train_tokenizer


def build_model(
    args: ModelArguments, texts: Iterable[str]
) -> tuple[ImagePromptForConditionalGeneration, ImagePromptProcessor]:
    """The model that the arguments ask for, and its processor.

    Args:
        args: the parts.
        texts: what a new tokenizer is made from, where one is asked for.

    Raises:
        ValueError: for parts that are missing, named twice or unknown.
    """
    parts = {name: value for name, value in vars(args).items() if value is not None and name != "model"}
    if args.model is not None:
        if parts:
            raise ValueError(f"--model is composed already: leave out {', '.join(f'--{name}' for name in parts)}.")
        return load_model(args.model)
    if args.vision is None or (args.text is None) == (args.text_config is None):
        raise ValueError("Pass --model, or --vision with one of --text and --text_config.")
    preprocessing = json_object("--preprocessing", args.preprocessing)
    if args.image_size:
        preprocessing["input_size"] = (3, args.image_size, args.image_size)
    if args.crop_pct is not None:
        preprocessing["crop_pct"] = args.crop_pct
    tokenizer: Any = args.tokenizer
    if args.new_tokenizer is not None:
        if args.tokenizer is not None or args.text is not None:
            raise ValueError("--new_tokenizer is for a new language model, --text_config, and stands for --tokenizer.")
        tokenizer = train_tokenizer(texts, args.new_tokenizer)
    text = args.text or new_gpt2("--text_config", args.text_config, len(tokenizer) if args.new_tokenizer else None)
    model, processor = compose(
        args.vision,
        text,
        tokenizer=tokenizer,
        pretrained=_which_weights(args.pretrained),
        model_args=json_object("--model_args", args.model_args),
        preprocessing=preprocessing,
        connector_args=json_object("--connector_args", args.connector_args) or None,
        feature_layer=feature_layer("--feature_layer", args.feature_layer),
        **{name: parts[name] for name in ("connector", "num_image_tokens", "fusion") if name in parts},
    )
    return _laid_out(model), processor


def refuse_streams(args: DataArguments) -> None:
    """Raise a ValueError if a source streams: a new tokenizer is made of all texts, before training."""
    if any(source.streaming for source, _ in read_sources(args).values()):
        raise ValueError(
            "--new_tokenizer reads all training texts first, so it needs data with an end, which a stream does not "
            "have: pass --tokenizer, or leave out --streaming."
        )


def load_model(folder: str) -> tuple[ImagePromptForConditionalGeneration, ImagePromptProcessor]:
    """A saved model and its processor."""
    model = ImagePromptForConditionalGeneration.from_pretrained(folder)
    processor = ImagePromptProcessor.from_pretrained(folder)
    processor.check_model(model)
    return _laid_out(model), processor


def _which_weights(value: str | None) -> bool | str:
    if value in ("vision", "text"):
        return value
    try:
        return value is None or string_to_bool(value)
    except ArgumentTypeError as error:
        raise ValueError(f"--pretrained is true, false, vision or text, got {value!r}.") from error


def _laid_out(model: ImagePromptForConditionalGeneration) -> ImagePromptForConditionalGeneration:
    """In the layout in which convolutions are fastest."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # the library's wrapper hides self
