"""Data for training: the collator."""

from .collating import ImagePromptCollator

__all__ = ["ImagePromptCollator"]
