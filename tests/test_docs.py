"""The commands in docs/ are commands that work."""

import json
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


def test_the_figures_of_the_captioning_page_are_those_measured():
    measured = json.loads((DOCS / "flickr8k" / "scores.json").read_text())
    page = (DOCS / "captioning.md").read_text()
    rows = {"this model": measured["scores"], "best constant caption": measured["best_constant"]["scores"]}
    for name, scores in rows.items():
        figures = " | ".join(f"{scores[key]:.3f}" for key in ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr"))
        assert f"| {name} | {figures} |" in page
    assert f"{measured['distinct_captions']} different captions" in page
    assert measured["scores"]["CIDEr"] > measured["best_constant"]["scores"]["CIDEr"]
    whole, short = (
        json.loads((DOCS / "flickr8k" / f"{name}.json").read_text())["train_runtime"]
        for name in ("train_results", "train_results_60_steps")
    )
    assert f"took {whole / 60:.0f} minutes" in page
    assert f"took {short:.0f} seconds" in page
    assert f"need {(1316 * short / 60 + 2 * 25) / 60:.0f} minutes" in page
