"""Checkpoints of older versions answer as they did; those of newer ones, broken ones and hostile ones are refused.

tests/checkpoints/ holds tiny checkpoints that older commits saved, each with what it answered there;
tests/checkpoints/save.py says how the next one is added.
"""

import hashlib
import inspect
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints.save import answers
from conftest import CODE, max_difference, picture, tiny_gpt2
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig

import imageprompt
from imageprompt import (
    ImagePromptConfig,
    ImagePromptForConditionalGeneration,
    ImagePromptModel,
    ImagePromptProcessor,
    compose,
)
from imageprompt.checkpoints import FORMAT_VERSION
from imageprompt.configuration import FUSIONS
from imageprompt.connectors import CONNECTORS
from imageprompt.image_processing import ImagePromptImageKwargs

TESTS = Path(__file__).parent
CHECKPOINTS = sorted(path.parent for path in (TESTS / "checkpoints").glob("*/config.json"))
SAME = 1e-5


def assert_same(found, folder):
    expected = load_file(folder / "expected.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith("_ids"):
            assert torch.equal(found[name], tensor), name
        else:
            assert max_difference(found[name], tensor) <= SAME, name


# --- older checkpoints


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda path: path.name)
def test_an_older_checkpoint_answers_as_it_did(folder, tmp_path, capfd, caplog):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    processor.check_model(model)
    assert "REPORT" not in capfd.readouterr().err and caplog.records == []
    assert_same(answers(model, processor), folder)

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == FORMAT_VERSION
    again = ImagePromptForConditionalGeneration.from_pretrained(tmp_path)
    assert_same(answers(again, ImagePromptProcessor.from_pretrained(tmp_path)), folder)


REMOTE = """
import sys
from pathlib import Path
from checkpoints.save import answers
from remote_session import hide_package
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

hide_package()
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    for part in (model, processor, processor.image_processor):
        assert type(part).__module__.startswith("transformers_modules."), type(part)
    save_file(answers(model, processor), folder / "found.safetensors")
"""


