"""Cross-attention fusion: what GPT-2's own cross-attention gives, for every row as if it were alone.

References: GPT-2 itself, given the image tokens of one row; and transformers' VisionEncoderDecoderModel.
"""

import copy
import gc
import weakref

import pytest
import torch
from conftest import (
    BACKBONES,
    NEW_TOKENS,
    batch_inputs,
    gpt2_of,
    max_difference,
    new_tokens,
    picture,
    reference_greedy,
    row_inputs,
    tiny,
    tiny_gpt2,
)
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    StaticCache,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from imageprompt import ImagePromptForConditionalGeneration, compose
from imageprompt.fusion import ImageCache

ROWS = [
    ([picture(0)], "A photo of"),
    ([], "What is it? It is the number"),
    ([picture(1), picture(2)], "Two <image>cats and <image>a dog"),
]


def beside(tokenizer, layout="NCHW", **settings):
    """(model, processor) with cross-attention, and logits that vary with the image."""
    text_config = tiny_gpt2(initializer_range=0.2)
    model, processor = tiny(tokenizer, layout, text_config=text_config, fusion="cross_attention", **settings)
    for parameter in model.model.connector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, processor


@pytest.fixture(scope="module")
def pair(tokenizer):
    torch.manual_seed(0)
    return beside(tokenizer)


@torch.no_grad()
def expected_logits(model, inputs):
    """GPT-2's logits for one row: each position as if the row had only the images whose placeholder it has passed.

    Whatever comes later cannot change a causal model's position, so the row may be cut behind it.
    """
    gpt2, ids = gpt2_of(model), inputs["input_ids"]
    passed = (ids[0] == model.config.image_token_id).cumsum(0).tolist()
    hidden = [None] * len(passed)
    tokens = model.get_image_features(inputs["pixel_values"]).pooler_output if passed[-1] else None
    # Layer by layer, since an early position keeps what it saw: run GPT-2's blocks with a mask per position.
    states = gpt2.transformer.wte(ids) + gpt2.transformer.wpe(torch.arange(len(passed)))
    for block in gpt2.transformer.h:
        length = len(passed)
        causal = torch.full((length, length), float("-inf")).triu(1)[None, None]
        states = states + block.attn(block.ln_1(states), attention_mask=causal)[0]
        for position, count in enumerate(passed):
            if count:
                query = block.ln_cross_attn(states[:, position : position + 1])
                seen = tokens[:count].flatten(0, 1)[None]
                hidden[position] = block.crossattention(query, encoder_hidden_states=seen)[0]
        states = torch.cat(
            [states[:, i : i + 1] + (0 if extra is None else extra) for i, extra in enumerate(hidden)], dim=1
        )
        states = states + block.mlp(block.ln_2(states))
    return gpt2.lm_head(gpt2.transformer.ln_f(states))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", BACKBONES)
@torch.no_grad()
def test_one_image_in_front_is_what_gpt2_makes_of_its_tokens(tokenizer, layout, attention):
    model, processor = beside(tokenizer, layout)
    model.set_attn_implementation({"text_config": attention})
    inputs = row_inputs(processor, ROWS[0])
    tokens = model.get_image_features(inputs["pixel_values"]).pooler_output
    expected = gpt2_of(model)(inputs["input_ids"], encoder_hidden_states=tokens).logits
    assert max_difference(model(**inputs).logits, expected) <= 1e-5
    assert max_difference(expected, gpt2_of(model)(inputs["input_ids"]).logits) > 0.1


@pytest.mark.parametrize("row", ROWS, ids=["one image", "text", "two images"])
def test_a_position_reads_the_images_it_has_passed(pair, row):
    model, processor = pair
    inputs = row_inputs(processor, row)
    with torch.no_grad():
        assert max_difference(model(**inputs).logits, expected_logits(model, inputs)) <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", BACKBONES)
@torch.no_grad()
def test_pain_03_padding_and_batch_mix_move_no_row(tokenizer, layout, side):
    model, processor = beside(tokenizer, layout)
    inputs = batch_inputs(processor, ROWS, padding_side=side)
    logits = model(**inputs).logits
    for row, mask, got in zip(ROWS, inputs["attention_mask"], logits, strict=True):
        assert max_difference(got[mask.bool()], model(**row_inputs(processor, row)).logits[0]) <= 1e-5


