"""Ranks against values found by hand and by sorting."""

import pytest
import torch

from imageprompt.evaluation.retrieval import retrieval_scores

# Two images with two texts each, and a third with one.
MATCHES = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)


def test_scores_equal_those_by_hand():
    scores = torch.tensor(
        [
            [5.0, 1.0, 2.0, 3.0, 4.0],  # best match first
            [9.0, 8.0, 7.0, 6.0, 5.0],  # third
            [1.0, 2.0, 3.0, 4.0, 0.0],  # fifth
        ]
    )
    # Text by text, the image's rank: 5 < 9: second; 1 < 8, 2: third; 7: first; 6: first; 0 < 5, 4: third.
    assert retrieval_scores(scores, MATCHES) == pytest.approx(
        {
            "image_to_text_recall@1": 1 / 3,
            "image_to_text_recall@5": 1,
            "image_to_text_recall@10": 1,
            "image_to_text_median_rank": 3,
            "text_to_image_recall@1": 2 / 5,
            "text_to_image_recall@5": 1,
            "text_to_image_recall@10": 1,
            "text_to_image_median_rank": 2,
        }
    )


def test_ranks_equal_those_of_sorting():
    images, texts = 40, 120
    scores, matches = torch.randn(images, texts), torch.zeros(images, texts, dtype=torch.bool)
    matches[torch.arange(texts) % images, torch.arange(texts)] = True
    expected = {}
    for way, ours, right in (("image_to_text", scores, matches), ("text_to_image", scores.T, matches.T)):
        places = [
            [bool(right[query, candidate]) for candidate in ours[query].argsort(descending=True)].index(True)
            for query in range(len(ours))
        ]
        expected |= {f"{way}_recall@{k}": sum(place < k for place in places) / len(places) for k in (1, 5, 10)}
        places.sort()
        expected[f"{way}_median_rank"] = 1 + (places[(len(places) - 1) // 2] + places[len(places) // 2]) / 2
    assert retrieval_scores(scores, matches) == pytest.approx(expected)


def test_a_model_that_does_not_look_finds_nothing():
    scores = torch.arange(20.0).expand(20, 20)  # some texts are likelier than others, whatever the image
    result = retrieval_scores(scores, torch.eye(20, dtype=torch.bool))
    assert result["image_to_text_recall@1"] == 1 / 20
    assert result["text_to_image_recall@10"] == 0
    assert result["text_to_image_median_rank"] == 20


def test_bad_input_is_named():
    scores = torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"\(3, 5\) and matches \(5, 3\)"):
        retrieval_scores(scores, MATCHES.T)
    with pytest.raises(ValueError, match="needs a match"):
        retrieval_scores(scores, torch.zeros(3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="not a number"):
        retrieval_scores(scores * float("nan"), MATCHES)
