"""The search for options: what is tried, what is written down, and that the best is what is trained."""

import json

import pytest
import torch
from commands import TINY_TEXT, options
from conftest import make_photos

from imageprompt.training import search as searching
from imageprompt.training.search import read_space
from imageprompt.training.train import main

SPACE = {"learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}, "per_device_train_batch_size": [2, 4]}
SPACE |= {"warmup_steps": {"low": 0, "high": 1}}


def searched(folders, output, space, *more):
    return options(folders, output, "--search", json.dumps(space), *more)


def test_every_trial_is_written_down_and_the_best_is_trained(folders, tmp_path):
    more = ["--trials", "3", "--seed", "5", "--report_to", "none"]
    main(searched(folders, tmp_path / "run", SPACE, *more))
    found = json.loads((tmp_path / "run" / "search.json").read_text())
    assert (found["metric"], found["direction"], found["seed"], found["space"]) == ("eval_loss", "minimize", 5, SPACE)
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 3
    best = min(found["trials"], key=lambda trial: trial["value"])
    assert best["options"] == found["best"]
    for trial in found["trials"]:
        tried = trial["options"]
        assert 1e-4 <= tried["learning_rate"] <= 1e-1 and tried["per_device_train_batch_size"] in (2, 4)
        assert tried["warmup_steps"] in (0, 1) and isinstance(tried["warmup_steps"], int)
    assert len({trial["options"]["learning_rate"] for trial in found["trials"]}) == 3
    args = torch.load(tmp_path / "run" / "training_args.bin", weights_only=False)
    assert {name: getattr(args, name) for name in found["best"]} == found["best"]
    assert (args.output_dir, args.seed) == (str(tmp_path / "run"), 5)
    assert not list((tmp_path / "run" / "search").glob("**/*.safetensors"))

    # The trial counts as what it says: the same training alone gives the same loss, but for the captions drawn.
    tried, *others = found["trials"]
    own = [f"--{name}={value}" for name, value in tried["options"].items()]
    main(options(folders, tmp_path / "alone", *own, "--eval_strategy", "steps", "--eval_steps", "2", "--seed", "5"))
    state = json.loads((tmp_path / "alone" / "trainer_state.json").read_text())
    (loss,) = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert abs(loss - tried["value"]) < 0.1 * min(abs(loss - other["value"]) for other in others)

    # A resumed run does not search again.
    (tmp_path / "run" / "search.json").write_text(json.dumps(found | {"best": {"learning_rate": 0.0}}))
    main(searched(folders, tmp_path / "run", SPACE, *more, "--resume_from_checkpoint", "true", "--max_steps", "3"))
    args = torch.load(tmp_path / "run" / "training_args.bin", weights_only=False)
    assert args.learning_rate == 0.0


def scripted(monkeypatch, scores):
    scores = iter(scores)
    monkeypatch.setattr("imageprompt.training.trainer.check_metric", lambda *_: None)
    monkeypatch.setattr("imageprompt.training.trainer.score_answers", lambda *_: {"CIDEr": next(scores)})


METRIC = ["--metric_task", "caption", "--metric", "CIDEr", "--eval_strategy", "steps", "--eval_steps", "1"]
METRIC += ["--trials", "2"]


@pytest.mark.parametrize(
    ("more", "values", "best"),
    [([], [0.2, 0.4], 1), (["--load_best_model_at_end", "--save_steps", "1"], [0.9, 0.4], 0)],
    ids=["last evaluation", "best evaluation"],
)
def test_the_direction_follows_the_metric(folders, tmp_path, monkeypatch, more, values, best):
    scripted(monkeypatch, [0.9, 0.2, 0.3, 0.4, 0.5, 0.6])
    main(searched(folders, tmp_path / "run", {"learning_rate": {"low": 0.0, "high": 1e-3}}, *METRIC, *more))
    found = json.loads((tmp_path / "run" / "search.json").read_text())
    assert (found["metric"], found["direction"]) == ("eval_CIDEr", "maximize")
    assert [trial["value"] for trial in found["trials"]] == values
    assert found["best"] == found["trials"][best]["options"]


def test_patience_begins_anew_in_every_trial(folders, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.5, 0.4, 0.5, 0.6, 0.7, 0.5, 0.6, 0.7])
    more = ["--early_stopping_patience", "1", "--max_steps", "3"]
    main(searched(folders, tmp_path / "run", {"learning_rate": [0.0, 1e-3]}, *METRIC, *more))
    found = json.loads((tmp_path / "run" / "search.json").read_text())
    assert [trial["value"] for trial in found["trials"]] == [0.4, 0.7]


