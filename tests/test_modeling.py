"""The forward pass: padding, batch mix and attention implementation move no row; parts that do not learn stay put."""

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKBONES, batch_inputs, max_difference, picture, row_inputs, tiny, tiny_gpt2
from transformers import AutoModelForCausalLM, DynamicCache, GPT2LMHeadModel

from imageprompt import ImagePromptConfig, ImagePromptForConditionalGeneration, ImagePromptModel, compose
from imageprompt.connectors import CONNECTORS

ROWS = [  # images and text of each row
    ([picture(0)], "A photo of"),
    ([], "What is it? It is the number"),
    ([picture(1), picture(2), picture(3)], "<image>Two<image> cats<image> on a red sofa."),
]


@pytest.fixture(scope="module")
def pair(tokenizer):
    torch.manual_seed(0)
    return tiny(tokenizer)


# --- padding and batches


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", BACKBONES)
def test_pain_03_padding_and_batch_mix_move_no_row(tokenizer, layout, side, attention, training):
    model, processor = tiny(
        tokenizer, layout, text_config=tiny_gpt2(initializer_range=0.1), trainable={"vision": False}
    )
    model.set_attn_implementation({"text_config": attention})
    model.train(training)
    inputs = batch_inputs(processor, ROWS, padding_side=side)
    logits = model(**inputs).logits
    for row, content in enumerate(ROWS):
        alone = model(**row_inputs(processor, content)).logits[0]
        assert max_difference(logits[row][inputs["attention_mask"][row].bool()], alone) <= 1e-5


def test_pain_06_rows_without_images_keep_their_place(pair):
    model, processor = pair
    for order in ([0, 1, 2], [1, 2, 0], [2, 1, 0]):
        logits = model(**batch_inputs(processor, [ROWS[row] for row in order])).logits[:, -1]
        for place, row in enumerate(order):
            assert max_difference(logits[place], model(**row_inputs(processor, ROWS[row])).logits[0, -1]) <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_steps_count_positions_from_the_mask(pair, side):
    model, processor = pair
    inputs = batch_inputs(processor, ROWS, padding_side=side)
    cache = DynamicCache(config=model.config.text_config)
    model(**inputs, past_key_values=cache, use_cache=True)
    mask = F.pad(inputs["attention_mask"], (0, 1), value=1)
    step = model(input_ids=torch.full((3, 1), 7), attention_mask=mask, past_key_values=cache, use_cache=True)
    for row, content in enumerate(ROWS):
        alone = row_inputs(processor, content)
        ids = F.pad(alone["input_ids"], (0, 1), value=7)
        expected = model(input_ids=ids, pixel_values=alone.get("pixel_values")).logits[0, -1]
        assert max_difference(step.logits[row, -1], expected) <= 1e-5


def test_padding_takes_no_position(tokenizer):
    model, processor = tiny(tokenizer, text_config=tiny_gpt2(n_positions=16))
    inputs = processor(images=picture(), text="A", return_tensors="pt")
    padded = {name: F.pad(inputs[name], (20, 0)) for name in ("input_ids", "attention_mask")}
    logits = model(**padded, pixel_values=inputs["pixel_values"]).logits
    assert max_difference(logits[:, 20:], model(**inputs).logits) <= 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_text_alone_has_the_logits_of_gpt2(tokenizer, tied):
    model, processor = tiny(tokenizer, text_config=tiny_gpt2(tie_word_embeddings=tied))
    gpt2 = GPT2LMHeadModel(model.config.text_config).eval()
    gpt2.load_state_dict(
        {"lm_head.weight": model.lm_head.weight}
        | {f"transformer.{name}": value for name, value in model.model.language_model.state_dict().items()}
    )
    inputs = processor(text="What is it? It is the number seven.", return_tensors="pt")
    assert max_difference(model(**inputs).logits, gpt2(**inputs).logits) <= 1e-6


