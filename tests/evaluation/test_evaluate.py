"""`evaluate` on a tiny split: what it writes, and that the constant caption is the best of its candidates."""

import json

import pytest
from conftest import picture, tiny
from datasets import Dataset, Image

from imageprompt.evaluation import caption_scores
from imageprompt.evaluation.evaluate import best_constant, main

CAPTIONS = [["A dog!", "One dog."], ["Two cats.", "Cats on a sofa."], ["A red sofa.", "It is red."]]


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    for part in tiny(tokenizer):
        part.save_pretrained(root / "model")
    rows = {"image": [picture(seed) for seed in range(3)], "captions": CAPTIONS}
    (root / "data").mkdir()
    for split in ("train", "test"):
        Dataset.from_dict(rows).cast_column("image", Image()).to_parquet(root / "data" / f"{split}.parquet")
    return root


def test_scores_settings_and_captions_are_written_and_repeat(folder, tmp_path):
    arguments = ["--model", str(folder / "model"), "--dataset", str(folder / "data"), "--max_new_tokens", "4"]
    for run in ("first", "second"):
        files = ["--output", str(tmp_path / f"{run}.json"), "--captions", str(tmp_path / "captions.txt")]
        main([*arguments, *files, "--constants", "2", "--picture", str(tmp_path / "grid.png")])
    result = json.loads((tmp_path / "first.json").read_text())
    captions = (tmp_path / "captions.txt").read_text().split("\n")[:3]
    assert result["scores"] == pytest.approx(caption_scores(dict(enumerate(captions)), dict(enumerate(CAPTIONS))))
    assert result["images"] == 3
    assert (tmp_path / "grid.png").exists()
    second = json.loads((tmp_path / "second.json").read_text())
    for entry in (result, second):
        entry["settings"].pop("output")
    assert result == second


def test_best_constant_has_the_highest_cider():
    references = dict(enumerate(CAPTIONS))
    candidates = ["a dog", "cats on a sofa", "nothing"]
    caption, scores = best_constant(candidates, references, progress=False)
    ciders = {c: caption_scores(dict.fromkeys(references, c), references)["CIDEr"] for c in candidates}
    assert scores["CIDEr"] == max(ciders.values())
    assert ciders[caption] == scores["CIDEr"]


def test_missing_column_is_named(folder, tmp_path):
    arguments = [
        "--model",
        str(folder / "model"),
        "--dataset",
        str(folder / "data"),
        "--output",
        str(tmp_path / "x.json"),
    ]
    with pytest.raises(ValueError, match="no column 'texts'; it has image, captions"):
        main([*arguments, "--references_column", "texts"])
    assert not (tmp_path / "x.json").exists()
