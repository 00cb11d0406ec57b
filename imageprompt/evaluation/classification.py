"""Scores of classes that a model names: accuracy, macro recall, macro F1, and the confusion matrix."""

from collections.abc import Iterable, Sequence
from typing import Any

from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from .vqa import plain

OTHER = "(another text)"


def number_labels(labels: Sequence[str], truth: Iterable[str]) -> dict[str, int]:
    """The number of each label, by its text without case and white space.

    Raises:
        ValueError: if two labels are equal then, or a truth is no label.
    """
    numbers: dict[str, int] = {}
    for number, label in enumerate(labels):
        if plain(label) in numbers:
            raise ValueError(
                f"Two labels are equal but for case and white space: {labels[numbers[plain(label)]]!r} and {label!r}. "
                "Write them in one way."
            )
        numbers[plain(label)] = number
    for label in truth:
        if plain(label) not in numbers:
            raise ValueError(f"The truth {label!r} is none of the labels {', '.join(labels):.200}.")
    return numbers


def classification_scores(truth: Sequence[str], answers: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """scikit-learn's scores of answers in words.

    An answer names a label if it equals it but for case and white space; any other text is wrong and counts as one
    more class, which is never the truth. Macro averages are over the labels that occur in `truth`.

    Args:
        truth: the label of each row.
        answers: the model's text for each row.
        labels: all labels, in the order of the confusion matrix.

    Returns:
        `scores` (`accuracy`, `macro_recall`, `macro_f1`, fractions), `per_class` (`precision`, `recall`, `f1`, `rows`
        of each label that occurs), and `confusion` (`labels`, and `counts` with a row for each label that is the truth
        and a column for each answer).

    Raises:
        ValueError: if there are no rows, not one answer for each, two labels are equal, or a truth is no label.
    """
    if not truth or len(truth) != len(answers):
        raise ValueError(f"Scores need one answer for each row; got {len(truth)} rows and {len(answers)} answers.")
    numbers = number_labels(labels, truth)
    true = [numbers[plain(label)] for label in truth]
    named = [numbers.get(plain(answer), len(labels)) for answer in answers]
    occurring = sorted(set(true))
    precision, recall, f1, rows = precision_recall_fscore_support(true, named, labels=occurring, zero_division=0)
    matrix = confusion_matrix(true, named, labels=range(len(labels) + 1))
    return {
        "scores": {
            "accuracy": float(accuracy_score(true, named)),
            "macro_recall": float(recall.mean()),
            "macro_f1": float(f1.mean()),
        },
        "per_class": {
            labels[number]: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "rows": int(rows[i]),
            }
            for i, number in enumerate(occurring)
        },
        "confusion": {"labels": [*labels, OTHER], "counts": matrix[:-1].tolist()},
    }
