"""The figures of docs/results.md are those of the committed files, and recipes ask in the test as in training."""

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[1] / "docs" / "results"
PAGE = (RESULTS.parent / "results.md").read_text()
# What is asked, and the score that counts.
ANSWERS = {
    "mnist": ("MNIST", "Which digit is this?", "accuracy"),
    "easy_vqa": ("easy-VQA", "the row's question", "exact_match"),
}


def read(task: str, name: str) -> dict:
    return json.loads((RESULTS / task / f"{name}.json").read_text())


@pytest.mark.parametrize("task", ANSWERS)
def test_rows_of_answers_are_what_was_measured(task):
    title, asked, score = ANSWERS[task]
    scores, training = read(task, "scores"), read(task, "training")
    minutes = training["metrics"]["train_runtime"] / 60
    row = f"| [{title}](results/{task}/scores.json) | {asked} | {scores['scores'][score]:.2%} of {scores['rows']:,} | "
    assert f"{row}{minutes:.0f} minutes |" in PAGE, f"{row}{minutes:.0f} minutes |"
    assert scores["broken_rows"] == [] == training["broken_rows"]


@pytest.mark.parametrize("task", ANSWERS)
def test_recipes_ask_in_the_test_as_in_training(task):
    train, evaluate = read(task, "train"), read(task, "evaluate")
    for name in ("dataset", "text_column", "suffix_column", "prompt"):
        assert train.get(name) == evaluate.get(name)
    assert evaluate["model"] == train["output_dir"]
    assert read(task, "scores")["settings"]["model"] == evaluate["model"]
    for action in ("train", "evaluate"):
        assert f"imageprompt {action} docs/results/{task}/{action}.json\n" in PAGE
