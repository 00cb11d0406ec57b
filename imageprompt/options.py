"""Options of the command line: those that are JSON, with errors that name the option, and recipes."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import GPT2Config


def json_object(option: str, value: str | dict | None) -> dict[str, Any]:
    """The object that an option holds; nothing is an empty one.

    Raises:
        ValueError: if it is no JSON object.
    """
    if value is None or isinstance(value, dict):
        return value or {}
    parsed = _parsed(option, value)
    if not isinstance(parsed, dict):
        raise ValueError(f"{option} is a JSON object, such as '{{\"name\": 1}}', got {value!r}.")
    return parsed


def spell_out_recipe(argv: Sequence[str]) -> list[str]:
    """A command line whose first word may be a recipe, a JSON file of options; options behind it come on top.

    Raises:
        ValueError: if the file is not there, or holds no JSON object.
    """
    if not argv or argv[0].startswith("-"):
        return list(argv)
    recipe, *more = argv
    if not Path(recipe).is_file():
        raise ValueError(f"{recipe!r} is neither an option nor a recipe, a JSON file of options.")
    return [*as_words(json_object(recipe, Path(recipe).read_text())), *more]


def as_words(options: dict[str, Any]) -> list[str]:
    """Options as they stand on a command line: lists of texts word by word, what is no text as JSON."""
    words = []
    for name, value in options.items():
        words.append(f"--{name}")
        if isinstance(value, list) and all(isinstance(word, str) for word in value):
            words += value
        else:
            words.append(value if isinstance(value, str) else json.dumps(value))
    return words


def json_or_file(option: str, value: str) -> Any:
    """What an option holds that is JSON, or the name of a file with it.

    Raises:
        ValueError: if it is neither.
    """
    path = Path(value).expanduser()
    if value.lstrip()[:1] not in ("[", "{") and path.is_file():
        return _parsed(f"{option} {value}", path.read_text())
    return _parsed(option, value)


def feature_layer(option: str, value: str | None) -> Any:
    """`feature_layer` of the configuration: "pooled", "tokens", a number or a list of numbers."""
    return value if value in (None, "pooled", "tokens") else _parsed(option, value)


def new_gpt2(option: str, value: str | dict | None, vocab_size: int | None = None) -> GPT2Config:
    """The configuration of a new GPT-2.

    Args:
        option: its name, for messages.
        value: GPT-2's settings.
        vocab_size: where the settings name none; GPT-2's own by default.

    Raises:
        ValueError: if it is no JSON object, or names a setting that GPT-2 does not have.
    """
    settings = json_object(option, value)
    known = {field.name for field in fields(GPT2Config)} | GPT2Config.attribute_map.keys()
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{option}: GPT-2 has no setting {name!r}.{hint}")
    defaults = {"bos_token_id": None, "eos_token_id": None}  # the tokenizer's will be taken
    if vocab_size is not None:
        defaults["vocab_size"] = vocab_size
    return GPT2Config(**defaults | settings)


def _parsed(option: str, value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} is no JSON: {value!r} ({error}).") from error
