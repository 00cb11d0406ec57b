"""Contracts that hold for any input: hypothesis draws the rows, images, padding, beams, types and settings.

The draws are the same in every run (`derandomize`), so a failure can be repeated.
"""

import functools

import pytest
import torch
from conftest import batch_inputs, max_difference, picture, row_inputs, tiny, tiny_gpt2
from hypothesis import given, settings
from hypothesis import strategies as st

from imageprompt import ImagePromptConfig, ImagePromptImageProcessor, ImagePromptProcessor
from imageprompt.configuration import IGNORE_INDEX
from imageprompt.connectors import CONNECTORS, build_connector

few = settings(max_examples=15, deadline=None, derandomize=True)
many = settings(max_examples=60, deadline=None, derandomize=True)

WORDS = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<"), max_size=12)


@st.composite
def rows(draw):
    """(images, text) of one row: none to three images, with a mark for each somewhere in the text, or with none."""
    images = [picture(seed) for seed in draw(st.lists(st.integers(0, 9), max_size=3))]
    words = [draw(WORDS) for _ in range(len(images) + 1)]
    if images and draw(st.booleans()):
        return images, "<image>".join(words)
    return images, "".join(words) or "A"


@pytest.fixture(scope="module")
def pairs(tokenizer):
    """A (model, processor) of every layout, fusion and type, made when it is first drawn."""

    @functools.cache
    def pair(layout, fusion, dtype):
        torch.manual_seed(0)
        model, processor = tiny(tokenizer, layout, tiny_gpt2(initializer_range=0.2), fusion=fusion)
        return model.to(dtype), processor

    return pair


