"""Stages, one after the other: what each sets, what is skipped when a run is resumed, and what is refused."""

import json
import shutil

import pytest
import torch
from commands import options
from transformers import AutoModelForImageTextToText, AutoProcessor

from imageprompt.training.train import main

CONNECTOR = {"name": "connector", "train_vision": False, "train_text": False, "learning_rate": 1e-2, "max_steps": 2}
ALL = {"max_steps": 3, "vision_learning_rate": 0.0, "text_learning_rate": 1e-3}
SCORED = {"metric_task": "caption"}
EVALUATES = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]


def staged(folders, output, stages, *more):
    return options(folders, output, "--stages", json.dumps(stages), *EVALUATES, *more)


def weights(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return model.config.trainable, model.state_dict()


def moved(before, after):
    """The parts whose parameters differ."""
    names = {name for name, value in before.items() if not torch.equal(value, after[name])}
    names = {name for name in names if "running_" not in name and "num_batches" not in name}
    return {name.removeprefix("model.").partition(".")[0] for name in names}


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    output = tmp_path_factory.mktemp("stages") / "run"
    main(staged(folders, output, [CONNECTOR, ALL]))
    return output


def test_each_stage_trains_what_it_says_and_starts_from_the_one_before(folders, run, tmp_path):
    main(options(folders, tmp_path / "none", "--learning_rate", "0", "--max_steps", "1"))
    _, start = weights(tmp_path / "none")
    first_choice, first = weights(run / "stage-1-connector")
    last_choice, last = weights(run / "stage-2")
    assert first_choice == {"vision": False, "connector": True, "text": False}
    assert last_choice == {"vision": True, "connector": True, "text": True}
    assert moved(start, first) == {"connector"}
    assert moved(first, last) == {"connector", "language_model", "lm_head"}
    for name in ("stage-1-connector", "stage-2"):
        state = json.loads((run / name / "trainer_state.json").read_text())
        assert state["global_step"] == {"stage-1-connector": 2, "stage-2": 3}[name]
        assert (run / name / "curves.png").stat().st_size > 5_000


def test_the_runs_folder_holds_the_last_model_and_the_curves_of_all_stages(run):
    choice, final = weights(run)
    last_choice, last = weights(run / "stage-2")
    assert choice == last_choice and all(torch.equal(value, last[name]) for name, value in final.items())
    AutoProcessor.from_pretrained(run).check_model(AutoModelForImageTextToText.from_pretrained(run))
    assert (run / "curves.png").stat().st_size > (run / "stage-2" / "curves.png").stat().st_size / 2
    assert json.loads((run / "training.json").read_text())["data"][0]["suffix_column"] == "captions"
    assert not (run / "half-written").exists() and not (run / "trainer_state.json").exists()


def test_a_resumed_run_skips_what_is_finished_and_goes_on_where_it_was(folders, run, tmp_path, capsys):
    broken = shutil.copytree(run, tmp_path / "run")
    (broken / "stage-2" / "train_results.json").unlink()
    shutil.rmtree(broken / "stage-2" / "checkpoint-3")
    untouched = (broken / "stage-1-connector" / "model.safetensors").stat().st_mtime_ns
    main(staged(folders, broken, [CONNECTOR, ALL], "--resume_from_checkpoint", "true"))
    assert (broken / "stage-1-connector" / "model.safetensors").stat().st_mtime_ns == untouched
    _, expected = weights(run)
    _, final = weights(broken)
    assert all(
        (value - expected[name]).abs().max() <= 1e-6 for name, value in final.items() if value.is_floating_point()
    )
    state = json.loads((broken / "stage-2" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [1, 2, 3]
    # A stage that was not reached starts from the beginning.
    shutil.rmtree(broken / "stage-2")
    main(staged(folders, broken, [CONNECTOR, ALL], "--resume_from_checkpoint", "true"))
    assert (broken / "stage-2" / "train_results.json").exists()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            [CONNECTOR | {"learning_rat": 1}],
            "--stages: there is no option 'learning_rat' to set. Did you mean 'learning_rate'",
        ),
        ([CONNECTOR | {"output_dir": "x"}], "there is no option 'output_dir' to set"),
        ([CONNECTOR | {"image_size": 64}], "there is no option 'image_size' to set"),
        ([], "--stages is a list of objects"),
        ({"max_steps": 1}, "--stages is a list of objects"),
        ([{"name": "a/b"}], "the name 'a/b' cannot be part"),
        ([ALL, CONNECTOR | {"vision_learning_rate": 1e-4}], "nothing of the part 'vision' learns"),
        ([ALL, {"train_vision": False, "train_text": False, "train_connector": False}], "Every part is frozen"),
        ([ALL, {"lora": {"target_modules": ["q_proj"]}}], "target_modules has 'q_proj'"),
        ([ALL, {"lora": {"target_modules": ["lm_head"]}}], "lm_head shares its weights"),
        ([ALL, SCORED | {"metric": "Cider"}], "The task 'caption' has no score 'Cider'; it has BLEU-1"),
    ],
)
def test_mistakes_in_any_stage_stop_before_the_first_starts(folders, tmp_path, stages, message):
    with pytest.raises(ValueError, match=message):
        main(staged(folders, tmp_path / "run", stages))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stages", "more", "message"),
    [
        ([CONNECTOR, ALL], [], "stage-1-connector is there already: go on with --resume_from_checkpoint true"),
        (
            [CONNECTOR | {"max_steps": 9}, ALL],
            ["--resume_from_checkpoint", "true"],
            "was trained with .*'max_steps': 2.*9",
        ),
        ([CONNECTOR, ALL], ["--resume_from_checkpoint", "x"], "With --stages, --resume_from_checkpoint is true"),
        ([CONNECTOR, ALL], ["--search", '{"learning_rate": [1, 2]}'], "--stages or --search, not both"),
    ],
)
def test_a_folder_with_stages_is_neither_overwritten_nor_mixed_up(folders, run, stages, more, message):
    with pytest.raises(ValueError, match=message):
        main(staged(folders, run, stages, *more))


def test_nothing_to_resume_is_said(folders, tmp_path):
    with pytest.raises(ValueError, match=r"No whole checkpoint in .*stage-1-connector to resume from: there is none"):
        main(staged(folders, tmp_path / "run", [CONNECTOR], "--resume_from_checkpoint", "true"))


def test_a_stage_with_a_tower_that_learns_has_no_feature_cache(folders, tmp_path):
    stages = [CONNECTOR | {"feature_cache": str(tmp_path / "cache")}, {"train_vision": True, "max_steps": 2}]
    main(staged(folders, tmp_path / "run", stages))
    (_, before), (_, after) = (weights(tmp_path / "run" / name) for name in ("stage-1-connector", "stage-2"))
    assert "vision_tower" in moved(before, after)
    stages[1]["feature_cache"] = str(tmp_path / "cache")
    with pytest.raises(ValueError, match="pass `--train_vision false`"):
        main(staged(folders, tmp_path / "other", stages))
    assert not (tmp_path / "other" / "stage-1-connector").exists()
