"""Quantised models: the right layers in integers, close to the original, and the same again after saving."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import max_difference, picture, tiny, tiny_gpt2
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig, TorchAoConfig

from imageprompt import ImagePromptForConditionalGeneration, ImagePromptModel
from imageprompt.compression import quantization_config, quantized_layers, skipped_modules
from imageprompt.compression.quantizing import KINDS

pytest.importorskip("torchao")
bitsandbytes = pytest.importorskip("bitsandbytes")
from torchao.quantization import FqnToConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig, PerGroup  # noqa: E402

TEXT_LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
# How far rounding may move the logits of a random model, as a part of the largest.
CLOSE = {"int8": 0.05, "int8-dynamic": 0.1, "int4": 0.4}


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """(folder of a plain model, inputs, its logits)."""
    folder = tmp_path_factory.mktemp("plain")
    model, processor = tiny(tokenizer, "NLC", tiny_gpt2(n_embd=64))
    spread_weights(model)
    model.save_pretrained(folder)
    inputs = processor(images=[picture(0), picture(1)], text=["A photo", "What is it?"], padding=True)
    return folder, inputs.convert_to_tensors("pt"), logits_of(model, inputs.convert_to_tensors("pt"))


def spread_weights(model):
    """Weights as large as learnt ones: those of a new GPT-2 hardly change its logits."""
    with torch.no_grad():
        for block in model.model.language_model.h:
            for parameter in block.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=parameter.shape[0] ** -0.5)


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs).logits


def saved_and_reloaded(model, folder, **settings):
    """The model again from its files, every weight of it equal; to be called before the model has run."""
    model.save_pretrained(folder)
    reloaded = ImagePromptForConditionalGeneration.from_pretrained(folder, **settings)
    weights, again = model.state_dict(), reloaded.state_dict()
    assert weights.keys() == again.keys() and quantized_layers(model) == quantized_layers(reloaded)
    for name, weight in weights.items():
        of_torchao = type(weight).__module__.startswith("torchao")
        pair = (weight.dequantize(), again[name].dequantize()) if of_torchao else (weight, again[name])
        assert torch.equal(*pair), name
    return reloaded


def assert_close(logits, expected, limit=1e-3):
    """Equal weights give logits that differ by the rounding of sums, which depends on where weights lie in memory."""
    assert max_difference(logits, expected) <= limit * expected.abs().max()


def load(folder, kind, parts=("text",), **settings):
    config = AutoConfig.from_pretrained(folder)
    return AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=quantization_config(kind, config, parts), **settings
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_close_generates_and_comes_back_as_it_was(saved, kind, tmp_path):
    folder, inputs, expected = saved
    model = load(folder, kind)
    layers = quantized_layers(model)
    assert set(layers) == {f"model.language_model.h.{block}.{name}" for block in (0, 1) for name in TEXT_LAYERS}
    assert set(layers.values()) == {{"torchao": "Int8Tensor", "bitsandbytes": "Params4bit"}[KINDS[kind]]}
    reloaded = saved_and_reloaded(model, tmp_path)
    logits = logits_of(model, inputs)
    assert 0 < max_difference(logits, expected) < CLOSE[kind] * expected.abs().max()
    assert_close(logits_of(reloaded, inputs), logits)
    assert_close(logits_of(AutoModelForImageTextToText.from_pretrained(tmp_path), inputs), logits)
    ids = model.generate(**inputs, max_new_tokens=5)
    assert torch.equal(ids, reloaded.generate(**inputs, max_new_tokens=5))
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 5
    if KINDS[kind] == "torchao":
        return  # the library finds torchao's weights only under the names that they were saved with, so with the head
    base = ImagePromptModel.from_pretrained(tmp_path)
    with torch.no_grad():
        states = base(**inputs).last_hidden_state
        assert_close(reloaded.lm_head(states), logits)


def weight_of(layer):
    """The weight that a quantised layer stands for, in floating point."""
    if KINDS["int4"] in type(layer).__module__:
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.dequantize()


@pytest.mark.parametrize("kind", KINDS)
def test_quantising_only_rounds(saved, kind):
    """Each weight lies within half a step of the original's, and the plain model with these weights says the same."""
    folder, inputs, _ = saved
    plain, model = ImagePromptForConditionalGeneration.from_pretrained(folder), load(folder, kind)
    for name in quantized_layers(model):
        weight, original = weight_of(model.get_submodule(name)), plain.get_submodule(name).weight.t()
        # NF4's values lie at most 0.304 of the largest of 64 apart, those of int8 a 127th of the largest of a row.
        groups = (original.reshape(-1, 64), 0.304) if kind == "int4" else (original, 1 / 127)
        step = groups[0].abs().amax(-1, keepdim=True) * groups[1]
        assert ((weight - original).reshape(groups[0].shape).abs() <= 0.501 * step).all()
        plain.get_submodule(name).weight.data = weight.t().contiguous()
    expected = logits_of(plain, inputs)
    # Activations are rounded to 8 bits, or by bitsandbytes to bfloat16 on a CPU that computes in it.
    limit = {"int8": 1e-5, "int8-dynamic": 0.05, "int4": 0.02}[kind]
    assert_close(logits_of(model, inputs), expected, limit)


