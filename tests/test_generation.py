"""Generation: rows are independent of their batch, images are encoded once, and what cannot fit is refused early.

The reference everywhere is the plainest loop there is: one row at a time, no cache, the whole model for every token.
"""

import copy
import itertools
import re
import threading
from pathlib import Path

import pytest
import torch
from conftest import (
    BACKBONES,
    BLUE,
    GREEN,
    NEW_TOKENS,
    RED,
    WHITE,
    batch_inputs,
    count_tower_calls,
    gpt2_of,
    lively,
    max_difference,
    new_tokens,
    picture,
    reference_greedy,
    row_inputs,
    tiny,
    tiny_gpt2,
)
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GPT2LMHeadModel,
    LogitsProcessorList,
    StaticCache,
    SuppressTokensLogitsProcessor,
    TextIteratorStreamer,
    TextStreamer,
)

ROWS = [  # images and text of each row
    ([RED], "A photo of"),
    ([], "What is it? It is the number"),
    ([GREEN, BLUE, WHITE], "Two"),
]


@pytest.fixture(scope="module")
def pair(tokenizer):
    torch.manual_seed(0)
    return lively(tokenizer)


@torch.no_grad()
def reference_outputs(model, inputs, new_ids, **kwargs):
    """The whole model over one row and the tokens behind it, at once: no cache, no batch, no `generate`."""
    ids = torch.cat([inputs["input_ids"], new_ids[None]], dim=1)
    return model(input_ids=ids, pixel_values=inputs.get("pixel_values"), use_cache=False, **kwargs)


def reference_logits(model, inputs, new_ids):
    """The logits (len(new_ids), vocabulary) that each new token was chosen by."""
    return reference_outputs(model, inputs, new_ids).logits[0, inputs["input_ids"].shape[1] - 1 : -1]


@pytest.mark.parametrize("layout", BACKBONES)
def test_images_decide_the_words(tokenizer, layout):
    model, processor = lively(tokenizer, layout)
    inputs = processor(images=[RED, GREEN, BLUE, WHITE], text="A", return_tensors="pt")
    assert len({str(words) for words in new_tokens(model, inputs)}) == 4


@pytest.mark.parametrize("layout", BACKBONES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_pain_03_batched_rows_generate_what_they_generate_alone(tokenizer, layout, side):
    model, processor = lively(tokenizer, layout)
    expected = [reference_greedy(model, row_inputs(processor, row)) for row in ROWS]
    assert new_tokens(model, batch_inputs(processor, ROWS, padding_side=side)) == expected


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", BACKBONES)
def test_pain_21_beams_of_a_batch_equal_beams_of_its_rows(tokenizer, layout, side):
    model, processor = lively(tokenizer, layout)
    expected = [new_tokens(model, row_inputs(processor, row), num_beams=4)[0] for row in ROWS]
    assert new_tokens(model, batch_inputs(processor, ROWS, padding_side=side), num_beams=4) == expected


def test_one_row_without_padding_needs_no_mask(pair):
    model, processor = pair
    inputs = row_inputs(processor, ROWS[0])
    with_mask = new_tokens(model, inputs)
    del inputs["attention_mask"]
    assert new_tokens(model, inputs) == with_mask


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"prompt_lookup_num_tokens": 2},
        pytest.param({"cache_implementation": "offloaded"}, marks=pytest.mark.gpu),  # needs a device to offload from
        pytest.param({"cache_implementation": "offloaded_static"}, marks=pytest.mark.gpu),
    ],
    ids=lambda settings: " ".join(map(str, settings.values())) if "cache_implementation" in settings else None,
)
def test_pain_23_every_way_to_decode_gives_the_same_tokens(pair, settings):
    model, processor = pair
    rows = ROWS[:1] if "prompt_lookup_num_tokens" in settings else ROWS
    expected = [reference_greedy(model, row_inputs(processor, row)) for row in rows]
    if "offloaded" in settings.get("cache_implementation", ""):
        model = copy.deepcopy(model).to("cuda")
    assert new_tokens(model, batch_inputs(processor, rows).to(model.device), **settings) == expected


