"""`imageprompt doctor`: each mistake is found, sound models pass, and the figures are those of real runs."""

import copy
import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BACKBONES, picture, tiny, tiny_gpt2
from safetensors.torch import load_file, save_file
from test_cli import main_with
from test_readme import cached_repository
from transformers import GPT2LMHeadModel, GPTJConfig, LlamaConfig

from imageprompt import ImagePromptConfig, ImagePromptForConditionalGeneration, ImagePromptProcessor
from imageprompt.compression import compress
from imageprompt.compression.quantizing import KINDS
from imageprompt.diagnosis import Plan, checks, diagnose
from imageprompt.diagnosis.memory import (
    LiveBytes,
    build_on_meta,
    count_parts,
    count_saved_bytes,
    estimate_memory,
    on_fake_tensors,
)
from imageprompt.diagnosis.report import Part

SMALL = {"preprocessing": {"input_size": (3, 64, 64)}, "num_image_tokens": 4}


@pytest.fixture(scope="module")
def composed(tokenizer):
    return tiny(tokenizer)


@pytest.fixture(scope="module")
def sound(composed, tmp_path_factory):
    """A saved model in which nothing is wrong."""
    folder = tmp_path_factory.mktemp("sound")
    for part in composed:
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    """A copy of it, to break."""
    return shutil.copytree(sound, tmp_path / "broken")


def pair(tokenizer, text=None, **settings):
    return diagnose("resnet10t", text or tiny_gpt2(), tokenizer=tokenizer, **SMALL | settings)


def status(report, name: str) -> list[str]:
    return [check.status for check in report.checks if check.name == name]


def message(report, name: str) -> str:
    return " ".join(check.message for check in report.checks if check.name == name and check.status != "ok")


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# --- checks


def test_a_sound_model_passes_every_check(sound, composed):
    report = diagnose(sound, plan=Plan(batch_size=16))
    assert report.ok and {check.status for check in report.checks} == {"ok"}
    names = {"positions", "processor", "chat template", "preprocessing", "weights", "learning", "batch norm", "dry run"}
    assert {check.name for check in report.checks} == names
    model, _ = composed
    assert report.preprocessing == model.config.vision_config.pretrained_cfg
    assert report.budget.tokens_per_image == 4 and report.budget.feature_grid == [2, 2]
    assert report.budget.text == [252, 248, 244, 240]


def test_pain_01_a_processor_of_another_model(folder, sound):
    edit_json(folder / "processor_config.json", num_image_tokens=2)
    report = diagnose(folder)
    assert not report.ok and "num_image_tokens 2 here, 4 in the model" in message(report, "processor")
    assert status(diagnose(sound), "processor") == ["ok"]


def test_more_tokens_than_the_vocabulary(folder):
    processor = ImagePromptProcessor.from_pretrained(folder)
    processor.tokenizer.add_tokens([f"more{i}" for i in range(200)])
    processor.save_pretrained(folder)
    assert "vocabulary" in message(diagnose(folder), "processor")


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ({"text_tokens": 222, "max_new_tokens": 30}, "ok"),
        ({"text_tokens": 223, "max_new_tokens": 30}, "error"),
        ({"text_tokens": 222, "max_new_tokens": 31}, "error"),
        ({"images_per_row": 48}, "ok"),
        ({"images_per_row": 49, "text_tokens": 20}, "warning"),
        ({"images_per_row": 64}, "error"),
    ],
)
def test_pain_05_positions(sound, plan, expected):
    report = diagnose(sound / "config.json", plan=Plan(batch_size=2, **{"text_tokens": 4, "max_new_tokens": 8} | plan))
    assert status(report, "positions") == [expected]
    assert report.ok == (expected != "error") == (report.memory is not None)


def test_pain_05_the_tokenizer_lets_longer_rows_through(folder, sound):
    edit_json(folder / "tokenizer_config.json", model_max_length=4096)
    assert status(diagnose(folder), "tokenizer length") == ["warning"]
    assert status(diagnose(sound), "tokenizer length") == []


