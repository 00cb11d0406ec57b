"""Scores of classes against values computed by hand."""

import pytest

from imageprompt.evaluation.classification import OTHER, classification_scores

LABELS = ["cat", "dog", "red sofa", "fox"]
TRUTH = ["cat", "cat", "cat", "dog", "dog", "red sofa"]
ANSWERS = ["cat", " CAT", "dog", "dog", "a dog", "Red  sofa"]


def test_scores_equal_those_by_hand():
    result = classification_scores(TRUTH, ANSWERS, LABELS)
    # cat: 2 of 3 found, never said wrongly; dog: 1 of 2 found, said twice; red sofa: found.
    assert result["scores"] == pytest.approx(
        {"accuracy": 4 / 6, "macro_recall": (2 / 3 + 1 / 2 + 1) / 3, "macro_f1": (4 / 5 + 1 / 2 + 1) / 3}
    )
    assert result["per_class"]["cat"] == pytest.approx({"precision": 1, "recall": 2 / 3, "f1": 4 / 5, "rows": 3})
    assert result["per_class"]["dog"] == pytest.approx({"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "rows": 2})
    assert "fox" not in result["per_class"]


def test_the_confusion_matrix_has_a_column_for_other_texts():
    assert classification_scores(TRUTH, ANSWERS, LABELS)["confusion"] == {
        "labels": [*LABELS, OTHER],
        "counts": [[2, 1, 0, 0, 0], [0, 1, 0, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]],
    }


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="2 rows and 1 answers"):
        classification_scores(["cat", "dog"], ["cat"], LABELS)
    with pytest.raises(ValueError, match="0 rows"):
        classification_scores([], [], LABELS)
    with pytest.raises(ValueError, match="'bird' is none of the labels cat, dog"):
        classification_scores(["bird"], ["cat"], LABELS)
    with pytest.raises(ValueError, match=r"Two labels are equal .*: 'cat' and 'Cat '"):
        classification_scores(["cat"], ["cat"], ["cat", "Cat "])
