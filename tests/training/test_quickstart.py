"""The quickstart's parts, and once, slowly, its promise."""

import json

import pytest

from imageprompt.training.quickstart import quickstart, scans


def test_scans_are_real_and_split_without_overlap():
    train, held_out = scans()
    assert (len(train), len(held_out)) == (1437, 360)
    assert {row["suffix"] for row in held_out} == {row["suffix"] for row in train}
    assert train[0]["image"].size == (8, 8)


def test_a_short_quickstart_goes_the_whole_way(tmp_path, capfd):
    quickstart(tmp_path / "run", epochs=0.1)
    result = json.loads((tmp_path / "run" / "accuracy.json").read_text())
    assert result["held_out"] == 360
    assert result["accuracy"] == result["right"] / 360
    assert (tmp_path / "run" / "answers.png").stat().st_size > 10_000
    assert "answered with the right word" in capfd.readouterr().out


@pytest.mark.slow
def test_quickstart_reads_97_percent_of_held_out_scans(tmp_path):
    quickstart(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "accuracy.json").read_text())["accuracy"] >= 0.97