def test_pain_05_an_image_larger_than_the_language_model(tokenizer):
    report = diagnose("resnet50", tiny_gpt2(n_positions=32), tokenizer=tokenizer)
    assert not report.ok and "only 32 positions" in message(report, "composition")
    assert report.memory is None and report.budget is None


def test_pain_11_batch_norm(tokenizer):
    learning = pair(tokenizer, plan=Plan(batch_size=8))
    assert status(learning, "batch norm") == ["warning"] and learning.ok
    assert status(pair(tokenizer, plan=Plan(batch_size=8, images_per_row=2)), "batch norm") == ["ok"]
    frozen = pair(tokenizer, plan=Plan(batch_size=2, trainable={"vision": False}))
    assert status(frozen, "batch norm") == ["ok"]
    assert frozen.parts["vision"].learning == 0
    without = diagnose("vit_tiny_patch16_224", tiny_gpt2(), tokenizer=tokenizer)
    assert status(without, "batch norm") == ["ok"]


def test_pain_11_one_value_for_each_statistic(tokenizer):
    settings = {"preprocessing": {"input_size": (3, 32, 32)}, "num_image_tokens": 1}
    report = diagnose("resnet10t", tiny_gpt2(), tokenizer=tokenizer, plan=Plan(batch_size=1), **settings)
    assert not report.ok and "more than 1 value per channel" in message(report, "dry run")
    assert pair(tokenizer, plan=Plan(batch_size=2)).ok


def test_pain_17_the_weights_were_trained_with_other_pixels(tokenizer, sound, folder):
    settings = {"preprocessing": SMALL["preprocessing"] | {"mean": (0.5, 0.5, 0.5)}}
    assert status(pair(tokenizer, **settings), "preprocessing") == ["error"]
    assert pair(tokenizer, pretrained=False, **settings).ok
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    vision["pretrained_cfg"]["mean"] = [0.1, 0.1, 0.1]
    edit_json(folder / "config.json", vision_config=vision)
    assert "0.485" in message(diagnose(folder / "config.json"), "preprocessing")
    assert status(diagnose(sound / "config.json"), "preprocessing") == ["ok"]


def test_pain_17_quickgelu_weights(tokenizer):
    small = {"tokenizer": tokenizer, "model_args": {"depth": 1}}
    plain = diagnose("vit_base_patch32_clip_224.openai", tiny_gpt2(), **small)
    assert not plain.ok and "QuickGELU" in message(plain, "preprocessing")
    assert diagnose("vit_base_patch32_clip_quickgelu_224.openai", tiny_gpt2(), **small).ok


def test_pain_19_lora(sound):
    pytest.importorskip("peft")

    def examine(lora, **plan):
        return diagnose(sound / "config.json", plan=Plan(lora=lora, **plan))

    nothing = examine(["q_proj"])
    assert not nothing.ok and "q_proj" in message(nothing, "LoRA")
    partly = examine(["c_attn", "q_proj"], modules_to_save=["connector"])
    assert partly.ok and "q_proj" in message(partly, "LoRA") and "c_attn" not in message(partly, "LoRA")
    dropped = examine(["c_attn"])
    assert dropped.ok and "modules_to_save" in message(dropped, "LoRA and connector")
    good = examine(["c_attn", "c_proj"], modules_to_save=["connector"])
    assert "6 modules in text" in next(check.message for check in good.checks if check.name == "LoRA")
    assert status(good, "LoRA") == ["ok"] and not message(good, "LoRA and connector")
    # Rank 8, two layers: c_attn 32 → 96, attention's c_proj 32 → 32, the MLP's c_proj 128 → 32.
    assert good.parts["text"].learning == 2 * 8 * ((32 + 96) + (32 + 32) + (128 + 32))
    assert good.parts["vision"].learning == 0 < good.parts["connector"].learning


def test_nothing_learns(sound):
    everything = dict.fromkeys(("vision", "connector", "text"), False)
    assert status(diagnose(sound, plan=Plan(trainable=everything)), "learning") == ["error"]
    assert status(diagnose(sound), "learning") == ["ok"]


