"""Sharing: what is pushed, what the card says, and that it loads by its name, all against a Hub on this machine."""

import json
import logging
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from conftest import CODE, make_photos, max_difference, picture, tiny, tiny_gpt2
from hub_server import TOKENS
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments
from typer.testing import CliRunner

from imageprompt import ImagePromptCollator, ImagePromptForConditionalGeneration, ImagePromptProcessor, compose
from imageprompt.cards import BEGIN, END, CardFacts
from imageprompt.cli import app
from imageprompt.compression import compress
from imageprompt.evaluation.evaluate import main as evaluate
from imageprompt.pushing import push_folder, read_evaluation
from imageprompt.training.arguments import ImagePromptTrainingArguments
from imageprompt.training.train import main as train
from imageprompt.training.trainer import ImagePromptTrainer

MODEL_FILES = {
    *CODE,
    *(".gitattributes", "README.md", "chat_template.jinja", "config.json", "generation_config.json"),
    *("model.safetensors", "processor_config.json", "requirements.txt", "tokenizer.json", "tokenizer_config.json"),
}
SMALL = {"stem_width": 8, "channels": [16, 16, 32, 32]}  # of a resnet10t
DATA = ["--dataset", "photos/captions.csv", "--image_column", "file", "--suffix_column", "caption"]
NAME = "ada/model"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder to work in, with photos and runs/captioner as training and evaluation left it."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_photos(Path("photos"))
        text = json.dumps({"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64})
        parts = ["--vision", "resnet10t", "--text_config", text, "--new_tokenizer", "300", "--pretrained", "false"]
        parts += ["--image_size", "64", "--model_args", json.dumps(SMALL)]
        parts += ["--prompt", "A photo of", "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1"]
        cut = ["--train_split", "train[:80%]", "--shuffle_rows", "0"]
        train([*parts, *DATA, *cut, "--use_cpu", "--output_dir", "runs/captioner"])
        asked = ["--model", "runs/captioner", "--split", "train[80%:]", "--shuffle_rows", "0", "--max_new_tokens", "5"]
        evaluate([*asked, *DATA, "--prompt", "A photo of", "--output", "runs/captioner/scores.json"])
        Path("runs/captioner/notes.py").write_text("print('mine alone')\n")
        Path("runs/captioner/.env").write_text("SECRET=1\n")
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the training's folder, to be changed."""
    return Path(shutil.copytree(trained / "runs" / "captioner", tmp_path / "captioner"))


def card_of(repo_id: str, revision: str = "main") -> ModelCard:
    return ModelCard.load(hf_hub_download(repo_id, "README.md", revision=revision))


def logits_of(model, processor) -> torch.Tensor:
    image = np.arange(70 * 90 * 3, dtype=np.uint8).reshape(70, 90, 3)
    with torch.no_grad():
        return model.eval()(**processor(images=image, text="A photo of", return_tensors="pt")).logits


def run_command(*arguments: str) -> str:
    """What `imageprompt` prints."""
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


# --- from one machine to another


def environment(hub, home: Path) -> dict[str, str]:
    """Of a process that knows of the Hub only where it is."""
    kept = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": ""}


def test_pain_12_a_pushed_model_loads_by_its_name_where_imageprompt_is_not_installed(hub, tokenizer, tmp_path):
    model, processor = tiny(tokenizer, text_config=tiny_gpt2(initializer_range=0.3), model_args=SMALL)
    first = model.push_to_hub(NAME, private=True)
    last = processor.push_to_hub(NAME)
    assert hub.history(NAME) == ["initial commit", "Upload model", "Upload processor"]
    assert hub.files(NAME).keys() == MODEL_FILES
    assert hub.repos[NAME].private
    older = logits_of(model, processor)
    with torch.no_grad():
        model.model.connector.get_parameter(next(iter(dict(model.model.connector.named_parameters())))).mul_(3)
    newest = logits_of(model, processor)
    assert max_difference(newest, older) > 0.01
    model.push_to_hub(NAME)
    assert first.oid != last.oid

    script = Path(__file__).with_name("hub_session.py")
    session = subprocess.run(
        [sys.executable, script, NAME, last.oid, tmp_path / "result.json"],
        env=environment(hub, tmp_path / "home"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert session.returncode == 0, session.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    for key, expected in (("older", older), ("newest", newest)):
        assert max_difference(torch.tensor(result["logits"][key]), expected.flatten()) <= 1e-5
    assert result["refused"].keys() == {"none", "wrong", "other"}
    assert "Invalid credentials" in result["refused"].pop("wrong")
    for said in result["refused"].values():
        assert "private" in said and "token" in said
    inputs = processor(images=Image.open(tmp_path / "photo.jpg"), return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=30)[:, inputs["input_ids"].shape[1] :]
    assert result["printed"] == processor.batch_decode(ids, skip_special_tokens=True)[0] + "\n"

    # That process pushed the model on, with the library's `push_to_hub`.
    again = f"{NAME}-again"
    assert hub.history(again) == ["initial commit", "Again", "Upload processor"]
    assert hub.files(again).keys() == MODEL_FILES
    loaded = ImagePromptForConditionalGeneration.from_pretrained(again)
    assert max_difference(logits_of(loaded, ImagePromptProcessor.from_pretrained(again)), newest) <= 1e-6


def required_by_package(extra: str | None = None) -> set[str]:
    """What the package needs to be installed, or one of its extras."""
    setup = ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    lines = setup["options"]["install_requires"] if extra is None else setup["options.extras_require"][extra]
    return set(lines.split())


def required_by(content: bytes) -> set[str]:
    return {line for line in content.decode().splitlines() if not line.startswith("#")}


LOADING = required_by_package() - {"accelerate", "typer"}  # which loading does not take


def test_the_requirements_are_those_of_the_package(hub, trained):
    push_folder(trained / "runs" / "captioner", NAME)
    assert required_by(hub.files(NAME)["requirements.txt"]) == LOADING


@pytest.mark.parametrize(
    ("kind", "parts", "library", "said"),
    [
        ("int8", ["connector", "text"], {"torchao>=0.18"}, "connector, text are quantised: torchao, `Int8WeightOnly"),
        ("int4", ["text"], {"bitsandbytes>=0.50", "accelerate"}, "text are quantised: bitsandbytes, 4 bits (nf4)"),
    ],
    ids=["int8", "int4"],
)
def test_a_quantised_model_says_so_and_what_it_needs(hub, tokenizer, tmp_path, kind, parts, library, said):
    for name in library:
        pytest.importorskip(re.split(">=", name)[0])
    model, processor = tiny(tokenizer, text_config=tiny_gpt2(n_embd=64), model_args=SMALL)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "whole")
    compress(str(tmp_path / "whole"), tmp_path / "small", quantize=kind, parts=parts)
    assert library <= required_by_package("compress") | required_by_package()
    push_folder(tmp_path / "small", NAME)
    loaded = ImagePromptForConditionalGeneration.from_pretrained(NAME)
    loaded.push_to_hub(f"{NAME}-again")
    processor.push_to_hub(f"{NAME}-again")  # which knows nothing of the weights
    for repo_id in (NAME, f"{NAME}-again"):
        assert required_by(hub.files(repo_id)["requirements.txt"]) == LOADING | library
        assert f"The weights of the linear layers of {said}" in card_of(repo_id).text
    again = ImagePromptForConditionalGeneration.from_pretrained(f"{NAME}-again")
    assert torch.equal(logits_of(again, processor), logits_of(loaded, processor))


def test_requirements_of_ones_own_stay(tokenizer, tmp_path):
    model, _ = tiny(tokenizer, model_args=SMALL)
    (tmp_path / "requirements.txt").write_text("mine\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "requirements.txt").read_text() == "mine\n"
    (tmp_path / "requirements.txt").unlink()
    model.save_pretrained(tmp_path)
    written = (tmp_path / "requirements.txt").read_text()
    (tmp_path / "requirements.txt").write_text(written.replace("timm", "an-older-timm"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "requirements.txt").read_text() == written and required_by(written.encode()) == LOADING


# --- what goes up


def test_nothing_but_the_model_leaves_a_training_folder(hub, trained):
    folder = trained / "runs" / "captioner"
    there = {path.name for path in folder.iterdir()}
    assert there > {
        "checkpoint-2",
        "training_args.bin",
        "trainer_state.json",
        "scores.predictions.jsonl",
        "training.json",
    }
    push_folder(folder, NAME)
    assert hub.files(NAME).keys() == MODEL_FILES
    for file in MODEL_FILES - {".gitattributes", "README.md", "requirements.txt"}:
        assert hub.files(NAME)[file] == (folder / file).read_bytes()
    again = len(hub.uploaded)
    push_folder(folder, NAME)
    assert hub.history(NAME) == ["initial commit", "Upload model"] and len(hub.uploaded) == again  # nothing is new


def test_weights_of_an_earlier_push_do_not_stay_in_their_place(hub, run):
    push_folder(run, NAME)
    model = ImagePromptForConditionalGeneration.from_pretrained(run)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    processor = ImagePromptProcessor.from_pretrained(run)
    model.push_to_hub(NAME, max_shard_size="40KB")
    assert "model.safetensors" not in hub.files(NAME) and "model.safetensors.index.json" in hub.files(NAME)
    loaded = ImagePromptForConditionalGeneration.from_pretrained(NAME)
    assert max_difference(logits_of(loaded, processor), logits_of(model, processor)) <= 1e-6
    model.save_pretrained(run)
    push_folder(run, NAME)
    assert {file for file in hub.files(NAME) if "safetensors" in file} == {"model.safetensors"}
    loaded = ImagePromptForConditionalGeneration.from_pretrained(NAME)
    assert max_difference(logits_of(loaded, processor), logits_of(model, processor)) <= 1e-6


def test_weights_under_other_names_stay(hub, run):
    others = {"model.fp16.safetensors", "model_ema.safetensors", "modelcard-figure.safetensors", "my/model.safetensors"}
    hub.add(NAME, dict.fromkeys({*others, "model-00001-of-00002.safetensors"}, b"weights"))
    push_folder(run, NAME)
    assert hub.files(NAME).keys() == MODEL_FILES - {".gitattributes"} | others
    ImagePromptForConditionalGeneration.from_pretrained(run).push_to_hub(NAME, max_shard_size="40KB")
    assert others <= hub.files(NAME).keys() and "model.safetensors" not in hub.files(NAME)


def test_a_push_without_a_message_has_one(hub, run, tokenizer):
    model, processor = tiny(tokenizer, model_args=SMALL)
    model.push_to_hub(NAME, commit_message=None)
    processor.push_to_hub(NAME, commit_message=None)
    push_folder(run, NAME, commit_message=None)
    assert hub.history(NAME) == ["initial commit", "Upload model", "Upload processor", "Upload model"]


@pytest.mark.parametrize(("there", "wish"), [(False, True), (True, False)], ids=["public", "private"])
def test_a_repository_that_others_may_see_against_the_wish_is_refused(hub, run, tokenizer, there, wish):
    hub.add(NAME, {"notes.txt": b"mine"}, private=there)
    model, processor = tiny(tokenizer, model_args=SMALL)
    kinds = ("public", "private")
    said = f"{NAME} is there already and {kinds[there]}, not {kinds[wish]} as you wish; nothing was sent. Change it at"
    for push in (model.push_to_hub, processor.push_to_hub, lambda *args, **kwargs: push_folder(run, *args, **kwargs)):
        with pytest.raises(ValueError, match=f"{said} {hub.url}/{NAME}/settings"):
            push(NAME, private=wish, revision="beams")
    args = ImagePromptTrainingArguments(
        str(run / "more"), push_to_hub=True, hub_model_id=NAME, hub_private_repo=wish, use_cpu=True
    )
    with pytest.raises(ValueError, match=said):
        ImagePromptTrainer(model, args, train_dataset=rows(), processing_class=processor)
    assert hub.files(NAME) == {"notes.txt": b"mine"} and hub.repos[NAME].refs.keys() == {"main"}
    push_folder(run, NAME)  # as it is
    push_folder(run, NAME, private=there)
    assert hub.repos[NAME].private is there


def test_several_chat_templates_travel(hub, run):
    processor = ImagePromptProcessor.from_pretrained(run)
    processor.chat_template = {"default": processor.chat_template, "plain": "{{ messages[0].content }}"}
    processor.save_pretrained(run)
    for push in (lambda: push_folder(run, NAME), lambda: processor.push_to_hub("ada/processor")):
        repo_id = push().repo_url.repo_id
        assert ImagePromptProcessor.from_pretrained(repo_id).chat_template == processor.chat_template


def test_branches_pull_requests_and_messages(hub, run):
    push_folder(run, NAME)
    (run / "generation_config.json").write_text('{"num_beams": 2}')
    main_before = hub.repos[NAME].refs["main"]
    commit = push_folder(run, NAME, revision="beams", commit_message="Two beams")
    assert hub.history(NAME)[-1] == "Two beams"
    assert hub.repos[NAME].refs == {"main": main_before, "beams": commit.oid}
    loaded = ImagePromptForConditionalGeneration.from_pretrained(NAME, revision="beams")
    assert loaded.generation_config.num_beams == 2
    asked = push_folder(run, NAME, create_pr=True)
    assert hub.repos[NAME].refs["main"] == main_before and hub.repos[NAME].refs["refs/pr/1"] == asked.oid
    assert asked.pr_url.endswith("/discussions/1")


# --- a connection that breaks off


def test_a_dropped_upload_is_repeated(hub, run):
    hub.faults[("PUT", "/lfs/")] = ["drop", 503]
    push_folder(run, NAME)
    assert hub.faults.pop(("PUT", "/lfs/")) == []
    assert hub.files(NAME)["model.safetensors"] == (run / "model.safetensors").read_bytes()


@pytest.mark.parametrize("request_", [("PUT", "/lfs/"), ("POST", "/commit/"), ("POST", "/preupload/")], ids="-".join)
def test_a_push_that_breaks_off_changes_nothing_and_goes_on(hub, run, request_):
    push_folder(run, NAME)
    model = ImagePromptForConditionalGeneration.from_pretrained(run)
    before, uploaded = hub.files(NAME), len(hub.uploaded)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(run, max_shard_size="40KB")
    shards = sorted(path.name for path in run.glob("model-*.safetensors"))
    (run / "model.safetensors").unlink()
    assert len(shards) >= 3
    # The first file comes through, and then nothing does.
    hub.faults[request_] = ["pass"] * (request_[0] == "PUT") + ["drop"] * 100
    with pytest.raises(ConnectionError, match=f"The push to {NAME} broke off. It changed nothing there"):
        push_folder(run, NAME)
    del hub.faults[request_]
    assert hub.files(NAME) == before
    push_folder(run, NAME)
    assert hub.history(NAME) == ["initial commit", "Upload model", "Upload model"]
    new = hub.uploaded[uploaded:]
    assert len(new) == len(set(new)) == len(shards)  # each was sent once, in the first or in the second push
    for shard in shards:
        assert hub.files(NAME)[shard] == (run / shard).read_bytes()


@pytest.mark.parametrize("answer", ["after", "late"])
@pytest.mark.parametrize("revision", [None, "beams"])
def test_a_push_whose_answer_is_lost_is_said_to_have_arrived(hub, run, answer, revision):
    hub.add(NAME, {})
    hub.faults[("POST", "/commit/")] = [answer]
    with pytest.raises(ConnectionError) as caught:
        push_folder(run, NAME, revision=revision)
    newest = hub.repos[NAME].refs[revision or "main"]
    assert hub.repos[NAME].commits[newest][0] == "Upload model"
    assert f"broke off. It arrived all the same, as {hub.url}/{NAME}/commit/{newest}" in str(caught.value)


def test_where_nobody_can_say_whether_a_push_arrived_that_is_said(hub, run):
    hub.add(NAME, {})
    hub.faults[("POST", "/commit/")] = ["after"]
    with pytest.raises(ConnectionError, match=f"may have arrived all the same: look at {hub.url}/{NAME}/discussions"):
        push_folder(run, NAME, create_pr=True)
    hub.faults[("POST", "/commit/")] = ["drop"]
    hub.faults[("GET", f"/api/models/{NAME}/revision/")] = ["pass"] + ["drop"] * 100
    with pytest.raises(ConnectionError, match=f"may have arrived all the same: look at {hub.url}/{NAME}/commits/main"):
        push_folder(run, NAME, revision="main")


def test_a_hub_that_is_not_there_was_sent_nothing(hub, run):
    hub.faults[("POST", "/api/repos/create")] = ["drop"]
    with pytest.raises(ConnectionError, match=f"The Hub cannot be reached: .* Nothing was sent to {NAME}"):
        push_folder(run, NAME)
    assert NAME not in hub.repos


def test_a_killed_push_changes_nothing(hub, run):
    push_folder(run, NAME)
    before = hub.files(NAME)
    weights = load_file(run / "model.safetensors")
    save_file({key: value + 1 for key, value in weights.items()}, run / "model.safetensors", {"format": "pt"})
    hub.faults[("PUT", "/lfs/")] = ["wait"]
    push = multiprocessing.get_context("fork").Process(target=push_folder, args=(run, NAME))
    push.start()
    assert hub.waiting.wait(60)
    push.kill()
    push.join()
    hub.go_on.set()
    assert hub.files(NAME) == before
    push_folder(run, NAME)
    assert hub.files(NAME)["model.safetensors"] == (run / "model.safetensors").read_bytes()


# --- the card


def test_the_card_says_what_is_known_and_nothing_else(hub, trained):
    folder = trained / "runs" / "captioner"
    scores = read_evaluation(folder / "scores.json")
    push_folder(folder, NAME, CardFacts(evaluations=[scores]))
    card = card_of(NAME)
    data = card.data
    assert (data.pipeline_tag, data.library_name) == ("image-text-to-text", "transformers")
    assert set(data.tags) == {"imageprompt", "custom_code"}
    # Random weights, data of this machine, and nobody said more.
    assert [data.base_model, data.datasets, data.license, data.language] == [None] * 4
    assert {"base_model", "datasets", "license", "language"}.isdisjoint(data.to_dict())
    results = {result.metric_name: result for result in data.eval_results}
    assert {key: result.metric_value for key, result in results.items()} == scores["scores"]
    assert len(results) == 6 and set(data.metrics) == {"bleu", "rouge", "cider"}
    bleu = results["BLEU-4"]
    assert (bleu.task_type, bleu.metric_type, bleu.dataset_type) == ("image-to-text", "bleu", "local")
    assert (bleu.dataset_name, bleu.dataset_split) == ("captions.csv", "train[80%:]")
    assert bleu.metric_args == {"do_sample": False, "max_new_tokens": 5, "num_beams": 1}
    text, record = card.text, json.loads((folder / "training.json").read_text())
    for fact in (
        "timm's `resnet10t`",
        "gpt2, 1 layers of width 32",
        "- connector: `mlp`",
        "- fusion: `prefix`",
        "- tokens per image: 4",
        "- positions of the language model: 64; an image takes 4 of them",
        "- height and width: 64 x 64 pixels",
        "- mean: 0.485, 0.456, 0.406",
        "- standard deviation: 0.229, 0.224, 0.225",
        "- data: `captions.csv` (a local one), split `train[:80%]`, prompt `A photo of`",
        "- rows: 16",
        "- what learnt: vision, connector, text",
        "- max_steps: 2",
        "- learning_rate: 5e-05",
        f"- train_loss: {record['metrics']['train_loss']:.4g}",
        f"torch {torch.__version__.partition('+')[0]}",
        f"| CIDEr | {scores['scores']['CIDEr']:.4g} |",
        'text="A photo of"',
        "4 rows of `captions.csv` (a local one)",
    ):
        assert fact in text, fact
    assert "num_train_epochs" not in text  # max_steps was given in its place
    assert "photos/" not in str(card) and "licen" not in str(card).lower()


def test_what_is_given_is_on_the_card(hub, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    image = Image.effect_noise((900, 600), 90).convert("RGB")
    exif = Image.Exif()
    exif[0x010F] = "a camera of mine"
    image.save(tmp_path / "sample.png", exif=exif)
    options = ["--license", "apache-2.0", "--language", "en", "--dataset", "ada/photos", "--tag", "photos"]
    options += ["--prompt", "A picture of", "--sample", str(tmp_path / "sample.png"), "--message", "First", "--private"]
    assert (
        run_command("push", "runs/captioner", "given", *options)
        .splitlines()[-1]
        .startswith(f"{hub.url}/ada/given/commit/")
    )
    assert hub.history("ada/given")[-1] == "First" and hub.repos["ada/given"].private
    card, files = card_of("ada/given"), hub.files("ada/given")
    assert files.keys() == MODEL_FILES | {"sample.jpg"}
    assert (card.data.license, card.data.language, card.data.datasets) == ("apache-2.0", ["en"], ["ada/photos"])
    assert card.data.tags == ["imageprompt", "custom_code", "photos"] and card.data.eval_results is None
    (tmp_path / "small.jpg").write_bytes(files["sample.jpg"])
    with Image.open(tmp_path / "small.jpg") as small:
        assert small.size == (512, 341) and not small.getexif() and b"camera" not in files["sample.jpg"]
    model = ImagePromptForConditionalGeneration.from_pretrained("runs/captioner")
    processor = ImagePromptProcessor.from_pretrained("runs/captioner")
    inputs = processor(images=image, text="A picture of", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=30)[:, inputs["input_ids"].shape[1] :]
    answer = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert (
        f"](sample.jpg)\n\nWhat the model says after the prompt `A picture of`:\n\n```text\n{answer}\n```" in card.text
    )


def test_base_models_are_named_where_their_weights_were_taken(hub, tokenizer, tmp_path):
    torch.manual_seed(1)
    backbone = timm.create_model("resnet10t", num_classes=0, **SMALL)
    save_file(backbone.state_dict(), tmp_path / "model.safetensors")
    cfg = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0, "first_conv": "conv1.0"}
    about = {"architecture": "resnet10t", "num_classes": 0, "pretrained_cfg": cfg, "model_args": SMALL}
    weights = (tmp_path / "model.safetensors").read_bytes()
    hub.add("grace/backbone", {"config.json": json.dumps(about).encode(), "model.safetensors": weights})
    gpt2 = GPT2LMHeadModel(tiny_gpt2())
    gpt2.push_to_hub("ada/gpt2")
    tokenizer.push_to_hub("ada/gpt2")
    for pretrained, expected in (
        (True, ["grace/backbone", "ada/gpt2"]),
        ("text", ["ada/gpt2"]),
        (False, None),
    ):
        model, _ = compose("grace/backbone", "ada/gpt2", num_image_tokens=4, pretrained=pretrained)
        model.push_to_hub(f"{NAME}-{pretrained}".lower())
        data = card_of(f"{NAME}-{pretrained}".lower()).data
        assert data.base_model == expected
        assert data.get("base_model_relation") == ("finetune" if expected else None)
    gpt2.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    model, _ = compose("grace/backbone", tmp_path / "gpt2", num_image_tokens=4)
    assert model.config.base_models == {"vision": "grace/backbone"}  # where a copy came from is not known
    model.save_pretrained(tmp_path / "saved")
    again = ImagePromptForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert again.config.base_models == {"vision": "grace/backbone"}


MINE = "---\nlicense: mit\nwidget: false\nmetrics: wer\ntags:\n- mine\n---\n# My model\n\nI made it.\n"


def test_a_card_of_ones_own_in_the_folder_keeps_its_text(hub, run):
    (run / "README.md").write_text(MINE)
    push_folder(run, NAME)
    card = card_of(NAME)
    assert card.text == "# My model\n\nI made it.\n"
    assert card.data.license == "mit" and card.data["widget"] is False and card.data.metrics == ["wer"]
    assert card.data.tags == ["mine", "imageprompt", "custom_code"] and card.data.pipeline_tag == "image-text-to-text"
    push_folder(run, NAME, CardFacts(license="apache-2.0"))
    assert card_of(NAME).data.license == "apache-2.0"  # this was said later


@pytest.mark.parametrize("blank", ["", "\n", "\n \n\n"])
def test_a_card_of_metadata_alone_gets_a_text(hub, run, trained, blank):
    hub.add(NAME, {"README.md": f"---\nlicense: mit\n---{blank}".encode()})  # as made on the Hub's page
    for _ in range(2):
        push_folder(run, NAME, sample=trained / "photos" / "00.png")
        card = card_of(NAME)
        assert card.data.license == "mit" and card.data.library_name == "transformers"
        assert card.text.strip().startswith(f"{BEGIN}\n\n# model\n") and card.text.strip().endswith(END)
        assert card.text.count("](sample.jpg)") == 1 and "sample.jpg" in hub.files(NAME)


def test_a_sample_that_would_not_be_shown_is_refused(hub, run, trained):
    sample = trained / "photos" / "00.png"
    hub.add(NAME, {"README.md": b"# My model\n"})
    with pytest.raises(ValueError, match=r"README.md has a text of its own, .* no place for the sample: put the lines"):
        push_folder(run, NAME, sample=sample)
    assert hub.files(NAME).keys() == {"README.md"}
    (run / "README.md").write_text(MINE)
    asked = len(hub.requests)
    with pytest.raises(ValueError, match=r"README.md has a text of its own"):
        push_folder(run, "ada/other", sample=sample)
    assert len(hub.requests) == asked
    (run / "README.md").write_text(f"{MINE}\n{BEGIN}\n{END}\n\nBelow.\n")
    push_folder(run, NAME, sample=sample)
    text = card_of(NAME).text
    assert text.startswith("# My model\n\nI made it.\n\n") and text.endswith("Below.\n") and "](sample.jpg)" in text


def test_a_card_in_the_repository_that_cannot_be_read_is_named_where_it_is(hub, run):
    hub.add(NAME, {"README.md": b"---\nlicense: [mit\n---\n# Mine\n"})
    for revision in (None, "beams"):
        with pytest.raises(ValueError, match=f"metadata of {hub.url}/{NAME}/blob/main/README.md cannot be read"):
            push_folder(run, NAME, revision=revision)
    assert hub.repos[NAME].refs.keys() == {"main"} and hub.history(NAME) == ["initial commit"]


def test_a_card_in_the_repository_is_kept_up_to_date(hub, run, tokenizer):
    push_folder(run, NAME, CardFacts(license="mit", evaluations=[read_evaluation(run / "scores.json")]))
    first = hub.files(NAME)["README.md"].decode()
    assert "## Scores" in first and "model-index" in first
    assert f"\n{BEGIN}\n" in first and f"\n{END}\n" in first
    written = first.replace(BEGIN, f"Above.\n\n{BEGIN}") + "\nBelow.\n"
    HfApi().upload_file(path_or_fileobj=written.encode(), path_in_repo="README.md", repo_id=NAME)
    model, _ = tiny(tokenizer, model_args=SMALL)
    model.push_to_hub(NAME, tags="other")
    card = card_of(NAME)
    assert card.text.startswith(f"\nAbove.\n\n{BEGIN}\n") and card.text.endswith(f"{END}\n\nBelow.\n")
    assert "gpt2, 2 layers of width 32" in card.text and "1 layers" not in card.text
    assert card.data.license == "mit" and card.data.tags == ["imageprompt", "custom_code", "other"]
    # Scores of the weights before are not those of the weights now.
    assert "## Scores" not in card.text and card.data.eval_results is None and card.data.metrics is None


def test_scores_of_another_model_are_refused(hub, run):
    scores = read_evaluation(run / "scores.json")
    (run / "generation_config.json").write_text('{"num_beams": 2}')
    asked = len(hub.requests)
    with pytest.raises(ValueError, match=r"scores of task 'caption' are not of the model in .*: config_sha256 differ"):
        push_folder(run, "ada/other", CardFacts(evaluations=[scores]))
    for content, said in (("{}", "is not what `imageprompt evaluate` writes"), ("{", "is no JSON")):
        (run / "scores.json").write_text(content)
        with pytest.raises(ValueError, match=said):
            read_evaluation(run / "scores.json")
    with pytest.raises(ValueError, match=r"There is no file .*none.json"):
        read_evaluation(run / "none.json")
    with pytest.raises(ValueError, match=r"notes.py is no image"):
        push_folder(run, "ada/other", sample=run / "notes.py")
    assert len(hub.requests) == asked


def test_the_record_of_another_training_is_left_out(hub, run, tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    push_folder(run, NAME)
    assert "## Training" in card_of(NAME).text and not caplog.messages
    weights = load_file(run / "model.safetensors")
    save_file({key: value + 1 for key, value in weights.items()}, run / "model.safetensors", {"format": "pt"})
    push_folder(run, NAME)
    assert "## Training" not in card_of(NAME).text
    assert [f"{run / 'training.json'} is not of the weights in {run}" in message for message in caplog.messages] == [
        True
    ]


def test_a_dry_run_sends_nothing(hub, trained, monkeypatch):
    monkeypatch.chdir(trained)
    monkeypatch.delenv("HF_TOKEN")
    asked = len(hub.requests)
    options = ["--evaluation", "runs/captioner/scores.json", "--sample", "photos/00.png", "--dry-run"]
    shown = run_command("push", "runs/captioner", "ada/dry", *options)
    listed = set(re.findall(r"^ +[\d,]+  (\S+)$", shown, re.MULTILINE))
    assert listed == MODEL_FILES - {".gitattributes", "README.md"} | {"sample.jpg"}
    assert "# dry\n" in shown and 'from_pretrained("ada/dry", trust_remote_code=True)' in shown
    assert len(hub.requests) == asked


def test_the_script_is_the_command(hub, trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    script = str(Path(__file__).parents[1] / "scripts" / "push_to_hub.py")

    def run_script(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(script, run_name="__main__")
        return end.value.code

    options = ["--evaluation", "runs/captioner/scores.json", "--license", "mit", "--revision", "first", "--private"]
    assert run_script("runs/captioner", "captioner", *options) == 0
    newest = hub.repos["ada/captioner"].refs["first"]
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/ada/captioner/commit/{newest}"
    assert hub.repos["ada/captioner"].private and hub.files("ada/captioner", "first").keys() == MODEL_FILES
    card = card_of("ada/captioner", "first")
    assert card.data.license == "mit" and "CIDEr" in card.text
    assert run_script("runs/none", "captioner") == 2
    assert capsys.readouterr().err == "Error: There is no folder runs/none.\n"


# --- the Trainer


def rows(count: int = 4) -> list[dict]:
    return [{"image": picture(seed), "text": "A photo of", "suffix": " a dog."} for seed in range(count)]


@pytest.mark.parametrize("kind", ["library", "own"])
def test_a_trainer_pushes_what_it_trained(hub, tokenizer, tmp_path, kind):
    model, processor = tiny(tokenizer, model_args=SMALL)
    trainers = {"library": (Trainer, TrainingArguments), "own": (ImagePromptTrainer, ImagePromptTrainingArguments)}
    trainer_class, arguments_class = trainers[kind]
    args = arguments_class(
        str(tmp_path / "run"),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        push_to_hub=True,
        hub_model_id=NAME,
        hub_strategy="end" if kind == "library" else "every_save",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    collator = ImagePromptCollator(processor)
    trainer = trainer_class(model, args, train_dataset=rows(), data_collator=collator, processing_class=processor)
    if kind == "own":  # the first push on the way fails, which does not stop the training
        hub.faults[("POST", "/commit/")] = ["drop"]
    trainer.train()
    trainer.push_to_hub(**({"license": "mit", "language": "en"}))
    loaded = ImagePromptForConditionalGeneration.from_pretrained(NAME)
    again = ImagePromptProcessor.from_pretrained(NAME)
    assert max_difference(logits_of(loaded, again), logits_of(model, processor)) <= 1e-6
    data, files = card_of(NAME).data, hub.files(NAME)
    assert data.license == "mit" and not [
        file for file in files if file.startswith("checkpoint-") or "optimizer" in file
    ]
    assert required_by(files["requirements.txt"]) == LOADING and files.keys() >= MODEL_FILES
    if kind == "own":
        assert hub.faults.pop(("POST", "/commit/")) == []
        assert hub.history(NAME) == ["initial commit", "Training in progress, step 2", "End of training"]
        assert files.keys() == MODEL_FILES
        assert data.pipeline_tag == "image-text-to-text" and data.language == ["en"]


# --- mistakes


def without(*names):
    def change(folder: Path) -> None:
        for file in names:
            (folder / file).unlink()

    return change


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])


def sharded(shard: str):
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))

    return change


def configured(**changes):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def with_card(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n# Mine\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shutil.rmtree, "There is no folder"),
        (without("config.json"), "holds no model: it has no config.json"),
        (configured(model_type="gpt2"), "'gpt2' checkpoint, not one of imageprompt"),
        (configured(architectures=["ImagePromptModel"]), "what is shared is a ImagePromptForConditionalGeneration"),
        (without("processor_config.json", "tokenizer.json", "tokenizer_config.json"), "holds no processor"),
        (configured(image_token_id=3), "do not belong together: image_token_id"),
        (without("model.safetensors"), r"has no model.safetensors \(none\)"),
        (pickled, "only .*pytorch_model.bin, a pickle"),
        (cut, "model.safetensors is broken"),
        (sharded("model-00001-of-00002.safetensors"), "lacks model-00001-of-00002.safetensors"),
        (sharded("training_args.bin"), "names 'training_args.bin', no weight file"),
        (sharded("../model.safetensors"), "names '../model.safetensors', no weight file"),
        (without("connectors.py"), "lacks connectors.py"),
        (without("modeling.py"), "lacks modeling.py"),
        (with_card, "metadata of .*README.md cannot be read"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_refused_before_anything_is_sent(hub, run, change, said):
    change(run)
    asked = len(hub.requests)
    with pytest.raises(ValueError, match=said):
        push_folder(run, "ada/broken")
    assert len(hub.requests) == asked


@pytest.mark.parametrize("repo_id", ["ada/not a name", "a/b/c", "ada/..", ""])
def test_an_impossible_name_is_refused(hub, trained, repo_id):
    asked = len(hub.requests)
    with pytest.raises(ValueError, match=r"[Rr]epo"):
        push_folder(trained / "runs" / "captioner", repo_id)
    assert len(hub.requests) == asked


def test_who_may_not_write_is_told(hub, trained, tokenizer, monkeypatch):
    folder = trained / "runs" / "captioner"
    with pytest.raises(ValueError, match=r"The Hub does not accept this token for ada/mine: .*hf auth login"):
        push_folder(folder, "ada/mine", token="hf_wrong")
    with pytest.raises(ValueError, match=r"This token may not write to grace/hers: .*under grace"):
        push_folder(folder, "grace/hers")
    hub.add("grace/hers", {})
    with pytest.raises(ValueError, match="This token may not write to grace/hers"):
        push_folder(folder, "grace/hers")
    monkeypatch.delenv("HF_TOKEN")
    asked = len(hub.requests)
    model, processor = tiny(tokenizer, model_args=SMALL)
    for push in (model.push_to_hub, processor.push_to_hub, lambda name: push_folder(folder, name)):
        with pytest.raises(ValueError, match="You are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN"):
            push("ada/mine")
    assert len(hub.requests) == asked and "ada/mine" not in hub.repos
    Path(huggingface_hub.constants.HF_TOKEN_PATH).write_text("hf_ada")  # as `hf auth login` leaves it
    push_folder(folder, "mine")
    assert hub.files("ada/mine").keys() == MODEL_FILES


# --- the page


def test_every_block_of_the_page_runs(hub, trained, tokenizer, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    picture().save("photo.jpg")
    model, processor = tiny(tokenizer, model_args=SMALL)
    monkeypatch.setitem(TOKENS, "hf_ada", "you")  # as the page calls its reader
    page = (Path(__file__).parents[1] / "docs" / "share-your-model.md").read_text()
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    namespace = {"model": model, "processor": processor, "rows": rows()}
    for language, block in blocks:
        if language == "python":
            exec(compile(block, "share-your-model.md", "exec"), namespace)
            continue
        for command in re.findall(r"(?:[^\n\\]|\\\n)+", block):
            words = shlex.split(command.replace("\\\n", " "))
            if words[:2] == ["hf", "auth"]:  # the library's, which asks for a token
                continue
            if words[:2] == ["imageprompt", "train"]:
                train([*words[2:], "--use_cpu"])
            else:
                assert words[:2] == ["imageprompt", "push"]
                run_command(*words[1:])
    assert {language for language, _ in blocks} == {"sh", "python"}
    assert hub.files("you/captioner").keys() == MODEL_FILES | {"sample.jpg"}
    assert hub.files("you/more").keys() == hub.files("you/dog").keys() == MODEL_FILES
    assert "- data: `captions.csv` (a local one), split `train`" in hub.files("you/more")["README.md"].decode()
    assert hub.history("you/more")[1:] == ["Training in progress, step 2", "Model save"]
    assert "CIDEr" in hub.files("you/captioner")["README.md"].decode()
