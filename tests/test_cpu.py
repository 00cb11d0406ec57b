"""Prepacked weights give the same answers, and refuse what cannot be done with them."""

import copy
import pickle

import pytest
import torch
from conftest import batch_inputs, lively, max_difference, picture, tiny, tiny_gpt2
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from imageprompt import cpu
from imageprompt.captioning import caption_images
from imageprompt.cli import app
from imageprompt.cpu import PrepackedLinear, prepack_weights

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")

ROWS = [([picture(0)], "A photo of"), ([picture(1), picture(2)], "Two <image>cats and <image>a dog"), ([], "What is")]
KINDS = {
    "GPT-2": {},
    "cross-attention": {"fusion": "cross_attention"},
    "untied head": {"text_config": tiny_gpt2(tie_word_embeddings=False, initializer_range=0.2)},
    "Llama": {
        "text_config": LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=400
        )
    },
}


@pytest.fixture
def model(tokenizer):
    return lively(tokenizer)[0]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_answers_are_those_of_the_plain_model(tokenizer, kind):
    settings = {"text_config": tiny_gpt2(initializer_range=0.2)} | KINDS[kind]
    model, processor = tiny(tokenizer, **settings)
    inputs = batch_inputs(processor, ROWS)
    ways = [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ]

    def answers():
        ids = [model.generate(**inputs, **way, max_new_tokens=6, do_sample=False) for way in ways]
        return model(**inputs).logits, ids

    logits, ids = answers()
    prepack_weights(model)
    packed_logits, packed_ids = answers()
    assert max_difference(packed_logits, logits) < 1e-5 * max(1, logits.abs().max().item())
    assert all(torch.equal(found, expected) for found, expected in zip(packed_ids, ids, strict=True))


@torch.no_grad()
def test_answers_behind_a_prefix_are_those_of_the_plain_model(tokenizer):
    model, processor = lively(tokenizer)
    image = processor(images=picture(0), return_tensors="pt")
    question = processor.tokenizer(["What is it?"], return_tensors="pt")

    def ask():
        return model.generate(**question, prefix=model.encode_prefix(**image), max_new_tokens=6, do_sample=False)

    expected = ask()
    prepack_weights(model)
    assert torch.equal(ask(), expected)


@torch.no_grad()
def test_compiled_answers_are_those_of_the_plain_model(tokenizer):
    model, processor = lively(tokenizer)
    inputs = processor(images=picture(0), text="What is it?", return_tensors="pt")
    expected = model(**inputs).logits
    prepack_weights(model)
    found = torch.compile(model)(**inputs).logits
    torch.compiler.reset()
    assert max_difference(found, expected) < 1e-5 * max(1, expected.abs().max().item())


def test_every_layer_of_the_text_is_packed_and_nothing_else(model):
    tower = [type(part) for part in model.model.vision_tower.modules()]
    connector = [type(part) for part in model.model.connector.modules()]
    words = model.get_input_embeddings().weight
    prepack_weights(model)
    prepack_weights(model)  # once more changes nothing
    text = [*model.model.language_model.modules(), model.lm_head]
    assert not [part for part in text if isinstance(part, (nn.Linear, Conv1D))]
    assert sum(isinstance(part, PrepackedLinear) for part in text) == 2 * 4 + 1
    assert [type(part) for part in model.model.vision_tower.modules()] == tower
    assert [type(part) for part in model.model.connector.modules()] == connector
    assert model.get_input_embeddings().weight is words


def test_the_model_without_a_head_is_packed_too(model):
    prepack_weights(model.model)
    assert isinstance(model.model.language_model.h[0].attn.c_attn, PrepackedLinear)
    assert isinstance(model.lm_head, nn.Linear)


def test_under_autocast_products_stay_in_the_dtype_of_the_weights(tokenizer):
    model, processor = lively(tokenizer)
    prepack_weights(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(**batch_inputs(processor, ROWS)).logits
    assert logits.dtype == torch.float32 and logits.isfinite().all()


def test_what_cannot_be_done_afterwards_is_refused(tokenizer, tmp_path):
    model, processor = lively(tokenizer)
    inputs = batch_inputs(processor, ROWS)
    prepack_weights(model)
    for spread in (lambda: model.save_pretrained(tmp_path), lambda: copy.deepcopy(model), lambda: pickle.dumps(model)):
        with pytest.raises(RuntimeError, match="cannot be saved or copied: do so before `prepack_weights`"):
            spread()
    layer = model.model.language_model.h[0].attn.c_attn
    with pytest.raises(RuntimeError, match=r"stay on the CPU and in torch.float32: load the model anew for torch.f"):
        layer.to(torch.float16)
    with pytest.raises(RuntimeError, match=r"load the model anew for torch.float32 on meta"):
        layer.to("meta")
    model.to("cpu", torch.float32)  # where it is already
    with pytest.raises(RuntimeError, match="pass no gradient on: take a model on which"):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, patch: model.double(), "this model is in torch.float64"),
        (lambda model, patch: model.half(), "this model is in torch.float16"),
        (lambda model, patch: model.to("meta"), "for CPUs, and this model is on meta"),
        (
            lambda model, patch: model.add_adapter(LoraConfig(target_modules=["c_attn"])),
            "has adapters.*merge them first",
        ),
        (lambda model, patch: patch.setattr(cpu, "is_quantized", lambda parameter: True), "are quantised"),
        (
            lambda model, patch: (model.bfloat16(), patch.setattr(cpu, "multiplies_bf16", lambda: False)),
            "no instructions for bfloat16, in which this model is; load it in float32",
        ),
        (lambda model, patch: patch.setattr(torch.backends.mkldnn, "is_available", lambda: False), "without oneDNN"),
    ],
    ids=["float64", "float16", "elsewhere", "adapters", "quantised", "bfloat16", "no oneDNN"],
)
def test_where_it_cannot_be_done_the_model_stays_as_it_was(model, monkeypatch, change, message):
    change(model, monkeypatch)
    layers = [type(part) for part in model.modules()]
    with pytest.raises(ValueError, match=f"{message}.*leave `prepack_weights` out"):
        prepack_weights(model)
    prepack_weights(model, strict=False)
    assert [type(part) for part in model.modules()] == layers


@pytest.mark.skipif(not cpu.multiplies_bf16(), reason="a CPU without instructions for bfloat16")
@torch.no_grad()
def test_bfloat16_is_within_its_rounding(tokenizer):
    model, processor = lively(tokenizer)
    model, inputs = model.bfloat16(), batch_inputs(processor, ROWS).to(torch.bfloat16)
    expected = model(**inputs).logits
    prepack_weights(model)
    assert max_difference(model(**inputs).logits, expected) <= 2**-5 * expected.abs().max().item()


@pytest.mark.skipif(torch.cuda.is_available(), reason="commands take the GPU")
def test_generate_and_caption_do_it(tokenizer, tmp_path, monkeypatch):
    for part in lively(tokenizer):
        part.save_pretrained(tmp_path / "model")
    picture(0).save(tmp_path / "0.png")
    rows, forward = [], PrepackedLinear.forward
    monkeypatch.setattr(
        PrepackedLinear, "forward", lambda self, hidden: rows.append(len(hidden)) or forward(self, hidden)
    )
    caption_images(str(tmp_path / "model"), [str(tmp_path / "0.png")], tmp_path / "captions.jsonl")
    assert rows
    rows.clear()
    result = CliRunner().invoke(app, ["generate", str(tmp_path / "model"), str(tmp_path / "0.png")])
    assert result.exit_code == 0 and rows
