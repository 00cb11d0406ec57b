"""Prompts that are run once give each text the score that it has alone."""

import pytest
import torch
from conftest import picture, tiny, tiny_gpt2
from transformers import AutoConfig

from imageprompt.evaluation.likelihood import EncodedPrompts

IMAGES = [[picture(0)], [], [picture(1), picture(2)], [picture(3)]]
PROMPTS = ["What is it?", "Two cats", "First <image>, then <image>:", ""]
SUFFIXES = [["!", " dog", " two cats on a red sofa.", "A dog!"], ["", "", "", ""], [" seven"] * 4]


def other_language_model(model_type, **settings):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 400, "head_dim": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return AutoConfig.for_model(model_type, **sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0, **settings)


KINDS = {
    "prefix": {},
    "cross_attention": {"fusion": "cross_attention"},
    "a window shorter than the prompts": {"text_config": ("mistral", {"sliding_window": 6})},
    "recurrent layers": {"text_config": ("olmo_hybrid", {})},
}


@pytest.mark.parametrize("kind", KINDS)
def test_texts_score_as_each_does_alone(kind, tokenizer):
    settings = dict(KINDS[kind])
    if "text_config" in settings:
        name, more = settings["text_config"]
        settings["text_config"] = other_language_model(name, **more)
    model, processor = tiny(tokenizer, **settings)
    encoded = EncodedPrompts(model, processor, IMAGES, PROMPTS)
    for suffixes in SUFFIXES:
        values, tokens, is_greedy = encoded.score(suffixes)
        for row, suffix in enumerate(suffixes):
            images = [IMAGES[row]] if IMAGES[row] else None
            alone = processor(images=images, text=[PROMPTS[row]], suffix=[suffix], return_tensors="pt")
            assert values[row].item() == pytest.approx(model.score(**alone).item(), rel=1e-6, abs=1e-5)
            supervised = alone["labels"][0] != -100
            assert tokens[row] == supervised.sum()
            expected = model(**alone).logits[0, :-1].argmax(-1)[supervised[1:]]
            assert is_greedy[row] == torch.equal(expected, alone["labels"][0][supervised])


def test_a_text_is_greedy_if_greedy_search_would_write_it(tokenizer):
    model, processor = tiny(tokenizer)
    torch.nn.init.zeros_(model.lm_head.weight)  # all tokens are equally likely, and the first is the end of the text
    encoded = EncodedPrompts(model, processor, [[picture(0)]] * 2, ["A"] * 2)
    assert encoded.score(["", "!"]).is_greedy.tolist() == [True, False]


def test_images_are_encoded_once_and_modes_stay(tokenizer):
    model, processor = tiny(tokenizer, text_config=tiny_gpt2(resid_pdrop=0.5))
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    encoded = EncodedPrompts(model, processor, IMAGES, PROMPTS)
    first, second = (encoded.score(SUFFIXES[0]).log_likelihoods for _ in range(2))
    assert len(calls) == 1
    assert torch.equal(first, second)
    assert model.training and model.model.vision_tower.training


def test_what_cannot_be_scored_is_refused(tokenizer):
    model, processor = tiny(tokenizer)
    encoded = EncodedPrompts(model, processor, IMAGES, PROMPTS)
    with pytest.raises(ValueError, match="1 texts for 4 rows"):
        encoded.score(["!"])
    with pytest.raises(ValueError, match=r"holds <image>: 'an <image>'"):
        encoded.score(["an <image>", "!", "!", "!"])
    with pytest.raises(ValueError, match="256 positions"):
        encoded.score(["!" * 300] * 4)
    with pytest.raises(ValueError, match="Row 0 is empty"):
        EncodedPrompts(model, processor, [[]], [""])
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="not numbers"):
        EncodedPrompts(model, processor, IMAGES, PROMPTS).score(SUFFIXES[0])
