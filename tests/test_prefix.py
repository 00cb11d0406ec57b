"""Behind a prefix every text gets what it gets in one piece with the prefix, and the images are encoded once."""

import pytest
import torch
from conftest import BLUE, GREEN, RED, WHITE, count_tower_calls, lively, new_tokens, picture, tiny, tiny_gpt2
from transformers import AutoConfig

PHOTOS = [[RED], [GREEN, BLUE]]  # the images of each row of the prefix
QUESTIONS = [" What is it?", " Two", " It is the number seven of"]


@pytest.fixture(scope="module", params=["prefix", "cross_attention"])
def pair(request, tokenizer):
    torch.manual_seed(0)
    return lively(tokenizer, fusion=request.param)


def encode(pair, images=PHOTOS):
    model, processor = pair
    texts = ["A"] * len(images)
    return model.encode_prefix(**processor(images=images, text=texts, padding=True, return_tensors="pt"))


def ask(pair, rows, questions, **settings):
    """New tokens of whole prompts, each row by itself: no prefix, no batch."""
    model, processor = pair
    found = []
    for row, question in zip(rows, questions, strict=True):
        inputs = processor(images=[PHOTOS[row]], text=["A" + question], return_tensors="pt")
        found += new_tokens(model, inputs, **settings)
    return found


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "all beams": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "static cache, beams": {"cache_implementation": "static", "num_beams": 3},
    "prompt in chunks": {"prefill_chunk_size": 2},
    "penalty": {"repetition_penalty": 1.3},  # counts the words of the prefix too
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("way", WAYS)
def test_generate_behind_a_prefix_is_generate(pair, way, side):
    model, processor = pair
    prefix, settings = encode(pair), WAYS[way]
    inputs = processor(text=QUESTIONS, padding=True, padding_side=side, return_tensors="pt")
    rows = [1, 0, 1]
    expected = ask(pair, rows, QUESTIONS, **settings)
    # Twice, as the first call must leave the prefix as it is.
    for _ in range(2):
        assert new_tokens(model, inputs, prefix=prefix[rows], **settings) == expected
    assert len({str(words) for words in expected}) > 1


def test_samples_behind_a_prefix_are_the_same_samples(pair):
    model, processor = pair
    whole = processor(images=[RED], text=["A Two"], return_tensors="pt")
    behind = processor(text=[" Two"], return_tensors="pt")
    settings = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 6}
    torch.manual_seed(0)
    expected = model.generate(**whole, **settings)[:, whole["input_ids"].shape[1] :]
    torch.manual_seed(0)
    found = model.generate(**behind, **settings, prefix=encode(pair, [[RED]]))[:, behind["input_ids"].shape[1] :]
    assert found.equal(expected)
    assert len(expected.unique(dim=0)) > 1


def test_one_row_serves_all_questions_and_images_are_encoded_once(tokenizer):
    pair = model, processor = lively(tokenizer)
    calls = count_tower_calls(model)
    prefix = encode(pair)
    assert calls == [3]
    inputs = processor(text=QUESTIONS, padding=True, return_tensors="pt")
    found = new_tokens(model, inputs, prefix=prefix[0])
    model.score(labels=inputs["input_ids"], prefix=prefix[0], **inputs)
    assert calls == [3]
    assert found == ask(pair, [0, 0, 0], QUESTIONS)


