"""Checkpoints: what is saved comes back bit for bit, anywhere, also where imageprompt is not installed."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BACKBONES, CODE, max_difference, picture, tiny, tiny_gpt2
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    GPT2Config,
    pipeline,
)
from transformers.dynamic_module_utils import get_imports

from imageprompt import (
    ImagePromptConfig,
    ImagePromptForConditionalGeneration,
    ImagePromptImageProcessor,
    ImagePromptModel,
    ImagePromptProcessor,
    compose,
)

# Families with buffers that are computed, not saved: relative positions, rotary and axial embeddings, Fourier features.
BUFFERED = {
    "rope": ("eva02_tiny_patch14_224", {"depth": 2}, (3, 56, 56)),
    "relative": ("vit_relpos_small_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3}, (3, 64, 64)),
    "maxvit": ("coatnet_pico_rw_224", {"embed_dim": (32, 32, 32, 32), "depths": (1, 1, 1, 1)}, (3, 64, 64)),
    "fourier": ("edgenext_xx_small", {"depths": (1, 1, 1, 2), "dims": (16, 24, 32, 32)}, (3, 64, 64)),
}

ROUNDING = 1e-6


def inputs_for(processor):
    return processor(images=[picture(0), picture(1)], text=["A photo of", "What"], padding=True, return_tensors="pt")


def assert_bit_equal(reloaded, model, processor):
    """Every weight and buffer to the last bit; outputs as far as kernels answer alike wherever the weights lie."""
    for kind in ("named_parameters", "named_buffers"):
        expected, found = dict(getattr(model, kind)()), dict(getattr(reloaded, kind)())
        assert expected.keys() == found.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    inputs = inputs_for(processor)
    assert max_difference(reloaded(**inputs).logits, model(**inputs).logits) <= ROUNDING


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """(folder, model, processor): one checkpoint that the tests below only read."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    model, processor = tiny(tokenizer, text_config=tiny_gpt2(initializer_range=0.2))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


# --- save and load


@pytest.mark.parametrize("backbone", [*BACKBONES, *BUFFERED])
def test_pain_16_a_reloaded_model_is_bit_equal(tokenizer, tmp_path, backbone):
    name, model_args, input_size = (BACKBONES | BUFFERED)[backbone]
    model, processor = compose(
        name,
        tiny_gpt2(),
        tokenizer=tokenizer,
        pretrained=False,
        model_args=model_args,
        preprocessing={"input_size": input_size},
        num_image_tokens=4,
    )
    model.save_pretrained(tmp_path)
    reloaded = ImagePromptForConditionalGeneration.from_pretrained(tmp_path)
    assert_bit_equal(reloaded, model, processor)
    assert not reloaded.training


