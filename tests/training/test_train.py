"""`train`, as a user calls it: from parts, from a saved model, under accelerate, and with mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import options
from transformers import AutoModelForImageTextToText, AutoProcessor

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


def test_two_processes_under_accelerate_launch(folders, tmp_path):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    run = subprocess.run(
        [*launch, str(ROOT / "scripts" / "train.py"), *options(folders, tmp_path / "run")],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("Saved to") == 1
    AutoModelForImageTextToText.from_pretrained(tmp_path / "run")


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
        main([str(tmp_path / "recipe.json"), "--tokenizer", str(folders[1])])
