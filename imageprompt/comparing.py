"""How far results are from those expected: one measure for what is imported, exported or made smaller.

Two programs that compute the same round differently, in float32 by as much as a small fault would change. An import is
therefore compared with its original in float64, where rounding plays no part, by the largest absolute difference.
Graphs and quantised weights exist in one precision only; their differences count as a part of the largest value.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 1e-5  # of any value in float64


@dataclass(frozen=True)
class Difference:
    """The largest difference of any value, and what it is measured by.

    Args:
        absolute: the difference.
        largest: the largest magnitude among the values expected.
        precision: in which they were computed, such as "float64".
    """

    absolute: float
    largest: float
    precision: str

    @property
    def relative(self) -> float:
        """The difference as a part of the largest value."""
        return self.absolute / self.largest if self.largest else float("inf")

    def within(self, absolute: float = 0.0, relative: float = 0.0) -> bool:
        """Whether it is at most the larger of a number and a part of the largest value; no number never is."""
        return self.absolute <= max(absolute, relative * self.largest)

    def __str__(self) -> str:
        return f"{self.absolute:.1e} in {self.precision} (the largest is {self.largest:.3g})"


def difference(pairs: Iterable[tuple[Tensor | np.ndarray, Tensor | np.ndarray]]) -> Difference:
    """The largest difference in pairs of (found, expected), each of equal shapes.

    Raises:
        ValueError: if the shapes differ.
    """
    tensors = [(torch.as_tensor(found), torch.as_tensor(expected)) for found, expected in pairs]
    for found, expected in tensors:
        if found.shape != expected.shape:
            raise ValueError(f"There are {tuple(found.shape)} values where {tuple(expected.shape)} are expected.")
    # torch's maximum keeps what is no number, Python's may not.
    absolute = torch.stack([(found - expected).abs().max() for found, expected in tensors]).max()
    largest = torch.stack([expected.abs().max() for _, expected in tensors]).max()
    return Difference(absolute.item(), largest.item(), str(tensors[0][1].dtype).removeprefix("torch."))


@torch.no_grad()
def verify(
    run: Callable[[torch.dtype], Iterable[tuple[Tensor, Tensor]]], what: str, mend: str
) -> dict[str, Difference]:
    """Compare a copy with its original, and stop where they are not the same.

    Args:
        run: computes (copy's, original's) values in a precision, float64 first and then float32.
        what: is compared, and `mend` what to do if it differs, for the message.

    Returns:
        The differences by precision, "float64" and "float32".

    Raises:
        ValueError: if any value differs by more than 1e-5 in float64.
    """
    exact = difference(run(torch.float64))
    if not exact.within(TOLERANCE):
        raise ValueError(f"{what} differ by up to {exact}: nothing was written. {mend}")
    return {each.precision: each for each in (exact, difference(run(torch.float32)))}


def described(differences: dict[str, Difference]) -> str:
    """What `verify` found, in words."""
    return " and ".join(map(str, differences.values()))