@pytest.mark.parametrize("tied", [True, False])
def test_pain_14_ties_survive(tokenizer, tmp_path, tied):
    model, processor = tiny(tokenizer, text_config=tiny_gpt2(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    reloaded, info = ImagePromptForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for each in (model, reloaded):
        head, embeddings = each.lm_head.weight, each.get_input_embeddings().weight
        assert (head.data_ptr() == embeddings.data_ptr()) == tied
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) == (not tied)  # noqa: SIM118
    assert_bit_equal(reloaded, model, processor)


def test_a_checkpoint_holds_what_it_needs_and_no_pickle(saved):
    folder, _, _ = saved
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "requirements.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert not [name for name in names if Path(name).suffix in {".bin", ".pt", ".pth", ".pkl", ".pickle"}]


def test_a_checkpoint_does_not_say_where_its_parts_lay(tokenizer, tmp_path):
    home = tmp_path / "home-of-ada"
    tiny_gpt2(vocab_size=len(tokenizer)).save_pretrained(home)
    settings = json.loads((home / "config.json").read_text())
    (home / "config.json").write_text(json.dumps(settings | {"_name_or_path": "/mnt/home-of-ada/gpt2"}))  # as of old
    text_config = GPT2Config.from_pretrained(home)
    assert "home-of-ada" in text_config.name_or_path
    model, processor = tiny(tokenizer, text_config=text_config)
    for number in range(2):  # as composed, and as loaded from that folder
        for part in (model, processor):
            part.save_pretrained(home / f"{number}")
        for file in (home / f"{number}").iterdir():
            assert b"home-of-ada" not in file.read_bytes(), file
        model = ImagePromptForConditionalGeneration.from_pretrained(home / f"{number}")
        processor = ImagePromptProcessor.from_pretrained(home / f"{number}")
    config = model.config.to_dict()
    config["vision_config"]["_name_or_path"] = config["text_config"]["_name_or_path"] = "/mnt/home-of-ada"
    assert "home-of-ada" not in ImagePromptConfig.from_dict(config).to_json_string()


def test_a_sharded_checkpoint_is_bit_equal(saved, tmp_path):
    _, model, processor = saved
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    reloaded = ImagePromptForConditionalGeneration.from_pretrained(tmp_path)
    assert_bit_equal(reloaded, model, processor)


def test_bfloat16(saved, tmp_path):
    folder, model, processor = saved
    half = ImagePromptForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    inputs = inputs_for(processor)
    expected = model(**inputs).logits
    assert max_difference(half(**inputs).logits, expected) <= 0.05 * expected.abs().max()
    assert half.generate(**inputs, max_new_tokens=3).shape == (2, inputs["input_ids"].shape[1] + 3)
    half.save_pretrained(tmp_path)
    again = ImagePromptForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    assert_bit_equal(again, half, processor)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=["auto", "cpu"])
def test_device_maps(saved, device_map):
    folder, model, processor = saved
    placed = ImagePromptForConditionalGeneration.from_pretrained(folder, device_map=device_map)
    inputs = inputs_for(processor).to(placed.device)
    expected = model(**inputs_for(processor)).logits
    assert max_difference(placed(**inputs).logits.cpu(), expected) <= (0 if placed.device.type == "cpu" else 1e-3)


def test_parts_offloaded_to_disk_answer_alike(saved, tmp_path):
    folder, model, processor = saved
    places = {"model.vision_tower": "disk", "model.connector": "cpu", "model.language_model": "cpu", "lm_head": "cpu"}
    placed = ImagePromptForConditionalGeneration.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    assert next(placed.model.vision_tower.parameters()).is_meta
    with torch.no_grad():
        assert torch.equal(placed(**inputs_for(processor)).logits, model(**inputs_for(processor)).logits)


def test_the_base_model_loads_from_the_heads_checkpoint_and_back(saved, tmp_path):
    folder, model, processor = saved
    base, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(base) is ImagePromptModel and not info["missing_keys"]
    inputs = inputs_for(processor)
    assert max_difference(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state) <= ROUNDING
    base.save_pretrained(tmp_path)
    headed = ImagePromptForConditionalGeneration.from_pretrained(tmp_path)  # the head is tied
    assert_bit_equal(headed, model, processor)


