"""VQA accuracy against the official script's own results and values computed by hand."""

import json
from pathlib import Path

import pytest

from imageprompt.evaluation.vqa import exact_match, normalize_answer, vqa_accuracy

OFFICIAL = json.loads((Path(__file__).parent / "vqa_official.json").read_text())


@pytest.mark.parametrize(("answer", "expected"), OFFICIAL["normalized"].items())
def test_answers_are_normalized_as_by_the_official_script(answer, expected):
    assert normalize_answer(answer) == expected


@pytest.mark.parametrize("case", OFFICIAL["accuracies"], ids=lambda case: case["answer"])
def test_accuracies_equal_the_official_scripts(case):
    assert vqa_accuracy({0: case["answer"]}, {0: case["people"]}) == pytest.approx(case["accuracy"], abs=1e-9)


@pytest.mark.parametrize(
    ("said_by", "accuracy"),
    # Of the ten nines, those without one who said so count one person less: 1: 9/10 * 1/3, 2: 8/10 * 2/3 + 2/10 * 1/3,
    # 3: 7/10 * 1 + 3/10 * 2/3, from 4 on always three.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)],
)
def test_an_answer_is_right_as_far_as_people_gave_it(said_by, accuracy):
    people = ["two"] * said_by + [f"other {n}" for n in range(10 - said_by)]
    assert vqa_accuracy({"q": "2."}, {"q": people}) == pytest.approx(accuracy)


def test_unanimous_answers_are_compared_as_they_are():
    assert vqa_accuracy({0: "Dog"}, {0: ["dog"] * 10}) == 0
    assert vqa_accuracy({0: "Dog"}, {0: ["dog"] * 9 + ["cat"]}) == 1


def test_the_accuracy_is_the_mean_over_the_questions():
    people = {"a": ["yes"] * 10, "b": ["yes"] * 10, "c": ["yes"] + ["no"] * 9}
    assert vqa_accuracy({"a": "yes", "b": "no", "c": "yes"}, people) == pytest.approx((1 + 0 + 0.3) / 3)


def test_exact_match_minds_neither_case_nor_white_space():
    accepted = {0: ["a Dog"], 1: ["two", "2"], 2: ["red"], 3: ["red"]}
    assert exact_match({0: " A  dog ", 1: "2", 2: "red.", 3: "green"}, accepted) == 0.5


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="'q' has 9"):
        vqa_accuracy({"q": "yes"}, {"q": ["yes"] * 9})
    with pytest.raises(ValueError, match=r"different rows.*'b'"):
        exact_match({"a": "x"}, {"a": ["x"], "b": ["y"]})
    with pytest.raises(ValueError, match="'a' has 'x'"):
        exact_match({"a": "x"}, {"a": "x"})
    with pytest.raises(ValueError, match="no candidates"):
        vqa_accuracy({}, {})