def test_older_checkpoints_answer_as_they_did_by_the_code_in_their_folder(tmp_path):
    folders = {}
    for source in CHECKPOINTS:
        if (source / "modeling.py").exists():  # its own code, under the library of today
            folders[Path(shutil.copytree(source, tmp_path / f"{source.name}-own"))] = source
        updated = Path(shutil.copytree(source, tmp_path / f"{source.name}-updated"))
        for name in CODE:
            shutil.copy(Path(imageprompt.__file__).with_name(name), updated / name)
        folders[updated] = source
    assert len(folders) > len(CHECKPOINTS)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(TESTS)}
    run = subprocess.run(
        [sys.executable, "-c", REMOTE, *folders], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "REPORT" not in run.stderr and "arning" not in run.stderr, run.stderr
    for folder, source in folders.items():
        assert_same(load_file(folder / "found.safetensors"), source)


def test_a_format_is_raised_with_what_it_holds():
    formats = json.loads((TESTS / "checkpoints" / "formats.json").read_text())
    assert list(formats) == [str(number) for number in range(1, FORMAT_VERSION + 1)]
    holds = {
        "fields": sorted({f.name for f in fields(ImagePromptConfig)} - {f.name for f in fields(PreTrainedConfig)}),
        "connectors": sorted(CONNECTORS),
        "fusions": sorted(FUSIONS),
        "processor": sorted(inspect.signature(ImagePromptProcessor).parameters),
        "image_processor": sorted(ImagePromptImageKwargs.__annotations__),
    }
    assert holds == formats[str(FORMAT_VERSION)], "raise FORMAT_VERSION, and see tests/checkpoints/save.py"
    kept = {json.loads((folder / "config.json").read_text()).get("format_version", 1) for folder in CHECKPOINTS}
    assert kept == set(range(1, FORMAT_VERSION + 1))


# --- a checkpoint to break


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    """A tiny checkpoint whose head has weights of its own."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoint"
    model, processor = compose(
        "vit_tiny_patch16_224",
        tiny_gpt2(n_embd=16, n_positions=64, tie_word_embeddings=False),
        tokenizer=tokenizer,
        pretrained=False,
        model_args={"depth": 1, "embed_dim": 16, "num_heads": 2},
        preprocessing={"input_size": (3, 32, 32)},
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


def edit(path, **changes):
    """Change values in a JSON file; `a__b` is key b of object a."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        place = content
        for key in outer:
            place = place[key]
        place[last] = value
    path.write_text(json.dumps(content))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def contents(root):
    """Hashes of all files in a folder."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()}


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def assert_refused(folder, message, load=None, error=ValueError):
    """Refused with a message, and nothing in or beside the folder is new, gone or changed."""
    before = contents(folder.parent)
    with pytest.raises(error, match=message):
        (load or ImagePromptForConditionalGeneration.from_pretrained)(folder)
    assert contents(folder.parent) == before


# --- newer checkpoints


def test_a_newer_format_is_refused_with_the_fields_that_are_new(folder):
    edit(folder / "config.json", format_version=FORMAT_VERSION + 1, prompt_depth=3)
    for load in (ImagePromptConfig, ImagePromptForConditionalGeneration, AutoModelForImageTextToText):
        assert_refused(
            folder,
            rf"config.json was written by a newer version.*format_version is {FORMAT_VERSION + 1}.*up to "
            rf"{FORMAT_VERSION}\. It does not know `prompt_depth`.*pip install --upgrade imageprompt",
            load.from_pretrained,
        )
    edit(folder / "config.json", format_version="two")
    assert_refused(folder, "format_version is 'two'")
    with pytest.raises(ValueError, match="newer version"):
        ImagePromptConfig.from_backbones("resnet10t", tiny_gpt2(), format_version=FORMAT_VERSION + 1)


def test_processors_of_a_newer_format_are_refused_with_the_settings_that_are_new(folder):
    edit(folder / "processor_config.json", format_version=FORMAT_VERSION + 1, image_prefix="Look: ")
    assert_refused(folder, "processor_config.json was.*newer.*`image_prefix`", ImagePromptProcessor.from_pretrained)
    edit(folder / "processor_config.json", image_processor__format_version=FORMAT_VERSION + 1)
    edit(folder / "processor_config.json", image_processor__sharpen=2)
    assert_refused(folder, "newer version.*`sharpen`", AutoImageProcessor.from_pretrained)


def test_settings_of_other_tools_are_named_and_do_nothing(folder, caplog, monkeypatch):
    edit(folder / "config.json", made_by="another tool")
    edit(folder / "processor_config.json", made_by="another tool", image_processor__sharpen=2)
    monkeypatch.setattr(imageprompt.checkpoints.logger, "warning", lambda text: caplog.handler.records.append(text))
    config = ImagePromptConfig.from_pretrained(folder)
    ImagePromptProcessor.from_pretrained(folder)
    assert config.made_by == "another tool" and config.format_version == FORMAT_VERSION
    assert list(dict.fromkeys(caplog.handler.records)) == [
        "This version of imageprompt makes no use of `made_by` in config.json.",
        "This version of imageprompt makes no use of `made_by` in processor_config.json.",
        "This version of imageprompt makes no use of `sharpen` in the image processor's settings.",
    ]


# --- weights that are not the model's

BIAS = "model.connector.linear_2.bias"


def test_a_missing_tensor_is_refused_by_name_and_random_only_when_asked_for(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(BIAS))
    for load in (ImagePromptForConditionalGeneration, AutoModelForImageTextToText):
        assert_refused(folder, f"It lacks {BIAS}, which would start from random", load.from_pretrained)
    assert_refused(folder, "It lacks connector.linear_2.bias", AutoModel.from_pretrained)
    model, report = AutoModelForImageTextToText.from_pretrained(folder, strict=False, output_loading_info=True)
    assert report["missing_keys"] == {BIAS} and model.get_parameter(BIAS).isfinite().all()


def test_a_surplus_tensor_is_refused_by_name(folder):
    edit_tensors(folder, lambda tensors: tensors.update({f"model.extra.{n}": torch.ones(2) for n in range(5)}))
    assert_refused(folder, r"no place for model\.extra\.0, model\.extra\.1, model\.extra\.2 and 2 more\.")
    assert type(ImagePromptForConditionalGeneration.from_pretrained(folder, strict=False)).__name__


def test_wrong_shapes_are_refused_by_name_and_made_anew_only_when_asked_for(folder):
    edit_tensors(folder, lambda tensors: tensors.update({BIAS: torch.zeros(5)}))
    message = re.escape(f"These have another shape: {BIAS} (5,) instead of (16,).")
    assert_refused(folder, message)
    assert_refused(folder, message, partial(ImagePromptForConditionalGeneration.from_pretrained, strict=False))
    model = ImagePromptForConditionalGeneration.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert model.get_parameter(BIAS).shape == (16,)


def test_a_configuration_of_another_model_is_refused(folder):
    edit(folder / "config.json", connector="linear")
    assert_refused(folder, r"It lacks model\.connector.*no place for model\.connector\.linear_1")


def test_a_model_without_head_reads_a_headed_checkpoint_but_gives_no_head(folder, tmp_path, capfd):
    capfd.readouterr()
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "headless")
    assert "REPORT" not in capfd.readouterr().err
    assert_refused(tmp_path / "headless", r"It lacks lm_head\.weight")
    assert type(ImagePromptModel.from_pretrained(tmp_path / "headless")) is ImagePromptModel


def test_loading_information_is_given_when_it_is_asked_for(whole):
    model, report = ImagePromptForConditionalGeneration.from_pretrained(whole, output_loading_info=True)
    assert isinstance(model, ImagePromptForConditionalGeneration) and not any(report.values())


def test_a_model_from_tensors_in_memory(whole):
    config, tensors = ImagePromptConfig.from_pretrained(whole), load_file(whole / "model.safetensors")
    model = ImagePromptForConditionalGeneration.from_pretrained(None, config=config, state_dict=tensors)
    assert torch.equal(model.get_parameter(BIAS), tensors[BIAS])
    tensors.pop(BIAS)
    with pytest.raises(ValueError, match=BIAS):
        ImagePromptForConditionalGeneration.from_pretrained(None, config=config, state_dict=tensors)


def test_a_model_quantised_while_loading_is_whole_and_stays_so(whole, tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    skipped = ["vision_tower", "connector", "lm_head"]
    settings = TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=skipped)
    model = ImagePromptForConditionalGeneration.from_pretrained(whole, quantization_config=settings)
    model.save_pretrained(tmp_path / "quantised")
    again = ImagePromptForConditionalGeneration.from_pretrained(tmp_path / "quantised")
    ids = torch.tensor([[1, 2, 3]])
    assert max_difference(again(ids).logits, model(ids).logits) <= SAME
    edit_tensors(tmp_path / "quantised", lambda tensors: tensors.pop(BIAS))
    assert_refused(tmp_path / "quantised", f"lacks {BIAS}")


def test_adapters_load_with_their_base_and_only_whole(whole, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = ImagePromptForConditionalGeneration.from_pretrained(whole)
    adapted = get_peft_model(base, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False))
    adapter = tmp_path / "adapter"
    adapted.save_pretrained(adapter)
    ids = torch.tensor([[1, 2, 3]])
    loaded = ImagePromptForConditionalGeneration.from_pretrained(adapter)
    assert max_difference(loaded(ids).logits, adapted.eval()(ids).logits) <= SAME
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    assert_refused(adapter, r"It lacks .*lora_A")


# --- files that are broken, pickles, or elsewhere


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def torch_pickle(folder):
    torch.save(Touch(folder / "ran"), folder / "model.safetensors")


def plain_pickle(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Touch(folder / "ran")))


def only_a_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save(Touch(folder / "ran"), folder / "pytorch_model.bin")


def index_of(name, **content):
    """Make the weights a shard that the index calls `name`; `{folder}` stands for the checkpoint's folder."""

    def change(folder):
        place = name.format(folder=folder)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        target = Path(os.path.normpath(folder / place))
        if target.parent in (folder, folder.parent):
            save_file(tensors, target, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, place)} | content
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def index_of_pickles(folder):
    index_of("model-00001-of-00001.bin")(folder)
    torch.save(Touch(folder / "ran"), folder / "model-00001-of-00001.bin")


