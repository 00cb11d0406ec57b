"""Image–text matching: how far up the right text stands for an image, and the right image for a text."""

from torch import Tensor

CUTOFFS = (1, 5, 10)


def retrieval_scores(scores: Tensor, matches: Tensor) -> dict[str, float]:
    """Recall@1, 5 and 10 and the median rank, both ways (as in Karpathy & Fei-Fei, arXiv 1412.2306).

    The rank of a query is that of its best match. A candidate with the same score that is no match stands before it,
    so a model that does not look gains nothing.

    Args:
        scores: (images, texts), higher is better.
        matches: (images, texts), true where a text belongs to an image; one at least in each row and column.

    Returns:
        `image_to_text_recall@1`, … (the share of images with a text of theirs among the first), `text_to_image_…`, and
        `…_median_rank`, which begins with 1.

    Raises:
        ValueError: if the shapes differ, a score is not a number, or a row or column has no match.
    """
    if scores.shape != matches.shape or scores.ndim != 2:
        raise ValueError(f"Scores {tuple(scores.shape)} and matches {tuple(matches.shape)} are of the same two sizes.")
    if not matches.any(1).all() or not matches.any(0).all():
        raise ValueError("Every image and every text needs a match.")
    if scores.isnan().any():
        raise ValueError("A score is not a number.")
    results: dict[str, float] = {}
    for way, (ours, right) in {
        "image_to_text": (scores, matches),
        "text_to_image": (scores.T, matches.T),
    }.items():
        best = ours.masked_fill(~right, float("-inf")).amax(1, keepdim=True)
        ranks = 1 + ((ours >= best) & ~right).sum(1)
        results |= {f"{way}_recall@{k}": (ranks <= k).double().mean().item() for k in CUTOFFS}
        results[f"{way}_median_rank"] = ranks.double().quantile(0.5).item()
    return results