@pytest.mark.parametrize("layout", BACKBONES)
def test_image_tokens_are_the_connected_features_of_timm(tokenizer, layout):
    """Everything between pixels and language model, by hand: timm, layout, placement."""
    model, processor = tiny(tokenizer, layout, connector="linear")
    inputs = processor(images=picture(), text="A", return_tensors="pt")
    features = model.model.vision_tower.timm_model.forward_features(inputs["pixel_values"])
    if layout == "NCHW":
        features = features.permute(0, 2, 3, 1)
    features = features[:, 1:] if layout == "NLC" else features.reshape(1, -1, features.shape[-1])  # 1: class token
    count = model.config.num_image_tokens
    if features.shape[1] != count:
        side, pooled = (round(n**0.5) for n in (features.shape[1], count))
        step = side // pooled
        features = features.reshape(pooled, step, pooled, step, -1).mean(dim=(1, 3)).reshape(1, count, -1)
    linear = model.model.connector.linear
    image_tokens = features @ linear.weight.T + linear.bias
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds = torch.cat([image_tokens, embeds[:, count:]], dim=1)
    expected = model.model.language_model(inputs_embeds=embeds).last_hidden_state @ model.lm_head.weight.T
    output = model(**inputs)
    assert max_difference(output.logits, expected) <= 1e-5
    assert max_difference(output.image_hidden_states, image_tokens) <= 1e-5


# --- inputs in other forms


def test_embeddings_and_encoded_images_stand_in_for_ids_and_pixels(pair):
    model, processor = pair
    inputs = batch_inputs(processor, ROWS)
    expected = model(**inputs).logits
    mask, pixels = inputs["attention_mask"], inputs["pixel_values"]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    features = {"image": model.get_image_features(pixels, return_dict=True)}
    for words in ({"input_ids": inputs["input_ids"]}, {"inputs_embeds": embeds}):
        for images in ({"pixel_values": pixels}, {"mm_encoder_outputs": features}):
            assert torch.equal(model(**words, **images, attention_mask=mask).logits, expected)


def test_embeddings_that_already_hold_the_images_pass(pair):
    model, processor = pair
    inputs = row_inputs(processor, ROWS[0])
    embeds = model.get_input_embeddings()(inputs["input_ids"]).clone()
    embeds[:, : processor.num_image_tokens] = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert max_difference(model(inputs_embeds=embeds).logits, model(**inputs).logits) <= 1e-6


def test_token_types_are_not_added_as_words(pair):
    model, processor = pair
    inputs = row_inputs(processor, ROWS[0])
    ones = torch.ones_like(inputs["input_ids"])
    assert torch.equal(model(**inputs, token_type_ids=ones).logits, model(**inputs).logits)


def test_logits_to_keep(pair):
    model, processor = pair
    inputs = batch_inputs(processor, ROWS)
    everything = model(**inputs).logits
    assert max_difference(model(**inputs, logits_to_keep=2).logits, everything[:, -2:]) <= 1e-6
    chosen = torch.tensor([0, 3])
    assert max_difference(model(**inputs, logits_to_keep=chosen).logits, everything[:, chosen]) <= 1e-6


