"""The texts of a row: prompts and suffixes are paired, classes are words, and what is missing is said."""

import math
import random
import re
from typing import Any

from datasets import ClassLabel, Dataset, IterableDataset, List

from .sources import Source


def class_names_of(dataset: Dataset | IterableDataset, source: Source) -> list[str] | None:
    """What classes are called, by number; None where suffixes are no classes.

    Raises:
        ValueError: if `--class_names` are not as many as the data set's own.
    """
    feature = dataset.features[source.suffix_column]
    while isinstance(feature, List):
        feature = feature.feature
    names = feature.names if isinstance(feature, ClassLabel) else None
    if source.class_names is not None and names is not None and len(source.class_names) != len(names):
        raise ValueError(f"`--class_names` has {len(source.class_names)} words for the {len(names)} classes {names}.")
    return source.class_names or names


def all_texts(
    values: dict[str, Any], source: Source, class_names: list[str] | None, number: int | None = None
) -> list[tuple[str, list[str]]]:
    """Every prompt of a row, or the one of that number, with its suffixes.

    Raises:
        ValueError: if one is missing, or is no class where classes have names.
    """
    prompts = values[source.text_column] if source.text_column is not None else None
    suffixes = values[source.suffix_column]
    if not isinstance(prompts, list):
        return [_texts(prompts, suffixes, source, class_names)]
    if not isinstance(suffixes, list) or len(suffixes) != len(prompts) or not prompts:
        raise ValueError(
            f"{len(prompts)} of {source.text_column!r} but {suffixes!r:.200} in {source.suffix_column!r}: lists of "
            "prompts need lists of as many suffixes."
        )
    numbers = range(len(prompts)) if number is None else [number]
    return [_texts(prompts[n], suffixes[n], source, class_names) for n in numbers]


def draw_texts(texts: list[tuple[str, list[str]]], number: int) -> dict[str, list[str]]:
    """So many different texts of an image; of several suffixes for each of several prompts, one for each prompt."""
    if len(texts) == 1:
        ((prompt, suffixes),) = texts
        choices = [(prompt, suffix) for suffix in suffixes]
    else:
        choices = [(prompt, random.choice(suffixes)) for prompt, suffixes in texts]
    drawn = random.sample(choices, min(number, len(choices)))
    return {"text": [prompt for prompt, _ in drawn], "suffix": [suffix for _, suffix in drawn]}


def _texts(own: Any, suffixes: Any, source: Source, class_names: list[str] | None) -> tuple[str, list[str]]:
    """A prompt and its suffixes, with a space between where words would run together."""
    text = source.prompt
    if source.text_column is not None:
        if not isinstance(own, str) or not own.strip():
            raise ValueError(f"no prompt in {source.text_column!r}, but {own!r}.")
        if text and "{text}" not in text:
            raise ValueError(f"`--prompt` beside `--text_column` holds {{text}}, where each row's own goes: {text!r}.")
        text = text.replace("{text}", own) if text else own
    words = [_word(value, source, class_names) for value in (suffixes if isinstance(suffixes, list) else [suffixes])]
    if not words:
        raise ValueError(f"no text in {source.suffix_column!r}.")
    return text, [separate(text, word) for word in words]


def _word(value: Any, source: Source, class_names: list[str] | None) -> str:
    word = str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""
    if not word.strip() or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"no text in {source.suffix_column!r}, but {value!r}.")
    if class_names is None or value in class_names:
        return word
    # Tables write the numbers of classes as texts, and with a class missing some libraries wrote 1.0 for 1.
    number = int(float(word)) if re.fullmatch(r"\d+(\.0)?", word) else len(class_names)
    if number >= len(class_names):
        raise ValueError(
            f"class {value!r} in {source.suffix_column!r}, but there are {len(class_names)} names: "
            f"{', '.join(class_names):.200}."
        )
    return class_names[number]


def separate(text: str, suffix: str) -> str:
    """The suffix with a space in front where the words would otherwise run together."""
    return suffix if not text or text[-1].isspace() or suffix[:1].isspace() else f" {suffix}"