@torch.no_grad()
def test_pain_06_text_without_images_is_plain_gpt2(pair):
    model, processor = pair
    plain = GPT2LMHeadModel(GPT2Config(**model.config.text_config.to_dict() | {"add_cross_attention": False})).eval()
    weights = model.model.language_model.state_dict()
    plain.transformer.load_state_dict({name: value for name, value in weights.items() if "cross" not in name})
    plain.tie_weights()
    inputs = processor(text=["A photo of", "What is it? It is"], padding=True, return_tensors="pt")
    expected = plain(**inputs, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)).logits
    real = inputs["attention_mask"].bool()
    assert max_difference(model(**inputs).logits[real], expected[real]) <= 1e-5
    generated = plain.generate(**inputs, max_new_tokens=NEW_TOKENS, pad_token_id=0, suppress_tokens=[400])
    assert model.generate(**inputs, max_new_tokens=NEW_TOKENS).tolist() == generated.tolist()


def expected_greedy(model, inputs):
    """The new tokens that `expected_logits` lead to."""
    return reference_greedy(model, inputs, lambda row: expected_logits(model, row))


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}],
    ids=lambda settings: next(iter(settings), "default"),
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_pain_23_every_way_to_decode_gives_the_same_tokens(pair, side, settings):
    model, processor = pair
    expected = [expected_greedy(model, row_inputs(processor, row)) for row in ROWS]
    assert new_tokens(model, batch_inputs(processor, ROWS, padding_side=side), **settings) == expected


@pytest.mark.parametrize("settings", [{}, {"num_return_sequences": 2}], ids=["best", "two"])
def test_pain_21_beams_of_a_batch_equal_beams_of_its_rows(pair, settings):
    model, processor = pair
    settings |= {"num_beams": 4}
    expected = [ids for row in ROWS for ids in new_tokens(model, row_inputs(processor, row), **settings)]
    assert new_tokens(model, batch_inputs(processor, ROWS), **settings) == expected


def test_pain_21_images_are_encoded_and_projected_once(pair):
    model, processor = pair
    block = model.model.language_model.h[0].crossattention
    calls = {"tower": 0, "keys": 0}
    hooks = [
        model.model.vision_tower.register_forward_hook(lambda *_: calls.update(tower=calls["tower"] + 1)),
        block.c_attn.register_forward_hook(lambda *_: calls.update(keys=calls["keys"] + 1)),
    ]
    model.generate(**batch_inputs(processor, ROWS), max_new_tokens=4, num_beams=3)
    for hook in hooks:
        hook.remove()
    assert calls == {"tower": 1, "keys": 1}


@pytest.mark.parametrize("wrapped", [False, True], ids=["text cache", "returned cache"])
def test_a_conversation_continues_from_its_cache(pair, wrapped):
    model, processor = pair
    first = row_inputs(processor, ROWS[0])
    cache = DynamicCache(config=model.config.text_config)
    output = model.generate(**first, past_key_values=cache, max_new_tokens=3, return_dict_in_generate=True)
    question = processor.tokenizer(" What is it?", return_tensors="pt").input_ids
    ids = torch.cat([output.sequences, question], dim=1)
    expected = expected_greedy(model, dict(first) | {"input_ids": ids})
    cache = output.past_key_values if wrapped else cache
    assert isinstance(output.past_key_values, ImageCache)
    continued = model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=NEW_TOKENS)
    assert continued[0, ids.shape[1] :].tolist() == expected


def test_an_image_may_come_after_text_in_the_cache_but_not_after_images(pair):
    model, processor = pair
    text = row_inputs(processor, ([], "A photo of"))
    cache = model(**text, use_cache=True).past_key_values
    image = row_inputs(processor, ([picture(0)], "<image> a"))
    whole = dict(image) | {"input_ids": torch.cat([text["input_ids"], image["input_ids"]], dim=1)}
    step = {"input_ids": image["input_ids"], "pixel_values": image["pixel_values"]}
    with torch.no_grad():
        logits = model(**step, past_key_values=cache).logits
        assert max_difference(logits, expected_logits(model, whole)[:, -logits.shape[1] :]) <= 1e-5
    with pytest.raises(ValueError, match="already holds images"):
        model(**step, past_key_values=cache)