def link_to_something_else(folder):
    (folder.parent / "private.txt").write_text("a secret")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder.parent / "private.txt")


BROKEN = {
    "cut": (cut, r"model\.safetensors is broken or cut short .*download it again"),
    "cut in header": (cut_in_header, r"model\.safetensors is broken or cut short"),
    "empty": (empty, r"model\.safetensors is broken or cut short"),
    "a zipped pickle": (torch_pickle, r"model\.safetensors is a pickle under a false name"),
    "a plain pickle": (plain_pickle, r"model\.safetensors is a pickle under a false name"),
    "pytorch_model.bin": (only_a_pickle, r"weights in pytorch_model\.bin and in no safetensors file.*can run code"),
    "index to the parent": (index_of("../model-1.safetensors"), r"points outside its folder, to '\.\./model-1"),
    "index to a path": (index_of("{folder}/model-1.safetensors"), r"points outside its folder, to '/"),
    "index to another drive": (index_of("C:\\model-1.safetensors"), r"points outside its folder, to 'C:"),
    "index of pickles": (index_of_pickles, r"names model-00001-of-00001\.bin, which is no safetensors file"),
    "index without names": (index_of("model-1.safetensors", weight_map=[1]), "no index of weights: AttributeError"),
    "index of numbers": (index_of("model-1.safetensors", weight_map={"a": 1}), "no index of weights: TypeError"),
    "index without metadata": (index_of("model-1.safetensors", metadata=None), "no index of weights"),
    "link": (link_to_something_else, r"model\.safetensors is broken or cut short(?!.*secret)"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_and_hostile_files_are_refused_by_name(folder, kind):
    change, message = BROKEN[kind]
    change(folder)
    assert_refused(folder, message)


def put_on_hub(hub, folder, **where):
    """Publish the files of a folder as ada/model."""
    place = f"{where['subfolder']}/" if "subfolder" in where else ""
    hub.add("ada/model", {place + path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_and_hostile_files_are_refused_on_the_hub_too(folder, hub, kind):
    change, message = BROKEN[kind]
    change(folder)
    put_on_hub(hub, folder)
    with pytest.raises(ValueError, match=message):
        ImagePromptForConditionalGeneration.from_pretrained("ada/model")
    assert not list(folder.parent.rglob("ran"))


def test_faults_on_the_hub_are_found_where_the_library_looks(folder, hub):
    """In a subfolder, at a revision, of a variant."""
    load = partial(ImagePromptForConditionalGeneration.from_pretrained, "ada/model", subfolder="sub")
    put_on_hub(hub, folder, subfolder="sub")
    assert load().get_parameter(BIAS).shape == (16,)
    whole = hub.repos["ada/model"].refs["main"]
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    put_on_hub(hub, folder, subfolder="sub")
    assert load(variant="fp16").get_parameter(BIAS).shape == (16,)
    (folder / "model.fp16.safetensors").write_bytes(b"")
    put_on_hub(hub, folder, subfolder="sub")
    with pytest.raises(ValueError, match=r"model\.fp16\.safetensors is broken"):
        load(variant="fp16")
    assert load(revision=whole).get_parameter(BIAS).shape == (16,)


def test_a_repository_of_shards_loads(folder, hub):
    index_of("model-00001-of-00001.safetensors")(folder)
    put_on_hub(hub, folder)
    assert ImagePromptForConditionalGeneration.from_pretrained("ada/model").get_parameter(BIAS).shape == (16,)


def test_what_is_not_on_the_hub_keeps_the_librarys_message(folder, hub):
    with pytest.raises(OSError, match=r"ada/nothing.*not a valid model identifier"):
        ImagePromptForConditionalGeneration.from_pretrained("ada/nothing")
    (folder / "model.safetensors").unlink()
    put_on_hub(hub, folder)
    with pytest.raises(OSError, match=r"does not appear to have a file named model\.safetensors"):
        ImagePromptForConditionalGeneration.from_pretrained("ada/model")


def test_a_missing_shard_is_refused_by_name(folder):
    index_of("model-00001-of-00002.safetensors")(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert_refused(folder, "model-00001-of-00002.safetensors", error=FileNotFoundError)


def test_shards_and_links_as_in_the_hubs_cache_load(folder, tmp_path):
    index_of("model-00001-of-00001.safetensors")(folder)
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    assert ImagePromptForConditionalGeneration.from_pretrained(linked).get_parameter(BIAS).shape == (16,)


def test_a_pickle_is_read_when_asked_for_but_never_run(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    model = ImagePromptForConditionalGeneration.from_pretrained(folder, use_safetensors=False)
    assert torch.equal(model.get_parameter(BIAS), tensors[BIAS])
    torch.save(tensors | {BIAS: Touch(folder / "ran")}, folder / "pytorch_model.bin")
    load = ImagePromptForConditionalGeneration.from_pretrained
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load(folder, use_safetensors=False)
    assert not (folder / "ran").exists()


# --- configurations that would run or read something else

ARGS = "vision_config__model_args__"
HOSTILE = {
    "timm's checkpoint": ({ARGS + "checkpoint_path": "{folder}/evil.pth"}, "`model_args` holds checkpoint_path"),
    "timm's weights": ({ARGS + "pretrained": True, ARGS + "cache_dir": "/"}, "holds cache_dir, pretrained"),
    "another Hub model": ({"vision_config__architecture": "hf-hub:someone/model"}, "knows no model 'hf-hub:someone"),
    "another folder": ({"vision_config__architecture": "local-dir:{folder}"}, "knows no model 'local-dir:"),
    "weights elsewhere": ({"transformers_weights": "../model.safetensors"}, "inside the model directory"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_configurations_that_lead_elsewhere_are_refused(folder, kind):
    changes, message = HOSTILE[kind]
    torch.save(Touch(folder / "ran"), folder / "evil.pth")
    shutil.copy(folder / "model.safetensors", folder.parent)
    changes = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in changes.items()}
    # Without what is probed, the backbone is made while the configuration is read.
    edit(folder / "config.json", **changes, feature_size=None)
    assert_refused(folder, message)


def test_code_that_a_checkpoint_brings_or_names_is_not_run_unasked(folder):
    ran = folder.parent / "ran"
    for path in [*folder.glob("*.py"), folder / "custom_generate" / "generate.py", folder / "tokenization.py"]:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"open({str(ran)!r}, 'w')\n")
    reference = "someone/else--modeling.Model"
    for part in ("text_config", "vision_config"):
        edit(folder / "config.json", **{f"{part}__auto_map": {"AutoConfig": reference, "AutoModel": reference}})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization.Tokenizer", None]})
    before = contents(folder.parent)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=picture(), text="A photo of", return_tensors="pt")
    model.generate(**inputs, max_new_tokens=2)
    assert contents(folder.parent) == before and not ran.exists()


# --- processors


@pytest.mark.parametrize(
    ("missing", "message", "error"),
    [
        (["processor_config.json"], "has no processor_config.json.*saved without its processor", FileNotFoundError),
        (["tokenizer.json", "tokenizer_config.json"], "has no tokenizer_config.json", FileNotFoundError),
        (["tokenizer.json"], "no vocabulary besides its special tokens.*tokenizer.json", ValueError),
    ],
)
def test_a_processor_that_is_not_whole_is_refused(folder, missing, message, error):
    for name in missing:
        (folder / name).unlink()
    for load in (ImagePromptProcessor, AutoProcessor):
        assert_refused(folder, message, load.from_pretrained, error)


def test_a_processor_of_another_model_is_refused(folder):
    other = ImagePromptProcessor.from_pretrained(CHECKPOINTS[0])
    other.save_pretrained(folder)
    config = ImagePromptConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"do not belong together.*image_token_id 300 here"):
        ImagePromptProcessor.from_pretrained(folder).check_model(config)
