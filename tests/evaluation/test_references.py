"""What could not be scored is refused in the words of the score that asked."""

import pytest

from imageprompt.evaluation.references import check_references


def test_candidates_with_references_pass():
    check_references({1: "a"}, {1: ["a", "b"]}, row="row", text="text")


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ({1: "a"}, {2: ["a"]}, r"different photos: 2 ids, \['1', '2'\]"),
        ({}, {}, "nothing to score"),
        ({1: "a"}, {1: []}, r"at least one caption; photo 1 has \[\]"),
        ({1: "a"}, {1: "a"}, "at least one caption; photo 1 has 'a'"),
        ({1: "a"}, {1: ["a", None]}, r"at least one caption; photo 1 has \['a', None\]"),
        ({1: None}, {1: ["a"]}, "A candidate is a text, empty if there is none; photo 1 has None"),
    ],
)
def test_what_cannot_be_compared_is_named(candidates, references, message):
    with pytest.raises(ValueError, match=message):
        check_references(candidates, references, row="photo", text="caption")