@given(data=st.data())
@many
@torch.no_grad()
def test_pain_03_a_row_has_the_logits_it_has_alone(pairs, data):
    layout = data.draw(st.sampled_from(["NCHW", "NLC", "NHWC"]))
    fusion = data.draw(st.sampled_from(["prefix", "cross_attention"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    model, processor = pairs(layout, fusion, dtype)
    batch = data.draw(st.lists(rows(), min_size=1, max_size=4))
    inputs = batch_inputs(processor, batch, padding_side=data.draw(st.sampled_from(["left", "right"])))
    logits = model(**inputs).logits
    # bf16 keeps 8 bits of each number on the way; a wrong position moves logits by ten times as much.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-5
    for row, mask, got in zip(batch, inputs["attention_mask"], logits, strict=True):
        alone = model(**row_inputs(processor, row)).logits[0]
        assert max_difference(got[mask.bool()], alone) <= tolerance * max(1, alone.abs().max())


@given(data=st.data())
@few
def test_pain_21_a_row_generates_what_it_generates_alone(pairs, data):
    layout = data.draw(st.sampled_from(["NCHW", "NLC", "NHWC"]))
    fusion = data.draw(st.sampled_from(["prefix", "cross_attention"]))
    model, processor = pairs(layout, fusion, torch.float32)
    beams = data.draw(st.integers(1, 3))
    how = {"num_beams": beams, "num_return_sequences": data.draw(st.integers(1, beams)), "max_new_tokens": 4}
    batch = data.draw(st.lists(rows(), min_size=1, max_size=3))
    inputs = batch_inputs(processor, batch, padding_side=data.draw(st.sampled_from(["left", "right"])))

    def texts(inputs):
        new = model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(new, skip_special_tokens=True)

    assert texts(inputs) == [text for row in batch for text in texts(row_inputs(processor, row))]


@st.composite
def configurations(draw):
    """Any connector, count, image size and fusion that the configuration accepts."""
    connector = draw(st.sampled_from(sorted(CONNECTORS)))
    size = [3, 32 * draw(st.integers(1, 6)), 32 * draw(st.integers(1, 6))]
    grid = [size[1] // 32, size[2] // 32]
    if CONNECTORS[connector].feature_layer == "pooled":
        grid = [1, 1]
    counts = CONNECTORS[connector].possible_counts(grid)
    return ImagePromptConfig.from_backbones(
        "resnet10t",
        tiny_gpt2(n_head=8),
        preprocessing={"input_size": size},
        connector=connector,
        num_image_tokens=draw(st.sampled_from(counts[:100])),
        fusion=draw(st.sampled_from(["prefix", "cross_attention"])),
    )


@given(config=configurations(), counts=st.lists(st.integers(0, 3), min_size=1, max_size=3))
@many
def test_pain_01_the_processor_makes_the_placeholders_that_the_model_fills(tokenizer_with_image, config, counts):
    height, width = config.image_size
    processor = ImagePromptProcessor(
        ImagePromptImageProcessor(size={"height": height, "width": width}),
        tokenizer_with_image,
        num_image_tokens=config.image_seq_length,
    )
    images = [[picture()] * count for count in counts]
    ids = processor(images=images, text=["A"] * len(counts), padding=True, return_tensors="pt")["input_ids"]
    placeholders = (ids == processor.image_token_id).sum(-1).tolist()
    with torch.device("meta"):
        features = torch.empty(sum(counts), config.feature_grid[0] * config.feature_grid[1], config.feature_size)
        tokens = build_connector(config)(features)
    assert tokens.shape == (sum(counts), config.num_image_tokens, config.hidden_size)
    each = tokens.shape[1] if config.fusion == "prefix" else 1
    assert placeholders == [count * each for count in counts]
    predicted = processor._get_num_multimodal_tokens(image_sizes=[(70, 90)] * sum(counts)).num_image_tokens
    assert sum(predicted) == sum(placeholders)


@pytest.fixture(scope="module")
def tokenizer_with_image(tokenizer):
    return tiny(tokenizer)[1].tokenizer


@given(batch=st.lists(rows(), min_size=1, max_size=3))
@many
def test_offsets_and_offset_mappings_point_into_the_text(pairs, batch):
    _, processor = pairs("NCHW", "prefix", torch.float32)
    images, texts = [images for images, _ in batch], [text for _, text in batch]
    marked = [text if "<image>" in text else "<image>" * len(images) + text for images, text in batch]
    outputs = processor(images, texts, return_text_replacement_offsets=True, return_offsets_mapping=True)
    block = "<image>" * processor.num_image_tokens
    for row, text in enumerate(marked):
        expanded = text.replace("<image>", block)
        offsets = outputs["text_replacement_offsets"][row]
        assert [text[slice(*offset["span"])] for offset in offsets] == ["<image>"] * len(images[row])
        assert [expanded[slice(*offset["new_span"])] for offset in offsets] == [block] * len(images[row])
        ids, spans = outputs["input_ids"][row], outputs["offset_mapping"][row]
        assert len(ids) == len(spans)
        for token, (start, end) in zip(ids, spans, strict=True):
            assert (token == processor.image_token_id) == (expanded[start:end] == "<image>")
        assert "".join(expanded[max(a, done) : b] for (a, b), done in zip(spans, ends_before(spans), strict=True)) == (
            expanded
        )


def ends_before(spans):
    """How far the text is covered before each token: the bytes of one character may be several tokens."""
    done, before = 0, []
    for _, end in spans:
        before.append(done)
        done = max(done, end)
    return before


@given(batch=st.lists(st.tuples(rows(), WORDS), min_size=1, max_size=3), side=st.sampled_from(["left", "right"]))
@many
def test_pain_09_exactly_the_suffix_and_its_end_are_learnt(pairs, batch, side):
    _, processor = pairs("NCHW", "prefix", torch.float32)
    outputs = processor(
        [images for (images, _), _ in batch],
        [text for (_, text), _ in batch],
        suffix=[suffix for _, suffix in batch],
        padding=True,
        padding_side=side,
        return_tensors="pt",
    )
    for ids, labels, mask, (_, suffix) in zip(
        outputs["input_ids"], outputs["labels"], outputs["attention_mask"], batch, strict=True
    ):
        learnt = labels != IGNORE_INDEX
        assert not (learnt & (mask == 0)).any()
        assert torch.equal(labels[learnt], ids[learnt])
        assert processor.decode(labels[learnt]) == suffix + processor.tokenizer.eos_token