def test_outputs_can_be_a_tuple_and_carry_states(pair):
    model, processor = pair
    inputs = row_inputs(processor, ROWS[0])
    output = model(**inputs, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert output.image_hidden_states.shape == (1, model.config.num_image_tokens, model.config.hidden_size)
    assert torch.equal(model(**inputs, return_dict=False)[0], output.logits)


def test_pain_24_the_parts_are_where_tools_look(pair):
    model, _ = pair
    assert model.get_encoder("image") is model.model.vision_tower
    assert model.get_decoder() is model.model.language_model
    assert model.get_output_embeddings() is model.lm_head
    assert model.get_input_embeddings() is model.model.language_model.wte
    assert model.config.get_text_config() is model.config.text_config


@pytest.mark.parametrize("config", ["llama", "opt", "gpt_neox", "bloom", "gpt_neo", "qwen2", "gemma"])
def test_other_language_models_compose_or_are_refused(tokenizer, config):
    """Rotary, ALiBi and learned positions; what composes is invariant to padding and keeps its ties."""
    model, processor = tiny(tokenizer, text_config=other_language_model(config))
    inputs = batch_inputs(processor, ROWS)
    logits = model(**inputs).logits
    for row, content in enumerate(ROWS):
        assert max_difference(logits[row, -1], model(**row_inputs(processor, content)).logits[0, -1]) <= 1e-5
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def other_language_model(model_type):
    from transformers import AutoConfig

    names = {"opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "bloom": {"n_head": 2, "n_layer": 2}}
    names["gpt_neo"] = {
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global"], 2]],
        "max_position_embeddings": 128,
    }
    common = {"hidden_size": 32, "vocab_size": 400, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if model_type not in ("bloom", "gpt_neo"):
        common |= {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    if model_type in ("gemma", "qwen2"):
        common |= {"head_dim": 16, "num_key_value_heads": 2}
    return AutoConfig.for_model(model_type, **common, **names.get(model_type, {}))


# --- input that is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda inputs: inputs.pop("pixel_values"), "do not match: 4 placeholders for 0"),
        (lambda inputs: inputs.update(pixel_values=torch.zeros(2, 3, 64, 64)), "4 placeholders for 8"),
        (
            lambda inputs: inputs.update(input_ids=inputs["input_ids"][:, 1:], attention_mask=None),
            "part of an image: each takes 4 placeholders",
        ),
        (lambda inputs: inputs.update(pixel_values=torch.zeros(1, 3, 32, 32)), r"\(images, 3, 64, 64\)"),
        (lambda inputs: inputs.update(pixel_values=torch.zeros(1, 1, 64, 64)), r"\(images, 3, 64, 64\)"),
        (lambda inputs: inputs.update(pixel_values=torch.zeros(3, 64, 64)), r"\(images, 3, 64, 64\)"),
        (lambda inputs: inputs.update(inputs_embeds=torch.zeros(1, 5, 32)), "exactly one of"),
        (lambda inputs: inputs.pop("input_ids"), "exactly one of"),
        (lambda inputs: inputs.update(mm_encoder_outputs={"image": object()}), "Pass one of `pixel_values`"),
        (lambda inputs: inputs.update(encoder_hidden_states=torch.zeros(1, 4, 32)), "for `fusion='cross_attention'`"),
        (lambda inputs: inputs.update(attention_mask=inputs["attention_mask"][:, 1:]), "must cover all"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_contradicting_inputs_are_refused(pair, change, message):
    model, processor = pair
    inputs = dict(processor(images=picture(), text="A", return_tensors="pt"))
    change(inputs)
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_a_one_token_image_without_pixels_is_refused(tokenizer):
    model, processor = tiny(tokenizer, num_image_tokens=1)
    inputs = processor(images=picture(), return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 1)
    with pytest.raises(ValueError, match="1 placeholders for 0"):
        model(input_ids=inputs["input_ids"])


def test_embedded_placeholders_without_pixels_are_refused(pair):
    model, processor = pair
    inputs = processor(images=picture(), return_tensors="pt")
    with pytest.raises(ValueError, match="4 placeholders for 0"):
        model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))


@pytest.mark.parametrize("with_mask", [True, False])
def test_pain_05_more_positions_than_there_are_is_refused(tokenizer, with_mask):
    model, _ = tiny(tokenizer, text_config=tiny_gpt2(n_positions=16))
    cache = DynamicCache(config=model.config.text_config)
    model(input_ids=torch.ones(1, 16, dtype=torch.long), past_key_values=cache, use_cache=True)
    mask = torch.ones(1, 17, dtype=torch.long) if with_mask else None
    with pytest.raises(ValueError, match="17 tokens in a row"):
        model(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=cache, attention_mask=mask)


def test_a_mask_of_the_new_tokens_only_is_refused(pair):
    """Positions counted from it would start again at zero."""
    model, _ = pair
    cache = DynamicCache(config=model.config.text_config)
    model(input_ids=torch.ones(1, 5, dtype=torch.long), past_key_values=cache, use_cache=True)
    one = torch.ones(1, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="5 in the cache and 1 new ones"):
        model(input_ids=one, attention_mask=one, past_key_values=cache)


# --- which parts learn


PARTS = {"vision": "model.vision_tower", "connector": "model.connector", "text": "model.language_model"}


def learning_parts(model):
    return {part: {p.requires_grad for p in model.get_submodule(name).parameters()} for part, name in PARTS.items()}


@pytest.mark.parametrize("part", PARTS)
def test_set_trainable_freezes_one_part_and_nothing_else(tokenizer, part, tmp_path):
    model, _ = tiny(tokenizer, text_config=tiny_gpt2(tie_word_embeddings=False))
    model.set_trainable(**{part: False})
    expected = {name: {name != part} for name in PARTS}
    assert learning_parts(model) == expected
    assert model.lm_head.weight.requires_grad == (part != "text")
    model.save_pretrained(tmp_path)
    assert learning_parts(ImagePromptForConditionalGeneration.from_pretrained(tmp_path)) == expected
    base = ImagePromptModel.from_pretrained(tmp_path)
    assert {p.requires_grad for p in base.get_submodule(PARTS[part].removeprefix("model.")).parameters()} == {False}
    model.set_trainable(**{part: True})
    assert learning_parts(model) == {name: {True} for name in PARTS}


def test_compose_takes_trainable(tokenizer):
    model, _ = tiny(tokenizer, trainable={"vision": False, "text": False})
    assert learning_parts(model) == {"vision": {False}, "connector": {True}, "text": {False}}
    assert not model.lm_head.weight.requires_grad  # tied


def test_trainable_can_be_chosen_while_loading(tokenizer, tmp_path):
    tiny(tokenizer)[0].save_pretrained(tmp_path)
    model = ImagePromptForConditionalGeneration.from_pretrained(tmp_path, trainable={"connector": False})
    assert learning_parts(model) == {"vision": {True}, "connector": {False}, "text": {True}}
    assert model.config.trainable == {"vision": True, "connector": False, "text": True}


def test_parts_that_are_not_named_stay_as_they_are(tokenizer):
    model, _ = tiny(tokenizer)
    model.model.language_model.wpe.requires_grad_(False)  # as an adapter library would
    model.set_trainable(vision=False)
    assert not model.model.language_model.wpe.weight.requires_grad


def test_pain_11_a_frozen_tower_stays_in_eval_mode(tokenizer):
    model, _ = tiny(tokenizer, trainable={"vision": False})
    model.train()
    assert model.training and model.model.language_model.training
    assert not any(module.training for module in model.model.vision_tower.modules())
    model.set_trainable(vision=True)
    assert all(module.training for module in model.model.vision_tower.modules())
    model.set_trainable(vision=False)
    assert not any(module.training for module in model.model.vision_tower.modules())


def test_a_tower_frozen_by_hand_stays_in_eval_mode_too(tokenizer):
    model, _ = tiny(tokenizer)
    model.model.vision_tower.requires_grad_(False)
    assert not model.train().model.vision_tower.training


def test_pain_18_a_resized_vocabulary_reaches_config_head_and_loss(tokenizer, tmp_path):
    model, processor = tiny(tokenizer)
    inputs = processor(images=picture(), text="A", suffix=" dog", return_tensors="pt")
    before = model(**inputs)
    model.set_trainable(text=False)
    model.resize_token_embeddings(450)
    assert model.config.vocab_size == model.config.text_config.vocab_size == 450
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.out_features == 450
    assert not model.lm_head.weight.requires_grad
    after = model(**inputs)
    assert max_difference(after.logits[..., :400], before.logits) <= 1e-6
    assert after.loss > before.loss  # more words compete
    model.save_pretrained(tmp_path)
    reloaded = ImagePromptForConditionalGeneration.from_pretrained(tmp_path)
    assert max_difference(reloaded(**inputs).logits, after.logits) <= 1e-6
    assert ImagePromptConfig.from_pretrained(tmp_path).image_token_id == processor.image_token_id


def test_pain_16_a_model_made_from_its_configuration_equals_timms_initialisation(tokenizer):
    """The library's own initialisation, N(0, 0.02) everywhere, would ruin a convolutional network."""
    model, _ = tiny(tokenizer)
    stem = model.model.vision_tower.timm_model.conv1[0].weight
    fan_out = stem.shape[0] * stem.shape[2] * stem.shape[3]
    assert stem.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.2)  # He, as timm draws it


def test_pain_25_the_language_models_numbers_are_seen_at_the_top(pair):
    config = pair[0].config
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"):
        assert getattr(config, name) == getattr(config.text_config, name)


def test_auto_class_of_the_text_matches_the_library(pair):
    """What stands in for the language model is the library's own class, not a copy."""
    model, _ = pair
    reference = AutoModelForCausalLM.from_config(model.config.text_config)
    assert type(model.model.language_model) is type(reference.base_model)


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("layout", BACKBONES)
def test_every_connector_on_every_layout_learns_and_survives_a_save(tokenizer, layout, connector, tmp_path):
    heads = {"connector_args": {"num_heads": 2}} if connector == "clipcap_transformer" else {}
    count = {"num_image_tokens": 1 if connector == "pixel_shuffle" else 3 if "clipcap" in connector else 4}
    model, processor = tiny(tokenizer, layout, connector=connector, **count, **heads)
    inputs = processor(images=[picture(0), picture(1)], text="A", suffix=[" dog", " cat"], return_tensors="pt")
    model.train()(**inputs).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.model.connector.parameters())
    tower = model.model.vision_tower
    assert all(parameter.grad is not None for parameter in tower.parameters() if parameter.requires_grad)
    model.eval().save_pretrained(tmp_path)
    loaded = ImagePromptForConditionalGeneration.from_pretrained(tmp_path)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    rows = processor(images=[picture(0)], text="A", return_tensors="pt")
    with torch.no_grad():
        assert max_difference(loaded(**rows).logits, model(**rows).logits) <= 1e-6


@pytest.mark.parametrize("layer", [0, -2, [-2, -1], "pooled"], ids=str)
@pytest.mark.parametrize("layout", BACKBONES)
@torch.no_grad()
def test_the_features_of_any_layer_become_image_tokens(tokenizer, layout, layer, tmp_path):
    model, processor = tiny(tokenizer, layout, feature_layer=layer, num_image_tokens=1, connector="linear")
    assert model.config.feature_layer == layer
    pixels = processor(images=picture(), return_tensors="pt")["pixel_values"]
    backbone = model.model.vision_tower.timm_model
    if layer == "pooled":
        expected = backbone.forward_head(backbone.forward_features(pixels), pre_logits=True)[:, None]
    else:
        layers = layer if isinstance(layer, list) else [layer]
        maps = backbone.forward_intermediates(pixels, indices=layers, intermediates_only=True)
        expected = torch.cat([each.mean((2, 3)) for each in maps], 1)[:, None]
    expected = model.model.connector.linear(expected)
    assert max_difference(model.get_image_features(pixels).pooler_output, expected) <= 1e-5
    model.save_pretrained(tmp_path)
    assert ImagePromptForConditionalGeneration.from_pretrained(tmp_path).config.to_dict()["feature_layer"] == layer


def test_layers_behind_the_features_are_frozen(tokenizer):
    model, _ = tiny(tokenizer, "NLC", feature_layer=0)
    learning = {name for name, value in model.model.vision_tower.named_parameters() if value.requires_grad}
    assert learning and not any("blocks.1." in name for name in learning)


@pytest.mark.parametrize(
    ("layout", "model_args"), [("NCHW", {}), ("NLC", {"depth": 2, "dynamic_img_size": True})], ids=["NCHW", "NLC"]
)
@torch.no_grad()
def test_images_of_other_sizes_become_as_many_tokens(tokenizer, layout, model_args):
    model, processor = tiny(tokenizer, layout, dynamic_image_size=True, model_args=model_args)
    processor.check_model(model)
    size = {"height": 96, "width": 160}
    inputs = processor(images=picture(), text="A", return_tensors="pt", size=size)
    assert inputs["pixel_values"].shape == (1, 3, 96, 160)
    outputs = model.get_image_features(inputs["pixel_values"])
    factor = 32 if layout == "NCHW" else 16
    features = outputs.last_hidden_state.view(1, 96 // factor, 160 // factor, -1)
    tokens = torch.nn.functional.adaptive_avg_pool2d(features.permute(0, 3, 1, 2), (2, 2)).flatten(2).mT
    assert max_difference(outputs.pooler_output, model.model.connector.project(tokens)) <= 1e-5
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_other_sizes_are_refused_unless_asked_for(tokenizer):
    model, processor = tiny(tokenizer)
    inputs = processor(images=picture(), text="A", return_tensors="pt", size={"height": 96, "width": 64})
    with pytest.raises(ValueError, match=r"shape \(images, 3, 64, 64\), not \(1, 3, 96, 64\)"):
        model(**inputs)
    with pytest.raises(ValueError, match=r"does not run on \(3, 64, 128\) images.*'dynamic_img_size': True"):
        tiny(tokenizer, "NLC", dynamic_image_size=True)
    model, processor = tiny(
        tokenizer, "NLC", dynamic_image_size=True, model_args={"dynamic_img_size": True, "depth": 1}
    )
    inputs = processor(images=picture(), text="A", return_tensors="pt", size={"height": 100, "width": 64})
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 .* does not run on \(3, 100, 64\) images"):
        model(**inputs)
    with pytest.raises(ValueError, match="'pixel_shuffle' follow the image's size"):
        tiny(tokenizer, dynamic_image_size=True, connector="pixel_shuffle", num_image_tokens=1)


@torch.no_grad()
def test_a_naflex_backbone_keeps_the_shape_of_its_images(tokenizer):
    settings = {"model_args": {"depth": 1, "embed_dim": 24, "num_heads": 2}, "num_image_tokens": 6}
    model, processor = compose(
        "naflexvit_base_patch16_gap",
        tiny_gpt2(),
        tokenizer=tokenizer,
        pretrained=False,
        preprocessing={"input_size": (3, 64, 96)},
        dynamic_image_size=True,
        **settings,
    )
    assert model.config.feature_grid == [4, 6] and model.config.num_prefix_tokens == 4
    for height, width in ((64, 96), (96, 64), (32, 160)):
        size = {"height": height, "width": width}
        inputs = processor(images=picture(), text="A", return_tensors="pt", size=size)
        features = model.get_image_features(inputs["pixel_values"])
        assert features.last_hidden_state.shape == (1, height * width // 256, 24)
        assert features.pooler_output.shape == (1, 6, 32)


def test_the_callers_configurations_stay_as_they_are():
    text_config = tiny_gpt2()
    GPT2LMHeadModel(text_config)
    before = text_config._attn_implementation
    ImagePromptConfig.from_backbones("resnet10t", text_config, fusion="cross_attention")
    assert text_config._attn_implementation == before == "sdpa" and not text_config.add_cross_attention


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_an_image_that_rows_share_is_encoded_once_with_the_same_result(tokenizer, fusion, monkeypatch):
    model, processor = tiny(tokenizer, "NLC", fusion=fusion)
    first, second = picture(0), picture(1)
    rows = {"images": [[first], [second, first], [], [first]], "text": ["What?", "Two", "None", "Why so"]}
    rows |= {"suffix": [" a", " b", " c", " d"], "padding": True, "return_tensors": "pt"}
    apart, shared = processor(**rows), processor(**rows, share_images=True)
    assert shared["image_index"].tolist() == [0, 1, 0, 0]
    assert len(shared["pixel_values"]) == 2 and len(apart["pixel_values"]) == 4
    assert torch.equal(shared["pixel_values"][shared["image_index"]], apart["pixel_values"])
    assert torch.equal(shared["input_ids"], apart["input_ids"])

    gradients = []
    for batch in (apart, shared):
        model.zero_grad()
        model.train()(**batch).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert max_difference(*gradients) < 1e-5
    model.eval()
    assert max_difference(model(**apart).logits, model(**shared).logits) < 1e-5
    assert max_difference(model.score(**apart), model.score(**shared)) < 1e-5

    seen = []
    encode = type(model.model.vision_tower).forward
    monkeypatch.setattr(
        type(model.model.vision_tower), "forward", lambda self, x, **kw: seen.append(len(x)) or encode(self, x, **kw)
    )
    rows.pop("suffix")
    apart, shared = processor(**rows), processor(**rows, share_images=True)
    for decoding in ({}, {"num_beams": 3}):
        decoding |= {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(model.generate(**apart, **decoding), model.generate(**shared, **decoding))
    assert seen == [4, 2, 4, 2]