def test_pain_23_generate_compiles_its_decoding_without_graph_breaks(pair):
    model, processor = pair
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True  # the library compiles on accelerators alone, unless told so
    expected = [reference_greedy(model, row_inputs(processor, row)) for row in ROWS]
    settings = {"cache_implementation": "static", "compile_config": config}
    assert new_tokens(model, batch_inputs(processor, ROWS), **settings) == expected
    assert graphs


def test_beams_with_a_static_cache(pair):
    model, processor = pair
    inputs = batch_inputs(processor, ROWS)
    assert new_tokens(model, inputs, num_beams=4, cache_implementation="static") == new_tokens(
        model, inputs, num_beams=4
    )


def test_eager_attention_generates_the_same_tokens(tokenizer):
    model, processor = lively(tokenizer)
    inputs = batch_inputs(processor, ROWS)
    expected = new_tokens(model, inputs)
    model.set_attn_implementation({"text_config": "eager"})
    assert model.model.language_model.config._attn_implementation == "eager"
    assert new_tokens(model, inputs) == expected


def test_embeddings_instead_of_ids_give_the_same_tokens(pair):
    model, processor = pair
    inputs = batch_inputs(processor, ROWS)
    expected = new_tokens(model, inputs, num_beams=2)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    for extra in ({}, {"input_ids": inputs["input_ids"]}):
        output = model.generate(
            inputs_embeds=embeds,
            pixel_values=inputs["pixel_values"],
            attention_mask=inputs["attention_mask"],
            num_beams=2,
            max_new_tokens=NEW_TOKENS,
            **extra,
        )
        assert output[:, -NEW_TOKENS:].tolist() == expected


def test_right_padded_embeddings_are_aligned_too(pair):
    model, processor = pair
    expected = new_tokens(model, batch_inputs(processor, ROWS))
    inputs = batch_inputs(processor, ROWS, padding_side="right")
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    output = model.generate(inputs_embeds=embeds, **inputs, max_new_tokens=NEW_TOKENS)
    assert output.tolist() == expected


def test_a_conversation_continues_from_its_cache(pair):
    model, processor = pair
    first = row_inputs(processor, ROWS[0])
    cache = DynamicCache(config=model.config.text_config)
    ids = model.generate(**first, past_key_values=cache, max_new_tokens=3)
    question = processor.tokenizer(" What is it?", return_tensors="pt").input_ids
    ids = torch.cat([ids, question], dim=1)
    expected = reference_greedy(model, {"input_ids": ids, "pixel_values": first["pixel_values"]})
    calls = count_tower_calls(model)
    continued = model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=NEW_TOKENS)
    assert continued[0, ids.shape[1] :].tolist() == expected
    assert calls == []


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 3}, {"do_sample": True, "num_return_sequences": 3}],
    ids=["greedy", "beams", "beams returned", "samples"],
)
def test_pain_21_the_tower_runs_once_per_generate(tokenizer, settings):
    model, processor = lively(tokenizer)
    calls = count_tower_calls(model)
    output = model.generate(**batch_inputs(processor, ROWS), max_new_tokens=4, **settings)
    assert calls == [4]  # one call, with the four images
    assert len(output) == len(ROWS) * settings.get("num_return_sequences", 1)


def test_returned_sequences_stay_with_their_image(pair):
    model, processor = pair
    settings = {"num_beams": 4, "num_return_sequences": 2}
    expected = [ids for row in ROWS for ids in new_tokens(model, row_inputs(processor, row), **settings)]
    assert new_tokens(model, batch_inputs(processor, ROWS), **settings) == expected