@torch.no_grad()
def test_attention_weights_say_what_a_position_read(tokenizer):
    model, processor = beside(tokenizer)
    model.set_attn_implementation({"text_config": "eager"})
    inputs = batch_inputs(processor, ROWS)
    outputs = model(**inputs, output_attentions=True)
    passed = (inputs["input_ids"] == model.config.image_token_id).cumsum(-1)
    assert len(outputs.cross_attentions) == len(outputs.attentions) == 2
    for weights in outputs.cross_attentions:
        assert weights.shape == (3, 2, inputs["input_ids"].shape[1], 2 * model.config.num_image_tokens)
        first, second = weights.unflatten(-1, (2, -1)).sum(-1).unbind(-1)
        one, both = (passed == 1)[:, None].expand_as(first), (passed == 2)[:, None].expand_as(first)
        assert torch.allclose(first[one], torch.ones(())) and not second[one].any()
        assert torch.allclose((first + second)[both], torch.ones(())) and (second[both] > 0).all()


def test_pain_23_decoding_compiles_without_graph_breaks(pair):
    model, processor = pair
    inputs = row_inputs(processor, ROWS[2])
    length, config = inputs["input_ids"].shape[1], model.config.text_config
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        caches = [
            model(**inputs, past_key_values=StaticCache(config=config, max_cache_len=32), use_cache=True)
            for _ in range(2)
        ]
        step = {"input_ids": torch.tensor([[7]]), "position_ids": torch.tensor([[length]])}
        expected = model(**step, past_key_values=caches[0].past_key_values).logits
        assert max_difference(compiled(**step, past_key_values=caches[1].past_key_values).logits, expected) <= 1e-5


def test_a_cache_that_is_used_again_forgets_the_images_before(pair):
    model, processor = pair
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    for row in (ROWS[0], ROWS[1], ROWS[2]):
        inputs = row_inputs(processor, row)
        assert new_tokens(model, inputs, past_key_values=cache) == [expected_greedy(model, inputs)]
        cache.reset()


