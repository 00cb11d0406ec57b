"""The commands in docs/ are commands that work."""

import re
import shlex
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

from imageprompt.evaluation.evaluate import EvaluationArguments
from imageprompt.training.train import DataArguments, ModelArguments, main

DOCS = Path(__file__).parents[1] / "docs"
COMMANDS = [
    shlex.split(command.replace("\\\n", " "))
    for page in sorted(DOCS.glob("*.md"))
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for command in re.findall(r"(?:[^\n\\]|\\\n)+", block)
]


def commands(*start: str) -> list[list[str]]:
    """The arguments of every command that begins so."""
    found = [command[len(start) :] for command in COMMANDS if command[: len(start)] == list(start)]
    assert found, f"no page shows {' '.join(start)}"
    return found


def test_options_exist():
    for arguments in commands("imageprompt", "train"):
        HfArgumentParser((ModelArguments, DataArguments, TrainingArguments)).parse_args_into_dataclasses(arguments)
    for arguments in commands("imageprompt", "evaluate"):
        HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses(arguments)


@pytest.mark.parametrize("arguments", commands("imageprompt", "train"))
def test_training_commands_run(arguments, shared_data, tmp_path, monkeypatch):
    monkeypatch.chdir(DOCS.parent)
    short = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--eval_strategy", "no", "--save_strategy", "no"]
    main([*arguments, *short, "--output_dir", str(tmp_path / "run")])
    assert (tmp_path / "run" / "model.safetensors").exists()
