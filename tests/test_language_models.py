"""Language models besides the tiny GPT-2: which compose exactly, which are refused, and GPT-2's published sizes."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import BACKBONES, max_difference, tiny, tiny_gpt2
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig

from imageprompt import ImagePromptConfig, ImagePromptForConditionalGeneration

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("sweep", ROOT / "scripts" / "sweep_language_models.py")
sweep = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sweep)

MEASURED = json.loads((ROOT / "docs" / "language-models" / "sweep.json").read_text())
RESULTS = MEASURED["results"]
# The others wait for the slow test.
COMMON = [
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "opt",
    "bloom",
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "smollm3",
    "gemma",
    "gemma3_text",
    "phi3",
    "granite",
    "biogpt",
    "falcon_h1",
    "phi",
    "gptj",
    "codegen",
    "cohere",
    "gemma2",
    "gemma3",
    "gemma4_text",
    "mamba",
    "bert",
    "roberta",
    "bart",
    "xlnet",
    "openai-gpt",
    *sweep.VARIANTS,
]


@pytest.mark.parametrize("name", COMMON)
def test_a_language_model_is_exact_or_refused(name):
    """The checks of the sweep: text, padding, cache, gradient, saving and ties, each against its reference."""
    result = sweep.refusal_or_check(name, sweep.byte_tokenizer())
    assert result["verdict"] == RESULTS[name]["verdict"]
    reasons = [one.get("reason", "").partition("differ by")[0] for one in (result, RESULTS[name])]
    assert reasons[0] == reasons[1]


@pytest.mark.slow
def test_every_language_model_is_what_the_page_says():
    tokenizer = sweep.byte_tokenizer()
    assert {name: sweep.refusal_or_check(name, tokenizer)["verdict"] for name in sweep.model_types()} == {
        name: result["verdict"] for name, result in RESULTS.items()
    }


def test_the_page_shows_what_was_measured():
    page = (ROOT / "docs" / "language-models.md").read_text()
    assert f"{sweep.TABLE[0]}{sweep.table(RESULTS)}{sweep.TABLE[1]}" in page
    counts = {verdict: sum(result["verdict"] == verdict for result in RESULTS.values()) for verdict in sweep.VERDICTS}
    assert f"{counts['exact']} exact, {counts['refused']} refused, {counts['not tried']} not tried" in page
    assert counts["wrong"] == 0 and sum(counts.values()) == len(RESULTS)
    worst = max(difference for result in RESULTS.values() for difference in result.get("checks", {}).values())
    assert worst <= MEASURED["limit"] == sweep.LIMIT


def test_a_wrong_model_would_be_found(tokenizer, monkeypatch):
    """The sweep's checks can fail: here the padding of a batch moves its positions."""
    monkeypatch.setattr("imageprompt.modeling.positions_from_mask", lambda mask, length: torch.arange(length)[None])
    monkeypatch.setattr("imageprompt.language_models.TEXT_CHECKS", {})
    result = sweep.refusal_or_check("gpt2", sweep.byte_tokenizer())
    assert result["verdict"] == "wrong" and "rows padded on the left" in result["reason"]


# --- each reason to refuse has its own test, with a model that has only that


@pytest.mark.parametrize(
    ("check", "break_it"),
    [
        ("padded on the left", lambda mask, length: torch.arange(length)[None]),
        ("from a cache", lambda mask, length: torch.arange(length)[None]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_check_finds_positions_that_padding_moves(tokenizer, monkeypatch, check, break_it):
    from imageprompt import language_models

    monkeypatch.setattr("imageprompt.modeling.positions_from_mask", break_it)
    monkeypatch.setattr("imageprompt.language_models.TEXT_CHECKS", {check: language_models.TEXT_CHECKS[check]})
    with pytest.raises(ValueError, match=rf"plain head on a decoder: {check}, its logits differ"):
        tiny(tokenizer, text_config=tiny_gpt2(initializer_range=0.1))


def test_a_model_that_sees_later_tokens_is_refused(tokenizer):
    config = AutoConfig.for_model("llama", **LLAMA, is_causal=False)
    model_class = type(ImagePromptForConditionalGeneration(_config(config)).model.language_model)
    assert not config.is_causal
    with pytest.raises(ValueError, match="differ"):
        tiny(tokenizer, text_config=config)
    assert model_class.__name__ == "LlamaModel"


LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.1}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("gemma2", {"head_dim": 8, "num_key_value_heads": 4}), ("granite", {"logits_scaling": 4.0})],
    ids=["soft-cap", "scale"],
)
def test_what_bends_large_logits_is_found_on_small_random_weights(tokenizer, model_type, settings):
    """Logits of 1e-4 pass through a soft-cap of 30 unchanged; pretrained ones would not."""
    config = AutoConfig.for_model(model_type, **LLAMA | {"initializer_range": 1e-4} | settings)
    with pytest.raises(ValueError, match="for plain text, its logits differ"):
        tiny(tokenizer, text_config=config)


