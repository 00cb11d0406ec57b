"""Options of `imageprompt train`: which model, what learns, and how. Those of the data are in `data/arguments.py`."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import HfArgumentParser

from ..configuration import PARTS
from ..data.arguments import DataArguments
from ..options import as_words, spell_out_recipe
from .steady import SteadyTrainingArguments


@dataclass
class LanguageModelArguments:
    """A language model: one that is there, or a new one with its tokenizer."""

    text: str | None = field(default=None, metadata={"help": "Hub id or local folder of a language model."})
    text_config: dict | str | None = field(
        default=None, metadata={"help": 'A new GPT-2 instead, as JSON: \'{"n_layer": 4, "n_embd": 256, "n_head": 4}\'.'}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Hub id or local folder of the tokenizer; --text brings its own."}
    )
    new_tokenizer: int | None = field(
        default=None, metadata={"help": "Make a tokenizer of so many tokens from the training texts instead."}
    )


@dataclass
class ModelArguments(LanguageModelArguments):
    """Which model: a saved one (`--model`), or parts to compose (`--vision` and `--text` or `--text_config`)."""

    model: str | None = field(default=None, metadata={"help": "Saved imageprompt model to go on with."})
    vision: str | None = field(default=None, metadata={"help": "timm name, Hub id or local folder of the backbone."})
    pretrained: str | None = field(
        default=None,
        metadata={
            "help": "Load the weights of all parts (true, the default), of none (false), or of vision or text alone."
        },
    )
    connector: str | None = field(default=None, metadata={"help": "Connector between the parts; mlp by default."})
    connector_args: dict | str | None = field(default=None, metadata={"help": "What it takes, JSON: '{\"depth\": 2}'."})
    num_image_tokens: int | None = field(default=None, metadata={"help": "Tokens per image; the connector's default."})
    fusion: str | None = field(default=None, metadata={"help": "prefix (the default) or cross_attention."})
    feature_layer: str | None = field(
        default=None, metadata={"help": "Features of an earlier block (-2), several ([-2, -1]), pooled or tokens."}
    )
    image_size: int | None = field(default=None, metadata={"help": "Square input in pixels; the backbone's own."})
    crop_pct: float | None = field(default=None, metadata={"help": "Share of the resized image that is kept."})
    preprocessing: dict | str | None = field(
        default=None, metadata={"help": "Overrides of the backbone's, JSON: '{\"input_size\": [3, 160, 320]}'."}
    )
    model_args: dict | str | None = field(default=None, metadata={"help": "Further timm.create_model keywords, JSON."})


@dataclass
class LearningArguments:
    """What learns: whole parts, or small adapters (LoRA) in place of them; and what need not be computed again."""

    train_vision: bool | None = field(default=None, metadata={"help": "Whether the vision tower learns; as saved."})
    train_connector: bool | None = field(default=None, metadata={"help": "Whether the connector learns; as saved."})
    train_text: bool | None = field(default=None, metadata={"help": "Whether the language model learns; as saved."})
    lora: dict | str | None = field(
        default=None,
        metadata={
            "help": "Train LoRA adapters, and merge them at the end: fields of peft's LoraConfig, JSON: "
            '\'{"r": 16, "target_modules": ["c_attn"], "modules_to_save": ["connector"]}\'.'
        },
    )
    feature_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the features that a frozen vision tower gives the training images: they are computed "
            "once, for all epochs and runs."
        },
    )
    keep_zeros: bool = field(
        default=False, metadata={"help": "Weights of layers that are zero, as pruning leaves them, stay zero."}
    )


@dataclass
class PlanArguments:
    """Several trainings in one run: stages one after the other, or a search for the best options before training."""

    stages: str | None = field(
        default=None,
        metadata={
            "help": "JSON, or a JSON file, with a list of stages, each an object of options in place of the command's: "
            '\'[{"train_vision": false, "train_text": false, "learning_rate": 1e-3}, {"max_steps": 900}]\'.'
        },
    )
    search: str | None = field(
        default=None,
        metadata={
            "help": "JSON, or a JSON file, with options and what to try for each: a list of values, or a range: "
            '\'{"learning_rate": {"low": 1e-5, "high": 1e-3, "log": true}, "weight_decay": [0, 0.1]}\'.'
        },
    )
    trials: int = field(default=10, metadata={"help": "How many combinations --search tries."})


@dataclass
class ImagePromptTrainingArguments(SteadyTrainingArguments):
    """[`SteadyTrainingArguments`] with a learning rate for each part, and generated metrics.

    Args:
        vision_learning_rate, connector_learning_rate, text_learning_rate (`float`, *optional*):
            of the parts; `learning_rate` by default. Schedule and warm-up are the same for all.
        metric_task (`str`, *optional*):
            in every evaluation, answer rows and score the answers, as [`imageprompt.evaluation.generated_metrics`] does
            for `"caption"`, `"vqa"`, `"classify"` and its other tasks.
        metric (`str`, *optional*):
            the score that decides which checkpoint is the best: `metric_for_best_model`, checked before work starts.
        metric_samples (`int`): so many rows are answered, spread evenly over the evaluation rows.
        metric_max_new_tokens (`int`): longest answer, in tokens.
        metric_num_beams (`int`): beams of generation; 1 is greedy search.

    Raises:
        ValueError: for a metric without evaluations or without a task.
    """

    vision_learning_rate: float | None = field(default=None, metadata={"help": "Of the vision tower."})
    connector_learning_rate: float | None = field(default=None, metadata={"help": "Of the connector."})
    text_learning_rate: float | None = field(default=None, metadata={"help": "Of the language model."})
    metric_task: str | None = field(
        default=None, metadata={"help": "Score answers in evaluations: caption, vqa, classify, …"}
    )
    metric: str | None = field(
        default=None, metadata={"help": "The score that decides about the best checkpoint, such as CIDEr or accuracy."}
    )
    metric_samples: int = field(default=500, metadata={"help": "Evaluation rows that are answered at most."})
    metric_max_new_tokens: int = field(default=30, metadata={"help": "Longest answer in evaluations, in tokens."})
    metric_num_beams: int = field(default=1, metadata={"help": "Beams in evaluations; 1 is greedy search."})
    # The collator reads columns that the model does not name.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: rows have other columns."})
    # Every parameter that learns gets a gradient from every batch, also from one without images.
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Look for them; there are none."})

    @property
    def part_learning_rates(self) -> dict[str, float]:
        """The learning rate of each part."""
        own = {part: getattr(self, f"{part}_learning_rate") for part in PARTS}
        return {part: self.learning_rate if rate is None else rate for part, rate in own.items()}

    def __post_init__(self):
        if self.metric_task is not None:
            self._require_evaluations("metric_task")
            if self.metric_samples < 1:
                raise ValueError(f"--metric_samples is at least 1, got {self.metric_samples}.")
        if self.metric is not None:
            if self.metric_task is None:
                raise ValueError(f"--metric {self.metric} is a score of answers: say of what with --metric_task.")
            self.metric_for_best_model = self.metric_for_best_model or f"eval_{self.metric}"
        super().__post_init__()
        # Of a stream each process reads its share: batches made by one process for all are cut by their first
        # dimension, which is rows for the texts, but images for the pixels.
        self.accelerator_config.dispatch_batches = False


class Arguments(NamedTuple):
    """All options of one run."""

    model: ModelArguments
    data: DataArguments
    learning: LearningArguments
    plan: PlanArguments
    training: ImagePromptTrainingArguments


TYPES = tuple(Arguments.__annotations__.values())


def parse(argv: Sequence[str]) -> Arguments:
    """The options of a command line, which may begin with a recipe."""
    parser = HfArgumentParser(TYPES, description="Train or fine-tune on images and texts.", prog="imageprompt train")
    return Arguments(*parser.parse_args_into_dataclasses(spell_out_recipe(argv)))


def with_options(argv: Sequence[str], options: dict[str, Any]) -> list[str]:
    """The command line with other options in place of its own; an option counts as it stands last."""
    return [*argv, *as_words(options)]


def refuse_unknown(option: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise a ValueError that names the closest known one, if a name in a JSON option is not known."""
    known = sorted(known)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{option}: there is no option {name!r} to set.{hint}")