def test_files_are_smaller_by_what_was_quantised(saved, tmp_path):
    folder, _, _ = saved
    plain = (folder / "model.safetensors").stat().st_size
    sizes = {}
    for kind in KINDS:
        model = load(folder, kind)
        model.save_pretrained(tmp_path / kind)
        sizes[kind] = (tmp_path / kind / "model.safetensors").stat().st_size
    weights = 2 * 12 * 64 * 64  # two blocks
    metadata = 20_000
    assert plain - sizes["int8"] == pytest.approx(3 * weights, abs=metadata)
    assert plain - sizes["int4"] == pytest.approx(3.5 * weights, abs=metadata)


def test_pain_20_tower_connector_and_head_are_left_alone(saved):
    """transformers#45674: 4- or 8-bit loading hits the tower or the head."""
    folder, _, _ = saved
    plain = ImagePromptForConditionalGeneration.from_pretrained(folder)
    for kind in KINDS:
        model = load(folder, kind)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        for name in ("vision_tower", "connector"):
            kept = getattr(model.model, name).state_dict()
            assert all(torch.equal(kept[key], value) for key, value in getattr(plain.model, name).state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_can_be_quantised(saved, kind, tmp_path):
    folder, inputs, expected = saved
    model = load(folder, kind, ("vision", "connector", "text"))
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(quantized_layers(model)) == linear - {"lm_head"}
    assert any("vision_tower" in name for name in linear)
    reloaded = saved_and_reloaded(model, tmp_path)
    logits = logits_of(model, inputs)
    assert 0 < max_difference(logits, expected) < 2 * CLOSE[kind] * expected.abs().max()
    assert_close(logits_of(reloaded, inputs), logits)


@pytest.mark.parametrize(
    ("settings", "parts", "named"),
    [
        ({"fusion": "cross_attention"}, ["text"], "attn.c_attn"),
        ({"fusion": "cross_attention"}, ["connector"], "crossattention"),
        ({"connector": "resampler", "num_image_tokens": 4}, ["connector"], "connector.layers.0.mlp"),
        ({"connector": "clipcap_transformer", "num_image_tokens": 4}, ["connector"], "connector.layers.0.linear1"),
    ],
)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_other_connectors_and_fusion(tokenizer, tmp_path, settings, parts, named, kind):
    model, processor = tiny(tokenizer, "NLC", tiny_gpt2(n_embd=64), **settings)
    model.save_pretrained(tmp_path / "plain")
    inputs = processor(images=picture(), text="A photo", return_tensors="pt")
    expected = logits_of(model, inputs)
    quantised = load(tmp_path / "plain", kind, parts)
    layers = list(quantized_layers(quantised))
    assert any(named in name for name in layers)
    of_connector = [name.startswith("model.connector") or ".crossattention." in name for name in layers]
    assert all(of_connector) if parts == ["connector"] else not any(of_connector)
    again = saved_and_reloaded(quantised, tmp_path / "small")
    logits = logits_of(quantised, inputs)
    assert 0 < max_difference(logits, expected) < 0.4 * expected.abs().max()
    assert_close(logits_of(again, inputs), logits)


def test_language_models_with_linear_layers(tokenizer, tmp_path):
    text = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=400,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model, _ = tiny(tokenizer, text_config=text)
    model.save_pretrained(tmp_path / "plain")
    quantised = load(tmp_path / "plain", "int8")
    assert len(quantized_layers(quantised)) == 7 and not quantised.config.conv1d_as_linear


def test_a_configuration_of_torchaos_own(saved, tmp_path):
    """The library's defaults: all but the head, and GPT-2's layers are not passed over."""
    folder, inputs, expected = saved
    settings = TorchAoConfig(Int8WeightOnlyConfig(granularity=PerGroup(32)))
    model, info = ImagePromptForConditionalGeneration.from_pretrained(
        folder, quantization_config=settings, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert len(quantized_layers(model)) == 8 + 2 + 2 * 4  # of GPT-2, the connector and the tower
    reloaded = saved_and_reloaded(model, tmp_path)
    logits = logits_of(model, inputs)
    assert 0 < max_difference(logits, expected) < 0.05 * expected.abs().max()
    assert_close(logits_of(reloaded, inputs), logits)


def test_quantised_weights_do_not_learn(saved):
    folder, inputs, _ = saved
    for kind in KINDS:
        model = load(folder, kind)
        model.set_trainable(text=True, connector=True)
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert not learning & {f"{name}.weight" for name in quantized_layers(model)}
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert model.model.connector.linear_1.weight.grad.abs().sum() > 0


def test_conv1d_as_linear_changes_nothing(saved, tmp_path):
    folder, inputs, expected = saved
    plain = ImagePromptForConditionalGeneration.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    config.conv1d_as_linear = True
    model = ImagePromptForConditionalGeneration(config).eval()
    linear = model.state_dict()
    for name, value in plain.state_dict().items():
        turned = any(name.endswith(f"{layer}.weight") for layer in TEXT_LAYERS)
        linear[name] = value.t() if turned else value
    model.load_state_dict(linear)
    assert max_difference(logits_of(model, inputs), expected) <= 1e-5
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["conv1d_as_linear"]
    assert (
        max_difference(logits_of(ImagePromptForConditionalGeneration.from_pretrained(tmp_path), inputs), expected)
        <= 1e-5
    )


@pytest.mark.parametrize(
    ("kind", "parts", "message"),
    [
        ("int3", ["text"], "Unknown kind 'int3'; known: int8, int8-dynamic, int4"),
        ("int8", ["head"], "Unknown part 'head'; known: vision, connector, text"),
        ("int8", [], "Name at least one part"),
        ("int8", ["vision"], "nothing to quantise in vision: no linear layer"),
    ],
)
def test_what_cannot_be_quantised_is_refused(tokenizer, kind, parts, message):
    config = tiny(tokenizer)[0].config  # its tower is a ResNet
    with pytest.raises(ValueError, match=message):
        quantization_config(kind, config, parts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_not_quantised_again(saved, kind, tmp_path):
    folder, _, _ = saved
    load(folder, kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantised already"):
        quantization_config("int8", AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_library_that_is_missing_is_named(tokenizer, kind, monkeypatch):
    monkeypatch.setattr("imageprompt.compression.quantizing.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf'{KINDS[kind]}: pip install "imageprompt\[compress\]"'):
        quantization_config(kind, tiny(tokenizer)[0].config)


def test_what_torchao_cannot_do_here_is_said(saved):
    folder, _, _ = saved

    def quantise(kind):
        settings = TorchAoConfig(kind, modules_to_not_convert=skipped_modules())
        ImagePromptForConditionalGeneration.from_pretrained(folder, quantization_config=settings)

    if not torch.cuda.is_available():
        for layout in ("plain", "plain_int32", "tile_packed_to_4d"):
            with pytest.raises(ValueError, match="need a GPU; on a CPU choose an int8 configuration, or bitsandbytes"):
                quantise(Int4WeightOnlyConfig(group_size=32, int4_packing_format=layout))
    with pytest.raises(ValueError, match=r"has quantised nothing: .*groups must divide"):
        quantise(Int4WeightOnlyConfig(group_size=128 * 3))
    with pytest.raises(ValueError, match="wrong way round"):
        quantise(FqnToConfig({"model.connector.linear_1": Int8WeightOnlyConfig()}))


def test_bitsandbytes_is_told_what_to_leave_out(saved):
    """What a GPU would be given; the same configuration runs on the CPU in the tests above."""
    folder, _, _ = saved
    settings = quantization_config("int4", AutoConfig.from_pretrained(folder), ["vision", "text"]).to_dict()
    assert settings["quant_method"] == "bitsandbytes" and settings["load_in_4bit"] and not settings["load_in_8bit"]
    assert settings["bnb_4bit_quant_type"] == "nf4"
    assert settings["llm_int8_skip_modules"] == skipped_modules(["vision", "text"])


REMOTE_SESSION = """
import sys

sys.modules["imageprompt"] = None  # as where it is not installed
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

folder, inputs, output = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
with torch.no_grad():
    save_file({"logits": model(**load_file(inputs)).logits}, output)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_pain_12_a_quantised_model_loads_where_imageprompt_is_not_installed(saved, kind, tmp_path):
    folder, inputs, _ = saved
    model = load(folder, kind)
    model.save_pretrained(tmp_path / "model")
    save_file(dict(inputs), tmp_path / "inputs.safetensors")
    arguments = [tmp_path / name for name in ("model", "inputs.safetensors", "logits.safetensors")]
    environment = os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", REMOTE_SESSION, *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    logits = logits_of(model, inputs)
    assert_close(load_file(arguments[-1])["logits"], logits)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(saved, kind, tmp_path):
    folder, inputs, expected = saved
    model = load(folder, kind, device_map="cuda")
    reloaded = saved_and_reloaded(model, tmp_path, device_map="cuda")
    inputs = inputs.to("cuda")
    logits = logits_of(model, inputs)
    assert 0 < max_difference(logits.cpu(), expected) < 2 * CLOSE[kind] * expected.abs().max()
    assert_close(logits_of(reloaded, inputs), logits)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), reloaded.generate(**inputs, max_new_tokens=5))