@pytest.mark.parametrize("text", ["A photo of <image>", "<image>", "A <image> and"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_placeholder_counts_wherever_a_chunk_ends(pair, text, size):
    model, processor = pair
    inputs = row_inputs(processor, ([picture(0)], text))
    assert new_tokens(model, inputs, prefill_chunk_size=size) == [expected_greedy(model, inputs)]


def test_a_static_cache_that_is_used_again_reads_a_prompt_of_one_image(pair):
    model, processor = pair
    cache = StaticCache(config=model.config.text_config, max_cache_len=32)
    for seed in (0, 1, 0):
        cache.reset()
        inputs = row_inputs(processor, ([picture(seed)], ""))
        assert inputs["input_ids"].shape[1] == 1
        assert new_tokens(model, inputs, past_key_values=cache) == [expected_greedy(model, inputs)]


def test_an_image_alone_may_follow_text_in_the_cache(pair):
    model, processor = pair
    text = row_inputs(processor, ([], "A photo of"))
    cache = DynamicCache(config=model.config.text_config)
    model(**text, past_key_values=cache, use_cache=True)
    image = row_inputs(processor, ([picture(0)], ""))
    whole = dict(image) | {"input_ids": torch.cat([text["input_ids"], image["input_ids"]], dim=1)}
    del whole["attention_mask"]
    assert new_tokens(model, whole, past_key_values=cache) == [expected_greedy(model, whole)]


@pytest.mark.parametrize("wrapped", [False, True], ids=["text cache", "returned cache"])
def test_other_images_behind_a_cache_with_images_are_refused(pair, wrapped):
    model, processor = pair
    first = row_inputs(processor, ROWS[0])
    cache = DynamicCache(config=model.config.text_config)
    output = model.generate(**first, past_key_values=cache, max_new_tokens=3, return_dict_in_generate=True)
    cache = output.past_key_values if wrapped else cache
    pixel_values = row_inputs(processor, ([picture(5)], ""))["pixel_values"]
    with pytest.raises(ValueError, match=r"already holds images.*the whole prompt with all of its images"):
        model.generate(output.sequences, pixel_values=pixel_values, past_key_values=cache, max_new_tokens=3)


@pytest.mark.parametrize("wrapped", [False, True], ids=["text cache", "returned cache"])
def test_what_is_cropped_away_is_not_read(pair, wrapped):
    model, processor = pair
    inputs = row_inputs(processor, ([picture(0)], "A photo of <image> a dog"))
    before = processor.tokenizer("A photo of ", return_tensors="pt").input_ids
    cache = DynamicCache(config=model.config.text_config)
    returned = model(**inputs, past_key_values=cache, use_cache=True).past_key_values
    cache.crop(before.shape[1] - inputs["input_ids"].shape[1])
    cache = returned if wrapped else cache
    rest = processor.tokenizer(" two cats", return_tensors="pt").input_ids
    text = {"input_ids": torch.cat([before, rest], dim=1)}
    other = row_inputs(processor, ([picture(1)], " and <image> here"))
    whole = dict(other) | {"input_ids": torch.cat([text["input_ids"], other["input_ids"]], dim=1)}
    with torch.no_grad():
        logits = model(input_ids=rest, past_key_values=cache, use_cache=True).logits
        assert max_difference(logits, expected_logits(model, text)[:, -rest.shape[1] :]) <= 1e-5
        step = {"input_ids": other["input_ids"], "pixel_values": other["pixel_values"]}
        logits = model(**step, past_key_values=cache).logits  # the image in the cache was cropped away
        assert max_difference(logits, expected_logits(model, whole)[:, -logits.shape[1] :]) <= 1e-5


@torch.no_grad()
def test_rows_of_a_cache_take_their_images_along(pair):
    model, processor = pair
    token = torch.tensor([[7], [8], [9]])

    def step(change, rows):
        inputs = batch_inputs(processor, ROWS, padding_side="left")
        cache = model(**inputs, use_cache=True).past_key_values
        change(cache)
        mask = torch.nn.functional.pad(inputs["attention_mask"][rows], (0, 1), value=1)
        return model(input_ids=token[rows], attention_mask=mask, past_key_values=cache).logits

    expected = step(lambda cache: None, [0, 1, 2])
    order = torch.tensor([2, 0, 1])
    assert max_difference(step(lambda cache: cache.reorder_cache(order), order), expected[order]) <= 1e-5
    some = torch.tensor([2, 1])
    assert max_difference(step(lambda cache: cache.batch_select_indices(some), some), expected[some]) <= 1e-5
    twice = torch.tensor([0, 0, 1, 1, 2, 2])
    assert max_difference(step(lambda cache: cache.batch_repeat_interleave(2), twice), expected[twice]) <= 1e-5


def test_an_emptied_cache_starts_anew(pair):
    model, processor = pair
    cache = model(**row_inputs(processor, ROWS[0]), use_cache=True).past_key_values
    for empty in (lambda: cache.reset(), lambda: cache.crop(-cache.get_seq_length())):
        empty()
        inputs = row_inputs(processor, ROWS[2])
        assert new_tokens(model, inputs, past_key_values=cache) == [expected_greedy(model, inputs)]


def test_caches_are_freed_without_the_garbage_collector(pair):
    model, processor = pair
    inputs = row_inputs(processor, ROWS[0])
    gc.collect()
    gc.disable()
    try:
        cache = weakref.ref(model(**inputs, use_cache=True).past_key_values)
        assert cache() is None
    finally:
        gc.enable()


def test_an_assistant_is_refused(pair):
    model, processor = pair
    with pytest.raises(ValueError, match="with cross-attention, leave it out"):
        model.generate(**row_inputs(processor, ROWS[0]), assistant_model=gpt2_of(model), max_new_tokens=3)


@torch.no_grad()
def test_encoded_rows_stand_in_for_images_and_must_match_them(pair):
    model, processor = pair
    inputs = row_inputs(processor, ROWS[2])
    expected = model(**inputs).logits
    pixel_values = inputs.pop("pixel_values")
    states = model.get_image_features(pixel_values).pooler_output.flatten(0, 1)[None]
    assert torch.equal(model(**inputs, encoder_hidden_states=states).logits, expected)
    for wrong in (states[:, :4], torch.cat([states, states], dim=1)):
        with pytest.raises(ValueError, match="each image of a row needs one placeholder"):
            model(**inputs, encoder_hidden_states=wrong)
    with pytest.raises(ValueError, match="instead of `pixel_values`"):
        model(**inputs, pixel_values=pixel_values, encoder_hidden_states=states)


def test_embeddings_stand_in_for_ids(pair):
    model, processor = pair
    inputs = batch_inputs(processor, ROWS)
    expected = new_tokens(model, inputs, num_beams=2)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    output = model.generate(inputs_embeds=embeds, **inputs, num_beams=2, max_new_tokens=NEW_TOKENS)
    for row, ids in zip(output.tolist(), expected, strict=True):
        assert row[: len(ids)] == ids


def test_an_image_takes_one_position_however_many_tokens_it_has(tokenizer):
    model, processor = beside(tokenizer, "NLC", num_image_tokens=16)
    assert (model.config.num_image_tokens, model.config.image_seq_length, processor.num_image_tokens) == (16, 1, 1)
    inputs = row_inputs(processor, ROWS[2])
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 2
    assert model.get_image_features(inputs["pixel_values"]).pooler_output.shape == (2, 16, 32)
    text_config = tiny_gpt2(n_positions=16)
    tiny(tokenizer, "NLC", text_config=text_config, num_image_tokens=16, fusion="cross_attention")


@pytest.mark.parametrize("drop", ["pixel_values", "input_ids"])
def test_images_that_do_not_match_their_placeholders_are_refused(pair, drop):
    model, processor = pair
    inputs = row_inputs(processor, ROWS[0])
    if drop == "input_ids":
        inputs["input_ids"] = inputs["input_ids"][:, 1:]
        del inputs["attention_mask"]
    else:
        del inputs["pixel_values"]
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="do not match"):
            call(**inputs)


def test_training_reaches_tower_connector_and_cross_attention(tokenizer):
    model, processor = beside(tokenizer, "NLC")
    inputs = processor(
        images=[[picture(0)], []], text=["A", "Two"], suffix=[" dog!", " cats"], padding=True, return_tensors="pt"
    )
    model.train()(**inputs).loss.backward()
    silent = {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().sum())
    }
    assert silent == set()


