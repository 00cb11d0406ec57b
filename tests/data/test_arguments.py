"""Options become rows: one source or a mixture, mapped or streamed; what cannot be is refused first."""

import json
from itertools import islice

import pytest
from conftest import picture
from datasets import Dataset, Image

from imageprompt.data.arguments import DataArguments, training_data, training_texts
from imageprompt.data.rows import Mixture, Rows

SIZE = (32, 32)


@pytest.fixture
def folders(tmp_path):
    """Two data sets, a and b, of four and eight rows, with the splits train and test."""
    for name, size in (("a", 4), ("b", 8)):
        (tmp_path / name).mkdir()
        columns = {"image": [picture(n) for n in range(size)], "suffix": [f"{name}{n}" for n in range(size)]}
        for split in ("train", "test"):
            Dataset.from_dict(columns).cast_column("image", Image()).to_parquet(tmp_path / name / f"{split}.parquet")
    return tmp_path


def mixture(folder, *entries):
    (folder / "mixture.json").write_text(json.dumps(list(entries)))
    return DataArguments(mixture=str(folder / "mixture.json"))


def test_one_source(folders):
    args = DataArguments(str(folders / "a"), eval_split="test", augment=True)
    train, evaluation = training_data(args, SIZE, evaluates=True)
    assert isinstance(train, Rows) and len(train) == len(evaluation) == 4
    assert train[0]["image"].size == SIZE and train[0]["image"].tobytes() != train[0]["image"].tobytes()
    assert evaluation[0]["image"].tobytes() == picture(0).tobytes()
    assert training_data(args, SIZE, evaluates=False)[1] is None


def test_a_mixture_with_weights_and_a_source_that_is_not_evaluated(folders):
    a = {"dataset": str(folders / "a"), "eval_split": "test", "weight": 3, "prompt": "A", "name": "first"}
    b = {"dataset": str(folders / "b"), "eval_split": None, "weight": 1, "augment": True, "augment_args": {"hflip": 0}}
    train, evaluation = training_data(mixture(folders, a, b), SIZE, evaluates=True)
    assert isinstance(train, Mixture) and train.counts == [9, 3] and list(train.parts) == ["first", "b"]
    assert list(evaluation) == ["first"] and evaluation["first"][0]["suffix"] == " a0"
    assert train[0]["text"] == "A" and train[9]["image"].size == SIZE


def test_streams(folders):
    args = DataArguments(str(folders / "b"), eval_split="test", streaming=True, shuffle_buffer=8)
    train, evaluation = training_data(args, SIZE, evaluates=True, seed=1)
    suffixes = [row["suffix"] for row in train]
    assert sorted(suffixes) == [f"b{n}" for n in range(8)] != suffixes
    assert len(evaluation) == 8
    entries = [{"dataset": str(folders / name), "streaming": True, "weight": 1} for name in "ab"]
    mixed, _ = training_data(mixture(folders, *entries), SIZE, evaluates=False)
    assert {row["suffix"][0] for row in islice(mixed, 10)} == {"a", "b"}
    unweighted = [{"dataset": str(folders / name), "streaming": True} for name in "ab"]
    with pytest.raises(ValueError, match="rows streams have is not known: give each of a, b a `weight`"):
        training_data(mixture(folders, *unweighted), SIZE, evaluates=False)
    alone, _ = training_data(mixture(folders, unweighted[0]), SIZE, evaluates=False)
    assert sorted(row["suffix"] for row in alone) == [f"a{n}" for n in range(4)]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "holds no list of sources"),
        ([{"dataset": "x", "colour": 1}], "no setting colour. It has dataset, "),
        ([{"dataset": "a"}, {"dataset": "a"}], "two sources are called 'a'"),
        ([{"dataset": "a", "weight": 1}, {"dataset": "b"}], "every source a `weight`, or none"),
        ([{"dataset": "a", "weight": -1}], "weight of a is a positive number, got -1"),
        ([{"dataset": "a", "streaming": True}, {"dataset": "b"}], "either all sources stream or none"),
        ([{"dataset": "./nowhere"}], "no data set at nowhere"),
        ([{}], "Which data"),
    ],
)
def test_what_a_mixture_cannot_be(folders, entries, message):
    with pytest.raises(ValueError, match=message):
        training_data(mixture(folders, *entries), SIZE, evaluates=False)


def test_a_mixture_is_a_file_and_not_beside_a_dataset(folders):
    args = mixture(folders, {"dataset": str(folders / "a")})
    args.dataset = str(folders / "b")
    with pytest.raises(ValueError, match="not both"):
        training_data(args, SIZE, evaluates=False)
    with pytest.raises(ValueError, match="--mixture is a JSON file"):
        training_data(DataArguments(mixture=str(folders / "none.json")), SIZE, evaluates=False)
    with pytest.raises(ValueError, match="No such augmentation: flip"):
        training_data(DataArguments(str(folders / "a"), augment_args='{"flip": 1}'), SIZE, evaluates=False)


def test_the_texts_of_all_sources(folders):
    a = {"dataset": str(folders / "a"), "prompt": "A"}
    texts = list(training_texts(mixture(folders, a, {"dataset": str(folders / "b")})))
    assert texts == [text for n in range(4) for text in ("A", f" a{n}")] + [f"b{n}" for n in range(8)]
    with pytest.raises(ValueError, match="leave out `--streaming`"):
        list(training_texts(DataArguments(str(folders / "a"), streaming=True)))