def test_encoded_images_are_reused_and_left_as_they_are(pair):
    model, processor = pair
    inputs = batch_inputs(processor, ROWS)
    expected = new_tokens(model, inputs, num_beams=4)
    features = {"image": model.get_image_features(inputs.pop("pixel_values"), return_dict=True)}
    for _ in range(2):
        assert new_tokens(model, inputs, num_beams=4, mm_encoder_outputs=features) == expected


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 4}, {"do_sample": True, "top_k": 20}, {"num_beams": 3, "do_sample": True}],
    ids=["greedy", "beams", "sampling", "sampled beams"],
)
def test_text_alone_generates_what_gpt2_generates(pair, settings):
    model, processor = pair
    gpt2 = gpt2_of(model)
    inputs = processor(text=["A photo of", "What is it? It is"], padding=True, return_tensors="pt")
    settings = {"max_new_tokens": 12, "suppress_tokens": model.generation_config.suppress_tokens} | settings
    torch.manual_seed(3)
    expected = gpt2.generate(**inputs, **settings)
    torch.manual_seed(3)
    assert model.generate(**inputs, **settings).tolist() == expected.tolist()


def test_the_placeholder_is_never_generated(tokenizer):
    model, processor = tiny(tokenizer, text_config=tiny_gpt2(tie_word_embeddings=False))
    with torch.no_grad():  # the placeholder has the highest logit everywhere
        model.model.language_model.ln_f.bias.fill_(1.0)
        model.lm_head.weight.zero_()[model.config.image_token_id] = 1.0
    inputs = processor(images=picture(), text="A", return_tensors="pt")

    def count(**settings):
        return (model.generate(**inputs, **settings) == model.config.image_token_id).sum()

    assert count(max_new_tokens=5, suppress_tokens=[1]) == processor.num_image_tokens + 5
    for settings in ({"max_new_tokens": 5}, {"generation_config": GenerationConfig(max_new_tokens=5, do_sample=True)}):
        assert count(**settings) == processor.num_image_tokens


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        ({"max_new_tokens": 20}, True),
        ({"max_new_tokens": 21}, False),
        ({"max_new_tokens": 21, "num_beams": 3}, False),
        ({"generation_config": GenerationConfig(max_new_tokens=20)}, True),
        ({"generation_config": GenerationConfig(max_new_tokens=21)}, False),
        ({"max_new_tokens": 20, "max_length": 1000}, True),
        ({"max_length": 32}, True),
        ({"max_length": 33}, False),
        ({"generation_config": GenerationConfig(max_length=33)}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("embedded", [False, True], ids=["ids", "embeddings"])
def test_pain_05_what_does_not_fit_the_positions_is_refused_before_images_are_encoded(
    tokenizer, settings, fits, embedded
):
    model, processor = tiny(tokenizer, text_config=tiny_gpt2(n_positions=32))
    inputs = processor(images=picture(), text="number!!", return_tensors="pt")
    assert inputs["input_ids"].shape[1] <= 12
    pad = 12 - inputs["input_ids"].shape[1]
    for name, value in (("input_ids", 5), ("attention_mask", 1)):
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, pad), value=value)  # 12 tokens for a prompt
    if embedded:
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    calls = count_tower_calls(model)
    if fits:
        model.generate(**inputs, eos_token_id=-1, **settings)
        assert calls == [1]
    else:
        with pytest.raises(ValueError, match="positions"):
            model.generate(**inputs, **settings)
        assert calls == []


def test_pain_05_the_models_own_generation_config_counts(tokenizer):
    model, processor = tiny(tokenizer)
    model.generation_config.max_new_tokens = 10_000
    with pytest.raises(ValueError, match="10000 new ones"):
        model.generate(**processor(images=picture(), return_tensors="pt"))


def test_padding_takes_no_position(tokenizer):
    model, processor = tiny(tokenizer, text_config=tiny_gpt2(n_positions=16))
    inputs = processor(images=picture(), text="A", return_tensors="pt", padding="max_length", max_length=16)
    output = model.generate(**inputs, max_new_tokens=11, eos_token_id=-1)
    alone = processor(images=picture(), text="A", return_tensors="pt")
    assert output[0, 11:].tolist() == model.generate(**alone, max_new_tokens=11, eos_token_id=-1)[0].tolist()