@pytest.mark.parametrize("auto_class", [AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_auto_classes_find_the_installed_classes(saved, auto_class):
    folder, _, _ = saved
    assert type(auto_class.from_pretrained(folder)) is ImagePromptForConditionalGeneration
    assert type(AutoConfig.from_pretrained(folder)) is ImagePromptConfig
    assert type(AutoProcessor.from_pretrained(folder)) is ImagePromptProcessor
    assert type(AutoImageProcessor.from_pretrained(folder)) is ImagePromptImageProcessor


def test_saving_again_writes_the_same_files(saved, tmp_path):
    source = saved[0]
    for folder in (tmp_path / "first", tmp_path / "second"):
        AutoModelForImageTextToText.from_pretrained(source).save_pretrained(folder)
        AutoProcessor.from_pretrained(source).save_pretrained(folder)
        source = folder
    for path in (tmp_path / "first").iterdir():
        assert (source / path.name).read_bytes() == path.read_bytes(), path.name


def test_loading_says_nothing_odd(saved, capfd, caplog):
    folder, _, _ = saved
    capfd.readouterr()
    AutoModelForImageTextToText.from_pretrained(folder)
    AutoProcessor.from_pretrained(folder)
    written = capfd.readouterr()
    lines = [line for line in written.err.replace("\r", "\n").splitlines() if line and "Loading weights" not in line]
    assert (lines, written.out, caplog.records) == ([], "", [])


# --- remote code


def test_pain_12_every_file_of_the_code_is_in_the_checkpoint(saved):
    folder, _, _ = saved
    assert {path.name for path in folder.glob("*.py")} == CODE
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration.ImagePromptConfig",
        "AutoModel": "modeling.ImagePromptModel",
        "AutoModelForImageTextToText": "modeling.ImagePromptForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling.ImagePromptForConditionalGeneration",
    }


@pytest.mark.parametrize("name", sorted(CODE))
def test_pain_12_the_code_imports_siblings_and_declared_libraries_only(saved, name):
    allowed = {"torch", "transformers", "timm", "torchvision", "PIL", "numpy", "huggingface_hub", "safetensors"}
    assert set(get_imports(saved[0] / name)) <= allowed | sys.stdlib_module_names  # all but what a `try` imports
    for node in ast.walk(ast.parse((saved[0] / name).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and f"{node.module}.py" in CODE


def run_remote(folder, home, *arguments):
    """Run remote_session.py where imageprompt cannot be imported; what it printed to stderr."""
    script = Path(__file__).with_name("remote_session.py")
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    run = subprocess.run(
        [sys.executable, script, folder, *arguments], env=environment, cwd=home, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stderr


def test_pain_12_checkpoints_work_and_save_where_imageprompt_is_not_installed(saved, tmp_path):
    folder, model, processor = saved
    image = np.arange(70 * 90 * 3, dtype=np.uint8).reshape(70, 90, 3)
    inputs = processor(images=image, text="A photo of", return_tensors="pt")
    expected = model(**inputs)
    ids = model.generate(**inputs, max_new_tokens=8, num_beams=2)

    resaved = tmp_path / "resaved"
    for number, (source, arguments) in enumerate([(folder, [resaved]), (resaved, [])]):
        home = tmp_path / f"home {number}"  # a fresh cache: nothing is left over from the first run
        home.mkdir()
        result = tmp_path / f"{number}.safetensors"
        printed = run_remote(source, home, result, *arguments)
        outputs = load_file(result)
        assert max_difference(outputs["logits"], expected.logits) <= ROUNDING
        assert max_difference(outputs["same_logits"], expected.logits) <= ROUNDING
        assert max_difference(outputs["hidden_states"], model.model(**inputs).last_hidden_state) <= ROUNDING
        assert torch.equal(outputs["ids"], ids)
        assert "arning" not in printed and "not initialized" not in printed, printed
    assert {path.name for path in resaved.glob("*.py")} == CODE


# --- pipelines

TASKS = ("image-text-to-text", "any-to-any")


@pytest.mark.parametrize("task", TASKS)
def test_pipeline_with_a_plain_prompt(saved, task):
    folder, model, processor = saved
    generator = pipeline(task, model=str(folder))
    prompt = f"{processor.image_token}A photo of"
    answers = generator(images=picture(), text=prompt, max_new_tokens=6, return_full_text=False)
    inputs = processor(images=picture(), text=prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    assert answers[0]["generated_text"] == processor.decode(ids[0], skip_special_tokens=True)


@pytest.mark.parametrize("task", TASKS)
def test_pipeline_with_a_chat(saved, task):
    folder, model, processor = saved
    generator = pipeline(task, model=str(folder))
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "What is it?"}]
    chat = [{"role": "user", "content": content}]
    answers = generator(text=chat, max_new_tokens=6, return_full_text=False)
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == processor.image_token_id).sum() == processor.num_image_tokens
    ids = model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    assert answers[0]["generated_text"] == processor.decode(ids[0], skip_special_tokens=True)


def test_a_head_on_a_base_checkpoint_never_says_the_placeholder(saved, tmp_path):
    folder, model, _ = saved
    ImagePromptModel.from_pretrained(folder).save_pretrained(tmp_path)
    loaded = ImagePromptForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.suppress_tokens == [model.config.image_token_id]
