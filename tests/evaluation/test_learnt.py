"""Rows to be scored are known again, if the model or one that it started from has learnt them."""

import json
from pathlib import Path

import pytest
from conftest import make_photos, tiny
from datasets import Dataset, Image

from imageprompt.data.sources import Source
from imageprompt.evaluation.learnt import find_learnt_rows
from imageprompt.training.train import main as train

CAPTIONS = {"dataset": "photos/captions.csv", "image_column": "file", "suffix_column": "caption", "shuffle_rows": 0}
QUESTIONS = CAPTIONS | {"dataset": "photos/questions.json", "text_column": "question", "suffix_column": "answer"}
FOLDER, TABLE = CAPTIONS | {"dataset": "folder"}, CAPTIONS | {"dataset": "folder/captions.csv"}
EMBEDDED = CAPTIONS | {"dataset": "embedded.parquet", "image_column": "image"}
WORDS = {"image_column": "none"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ten photos with captions and two questions each; the same captions in another file; photos with one table."""
    root = tmp_path_factory.mktemp("learnt")
    for name in ("photos", "folder"):
        make_photos(root / name, 10)
    captions = (root / "photos" / "captions.csv").read_text()
    (root / "photos" / "others.csv").write_text(captions)
    for name in ("questions.json", "classes.csv"):
        (root / "folder" / name).unlink()
    rows = [line.split(",") for line in captions.splitlines()[1:]]
    embedded = {"image": [str(root / "photos" / file) for file, _ in rows], "caption": [text for _, text in rows]}
    Dataset.from_dict(embedded).cast_column("image", Image()).to_parquet(root / "embedded.parquet")
    return root


@pytest.mark.parametrize(
    ("learnt", "train_split", "asked", "split", "known"),
    [
        (CAPTIONS, "train[:8]", CAPTIONS, "train[80%:]", False),
        (CAPTIONS, "train[:8]", CAPTIONS, "train[70%:]", True),
        (CAPTIONS, "train[:8]", CAPTIONS | {"shuffle_rows": None}, "train[50%:]", True),  # cut after other shufflings
        (CAPTIONS, "train", CAPTIONS, "train[:1]", True),
        (CAPTIONS, "train", CAPTIONS | {"dataset": "photos/others.csv"}, "train", False),
        # Parts of a split count images where several rows show the same.
        (QUESTIONS, "train[:80%]", QUESTIONS, "train[-2:]", False),
        (QUESTIONS, "train[:80%]", QUESTIONS, "train[-4:]", True),
        (QUESTIONS | {"join_rows": True}, "train[:80%]", QUESTIONS, "train[-2:]", False),
        (QUESTIONS, "train[:80%]", QUESTIONS | {"join_rows": True}, "train[-4:]", True),
        # A folder is its table.
        (FOLDER, "train[:8]", TABLE, "train[8:]", False),
        (FOLDER, "train[:8]", TABLE, "train[7:]", True),
        (TABLE, "train[:8]", FOLDER, "train[7:]", True),
        # Images that the data set holds.
        (EMBEDDED, "train[:8]", EMBEDDED, "train[8:]", False),
        (EMBEDDED, "train[:8]", EMBEDDED, "train[7:]", True),
        # The texts alone.
        (CAPTIONS, "train[:8]", CAPTIONS | WORDS, "train[8:]", False),
        (CAPTIONS, "train[:8]", CAPTIONS | WORDS, "train[7:]", True),
        (CAPTIONS | WORDS, "train[:8]", CAPTIONS, "train[7:]", True),
        # What is there no more.
        (CAPTIONS, "validation[:8]+train[9:]", CAPTIONS, "train", False),
        (CAPTIONS | {"image_column": "picture"}, "train[:8]", CAPTIONS, "train", False),
    ],
)
def test_rows_that_were_learnt_are_known(data, tmp_path, monkeypatch, learnt, train_split, asked, split, known):
    monkeypatch.chdir(data)
    learnt = learnt | {"subset": None, "train_split": train_split}
    (tmp_path / "training.json").write_text(json.dumps({"data": [learnt]}))
    expected = f"{train_split} of {learnt['dataset']} (shuffle_rows 0)" if known else None
    assert find_learnt_rows(tmp_path, Source(**asked), split) == expected


def test_rows_that_an_earlier_model_has_learnt_are_known(data, tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(data)
    for part in tiny(tokenizer):
        part.save_pretrained(tmp_path / "model")
    before, options = tmp_path / "model", ["--use_cpu", "--max_steps", "1", "--shuffle_rows", "0"]
    for dataset, column in (("photos/captions.csv", "caption"), ("photos/classes.csv", "shape"), ("folder", "caption")):
        columns = ["--dataset", dataset, "--image_column", "file", "--suffix_column", column]
        after = tmp_path / f"after {dataset}".replace("/", " ")
        train([*options, *columns, "--train_split", "train[:8]", "--model", str(before), "--output_dir", str(after)])
        assert json.loads((after / "training.json").read_text())["model_options"] == {"model": str(before)}
        before = after
    assert (
        find_learnt_rows(after, Source(**CAPTIONS), "train[7:]") == "train[:8] of photos/captions.csv (shuffle_rows 0)"
    )
    assert find_learnt_rows(after, Source(**CAPTIONS), "train[8:]") is None


def test_a_model_without_a_record_has_learnt_nothing_that_is_known(tmp_path):
    assert find_learnt_rows(tmp_path, Source("photos/captions.csv"), "train") is None
    (tmp_path / "training.json").write_text(json.dumps({"metrics": {}}))  # of an older version
    assert find_learnt_rows(tmp_path, Source("photos/captions.csv"), "train") is None
