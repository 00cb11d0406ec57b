"""Data sets become rows, and wrong columns are named before work starts."""

import pytest
from conftest import picture
from datasets import Dataset, Image

from imageprompt.data.reading import as_rows, augmentation, read_split, separate


@pytest.fixture
def dataset() -> Dataset:
    rows = {
        "photo": [picture(0), picture(1)],
        "captions": [["a dog", "one dog"], ["a cat", "one cat"]],
        "q": ["A?", "B?"],
    }
    return Dataset.from_dict(rows).cast_column("photo", Image())


def test_one_caption_of_several_is_drawn_at_every_reading(dataset):
    rows = as_rows(dataset, image_column="photo", suffix_column="captions")
    drawn = {rows[0]["suffix"] for _ in range(30)}
    assert drawn == {"a dog", "one dog"}
    assert rows[0]["text"] == ""


def test_evaluation_always_reads_the_first_caption(dataset):
    rows = as_rows(dataset, image_column="photo", suffix_column="captions", draw=False)
    assert {rows[1]["suffix"] for _ in range(10)} == {"a cat"}


def test_prompts_come_from_a_column_or_are_one_for_all(dataset):
    columns = {"image_column": "photo", "suffix_column": "captions"}
    assert as_rows(dataset, text_column="q", **columns)[1]["text"] == "B?"
    row = as_rows(dataset, prompt="This is", **columns)[1]
    assert row["text"] == "This is"
    assert row["suffix"] in {" a cat", " one cat"}


@pytest.mark.parametrize(
    ("text", "suffix", "expected"),
    [("", "dog", "dog"), ("A photo of", "dog", " dog"), ("A photo of ", "dog", "dog"), ("A photo of", " dog", " dog")],
)
def test_words_do_not_run_together(text, suffix, expected):
    assert separate(text, suffix) == expected


def test_missing_column_is_named_with_those_found(dataset):
    with pytest.raises(ValueError, match="no column 'image'; it has photo, captions, q"):
        as_rows(dataset, suffix_column="captions")


def test_missing_folder_and_split_are_named(dataset, tmp_path):
    with pytest.raises(ValueError, match="no data set at"):
        read_split(str(tmp_path / "nowhere"), "train")
    dataset.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        read_split(str(tmp_path), "test")
    assert read_split(str(tmp_path), "train").column_names == ["photo", "captions", "q"]


def test_augmentation_varies_and_keeps_the_size(dataset):
    rows = as_rows(dataset, image_column="photo", suffix_column="captions", augment=augmentation((40, 30)))
    first, second = rows[0]["image"], rows[0]["image"]
    assert first.size == second.size == (30, 40)
    assert first.tobytes() != second.tobytes()
