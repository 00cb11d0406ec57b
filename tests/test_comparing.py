"""The one measure of differences: it sees every value, no number is never close, and float64 decides."""

import numpy as np
import pytest
import torch

from imageprompt.comparing import Difference, described, difference, verify


def test_the_largest_difference_of_all_pairs():
    found = difference([(torch.tensor([1.0, -8.5]), torch.tensor([1.0, -8.0])), (np.ones(2), np.array([1.0, 3.0]))])
    assert (found.absolute, found.largest, found.precision) == (2.0, 8.0, "float32")
    assert found.relative == 0.25 and str(found) == "2.0e+00 in float32 (the largest is 8)"
    assert found.within(2.0) and found.within(relative=0.25) and not found.within(1.9, 0.2)


def test_no_number_is_never_close():
    for pairs in ([(torch.tensor([float("nan")]), torch.ones(1)), (torch.ones(1), torch.ones(1))],):
        for order in (pairs, pairs[::-1]):
            assert not difference(order).within(1e9, 1e9)
    assert not Difference(1.0, 0.0, "float32").relative < 1e9


def test_values_of_other_shapes_are_not_stretched():
    with pytest.raises(ValueError, match=r"\(2, 1\) values where \(2, 2\) are expected"):
        difference([(torch.ones(2, 1), torch.ones(2, 2))])


def test_float64_decides():
    def run(dtype, error=0.0):
        return [(torch.full((2,), 100.0 + error, dtype=dtype), torch.full((2,), 100.0, dtype=dtype))]

    assert list(verify(run, "They", "")) == ["float64", "float32"]
    # As a part of the largest this is 4e-7, which float32 could hide.
    with pytest.raises(ValueError, match=r"^They differ by up to 4\.0e-05 in float64 .*nothing was written\. Look\.$"):
        verify(lambda dtype: run(dtype, 4e-5), "They", "Look.")
    # What float32 rounds is told, and stops nothing.
    rounded = verify(lambda dtype: run(dtype, 4e-5 if dtype == torch.float32 else 0.0), "They", "")
    assert described(rounded) == "0.0e+00 in float64 (the largest is 100) and 3.8e-05 in float32 (the largest is 100)"