def test_missing_processor_files(folder):
    for file in ("processor_config.json", "tokenizer_config.json", "tokenizer.json"):
        (folder / file).unlink()
    assert not diagnose(folder).ok and status(diagnose(folder), "processor") == ["error"]
    assert diagnose(folder / "config.json").ok


@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
def test_missing_tokens(folder, name):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    edit_json(folder / "tokenizer_config.json", **{name: None})
    assert settings[name]
    report = diagnose(folder)
    assert not report.ok and name in message(report, "tokenizer")


def test_a_tokenizer_without_eos_cannot_be_composed(tokenizer):
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    assert "eos_token" in message(pair(without), "tokenizer")
    assert status(pair(tokenizer), "tokenizer") == []
    assert status(pair(None), "tokenizer") == ["warning"]


def test_a_chat_template_without_images(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0].role }}")
    assert "0 image marks" in message(diagnose(folder), "chat template")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no images') }}")
    report = diagnose(folder)
    assert report.ok and "no images" in message(report, "chat template")


def test_weights_in_the_files(folder):
    name = "model.connector.linear_1.weight"
    edit_weights(folder, lambda weights: weights.update({"surplus": torch.zeros(1)}))
    assert diagnose(folder).ok and "surplus" in message(diagnose(folder), "weights")
    edit_weights(folder, lambda weights: weights.update({name: torch.zeros(3, 3)}))
    wrong = diagnose(folder)
    assert not wrong.ok and f"{name} has the shape (3, 3) instead of (32, 512)" in message(wrong, "weights")
    edit_weights(folder, lambda weights: weights.pop(name))
    assert not diagnose(folder).ok and f"lack {name}" in message(diagnose(folder), "weights")
    (folder / "model.safetensors").unlink()
    assert status(diagnose(folder), "weights") == ["error"]


def test_backbones_and_configurations_that_cannot_be(tokenizer, folder):
    report = diagnose("test_vit", tiny_gpt2(), tokenizer=tokenizer, model_args={"dept": 1})
    assert not report.ok and "does not run on" in message(report, "composition")
    assert "Unknown connector" in message(pair(tokenizer, connector="rope"), "composition")
    edit_json(folder / "config.json", image_token_id=100_000)
    assert "outside the vocabulary" in message(diagnose(folder), "configuration")


def test_language_models_that_compose_refuses(tokenizer):
    gptj = GPTJConfig(n_layer=1, n_head=2, n_embd=32, rotary_dim=8, n_positions=128, vocab_size=400)
    report = pair(tokenizer, gptj)
    assert not report.ok and "its head has a bias" in message(report, "language model")
    llama = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=400)
    report = pair(tokenizer, llama)
    assert report.ok and "`compose` finds out from its weights" in message(report, "language model")
    assert status(pair(tokenizer), "language model") == []


def test_what_fake_tensors_cannot_follow_is_no_failure(tokenizer, monkeypatch):
    def untraceable(*_):
        raise checks.DataDependentOutputException("item")

    monkeypatch.setattr(checks, "estimate_memory", untraceable)
    report = pair(tokenizer)
    assert report.ok and report.memory is None and status(report, "dry run") == ["warning"]


# --- figures


@pytest.mark.parametrize("layout", BACKBONES)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_real_model(tokenizer, layout, tied):
    model, _ = tiny(tokenizer, layout, tiny_gpt2(tie_word_embeddings=tied), trainable={"vision": False})
    parts = count_parts(build_on_meta(model.config))
    assert parts == count_parts(model) and ("head" in parts) != tied
    assert sum(part.parameters for part in parts.values()) == model.num_parameters()
    assert sum(part.learning for part in parts.values()) == model.num_parameters(only_trainable=True)