def test_a_bias_of_zeros_is_a_bias(tokenizer):
    with pytest.raises(ValueError, match="its head has a bias"):
        tiny(tokenizer, text_config=AutoConfig.for_model("phi", **LLAMA))


def test_parts_of_a_larger_model_are_asked_for_alone(tokenizer):
    with pytest.raises(ValueError, match=r"'gemma3' model holds more.*`text_config`"):
        tiny(tokenizer, text_config=AutoConfig.for_model("gemma3"))


# --- image tokens among scaled word embeddings


def _config(text_config) -> ImagePromptConfig:
    name, model_args, input_size = BACKBONES["NCHW"]
    return ImagePromptConfig.from_backbones(
        name, text_config, model_args=model_args, preprocessing={"input_size": input_size}, num_image_tokens=4
    )


@pytest.mark.parametrize(("model_type", "scale"), [("gemma", 1.0), ("xglm", 1.0), ("llama", 1.0), ("granite", 12.0)])
def test_what_happens_to_image_tokens_in_front_of_the_first_layer(model_type, scale):
    """Gemma scales words in its embedding, so images stay as the connector makes them; Granite scales both."""
    config = sweep.tiny_config(model_type)
    if model_type == "granite":
        config.embedding_multiplier = 12.0
    model = ImagePromptForConditionalGeneration(_config(config)).eval()
    seen = []
    layers = model.model.language_model.layers
    layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ids = torch.full((1, 4), model.config.image_token_id)
    output = model(ids, pixel_values=torch.randn(1, 3, 64, 64))
    positions = seen[0] - scale * output.image_hidden_states  # xglm adds sinusoids
    assert max_difference(positions, torch.zeros_like(positions)) <= (1.0 if model_type == "xglm" else 1e-6)


# --- GPT-2's published sizes


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads", "parameters"),
    [
        ("gpt2", 12, 768, 12, 124_439_808),
        ("gpt2-medium", 24, 1024, 16, 354_823_168),
        ("gpt2-large", 36, 1280, 20, 774_030_080),
        ("gpt2-xl", 48, 1600, 25, 1_557_611_200),
    ],
)
def test_the_sizes_of_gpt2_have_their_published_parameters(name, layers, width, heads, parameters):
    """124M, 355M, 774M and 1.56B (openai/gpt-2), counted on the meta device; the placeholder adds one embedding."""
    text_config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads)
    config = ImagePromptConfig.from_backbones("vit_small_patch16_224", text_config, num_image_tokens=49)
    with torch.device("meta"):
        model = ImagePromptForConditionalGeneration(config)
        gpt2 = GPT2LMHeadModel(text_config)
    ours = {key: value.shape for key, value in model.model.language_model.named_parameters()}
    theirs = {key: value.shape for key, value in gpt2.transformer.named_parameters()}
    assert ours.pop("wte.weight") == (theirs.pop("wte.weight")[0] + 1, width)
    assert ours == theirs
    assert sum(value.numel() for value in gpt2.parameters()) == parameters
    text = model.model.language_model.parameters()
    assert sum(value.numel() for value in text) == parameters + width
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_an_own_name_for_the_embeddings_is_tied_too(tokenizer):
    model, _ = tiny(tokenizer, text_config=LlamaConfig(**LLAMA, tie_word_embeddings=True))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model._tied_weights_keys == {"lm_head.weight": "model.language_model.embed_tokens.weight"}
