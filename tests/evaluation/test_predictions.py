"""A file of answers goes on where it stopped, and only with what it was begun with."""

import json

import pytest

from imageprompt.evaluation.predictions import Predictions

ABOUT = {"task": "caption", "decoding": {"num_beams": 3}}
RECORDS = [{"row": row, "answer": f"a dög\n{row}"} for row in range(7)]


def opened(path, about=ABOUT, **settings):
    return Predictions(path, about, **{"batch_size": 2, "total": 7} | settings)


@pytest.fixture
def path(tmp_path):
    predictions = opened(tmp_path / "x.jsonl")
    for start in range(0, 7, 2):
        predictions.add(RECORDS[start : start + 2])
    return predictions.path


def test_a_complete_file_is_read_and_left_as_it_is(path):
    before = path.read_bytes()
    assert opened(path).records == RECORDS
    assert path.read_bytes() == before
    assert [json.loads(line) for line in path.read_text().split("\n")[:-1]] == [ABOUT, *RECORDS]


@pytest.mark.parametrize("left", range(1, 60, 7))
def test_a_file_cut_anywhere_becomes_the_same_file(path, left):
    whole = path.read_bytes()
    path.write_bytes(whole[:-left])
    predictions = opened(path)
    assert len(predictions.records) % 2 == 0 and predictions.records == RECORDS[: len(predictions.records)]
    for start in range(len(predictions.records), 7, 2):
        predictions.add(RECORDS[start : start + 2])
    assert path.read_bytes() == whole


def test_other_settings_are_refused_by_name(path):
    with pytest.raises(ValueError, match=r"decoding\.num_beams 3 instead of 5; seed None instead of 1\. .*--restart"):
        opened(path, {"task": "caption", "decoding": {"num_beams": 5}, "seed": 1})
    assert opened(path, {"task": "vqa"}, restart=True).records == []
    opened(path, {"task": "rank"}).add(RECORDS)  # nothing was answered yet, so nothing is lost
    assert opened(path, {"task": "rank"}).records == RECORDS


def test_other_files_are_refused(path):
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no file of predictions"):
        opened(path)
    path.write_text("".join(json.dumps(line) + "\n" for line in (ABOUT, RECORDS[0], RECORDS[2])))
    with pytest.raises(ValueError, match="one after the other"):
        opened(path)
    path.write_text("")
    assert opened(path).records == []