def test_cross_attention_learns_with_the_connector(tokenizer):
    model, _ = beside(tokenizer, trainable={"vision": False, "text": False})
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("crossattention" in name for name in learning) and any("ln_cross_attn" in name for name in learning)
    assert all("cross" in name or "connector" in name for name in learning)
    model.set_trainable(connector=False, text=True)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning and not any("cross" in name or "connector" in name for name in learning)


def test_it_is_saved_and_loaded_bit_equal(pair, tmp_path):
    model, processor = pair
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = ImagePromptForConditionalGeneration.from_pretrained(tmp_path)
    again = type(processor).from_pretrained(tmp_path)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    inputs = batch_inputs(again, ROWS)
    with torch.no_grad():
        assert max_difference(loaded(**inputs).logits, model(**inputs).logits) <= 1e-6
    again.check_model(loaded)


def test_pretrained_gpt2_keeps_its_words_and_gets_cross_attention(tokenizer, tmp_path):
    gpt2 = GPT2LMHeadModel(tiny_gpt2()).eval()
    gpt2.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = {"fusion": "cross_attention", "num_image_tokens": 4, "pretrained": True}
    with pytest.raises(ValueError, match="Cannot load"):  # the backbone's weights are not here, but the text's are
        compose("resnet10t", tmp_path, **settings)
    model, _ = compose("resnet10t", tmp_path, **settings | {"pretrained": False})
    assert model.model.language_model.h[1].crossattention.q_attn.weight.abs().sum() > 0


def test_logits_equal_a_vision_encoder_decoder_model(tokenizer):
    """Its decoder starts with BOS; here the placeholder stands in that place, with the embedding of BOS."""
    model, processor = beside(tokenizer, "NLC")
    text_config = copy.deepcopy(model.config.text_config)
    vit = ViTConfig(hidden_size=text_config.n_embd, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    peer = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, text_config)).eval()
    peer.decoder.transformer.load_state_dict(model.model.language_model.state_dict())
    peer.decoder.tie_weights()
    inputs = row_inputs(processor, ([picture(0)], "A photo of"))
    tokens = model.get_image_features(inputs["pixel_values"]).pooler_output
    placeholder = model.config.image_token_id
    words = torch.arange(text_config.vocab_size) != placeholder
    with torch.no_grad():
        model.get_input_embeddings().weight[placeholder] = model.get_input_embeddings().weight[0]
        ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == placeholder, 0)
        expected = peer(encoder_outputs=(tokens,), decoder_input_ids=ids).logits
        assert max_difference(model(**inputs).logits[..., words], expected[..., words]) <= 1e-5


def test_other_language_models_have_no_cross_attention(tokenizer):
    from transformers import LlamaConfig

    llama = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=400)
    with pytest.raises(ValueError, match=r"needs GPT-2.*llama goes with 'prefix'"):
        tiny(tokenizer, text_config=llama, fusion="cross_attention")


def test_attention_that_takes_no_scores_is_refused(pair):
    model, processor = pair
    model.model.language_model.config._attn_implementation_internal, before = "flex_attention", "sdpa"
    with pytest.raises(ValueError, match="'sdpa' or 'eager'"):
        model(**row_inputs(processor, ROWS[0]))
    model.model.language_model.config._attn_implementation_internal = before
