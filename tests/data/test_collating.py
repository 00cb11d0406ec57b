"""Rows of any mix become one padded batch with labels, and rows that cannot be learnt from are refused."""

import logging

import numpy as np
import pytest
import torch
from conftest import picture, tiny

from imageprompt import ImagePromptCollator


@pytest.fixture(scope="module")
def parts(tokenizer):
    return tiny(tokenizer)


@pytest.fixture(scope="module")
def collator(parts):
    return ImagePromptCollator(parts[1])


ROWS = [
    {"image": picture(0), "text": "What is it?", "suffix": " a dog"},
    {"images": [picture(1), picture(2)], "text": "A <image> or <image>", "suffix": "!"},
    {"text": "Two", "suffix": " cats on a red sofa."},
    {"image": None, "text": "Two", "suffix": " cats"},
    {"image": picture(3), "suffix": " it"},
    {"images": np.stack([np.asarray(picture(4))] * 2), "text": None, "suffix": ""},
]
COUNTS = [1, 2, 0, 0, 1, 2]


def test_pain_06_rows_of_any_mix_are_what_they_are_alone(collator, parts):
    batch = collator(ROWS)
    pixels = iter(batch["pixel_values"])
    for index, (row, count) in enumerate(zip(ROWS, COUNTS, strict=True)):
        alone = collator([row])
        length = alone["input_ids"].shape[1]
        for key in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(batch[key][index, :length], alone[key][0])
        assert (batch["labels"][index, length:] == -100).all()
        assert (alone["input_ids"] == parts[1].image_token_id).sum() == 4 * count
        assert all(torch.equal(next(pixels), image) for image in alone.get("pixel_values", []))
    assert next(pixels, None) is None


def test_several_texts_of_an_image_are_the_rows_that_they_would_be_alone(collator):
    photo, other = picture(0), picture(1)
    together = [
        {"image": photo, "text": ["What is it?", "Why"], "suffix": [" a dog", "!"]},
        {"image": other, "suffix": "it"},
        {"image": other, "text": "Two", "suffix": [" cats"]},
    ]
    alone = [
        {"image": photo, "text": "What is it?", "suffix": " a dog"},
        {"image": photo, "text": "Why", "suffix": "!"},
        {"image": other, "suffix": "it"},
        {"image": other, "text": "Two", "suffix": " cats"},
    ]
    batch, expected = collator(together), collator(alone)
    for key in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(batch[key], expected[key])
    assert batch["image_index"].tolist() == [0, 0, 1, 1]
    assert torch.equal(batch["pixel_values"][batch["image_index"]], expected["pixel_values"])
    assert "image_index" not in expected
    for row in ({"text": ["a"], "suffix": ["b", "c"]}, {"text": "a", "suffix": []}):
        with pytest.raises(ValueError, match=r"Row 0 has . of `text` and . of `suffix`: one for each"):
            collator([row])


def test_a_batch_trains_the_model(collator, parts):
    loss = parts[0](**collator(ROWS)).loss
    loss.backward()
    assert loss.isfinite()


def test_marks_never_move_an_image_to_another_row(collator):
    rows = [{"image": picture(0), "text": "<image> or <image>", "suffix": "a"}, {"image": picture(1), "suffix": "b"}]
    with pytest.raises(ValueError, match="Row 0 has 2 <image> in its text but 1 images"):
        collator(rows)


def test_pain_28_a_row_without_a_suffix_is_refused_with_its_columns():
    rows = [ROWS[0], {"labels": 1, "caption": "x"}]
    with pytest.raises(
        ValueError, match=r"Row 1 has no `suffix`.*\['caption', 'labels'\].*remove_unused_columns=False"
    ):
        ImagePromptCollator(None)(rows)


def test_two_image_columns_are_refused(collator):
    with pytest.raises(ValueError, match="Row 0 has both `image` and `images`"):
        collator([ROWS[0] | {"images": [picture(1)]}])


def test_a_misspelt_column_does_not_go_missing_silently(collator, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("imageprompt"), "propagate", True)
    with caplog.at_level("WARNING"):
        collator([{"image": picture(), "prompt": "What is it?", "suffix": " a dog"}])
    assert "Not used for training: prompt" in caplog.text


def test_max_length_trims_the_suffix_alone(parts):
    row = {"image": picture(), "text": "What is it?", "suffix": " Two cats on a red sofa."}
    whole = ImagePromptCollator(parts[1])([row])
    length = whole["input_ids"].shape[1] - 3
    trimmed = ImagePromptCollator(parts[1], max_length=length)([row])
    for key in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(trimmed[key], whole[key][:, :length])


def test_a_maximum_length_without_positions_is_refused(parts):
    positions = parts[1].tokenizer.model_max_length
    ImagePromptCollator(parts[1], max_length=positions)
    with pytest.raises(ValueError, match=f"`max_length` {positions + 1} is more than .* {positions} positions"):
        ImagePromptCollator(parts[1], max_length=positions + 1)


def test_pain_04_a_maximum_length_that_leaves_nothing_to_learn_is_refused(parts):
    with pytest.raises(ValueError, match=r"Row 0 has .* tokens before its suffix"):
        ImagePromptCollator(parts[1], max_length=5)([ROWS[0]])
