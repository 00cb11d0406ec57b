"""Measuring what a model says: captions, answers, classes, matches of images and texts, perplexity."""

from .captions import caption_scores
from .tasks import generated_metrics

__all__ = ["caption_scores", "generated_metrics"]