def test_a_full_prompt_leaves_no_room(tokenizer):
    model, _ = tiny(tokenizer, text_config=tiny_gpt2(n_positions=16))
    with pytest.raises(ValueError, match="positions"):
        model.generate(torch.ones(1, 16, dtype=torch.long))


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("num_image_tokens", [1, 4])
def test_placeholders_without_images_are_refused(tokenizer, num_image_tokens, cache):
    model, processor = tiny(tokenizer, num_image_tokens=num_image_tokens)
    inputs = processor(images=picture(), return_tensors="pt")
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="do not match"):
        model.generate(**inputs, cache_implementation=cache)


def test_positional_arguments_are_those_of_the_library(pair):
    model, processor = pair
    inputs = row_inputs(processor, ROWS[0])
    expected = model.generate(**inputs, max_new_tokens=3)
    processors = LogitsProcessorList([SuppressTokensLogitsProcessor(expected[0, -3:-2])])
    config = GenerationConfig(max_new_tokens=3)
    output = model.generate(inputs["input_ids"], config, processors, pixel_values=inputs["pixel_values"])
    assert output[0, -3] != expected[0, -3]


def test_images_without_a_prompt_are_refused(pair):
    model, _ = pair
    with pytest.raises(ValueError, match="do not match"):
        model.generate(pixel_values=torch.zeros(1, 3, 64, 64))


def test_right_padding_behind_a_cache_is_refused(pair):
    model, _ = pair
    cache = DynamicCache(config=model.config.text_config)
    ids = torch.ones(2, 4, dtype=torch.long)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    mask = torch.tensor([[1] * 6, [1] * 5 + [0]])
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate(torch.ones(2, 6, dtype=torch.long), attention_mask=mask, past_key_values=cache)


def test_pain_23_decoding_compiles_without_graph_breaks(pair):
    model, processor = pair
    inputs = row_inputs(processor, ROWS[0])
    length, config = inputs["input_ids"].shape[1], model.config.text_config
    caches = [StaticCache(config=config, max_cache_len=32) for _ in range(2)]
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        for cache in caches:
            model(**inputs, past_key_values=cache, use_cache=True)
        step = {"input_ids": torch.tensor([[7]]), "position_ids": torch.tensor([[length]])}
        expected = model(**step, past_key_values=caches[0]).logits
        assert max_difference(compiled(**step, past_key_values=caches[1]).logits, expected) <= 1e-5


def test_pain_23_a_prompt_with_an_image_compiles_without_graph_breaks(pair):
    model, processor = pair
    inputs = row_inputs(processor, ROWS[0])
    assert "pixel_values" in inputs
    with torch.no_grad():
        compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
        assert max_difference(compiled(**inputs).logits, model(**inputs).logits) <= 1e-5


def test_token_types_are_dropped(pair):
    model, processor = pair
    inputs = row_inputs(processor, ROWS[0])
    expected = model.generate(**inputs, max_new_tokens=4)
    types = {name: torch.ones_like(inputs["input_ids"]) for name in ("token_type_ids", "mm_token_type_ids")}
    assert torch.equal(model.generate(**inputs, **types, max_new_tokens=4), expected)


# --- what generate tells about its choices


ALL_OUTPUTS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "eos_token_id": -1}


def test_logits_and_scores_of_a_batch_are_those_of_its_rows(pair):
    model, processor = pair
    inputs = batch_inputs(processor, ROWS)
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **ALL_OUTPUTS)
    for row, content in enumerate(ROWS):
        expected = reference_logits(model, row_inputs(processor, content), output.sequences[row, -NEW_TOKENS:])
        assert max_difference(torch.stack(output.logits)[:, row], expected) <= 1e-4
        expected[:, model.config.image_token_id] = float("-inf")
        scores = torch.stack(output.scores)[:, row]
        assert torch.equal(scores.isinf(), expected.isinf())
        assert max_difference(scores.softmax(-1), expected.softmax(-1)) <= 1e-5