def test_a_trial_whose_loss_is_not_finite_counts_as_failed(folders, tmp_path):
    space = {"learning_rate": [1e-3], "weight_decay": [0.0, 1e30]}
    main(searched(folders, tmp_path / "run", space, "--trials", "4", "--max_steps", "4", "--optim", "sgd"))
    found = json.loads((tmp_path / "run" / "search.json").read_text())
    states = {(trial["options"]["weight_decay"], trial["state"]) for trial in found["trials"]}
    assert states == {(0.0, "complete"), (1e30, "fail")}
    with pytest.raises(ValueError, match="none of 1 trials came to its end; narrow the ranges"):
        broken = {"weight_decay": [1e30]}
        main(searched(folders, tmp_path / "broken", broken, "--trials", "1", "--max_steps", "4", "--optim", "sgd"))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"learning_rat": [1]}, "--search: there is no option 'learning_rat' to set. Did you mean 'learning_rate'"),
        ({"image_size": [32, 64]}, "there is no option 'image_size'"),
        ({"early_stopping_patience": [1, 2]}, "early_stopping_patience is the same in all trials; .* adam_beta1"),
        ({"label_smoothing_factor": [0.0, 0.1]}, "label_smoothing_factor is the same in all trials"),
        ({"bf16": [True, False]}, "bf16 is the same in all trials"),
        ({"output_dir": ["a", "b"]}, "output_dir is the same in all trials"),
        ({}, "--search is an object"),
        ([1], "--search is an object"),
        ({"learning_rate": []}, "learning_rate needs a list of values or a range"),
        ({"learning_rate": 1e-3}, "learning_rate needs a list of values or a range"),
        ({"learning_rate": {"low": 1}}, "the range of learning_rate has low, high"),
        ({"learning_rate": {"low": 1, "high": 2, "lag": True}}, "the range of learning_rate has low, high"),
        ({"learning_rate": {"low": 2, "high": 1}}, "low is less than high"),
        ({"learning_rate": {"low": 0, "high": 1, "log": True}}, "with log more than 0"),
    ],
)
def test_spaces_that_mean_nothing_are_refused(folders, tmp_path, space, message):
    with pytest.raises(ValueError, match=message):
        main(searched(folders, tmp_path / "run", space))
    assert not (tmp_path / "run").exists()


def test_values_of_the_wrong_type_are_refused_as_on_the_command_line(folders, tmp_path, capsys):
    with pytest.raises(SystemExit):
        read_space(options(folders, tmp_path), '{"learning_rate": ["fast"]}')
    assert "argument --learning_rate/--learning-rate: invalid float value: 'fast'" in capsys.readouterr().err


def test_a_search_needs_rows_to_compare_on(folders, tmp_path):
    with pytest.raises(ValueError, match="no split 'test'"):
        main(searched(folders, tmp_path / "run", SPACE, "--eval_split", "test"))


def test_no_trial_trains_on_rows_that_see_each_other(folders, tmp_path):
    more = ["--pack_length", "64", "--fusion", "cross_attention"]
    with pytest.raises(ValueError, match="Rows in one line would see each other's images"):
        main(searched(folders, tmp_path / "run", SPACE, *more))
    assert not (tmp_path / "run").exists()


def test_a_rate_of_a_part_that_does_not_learn_is_not_searched(folders, tmp_path):
    space = {"vision_learning_rate": [1e-4, 1e-3]}
    with pytest.raises(ValueError, match="--vision_learning_rate is given, but nothing of the part 'vision' learns"):
        main(searched(folders, tmp_path / "run", space, "--train_vision", "false"))
    assert not (tmp_path / "run" / "search.json").exists()


def test_every_option_that_can_be_searched_counts_in_a_trial(folders, tmp_path):
    """The training with what was found ends with the loss of its trial."""
    photos = make_photos(tmp_path / "photos", 16) / "captions.csv"
    data = ["--dataset", str(photos), "--image_column", "file", "--suffix_column", "caption", "--eval_split", "train"]
    still = json.dumps(json.loads(TINY_TEXT) | {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0})
    data += ["--text_config", still, "--eval_strategy", "epoch", "--save_strategy", "no", "--max_steps", "-1"]
    tried: dict[str, object] = {"learning_rate": 1e-2, "vision_learning_rate": 2e-3, "connector_learning_rate": 3e-3}
    tried |= {"text_learning_rate": 4e-3, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1}
    tried |= {"optim": "adafactor", "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-3, "weight_decay": 0.3}
    tried |= {"max_grad_norm": 0.1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    tried |= {"train_sampling_strategy": "sequential", "num_train_epochs": 2, "max_steps": 3}
    assert tried.keys() == searching._OPTIONS

    def losses(name, *without):
        space = {option: [value] for option, value in tried.items() if option not in without}
        main(searched(folders, tmp_path / name, space, "--trials", "1", *data))
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        (trial,) = json.loads((tmp_path / name / "search.json").read_text())["trials"]
        last = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry][-1]
        assert trial["value"] == pytest.approx(last, rel=1e-6)
        return state["global_step"]

    assert losses("adafactor", "num_train_epochs", "max_steps", "adam_beta1", "adam_beta2", "adam_epsilon") == 9
    assert losses("adam", "num_train_epochs", "optim") == 3
    assert losses("epochs", "max_steps", "optim") == 6