@pytest.mark.parametrize("layout", BACKBONES)
@pytest.mark.parametrize("vision", [True, False])
def test_memory_is_that_of_a_real_step(tokenizer, layout, vision):
    """Saved bytes are exact; the peak may differ by what a kernel borrows."""
    plan = Plan(text_tokens=9, batch_size=2, num_beams=3, max_new_tokens=6)
    model, processor = tiny(tokenizer, layout, trainable={"vision": vision})
    model.train()
    texts = {"text": ["", "is"], "suffix": ["abcdefgh", "abc"]}
    batch = processor(images=[picture()] * 2, padding="max_length", max_length=13, return_tensors="pt", **texts)
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == processor.image_token_id, -100)
    with LiveBytes() as live, count_saved_bytes(model) as saved:
        loss = model(**batch, use_cache=False).loss
        saved_bytes = sum(saved.values())
        loss.backward()
    model.eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with LiveBytes() as generating:
        model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, num_beams=3)

    meta = build_on_meta(model.config).train()
    with on_fake_tensors(meta):
        memory = estimate_memory(meta, plan)
    assert memory.activations == saved_bytes
    assert memory.weights == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    batch_bytes = sum(batch[name].nbytes for name in inputs)
    step = memory.training - memory.weights - memory.optimizer
    assert 0.99 * live.peak <= step <= 1.01 * (live.peak + batch_bytes)
    assert memory.kv_cache == 2 * 3 * memory.kv_cache_per_row
    assert memory.kv_cache_per_row == 2 * 2 * 32 * 4 * (13 + 6)  # keys and values, layers, width, bytes, positions
    assert memory.generation - memory.weights == pytest.approx(generating.peak, rel=0.5)


def test_cross_attention_is_counted_too(tokenizer):
    plan = Plan(text_tokens=9, batch_size=2, num_beams=3, max_new_tokens=6, images_per_row=2)
    model, processor = tiny(tokenizer, "NLC", fusion="cross_attention", num_image_tokens=16)
    model.train()
    texts = {"text": ["", "is"], "suffix": ["abcdefgh", "abc"]}
    batch = processor(images=[[picture()] * 2] * 2, padding="max_length", max_length=11, return_tensors="pt", **texts)
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == processor.image_token_id, -100)
    with LiveBytes() as live, count_saved_bytes(model) as saved:
        loss = model(**batch, use_cache=False).loss
        saved_bytes = sum(saved.values())
        loss.backward()
    meta = build_on_meta(model.config).train()
    with on_fake_tensors(meta):
        memory = estimate_memory(meta, plan)
    # Sharing the images out among the rows takes a little more.
    assert memory.activations == pytest.approx(saved_bytes, rel=0.01)
    assert memory.training - memory.weights - memory.optimizer == pytest.approx(live.peak, rel=0.02)
    assert memory.kv_cache_per_row == 2 * 2 * 32 * 4 * ((11 + 6) + 2 * 16)  # text and new tokens, and the images once
    report = pair(tokenizer, fusion="cross_attention", num_image_tokens=4)
    assert report.ok and report.budget.positions_per_image == 1 and report.budget.tokens_per_image == 4


def test_low_precision_needs_less(sound):
    def expected(dtype):
        return diagnose(sound / "config.json", plan=Plan(dtype=dtype, batch_size=64)).memory

    plain, autocast, pure = expected("float32"), expected("autocast"), expected("bfloat16")
    assert pure.optimizer * 2 == plain.optimizer and pure.kv_cache * 2 == plain.kv_cache
    assert autocast.weights == plain.weights and autocast.activations < plain.activations


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_weights_are_counted_as_they_are_held(tokenizer, tmp_path, kind):
    pytest.importorskip(KINDS[kind])
    model, processor = tiny(tokenizer, text_config=tiny_gpt2(n_embd=64))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "whole")
    compress(str(tmp_path / "whole"), tmp_path / "small", quantize=kind)
    loaded = ImagePromptForConditionalGeneration.from_pretrained(tmp_path / "small")
    tensors, _ = loaded.hf_quantizer.get_state_dict_and_metadata(loaded)  # plain ones, with scales
    tensors = tensors or loaded.state_dict()
    held = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors.values()}.values())

    whole, small = diagnose(tmp_path / "whole"), diagnose(tmp_path / "small")
    assert small.memory.weights == held
    saved = whole.memory.weights - small.memory.weights
    assert saved > 0 and whole.memory.generation - small.memory.generation == saved
    assert small.parts == {name: Part(part.parameters, 0) for name, part in whole.parts.items()}
    assert (small.memory.gradients, small.memory.optimizer) == (0, 0)
    assert not small.ok and "Quantised weights do not learn" in message(small, "learning")
    assert [check.name for check in small.checks if check.status == "error"] == ["learning"]
    config_alone = diagnose(tmp_path / "small" / "config.json")
    assert config_alone.memory.weights == whole.memory.weights
    assert "files are not here: they are counted as not quantised" in message(config_alone, "memory")


