"""`train`, as a user calls it: from parts, from a saved model, under accelerate, and with mistakes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import TINY_TEXT, options
from conftest import make_photos, max_difference, picture
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForImageTextToText, AutoProcessor

from imageprompt import ImagePromptForConditionalGeneration
from imageprompt.options import as_words
from imageprompt.training import building
from imageprompt.training import train as training
from imageprompt.training.train import main

ROOT = Path(__file__).parents[2]


def test_trains_evaluates_and_saves_all_that_loading_needs(folders, tmp_path):
    main(
        options(
            folders,
            tmp_path / "run",
            "--train_vision",
            "false",
            "--eval_strategy",
            "steps",
            "--eval_steps",
            "1",
            "--augment",
        )
    )
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run")
    AutoProcessor.from_pretrained(tmp_path / "run").check_model(model)
    assert model.config.trainable == {"vision": False, "connector": True, "text": True}
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert any("eval_loss" in entry for entry in state["log_history"])
    assert json.loads((tmp_path / "run" / "train_results.json").read_text())["train_loss"] > 0
    # A checkpoint is a whole model: the processor is in it.
    AutoProcessor.from_pretrained(tmp_path / "run" / "checkpoint-2").check_model(model)


def test_goes_on_from_a_saved_model_and_resumes_a_run(folders, tmp_path):
    main(options(folders, tmp_path / "first"))
    data = ["--dataset", str(folders[0]), "--suffix_column", "captions", "--use_cpu"]
    second = ["--model", str(tmp_path / "first"), *data, "--output_dir", str(tmp_path / "second")]
    main([*second, "--max_steps", "4"])
    main([*second, "--max_steps", "6", "--resume_from_checkpoint", str(tmp_path / "second" / "checkpoint-4")])
    assert json.loads((tmp_path / "second" / "trainer_state.json").read_text())["global_step"] == 6


@pytest.mark.parametrize("more", [[], ["--search", '{"learning_rate": [1e-4]}']], ids=["train", "search"])
def test_an_earlier_run_is_not_trained_over(folders, tmp_path, monkeypatch, more):
    main(options(folders, tmp_path / "run"))
    monkeypatch.setattr(training, "build_model", lambda *_: pytest.fail("built"))
    with pytest.raises(ValueError, match=r"run/checkpoint-2 is of an earlier run: .*--resume_from_checkpoint true"):
        main(options(folders, tmp_path / "run", *more))


def test_a_new_tokenizer_needs_data_with_an_end(folders, tmp_path):
    data = {"dataset": str(folders[0]), "suffix_column": "captions", "streaming": True}
    (tmp_path / "mixture.json").write_text(json.dumps([data]))
    parts = ["--vision", "test_resnet", "--text_config", TINY_TEXT, "--new_tokenizer", "300", "--pretrained", "false"]
    parts += ["--max_steps", "2", "--use_cpu", "--output_dir", str(tmp_path / "run")]
    for streamed in (["--mixture", str(tmp_path / "mixture.json")], as_words(data)):
        with pytest.raises(ValueError, match=r"--new_tokenizer .* needs data with an end, .* pass --tokenizer"):
            main([*parts, *streamed])
    assert not (tmp_path / "run").exists()


def test_a_frozen_part_of_a_saved_model_stays_frozen(folders, tmp_path):
    main(options(folders, tmp_path / "first", "--train_vision", "false"))
    again = ["--model", str(tmp_path / "first"), "--dataset", str(folders[0]), "--suffix_column", "captions"]
    again += ["--use_cpu", "--max_steps", "1"]
    main([*again, "--output_dir", str(tmp_path / "second"), "--train_text", "false"])
    trainable = AutoModelForImageTextToText.from_pretrained(tmp_path / "second").config.trainable
    assert trainable == {"vision": False, "connector": True, "text": False}
    with pytest.raises(ValueError, match="composed already: leave out --connector, --image_size"):
        main([*again, "--output_dir", str(tmp_path / "third"), "--connector", "pool", "--image_size", "64"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--suffix_column", "caption"], "no column 'caption'; it has image, captions"),
        (["--connector", "mpl"], "Unknown connector 'mpl'"),
        (["--vision", "resnet19"], "resnet18"),
        (["--train_split", "tran"], "no split 'tran'; it has"),
        (["--text", "gpt2"], "one of --text and --text_config"),
    ],
)
def test_mistakes_stop_before_anything_is_written(folders, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        main(options(folders, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


EVERY_STEP = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
METRIC = ["--metric_task", "caption", "--metric", "CIDEr", "--metric_max_new_tokens", "5", "--metric_samples", "4"]


def history(folder) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_scores_decide_and_are_shown_in_tensorboard_and_in_a_picture(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    more = [*METRIC, "--load_best_model_at_end", "--early_stopping_patience", "1", "--save_total_limit", "1"]
    lengths = ["--train_sampling_strategy", "group_by_length"]
    run = tmp_path / "run"
    main(options(folders, run, *EVERY_STEP, *more, *lengths, "--report_to", "tensorboard", "--max_steps", "4"))
    scores = {entry["step"]: entry["eval_CIDEr"] for entry in history(run) if "eval_CIDEr" in entry}
    assert len(scores) >= 2
    best = max(scores, key=lambda step: (scores[step], -step))
    (kept,) = run.glob("checkpoint-*")
    assert int(kept.name.partition("-")[2]) in (best, max(scores))
    board = EventAccumulator(str(next((tmp_path / "board").rglob("events*")).parent))
    board.Reload()
    shown = {event.step: event.value for event in board.Scalars("eval/CIDEr")}
    assert shown == pytest.approx(scores, abs=1e-6)
    assert (run / "curves.png").stat().st_size > 10_000


def test_a_resumed_run_draws_its_whole_history(folders, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("imageprompt.training.steady.save_curves", lambda log, path: drawn.append((log, path)))
    main(options(folders, tmp_path / "run", *EVERY_STEP))
    more = ["--max_steps", "4", "--logging_steps", "1", "--resume_from_checkpoint", "true"]
    main(options(folders, tmp_path / "run", *EVERY_STEP, *more))
    (_, first), (log, path) = drawn
    assert first == path == tmp_path / "run" / "curves.png"
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [1, 2, 3, 4]


def launch(*arguments: str) -> str:
    """The output of the script in two processes, as one: accelerate's own launcher starts a single one on a CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*command, str(ROOT / "scripts" / "train.py"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_two_processes_share_the_rows(folders, tmp_path):
    """Of eight rows, two processes with two rows in a batch need two steps for a pass."""
    rows = ["--num_train_epochs", "1", "--max_steps", "-1", "--per_device_train_batch_size", "2"]
    assert launch(*options(folders, tmp_path / "run", *rows)).count("Saved to") == 1
    AutoModelForImageTextToText.from_pretrained(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 2


@pytest.mark.slow
def test_two_processes_go_through_stages_adapters_and_a_search(folders, tmp_path):
    """Three runs of two processes: about two minutes."""
    stages = [{"train_vision": False, "train_text": False}, {"lora": {"target_modules": ["c_attn"]}, "max_steps": 3}]
    staged = options(folders, tmp_path / "run", "--stages", json.dumps(stages), *EVERY_STEP, *METRIC)
    assert launch(*staged).count("Saved to") == 1
    AutoModelForImageTextToText.from_pretrained(tmp_path / "run")
    assert [entry["step"] for entry in history(tmp_path / "run" / "stage-2") if "eval_CIDEr" in entry] == [1, 2, 3]
    (tmp_path / "run" / "stage-2" / "train_results.json").unlink()
    shutil.rmtree(tmp_path / "run" / "stage-2" / "checkpoint-3")
    launch(*staged, "--resume_from_checkpoint", "true")
    assert [entry["step"] for entry in history(tmp_path / "run" / "stage-2") if "eval_CIDEr" in entry] == [1, 2, 3]

    space = json.dumps({"learning_rate": [1e-4, 1e-3, 1e-2]})
    launch(*options(folders, tmp_path / "searched", "--search", space, "--trials", "2"))
    found = json.loads((tmp_path / "searched" / "search.json").read_text())
    args = torch.load(tmp_path / "searched" / "training_args.bin", weights_only=False)
    assert len(found["trials"]) == 2 and args.learning_rate == found["best"]["learning_rate"]


@pytest.mark.parametrize("more", [["--bf16"], ["--activation_checkpointing"], ["--bf16", "--activation_checkpointing"]])
def test_less_memory(folders, tmp_path, monkeypatch, more):
    """That bfloat16 and checkpointing are really on, not only accepted."""
    seen = set()

    def look(layer, inputs, output):
        model = ImagePromptForConditionalGeneration.seen
        seen.add((output.dtype, model.is_activation_checkpointing))

    real = building.build_model

    def build(args, texts):
        model, processor = real(args, texts)
        ImagePromptForConditionalGeneration.seen = model
        model.model.connector.linear_1.register_forward_hook(look)
        return model, processor

    monkeypatch.setattr("imageprompt.training.train.build_model", build)
    monkeypatch.setattr(ImagePromptForConditionalGeneration, "seen", None, raising=False)
    main(options(folders, tmp_path / "run", *more))
    dtype = torch.bfloat16 if "--bf16" in more else torch.float32
    assert seen == {(dtype, "--activation_checkpointing" in more)}
    assert history(tmp_path / "run")[0]["loss"] == pytest.approx(6.0, abs=0.3)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert {value.dtype for value in saved.values() if value.is_floating_point()} == {torch.float32}


def test_a_compiled_model_learns_and_is_saved_as_a_plain_one(folders, tmp_path):
    compiled = ["--torch_compile", "--torch_compile_backend", "aot_eager"]
    for name, more in {"plain": [], "compiled": compiled}.items():
        main(options(folders, tmp_path / name, *EVERY_STEP, *METRIC, *more))
    plain, compiled = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, atol=1e-4, rtol=0)
    losses = [[e["loss"] for e in history(tmp_path / name) if "loss" in e] for name in ("plain", "compiled")]
    assert losses[0] and losses[0] == pytest.approx(losses[1], abs=1e-3)
    torch.compiler.reset()  # other tests in this process compile the same forward pass


