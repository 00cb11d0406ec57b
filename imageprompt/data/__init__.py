"""Data: where it comes from, the rows that it is read as, and the batches that they become."""

from importlib import import_module
from typing import TYPE_CHECKING

from .collating import ImagePromptCollator

if TYPE_CHECKING:
    from .rows import Mixture as Mixture
    from .rows import Rows as Rows
    from .rows import read_rows as read_rows
    from .sources import Source as Source

# `datasets`, an extra, is not needed to collate rows of one's own.
_HOMES = {"Mixture": ".rows", "Rows": ".rows", "Source": ".sources", "read_rows": ".rows"}
__all__ = ["ImagePromptCollator", "Mixture", "Rows", "Source", "read_rows"]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
