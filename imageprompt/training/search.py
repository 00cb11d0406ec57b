"""Search for the best options of training, with the library's search and optuna, before the training itself.

Each trial trains a fresh model, in the folder `search/` of the run, and writes no checkpoint. It counts by its last
evaluation, or, where the best checkpoint will be kept, by its best one.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from ..configuration import PARTS
from ..data import ImagePromptCollator
from ..data.arguments import training_texts
from ..options import json_or_file
from ..processing import ImagePromptProcessor
from ..provenance import provenance
from .arguments import Arguments, ImagePromptTrainingArguments, parse, refuse_unknown, with_options
from .building import build_model
from .running import TrainingRows, choose_what_learns, learning_callbacks
from .trainer import ImagePromptTrainer, refuse_rates_of_frozen_parts

if TYPE_CHECKING:
    import optuna

# What a trial can set: the trainer reads these when training starts. It is built once for all trials, so that others,
# as early_stopping_patience, hold for all of them; and others again say how trials are compared.
_OPTIONS = {"learning_rate", *(f"{part}_learning_rate" for part in PARTS), "lr_scheduler_type", "warmup_steps"}
_OPTIONS |= {"optim", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm"}
_OPTIONS |= {"per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy"}
_OPTIONS |= {"num_train_epochs", "max_steps"}
_RANGE = {"low", "high", "log", "step"}


def read_space(argv: Sequence[str], text: str) -> dict[str, Any]:
    """What to try: for each option a list of values, or a range as an object with `low`, `high`, `log` and `step`.

    Args:
        argv: the command line; every value is tried on it.
        text: JSON, or the name of a file with it.

    Raises:
        ValueError: for options or ranges that do not exist.
    """
    space = json_or_file("--search", text)
    if not isinstance(space, dict) or not space:
        raise ValueError(f"--search is an object such as '{{\"learning_rate\": [1e-4, 1e-3]}}', got {space!r:.200}.")
    refuse_unknown("--search", space, {field.name for field in fields(ImagePromptTrainingArguments)})
    for name, tried in space.items():
        if name not in _OPTIONS:
            raise ValueError(
                f"--search: {name} is the same in all trials; what can be tried is {', '.join(sorted(_OPTIONS))}."
            )
        if isinstance(tried, dict):
            if not {"low", "high"} <= tried.keys() <= _RANGE:
                raise ValueError(
                    f"--search: the range of {name} has low, high and, if wanted, log or step; got {tried}."
                )
            values = [tried["low"], tried["high"]]
            if not values[0] < values[1] or (tried.get("log") and values[0] <= 0):
                raise ValueError(f"--search: low is less than high, and with log more than 0; {name} has {tried}.")
        elif isinstance(tried, list) and tried:
            values = tried
        else:
            raise ValueError(f"--search: {name} needs a list of values or a range, got {tried!r}.")
        for value in values:
            parse(with_options(argv, {name: value}))
    return space


def suggest(space: dict[str, Any]) -> Callable[["optuna.Trial"], dict[str, Any]]:
    """A function that draws a trial's options from the space."""

    def draw(trial: "optuna.Trial") -> dict[str, Any]:
        return {name: _draw(trial, name, tried) for name, tried in space.items()}

    return draw


def _draw(trial: "optuna.Trial", name: str, tried: Any) -> Any:
    if isinstance(tried, list):
        return trial.suggest_categorical(name, tried)
    whole = all(isinstance(tried[bound], int) for bound in ("low", "high"))
    return trial.suggest_int(name, **tried) if whole else trial.suggest_float(name, **tried)


def search(
    argv: Sequence[str], options: Arguments, processor: ImagePromptProcessor, rows: TrainingRows
) -> dict[str, Any]:
    """The best options of `options.plan.trials` trials, which are written to `search.json`.

    A resumed run takes those that it found before.

    Raises:
        ValueError: see [`read_space`]; and if there are no rows to evaluate on, or no trial came to its end.
    """
    import optuna

    space = read_space(argv, options.plan.search)
    folder = Path(options.training.output_dir)
    found = folder / "search.json"
    if options.training.resume_from_checkpoint and found.is_file():
        return json.loads(found.read_text())["best"]
    if rows.evaluation is None:
        raise ValueError("--search compares evaluations: name rows to evaluate on with --eval_split.")
    keeps_best = options.training.load_best_model_at_end
    metric = f"eval_{(options.training.metric_for_best_model or 'loss').removeprefix('eval_')}"
    own = {"output_dir": str(folder / "search"), "save_strategy": "no", "load_best_model_at_end": False}
    args = parse(with_options(argv, own | {"report_to": "none", "metric_for_best_model": metric})).training
    better = max if args.greater_is_better else min

    def objective(metrics: dict[str, float]) -> float:
        best = trainer.state.best_metric if keeps_best else None
        return metrics[metric] if best is None else better(best, metrics[metric])

    def build():
        return build_model(options.model, training_texts(options.data))

    trainer = ImagePromptTrainer(
        None,
        args,
        model_init=lambda: choose_what_learns(build()[0], options.learning),
        train_dataset=rows.train,
        eval_dataset=rows.evaluation,
        data_collator=ImagePromptCollator(processor, options.data.max_length, options.data.pack_length),
        processing_class=processor,
        callbacks=learning_callbacks(options.learning),
    )
    first = {name: tried[0] if isinstance(tried, list) else tried["low"] for name, tried in space.items()}
    refuse_rates_of_frozen_parts(trainer.model, parse(with_options(argv, first)).training)
    storage = optuna.storages.InMemoryStorage()
    direction = "maximize" if better is max else "minimize"
    try:
        trainer.hyperparameter_search(
            suggest(space),
            objective,
            options.plan.trials,
            direction,
            "optuna",
            storage=storage,
            study_name="search",
            sampler=optuna.samplers.TPESampler(seed=args.seed),
            catch=(FloatingPointError,),  # a learning rate that is too high is an answer too
        )
    except ValueError as error:
        if "No trials are completed" not in str(error):
            raise
        raise ValueError(
            f"--search: none of {options.plan.trials} trials came to its end; narrow the ranges."
        ) from error
    best: list[Any] = [None]
    if args.process_index == 0:
        study = optuna.load_study(study_name="search", storage=storage)
        best = [study.best_params]
        facts = {"metric": metric, "direction": direction, "best": study.best_params, "seed": args.seed, "space": space}
        facts["trials"] = [_record(trial) for trial in study.get_trials()]
        folder.mkdir(parents=True, exist_ok=True)
        found.write_text(json.dumps(facts | provenance(), indent=2) + "\n")
    return broadcast_object_list(best)[0]


def _record(trial: "optuna.trial.FrozenTrial") -> dict[str, Any]:
    seconds = None if trial.duration is None else round(trial.duration.total_seconds(), 1)
    return {"options": trial.params, "value": trial.value, "state": trial.state.name.lower(), "seconds": seconds}