def test_a_billion_parameters_need_none_of_their_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # GPT-2 XL's size in fewer, wider layers: the time goes with the number of operations.
    report = diagnose("resnet10t", '{"n_layer": 12, "n_embd": 3072, "n_head": 24}')
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB on Linux
    assert sum(part.parameters for part in report.parts.values()) > 1.5e9
    assert report.memory.weights > 6e9 and grown < 1e6
    assert report.ok


def test_the_readmes_distance_is_the_measured_one():
    root = Path(__file__).parents[1]
    measured = json.loads((root / "docs" / "doctor" / "memory.json").read_text())
    assert measured["measured_over_expected"] == measured["measured_bytes"] / measured["expected_bytes"]
    assert f"took {measured['measured_over_expected']:.2f} times the memory" in (root / "README.md").read_text()
    assert measured["expected_bytes"] == pytest.approx(
        diagnose(
            measured["model"]["vision"], json.dumps(measured["model"]["text"]), plan=Plan(**measured["plan"])
        ).memory.training,
        rel=0.02,
    )


# --- the command


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main_with("doctor", *map(str, arguments))
    return end.value.code


def test_exit_codes(sound, tmp_path, capsys):
    assert run(sound, "--freeze", "vision") == 0
    output = capsys.readouterr().out
    assert "tokens per image" in output and "4,922,488, 0 learn" in output
    assert run(sound, "--text-tokens", 300) == 1
    assert "more than the 256 there are" in capsys.readouterr().out
    (tmp_path / "other.json").write_text('{"model_type": "gpt2"}')
    for unreadable in (["nowhere/here"], ["resnet1000", "{}"], ["resnet18", "{"], [tmp_path / "other.json"]):
        assert run(*unreadable) == 2, unreadable
        assert "Error: " in capsys.readouterr().err
    assert run(sound, "--connector", "mlp") == 2
    assert "composed already" in capsys.readouterr().err


def test_json(sound, capsys):
    assert run(sound, "--json", "--freeze", "vision", "--batch-size", 2) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["parts"]["vision"] == {"parameters": 4922488, "learning": 0}
    assert report["plan"]["batch_size"] == 2 and report["memory"]["training"] > report["memory"]["weights"]


def test_a_pair_of_names(tokenizer, tmp_path, capsys):
    GPT2LMHeadModel(tiny_gpt2()).config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert run("resnet18", tmp_path, "--connector", "pool", "--num-image-tokens", 2, "--lora", "all-linear") == 0
    assert "2 (of a 7x7 feature map)" in capsys.readouterr().out


def test_a_model_on_the_hub_is_examined_without_its_weights(sound, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = cached_repository(tmp_path, "you/model")
    shutil.copytree(sound, snapshot, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    report = diagnose("you/model")
    assert report.ok and status(report, "weights") == [] and status(report, "processor") == ["ok"]


def test_examining_leaves_the_configuration_alone(sound):
    config = ImagePromptConfig.from_pretrained(sound)
    before = config.to_dict()
    model = build_on_meta(config)
    assert isinstance(model, ImagePromptForConditionalGeneration) and config.to_dict() == before
