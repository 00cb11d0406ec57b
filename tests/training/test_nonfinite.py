"""A loss that is not finite stops training, and what caused it can be loaded and looked at."""

import json

import pytest
import torch
from conftest import tiny
from safetensors import safe_open
from safetensors.torch import load_file
from trainers import eight_rows, trainer_of

from imageprompt import ImagePromptCollator
from imageprompt.cli import main


def break_row(processor, index):
    """A collator that spoils the pixels of the batch which holds a certain row."""
    collator = ImagePromptCollator(processor)

    def collate(rows):
        batch = collator(rows)
        for place, row in enumerate(rows):
            if row["suffix"] == eight_rows()[index]["suffix"]:
                batch["pixel_values"][place, 0, 0, 0] = float("nan")
        return batch

    return collate


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_step_is_named_and_its_batch_saved(tokenizer, tmp_path, accumulation):
    model, processor = tiny(tokenizer)
    settings = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": accumulation, "max_steps": 4}
    trainer = trainer_of(tokenizer, tmp_path, model=(model, processor), per_device_train_batch_size=2, **settings)
    trainer.data_collator = break_row(processor, 5)
    step = {1: 3, 2: 2}[accumulation]
    message = rf"The loss of step {step} is nan. In the batch, pixel_values hold values .* saved to .*step-{step}\.safe"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    assert trainer.state.global_step == step - 1
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        facts = opened.metadata()
    assert (facts["step"], facts["loss"]) == (str(step), "nan")
    assert json.loads(facts["texts"]) == [f"<image>A photo of{row['suffix']}<|endoftext|>" for row in eight_rows()[4:6]]
    batch = load_file(file)
    assert model(**batch).loss.isnan()
    batch["pixel_values"].nan_to_num_(0)
    assert model(**batch).loss.isfinite()


def test_weights_that_broke_before_are_named(tokenizer, tmp_path):
    model, processor = tiny(tokenizer)
    with torch.no_grad():
        model.model.connector.linear_1.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"1 weights are not finite any more, model.connector.linear_1.weight"):
        trainer_of(tokenizer, tmp_path, model=(model, processor)).train()


def test_values_that_overflow_on_the_way_are_told_from_bad_data(tokenizer, tmp_path):
    model, processor = tiny(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    with pytest.raises(FloatingPointError, match="Batch and weights are finite, so values overflow on the way"):
        trainer_of(tokenizer, tmp_path, model=(model, processor)).train()


def test_the_device_is_looked_at_once_a_step(tokenizer, tmp_path, monkeypatch):
    """The library's own filter looks twice; with it off, ours is the only look."""
    looks = []
    trainer = trainer_of(tokenizer, tmp_path, max_steps=2, max_grad_norm=0.0)
    assert trainer.args.logging_nan_inf_filter is False
    monkeypatch.setattr(torch, "isfinite", lambda value, real=torch.isfinite: looks.append(value) or real(value))
    for name in ("isnan", "isinf"):
        monkeypatch.setattr(torch, name, lambda value: pytest.fail("looked at by the library too"))
    trainer.train()
    assert len(looks) == 2


def test_the_command_prints_it_as_an_error(monkeypatch, capsys):
    def stop(argv):
        raise FloatingPointError("The loss of step 3 is nan.")

    monkeypatch.setattr("imageprompt.training.train.main", stop)
    monkeypatch.setattr("sys.argv", ["imageprompt", "train"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "Error: The loss of step 3 is nan." in capsys.readouterr().err
