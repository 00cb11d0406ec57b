"""Stages: several trainings one after the other, as data, such as the connector first and then all parts.

A stage is an object of options that stand in place of those of the command, and may have a `name`. It starts from the
model that the stage before has saved, and from the command's choice of what learns. Its folder is `stage-1`, or
`stage-1-<name>`; in the end the run's own folder holds the last stage's model.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from transformers.trainer import TRAINER_STATE_NAME

from ..data.feature_cache import check_cacheable
from ..diagnosis.memory import build_on_meta
from ..modeling import ImagePromptForConditionalGeneration
from ..options import json_or_file
from ..processing import ImagePromptProcessor
from .arguments import (
    Arguments,
    ImagePromptTrainingArguments,
    LearningArguments,
    parse,
    refuse_unknown,
    with_options,
)
from .building import load_model
from .checkpoints import find_checkpoint, list_checkpoints, move_model, what_lacks, whole_or_nothing
from .curves import read_curves, save_curves
from .running import TrainingRows, choose_what_learns, run_training
from .scoring import check_metric
from .trainer import refuse_rates_of_frozen_parts

_OF_TRAINING = {"stage.json", "curves.png", "training_args.bin", TRAINER_STATE_NAME}
_OF_TRAINING |= {"train_results.json", "all_results.json"}
_OWN = {"output_dir", "resume_from_checkpoint"}
_OPTIONS = {field.name for kind in (ImagePromptTrainingArguments, LearningArguments) for field in fields(kind)} - _OWN


class Stage(NamedTuple):
    """A stage: its folder, what it sets, and all options that hold in it."""

    folder: Path
    settings: dict[str, Any]
    options: Arguments

    @property
    def record(self) -> Path:
        return self.folder / "stage.json"

    @property
    def is_finished(self) -> bool:
        return (self.folder / "train_results.json").is_file()  # which is written last


def read_stages(argv: Sequence[str], options: Arguments) -> list[Stage]:
    """The stages that the options name.

    Args:
        argv: the command line.
        options: what it says.

    Raises:
        ValueError: if they are no list of objects, or set what no stage can set.
    """
    given = json_or_file("--stages", options.plan.stages)
    if not isinstance(given, list) or not given or not all(isinstance(stage, dict) for stage in given):
        raise ValueError(
            f"--stages is a list of objects, such as '[{{\"train_text\": false}}, {{}}]', got {given!r:.200}."
        )
    stages = []
    for number, settings in enumerate(given, start=1):
        refuse_unknown("--stages", settings, _OPTIONS | {"name"})
        name = str(settings.get("name", ""))
        if "/" in name:
            raise ValueError(f"--stages: the name {name!r} cannot be part of a folder's.")
        folder = Path(options.training.output_dir) / (f"stage-{number}-{name}" if name else f"stage-{number}")
        own = {key: value for key, value in settings.items() if key != "name"}
        stages.append(Stage(folder, settings, parse(with_options(argv, own | {"output_dir": str(folder)}))))
    return stages


def check_stages(
    stages: Sequence[Stage],
    model: ImagePromptForConditionalGeneration,
    processor: ImagePromptProcessor,
    rows: TrainingRows,
    resumes: str | None,
) -> None:
    """Refuse what could not be trained in a later stage, before the first one starts.

    Args:
        stages: as [`read_stages`] gives them.
        model, processor: those that the first stage starts from.
        rows: those that all stages train on.
        resumes: the option `--resume_from_checkpoint`.

    Raises:
        ValueError: for options that do not go together, a folder that holds other stages, or nothing to resume.
    """
    for stage in stages:
        tried = build_on_meta(model.config)  # of the model's shape, without its weights
        refuse_rates_of_frozen_parts(choose_what_learns(tried, stage.options.learning), stage.options.training)
        if stage.options.learning.feature_cache is not None:
            check_cacheable(tried, rows.train)
        check_metric(model, processor, rows.evaluation, stage.options.training)
        if stage.record.is_file() and (before := json.loads(stage.record.read_text())) != stage.settings:
            raise ValueError(f"{stage.folder} was trained with {before}, now --stages says {stage.settings}.")
    first = next((stage for stage in stages if not stage.is_finished), None)
    if resumes is None:
        if there := [stage.folder for stage in stages if stage.folder.exists()]:
            raise ValueError(
                f"{there[0]} is there already: go on with --resume_from_checkpoint true, or name another --output_dir."
            )
    elif resumes.lower() != "true":
        raise ValueError("With --stages, --resume_from_checkpoint is true: the stages know where they were.")
    elif first is stages[0]:
        find_checkpoint(first.folder, True)
    PartialState().wait_for_everyone()  # before one process makes what another would find


def run_stages(
    stages: Sequence[Stage],
    model: ImagePromptForConditionalGeneration,
    processor: ImagePromptProcessor,
    rows: TrainingRows,
    output_dir: Path,
) -> None:
    """Run the stages that are not finished, and save the last one's model to `output_dir`."""
    trainable, is_main = dict(model.config.trainable), PartialState().is_main_process
    finished = [stage.is_finished for stage in stages]
    for number, stage in enumerate(stages):
        if finished[number]:
            continue
        if number > 0:
            model, processor = load_model(str(stages[number - 1].folder))
            model.set_trainable(**trainable)
        is_broken_off = any(what_lacks(folder) is None for folder in list_checkpoints(stage.folder))
        stage.options.training.resume_from_checkpoint = "true" if is_broken_off else None
        if is_main:
            stage.folder.mkdir(parents=True, exist_ok=True)
            stage.record.write_text(json.dumps(stage.settings))
        run_training(model, processor, rows, stage.options)
    if is_main:
        _copy_model(stages[-1].folder, output_dir)
        _join_curves(stages, output_dir)
    PartialState().wait_for_everyone()


def _copy_model(folder: Path, output_dir: Path) -> None:
    """The model of the last stage and what it came from, without what else is told of its training."""
    half = output_dir / "half-written"
    with whole_or_nothing(half, "The model", folder):
        half.mkdir(exist_ok=True)
        for file in folder.iterdir():
            if file.is_file() and file.name not in _OF_TRAINING:
                shutil.copyfile(file, half / file.name)
    move_model(half, output_dir)


def _join_curves(stages: Sequence[Stage], output_dir: Path) -> None:
    """The curves of all stages in one picture, their steps counted on."""
    history: list[dict[str, Any]] = []
    begins: list[int] = []
    passed = 0
    for stage in stages:
        state = json.loads((stage.folder / TRAINER_STATE_NAME).read_text())
        begins.append(passed)
        history += [entry | {"step": entry["step"] + passed} for entry in state["log_history"]]
        passed += state["global_step"]
    if read_curves(history):
        save_curves(history, output_dir / "curves.png", stages=begins[1:])
