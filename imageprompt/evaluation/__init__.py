"""Measuring what a model says: caption scores."""

from .captions import caption_scores

__all__ = ["caption_scores"]
