"""Packed rows learn what padded ones do, and models in which they would not are refused."""

import pytest
from conftest import lively, max_difference, picture, tiny, tiny_gpt2
from transformers import BloomConfig, GPTNeoXConfig, LlamaConfig

from imageprompt import ImagePromptCollator, compose
from imageprompt.data.packing import check_packable

ROWS = [
    {"image": picture(0), "text": "What is it?", "suffix": " a dog"},
    {"image": [picture(1), picture(2)], "text": "A <image> or <image>", "suffix": " two cats on a red sofa."},
    {"text": "Two", "suffix": " cats"},
    {"image": picture(3), "suffix": " it"},
    {"image": picture(4), "text": ["What?", "Which?"], "suffix": [" the number seven", " a"]},
]


def losses_and_gradients(parts, batch):
    model, _ = parts
    model.train()
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pack_length", [1, 40, 10_000])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradients_are_those_of_padded_rows(tokenizer, pack_length, attention):
    model, processor = parts = lively(tokenizer)
    model.set_attn_implementation(attention)
    model.set_trainable(vision=False)  # batch norm sees the same images, but in its own order of summation
    padded = ImagePromptCollator(processor)(ROWS)
    packed = ImagePromptCollator(processor, pack_length=pack_length)(ROWS)
    lengths = padded["attention_mask"].sum(-1)
    assert "attention_mask" not in packed and "image_index" in packed
    assert packed["input_ids"].shape[1] <= max(pack_length, lengths.max())
    assert (packed["labels"] != -100).sum() == (padded["labels"] != -100).sum()
    if pack_length == 10_000:
        assert packed["input_ids"].shape == (1, lengths.sum())
    expected, gradients = losses_and_gradients(parts, padded)
    loss, others = losses_and_gradients(parts, packed)
    assert max_difference(loss, expected) <= 1e-5
    assert gradients.keys() == others.keys()
    assert max(max_difference(gradients[name], others[name]) for name in gradients) <= 1e-4


def test_rows_longer_than_the_positions_may_lie_in_one_line(tokenizer):
    model, processor = lively(tokenizer)
    rows = [{"image": picture(seed), "suffix": " a dog"} for seed in range(40)]
    packed = ImagePromptCollator(processor, pack_length=10_000)(rows)
    assert packed["input_ids"].shape[1] > model.config.text_config.n_positions
    expected = model.eval()(**ImagePromptCollator(processor)(rows)).loss
    assert max_difference(model(**packed).loss, expected) <= 1e-5


def test_a_line_may_be_padded_by_more_than_the_positions(tokenizer):
    model, processor = tiny(tokenizer, text_config=tiny_gpt2(initializer_range=0.2, n_positions=48))
    rows = [{"image": picture(seed), "suffix": " a dog"} for seed in range(9)]
    lengths = ImagePromptCollator(processor)(rows)["attention_mask"].sum(-1)
    packed = ImagePromptCollator(processor, pack_length=int(lengths[:8].sum()))(rows)
    padding = packed["input_ids"].shape[1] - lengths[8]
    assert len(packed["input_ids"]) == 2 and padding > 48
    expected = model.eval()(**ImagePromptCollator(processor)(rows)).loss
    assert max_difference(model(**packed).loss, expected) <= 1e-5


def test_a_line_has_room_for_a_token(tokenizer):
    with pytest.raises(ValueError, match="`pack_length` is at least 1, got 0"):
        ImagePromptCollator(lively(tokenizer)[1], pack_length=0)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 400}
SIZES |= {"bos_token_id": 0, "eos_token_id": 0}


@pytest.mark.parametrize(
    ("config", "fits"),
    [
        (tiny_gpt2(initializer_range=0.2), True),
        (LlamaConfig(**SIZES, intermediate_size=64, initializer_range=0.2), True),
        (GPTNeoXConfig(**SIZES, intermediate_size=64, initializer_range=0.2), True),
        (BloomConfig(**SIZES, n_layer=2, n_head=2, initializer_range=0.2), False),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_a_model_is_tried_before_it_is_packed(tokenizer, config, fits):
    model, _ = compose("test_resnet", config, tokenizer=tokenizer, pretrained=False)
    if fits:
        check_packable(model)
        return
    with pytest.raises(ValueError, match=r"see each other in a bloom with \w+ attention: leave out `--pack_length`"):
        check_packable(model)


def test_cross_attention_is_refused(tokenizer):
    model, _ = lively(tokenizer, fusion="cross_attention")
    with pytest.raises(ValueError, match=r"each other's images with `fusion='cross_attention'`: leave out"):
        check_packable(model)