@pytest.mark.parametrize("copies", [1, 3])
def test_samples_are_drawn_from_what_each_row_alone_would_be(pair, copies):
    """Temperature and top-k by hand on the logits of the plain loop, and the same draws from the same seed."""
    model, processor = pair
    inputs, temperature, top_k = batch_inputs(processor, ROWS), 1.7, 20
    settings = {"do_sample": True, "temperature": temperature, "top_k": top_k, "num_return_sequences": copies}
    torch.manual_seed(3)
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, **settings, **ALL_OUTPUTS)
    probabilities = []
    for row, ids in enumerate(output.sequences[:, -NEW_TOKENS:]):
        logits = reference_logits(model, row_inputs(processor, ROWS[row // copies]), ids)
        logits[:, model.config.image_token_id] = float("-inf")
        kept = logits >= logits.topk(top_k).values[:, -1:]
        probabilities.append((logits / temperature).masked_fill(~kept, float("-inf")).softmax(-1))
    expected = torch.stack(probabilities, dim=1)
    assert max_difference(torch.stack(output.scores).softmax(-1), expected) <= 1e-5
    torch.manual_seed(3)
    draws = [torch.multinomial(step, num_samples=1)[:, 0] for step in expected]
    assert torch.equal(torch.stack(draws, dim=1), output.sequences[:, -NEW_TOKENS:])


@pytest.mark.parametrize("length_penalty", [1.0, 0.0])
def test_beam_scores_are_log_likelihoods(pair, length_penalty):
    model, processor = pair
    output = model.generate(
        **batch_inputs(processor, ROWS),
        max_new_tokens=NEW_TOKENS,
        num_beams=4,
        num_return_sequences=2,
        length_penalty=length_penalty,
        **ALL_OUTPUTS,
    )
    for sequence, score in enumerate(output.sequences_scores):
        ids = output.sequences[sequence, -NEW_TOKENS:]
        log_likelihoods = reference_logits(model, row_inputs(processor, ROWS[sequence // 2]), ids).log_softmax(-1)
        expected = log_likelihoods.gather(1, ids[:, None]).sum() / NEW_TOKENS**length_penalty
        assert max_difference(score, expected) <= 1e-4


def test_states_and_attentions_of_cached_steps_are_those_of_the_whole_row(tokenizer):
    model, processor = lively(tokenizer)
    model.set_attn_implementation({"text_config": "eager"})
    inputs = batch_inputs(processor, ROWS)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **wanted, **ALL_OUTPUTS)
    padded = inputs["input_ids"].shape[1]
    for row, content in enumerate(ROWS):
        alone = row_inputs(processor, content)
        length = alone["input_ids"].shape[1]
        whole = reference_outputs(model, alone, output.sequences[row, -NEW_TOKENS:], **wanted)
        assert len(output.hidden_states) == len(output.attentions) == NEW_TOKENS
        for layer, expected in enumerate(whole.hidden_states):
            steps = torch.cat([step[layer][row] for step in output.hidden_states])[padded - length :]
            assert max_difference(steps, expected[0, :-1]) <= 1e-4
        for layer, expected in enumerate(whole.attentions):
            last = output.attentions[-1][layer][row, :, 0]
            assert last.shape == (model.config.num_attention_heads, padded + NEW_TOKENS - 1)
            assert max_difference(last[:, padded - length :], expected[0, :, -2, :-1]) <= 1e-5
            assert last[:, : padded - length].abs().max() <= 1e-6 if length < padded else True


# --- rules for the words


def constrained_greedy(model, inputs, allowed):
    """The plain loop, where `allowed(new)` gives the ids that may follow."""
    new = torch.empty(0, dtype=torch.long)
    for _ in range(NEW_TOKENS):
        logits = reference_outputs(model, inputs, new).logits[0, -1]
        mask = torch.full_like(logits, float("-inf"))
        mask[list(set(allowed(new.tolist())) - {model.config.image_token_id})] = 0.0
        new = torch.cat([new, (logits + mask).argmax()[None]])
    return new.tolist()


def no_repeated_pair(prompt):
    def allowed(new):
        ids = prompt + new
        seen = {second for first, second in itertools.pairwise(ids) if first == ids[-1]}
        return set(range(400)) - seen

    return allowed


ANSWERS = [[66, 70, 90, 33, 40, 41], [66, 71, 80, 81, 82, 83], [300, 20, 21, 22, 23, 24]]


def one_of_the_answers(new):
    return {answer[len(new)] for answer in ANSWERS if answer[: len(new)] == new}


@pytest.mark.parametrize("rule", ["prefix_allowed_tokens_fn", "bad_words_ids", "no_repeat_ngram_size"])
def test_rules_for_words_hold_row_by_row(pair, rule):
    model, processor = pair
    inputs = batch_inputs(processor, ROWS)
    length = inputs["input_ids"].shape[1]
    favourites = {ids for row in ROWS for ids in reference_greedy(model, row_inputs(processor, row))}
    settings = {
        "prefix_allowed_tokens_fn": lambda row, ids: list(one_of_the_answers(ids[length:].tolist())),
        "bad_words_ids": [[ids] for ids in favourites],
        "no_repeat_ngram_size": 2,
    }
    output = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, **{rule: settings[rule]}
    )
    for row, content in enumerate(ROWS):
        alone = row_inputs(processor, content)
        # Placeholders repeat too, and padding stands in front of a short row: only words follow from words here.
        allowed = {
            "prefix_allowed_tokens_fn": one_of_the_answers,
            "bad_words_ids": lambda new: set(range(400)) - favourites,
            "no_repeat_ngram_size": no_repeated_pair(alone["input_ids"][0].tolist()),
        }[rule]
        assert output[row, length:].tolist() == constrained_greedy(model, alone, allowed)


# --- streams, assistants, caches


def test_streams_give_the_same_words(pair, capsys):
    model, processor = pair
    inputs = row_inputs(processor, ROWS[0])
    expected = processor.decode(reference_greedy(model, inputs), skip_special_tokens=True)
    pieces = TextIteratorStreamer(processor, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(target=lambda: model.generate(**inputs, max_new_tokens=NEW_TOKENS, streamer=pieces))
    thread.start()
    assert "".join(pieces) == expected != ""
    thread.join()
    streamer = TextStreamer(processor, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=NEW_TOKENS, streamer=streamer)
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize("assistant", ["other", "itself"])
def test_an_assistant_without_images_changes_nothing(pair, assistant):
    model, processor = pair
    torch.manual_seed(7)
    other = GPT2LMHeadModel(tiny_gpt2(n_layer=1, vocab_size=model.config.vocab_size, initializer_range=0.2)).eval()
    for row in ROWS:
        inputs = row_inputs(processor, row)
        helper = other if assistant == "other" else gpt2_of(model)
        assert new_tokens(model, inputs, assistant_model=helper) == [reference_greedy(model, inputs)]


def test_assistants_that_would_get_no_images_are_refused(tokenizer, pair):
    model, processor = pair
    inputs, calls = row_inputs(processor, ROWS[0]), count_tower_calls(model)
    layers = model.config.text_config.num_hidden_layers
    small = GPT2LMHeadModel(tiny_gpt2(vocab_size=model.config.image_token_id))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    for settings, message in (
        ({"assistant_model": lively(tokenizer)[0]}, "shows an assistant no images"),
        ({"assistant_early_exit": 1}, "shows an assistant no images"),
        ({"assistant_model": small}, r"none for the placeholder.*resize_token_embeddings"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, max_new_tokens=2, **settings)
    with pytest.raises(ValueError, match="cuts ids, not embeddings"):
        model.generate(inputs_embeds=embeds, pixel_values=inputs["pixel_values"], prefill_chunk_size=3)
    assert calls == [] and model.config.text_config.num_hidden_layers == layers
    text = row_inputs(processor, ROWS[1])  # without images, an assistant of our own is one like any other
    assert new_tokens(model, text, assistant_model=lively(tokenizer)[0]) == [reference_greedy(model, text)]


def test_a_quantised_cache_does_here_what_it_does_to_gpt2(pair):
    pytest.importorskip("optimum.quanto")
    model, processor = pair
    backend = {"backend": "quanto", "nbits": 4, "axis_key": 0, "axis_value": 0, "q_group_size": 32}
    settings = {"cache_implementation": "quantized", "cache_config": backend | {"residual_length": 4}}
    settings |= {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "eos_token_id": -1}
    inputs = row_inputs(processor, ROWS[0])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[:, : processor.num_image_tokens] = model.get_image_features(inputs["pixel_values"]).pooler_output
    suppressed = {"suppress_tokens": model.generation_config.suppress_tokens}
    expected = gpt2_of(model).generate(inputs_embeds=embeds, **settings, **suppressed)
    output = model.generate(**inputs, **settings)
    assert torch.equal(output.sequences[:, -NEW_TOKENS:], expected.sequences)
    assert max_difference(torch.stack(output.logits), torch.stack(expected.logits)) <= 1e-5
    whole = reference_logits(model, inputs, output.sequences[0, -NEW_TOKENS:])
    assert max_difference(torch.stack(output.logits)[:, 0], whole) > 1e-3  # four bits are not thirty-two


def test_a_conversation_goes_on_with_another_image(pair):
    """Behind a cache, only the new images are passed; all of them, or none, are refused."""
    model, processor = pair
    first = row_inputs(processor, ROWS[0])
    second = processor(images=[GREEN], text=["<image> What is it?"], return_tensors="pt")
    cache = DynamicCache(config=model.config.text_config)
    ids = model.generate(**first, past_key_values=cache, max_new_tokens=3)
    ids = torch.cat([ids, second["input_ids"]], dim=1)
    both = torch.cat([first["pixel_values"], second["pixel_values"]])
    expected = reference_greedy(model, {"input_ids": ids, "pixel_values": both})
    for pixels, message in ((both, "4 placeholders for 8"), (None, "4 placeholders for 0")):
        with pytest.raises(ValueError, match=message):
            model.generate(ids, pixel_values=pixels, past_key_values=copy.deepcopy(cache), max_new_tokens=2)
    output = model.generate(
        ids, pixel_values=second["pixel_values"], past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False
    )
    assert output[0, ids.shape[1] :].tolist() == expected


def test_the_blocks_of_the_generation_page_run(pair, tmp_path, monkeypatch):
    model, processor = pair
    page = (Path(__file__).parents[1] / "docs" / "generation.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    RED.save("photo.jpg")
    GREEN.save("other.jpg")
    namespace = {"model": model, "processor": processor}
    for block in blocks:
        exec(compile(block, "generation.md", "exec"), namespace)
    assert namespace["same"]
    assert namespace["chosen"] in namespace["answers"]
    assert namespace["answer"] in namespace["answers"]


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_features_stand_in_for_images(tokenizer, fusion):
    model, processor = lively(tokenizer, fusion=fusion)
    model.eval()
    inputs = batch_inputs(processor, [([picture(1)], "What?"), ([picture(2), picture(3)], "Two?")])
    pixel_values = inputs.pop("pixel_values")
    features = model.get_image_features(pixel_values).last_hidden_state
    calls = count_tower_calls(model)
    with torch.no_grad():
        behind = model(**inputs, image_features=features).logits
    greedy, beams = (new_tokens(model, inputs, image_features=features, num_beams=beams) for beams in (1, 3))
    assert calls == []
    assert max_difference(behind, model(**inputs, pixel_values=pixel_values).logits) <= 1e-5
    assert greedy == new_tokens(model, inputs, pixel_values=pixel_values)
    assert beams == new_tokens(model, inputs, pixel_values=pixel_values, num_beams=3)
    shape = rf"have the shape \(images, {features.shape[1]}, {features.shape[2]}\), not"
    with pytest.raises(ValueError, match=shape):
        model(**inputs, image_features=features[:, :-1])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="Pass one of `pixel_values`, `image_features` and `mm_encoder_outputs`"):
            call(**inputs, pixel_values=pixel_values, image_features=features)