LORA = ["--lora", '{"r": 4, "target_modules": ["c_attn", "c_fc"]}', "--learning_rate", "1e-2"]


def test_lora_ends_in_a_plain_model_and_an_adapter(folders, tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    main(options(folders, base))
    data = ["--dataset", str(folders[0]), "--suffix_column", "captions", "--use_cpu", "--model", str(base)]
    more = [*EVERY_STEP, "--load_best_model_at_end", "--max_steps", "2", "--bf16", "--activation_checkpointing"]
    main([*data, *LORA, *more, "--output_dir", str(run)])
    model = AutoModelForImageTextToText.from_pretrained(run)
    processor = AutoProcessor.from_pretrained(run)
    processor.check_model(model)
    assert type(model) is ImagePromptForConditionalGeneration
    assert model.config.trainable == {"vision": True, "connector": True, "text": True}
    plain = AutoModelForImageTextToText.from_pretrained(base)
    inputs = processor(images=picture(1), text="A", return_tensors="pt")
    with torch.no_grad():
        before = plain(**inputs).logits
        adapted = PeftModel.from_pretrained(plain, run / "adapter")(**inputs).logits
        assert max_difference(model(**inputs).logits, adapted) <= 1e-4
        assert max_difference(adapted, before) > 1e-3
    assert not (run / "checkpoint-2" / "model.safetensors").exists()  # checkpoints hold the adapter alone
    main([*data, *LORA, *more, "--max_steps", "3", "--resume_from_checkpoint", "true", "--output_dir", str(run)])
    assert [entry["step"] for entry in history(run) if "eval_loss" in entry] == [1, 2, 3]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([*LORA, "--train_text", "false"], "--lora says what learns: leave out --train_text"),
        (["--lora", "[1]"], "--lora is a JSON object"),
        (["--train_vision", "0", "--train_connector", "0", "--train_text", "0"], "Every part is frozen"),
        (["--train_vision", "0", "--vision_learning_rate", "1e-3"], "nothing of the part 'vision' learns"),
        (["--fp16"], "--fp16 needs a GPU"),
        ([*METRIC, "--eval_strategy", "epoch", "--metric", "cider"], "has no score 'cider'; it has BLEU-1"),
        (["--resume_from_checkpoint", "true"], "No whole checkpoint in .* to resume from: there is none"),
        (["--metric", "CIDEr", "--eval_strategy", "epoch"], "say of what with --metric_task"),
    ],
)
def test_mistakes_in_how_to_train_stop_before_the_first_step(folders, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        main(options(folders, tmp_path / "run", *more))
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_the_script_stays_short():
    assert len((ROOT / "imageprompt" / "training" / "train.py").read_text().splitlines()) < 150


def test_a_recipe_with_a_tokenizer_made_of_the_training_texts(folders, tmp_path):
    recipe = {"vision": "resnet10t", "text_config": {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64}}
    recipe |= {"new_tokenizer": 300, "pretrained": False, "image_size": 32, "dataset": str(folders[0])}
    recipe |= {"suffix_column": "captions", "max_steps": 1, "use_cpu": True, "output_dir": str(tmp_path / "run")}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    main([str(tmp_path / "recipe.json")])
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    assert processor.tokenizer.tokenize("A dog!") != list("A dog!") and len(processor.tokenizer) < 300
    config = AutoModelForImageTextToText.from_pretrained(tmp_path / "run").config
    assert config.vocab_size == len(processor.tokenizer)
    with pytest.raises(ValueError, match="--new_tokenizer is for a new language model"):
        main([str(tmp_path / "recipe.json"), "--tokenizer", str(folders[1]), "--output_dir", str(tmp_path / "other")])


def test_broken_rows_are_left_out_named_and_recorded(folders, tokenizer, tmp_path, capsys):
    make_photos(tmp_path / "photos", 6)
    (tmp_path / "photos" / "03.png").write_bytes(b"no image")
    data = ["--dataset", str(tmp_path / "photos" / "captions.csv"), "--image_column", "file"]
    main([*options(folders, tmp_path / "run"), *data, "--suffix_column", "caption"])
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    assert record["broken_rows"] == [f"Row 3 of {tmp_path}/photos/captions.csv (03.png)"]
    (source,) = record["data"]
    assert (source["dataset"], source["shuffle_rows"], source["train_split"]) == (data[1], None, "train")
    assert record["metrics"]["train_loss"] > 0 and "torch" in record["versions"]
    (source,) = record["data"]
    assert source["dataset"] == data[1] and source["train_split"] == "train" and not source["on_hub"]
    assert record["rows"] == 6 and record["options"]["seed"] == 42
    assert record["learns"] == {"vision": True, "connector": True, "text": True} and record["lora"] is None
    assert "Left out: Row 3 of" in capsys.readouterr().out
    with pytest.raises(ValueError, match="1 broken rows of 6; the last: Row 3 of"):
        main([*options(folders, tmp_path / "strict"), *data, "--suffix_column", "caption", "--max_broken_rows", "0"])


def test_a_resumed_run_knows_the_rows_that_were_broken(folders, tmp_path):
    """A row stays left out, although its image is mended before the run goes on."""
    make_photos(tmp_path / "photos", 6)
    whole = (tmp_path / "photos" / "03.png").read_bytes()
    (tmp_path / "photos" / "03.png").write_bytes(b"no image")
    data = ["--dataset", str(tmp_path / "photos" / "captions.csv"), "--image_column", "file"]
    steps = ["--save_steps", "2", "--per_device_train_batch_size", "3"]
    arguments = [*options(folders, tmp_path / "run"), *data, "--suffix_column", "caption", *steps]
    main(arguments)
    (tmp_path / "photos" / "03.png").write_bytes(whole)
    main([*arguments, "--max_steps", "4", "--resume_from_checkpoint", "true"])
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    assert record["broken_rows"] == [f"Row 3 of {tmp_path}/photos/captions.csv (03.png)"]


def test_a_wrong_column_is_met_before_a_backbone_is_looked_for(folders, tmp_path):
    with pytest.raises(ValueError, match="no column 'captoin'"):
        main(options(folders, tmp_path / "run", "--vision", "no_such_net", "--suffix_column", "captoin"))


def test_training_with_a_cache_gives_the_same_model(folders, tmp_path):
    frozen = ["--train_vision", "false", "--connector", "pool", "--max_steps", "4", "--seed", "3"]
    cached = ["--feature_cache", str(tmp_path / "cache")]
    main(options(folders, tmp_path / "plain", *frozen))
    main(options(folders, tmp_path / "cached", *frozen, *cached, "--dataloader_num_workers", "1"))
    plain, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "cached"))
    assert max(max_difference(plain[name], other[name]) for name in plain) <= 1e-5
    about = json.loads((tmp_path / "cache" / "about.json").read_text())
    assert about["backbone"] == "test_resnet" and len((tmp_path / "cache" / "images.txt").read_text().split()) == 8