def test_what_generate_returns_begins_with_the_prompt_that_was_passed(pair):
    model, processor = pair
    prefix, inputs = encode(pair, [[RED]]), processor(text=QUESTIONS[:1], return_tensors="pt")
    settings = {"prefix": prefix, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    outputs = model.generate(**inputs, **settings)
    assert outputs.sequences[:, : inputs["input_ids"].shape[1]].equal(inputs["input_ids"])
    assert outputs.sequences.shape[1] == inputs["input_ids"].shape[1] + len(outputs.logits)


def test_another_image_may_follow_a_prefix(tokenizer):
    pair = model, processor = lively(tokenizer)
    inputs = processor(images=[WHITE], text=[" and <image>:"], return_tensors="pt")
    whole = processor(images=[[RED, WHITE]], text=["<image>A and <image>:"], return_tensors="pt")
    assert new_tokens(model, inputs, prefix=encode(pair, [[RED]])) == new_tokens(model, whole)


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_behind_a_prefix_are_scores(pair, side):
    model, processor = pair
    rows, prompts, answers = [0, 1, 1], [" What is it?", " Two", " It"], [" dog", " two cats on a red sofa", "!"]
    behind = processor(text=prompts, suffix=answers, padding=True, padding_side=side, return_tensors="pt")
    found = model.score(**behind, prefix=encode(pair)[rows])
    for row, prompt, answer, value in zip(rows, prompts, answers, found, strict=True):
        whole = processor(images=[PHOTOS[row]], text=["A" + prompt], suffix=[answer], return_tensors="pt")
        assert value.item() == pytest.approx(model.score(**whole).item(), rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_prefix_itself_predicts_the_first_token(pair, side):
    """Texts to rank may follow an image directly."""
    model, processor = pair
    answers = [" dog", " two cats on a red sofa", "!"]
    texts = processor.tokenizer(answers, padding=True, padding_side=side, return_tensors="pt")
    labels = texts["input_ids"].masked_fill(texts["attention_mask"] == 0, -100)
    found = model.score(labels=labels, prefix=encode(pair)[1], **texts)
    for answer, value in zip(answers, found, strict=True):
        whole = processor(images=[PHOTOS[1]], text=["A"], suffix=[answer], return_tensors="pt")
        whole["labels"][:, -1] = -100  # the end of the text, which is not in the labels above
        assert value.item() == pytest.approx(model.score(**whole).item(), rel=1e-6, abs=1e-5)


def test_a_language_model_that_looks_back_over_a_window_keeps_what_its_caches_need(tokenizer):
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"num_key_value_heads": 1, "vocab_size": 400, "sliding_window": 6, "initializer_range": 0.2}
    config = AutoConfig.for_model("mistral", **settings, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    pair = model, processor = tiny(tokenizer, text_config=config)
    questions = [" What is it?"] * 2  # of one length
    inputs = processor(text=questions, return_tensors="pt")
    expected = ask(pair, [1, 0], questions)
    for cache in ("dynamic", "static"):
        assert new_tokens(model, inputs, prefix=encode(pair)[[1, 0]], cache_implementation=cache) == expected
    with pytest.raises(ValueError, match="counts padding between a prefix and the text"):
        new_tokens(model, processor(text=QUESTIONS, padding=True, return_tensors="pt"), prefix=encode(pair)[0])


def test_a_prefix_tells_what_it_takes(tokenizer):
    prefix = encode(lively(tokenizer))
    layers, width = 2, 32  # of the tiny language model, in fp32
    assert prefix.nbytes == 2 * 4 * layers * width * len(prefix) * prefix.num_positions
    assert repr(prefix) == f"ImagePrefix(rows=2, positions={prefix.num_positions}, nbytes={prefix.nbytes})"
    assert prefix[1:].nbytes == prefix[1].nbytes == prefix.nbytes / 2
    with pytest.raises(IndexError):
        prefix[[2]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prefix": [0, 1]}, r"2 rows and 3 texts follow: choose the row that each follows, as `prefix\[\[0, 0"),
        ({"use_cache": False}, "`use_cache=False` would compute the prefix again"),
        ({"past_key_values": object()}, "either `prefix` or `past_key_values`"),
        ({"assistant_model": object()}, "either `prefix` or `assistant_model`"),
        ({"inputs_embeds": torch.zeros(3, 1, 32)}, "either `prefix` or `inputs_embeds`"),
        ({"position_ids": torch.zeros(3, 1)}, "either `prefix` or `position_ids`"),
        ({"input_ids": torch.zeros(3, 0, dtype=torch.long)}, "at least one token"),
        ({"max_new_tokens": 250}, "need more than the language model's 256 positions"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_prefixes_that_would_not_be_used_are_refused(tokenizer, wrong, message):
    pair = model, processor = lively(tokenizer)
    prefix, inputs = encode(pair), processor(text=QUESTIONS, padding=True, return_tensors="pt")
    wrong = {"prefix": [0, 0, 1]} | wrong
    wrong["prefix"] = prefix[wrong["prefix"]]
    with pytest.raises(ValueError, match=message):
        model.generate(**dict(inputs) | wrong)


def test_images_behind_a_prefix(pair):
    """Answers and scores are those of the whole prompt; with cross-attention, which reads all images at once, none."""
    model, processor = pair
    prefix = encode(pair)[0]
    texts = {"text": [" It shows", " Two"], "suffix": [" one", " a house and a tree"]}
    behind = processor(images=[[WHITE], [GREEN]], **texts, padding=True, return_tensors="pt")
    question = processor(images=[[WHITE]], text=[" It"], return_tensors="pt")
    if model.config.fusion == "cross_attention":
        for act in (lambda: model.score(prefix=prefix, **behind), lambda: new_tokens(model, question, prefix=prefix)):
            with pytest.raises(ValueError, match="no images can follow a prefix: encode all of them into it"):
                act()
        return
    prompts = ["A<image>" + text for text in texts["text"]]
    whole = [
        processor(images=[[RED, image]], text=["<image>" + prompt], suffix=[suffix], return_tensors="pt")
        for image, prompt, suffix in zip((WHITE, GREEN), prompts, texts["suffix"], strict=True)
    ]
    torch.testing.assert_close(model.score(prefix=prefix, **behind), torch.cat([model.score(**row) for row in whole]))
    asked = processor(images=[[RED, WHITE]], text=["<image>A<image> It"], return_tensors="pt")
    assert new_tokens(model, question, prefix=prefix) == new_tokens(model, asked)
    with pytest.raises(ValueError, match="either `prefix` or `position_ids`"):
        model.score(prefix=prefix, **behind, position_ids=torch.zeros_like(behind["input_ids"]))


def test_recurrent_layers_are_refused(tokenizer):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 400, "head_dim": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model("olmo_hybrid", **sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model, processor = tiny(tokenizer, text_config=config)
    with pytest.raises(ValueError, match="olmo_hybrid language model has recurrent layers"):
        model.encode_prefix(**processor(images=[picture(0)], return_tensors="pt"))


def test_what_trains_stays_in_training_and_dropout_does_not_enter_a_prefix(tokenizer):
    pair = model, _ = tiny(tokenizer, text_config=tiny_gpt2(resid_pdrop=0.5))
    model.train()
    assert encode(pair).last_hidden_state.equal(encode(pair).last_hidden_state)
    assert model.training
