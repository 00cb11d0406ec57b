"""Scores of generated answers in the midst of training: by how well the model answers, not by its loss."""

import copy
from collections.abc import Sequence

from accelerate.utils import gather_object

from ..data.rows import BrokenRow, Rows
from ..evaluation.tasks import Record, Settings, Task, answer_rows, answered, make_task
from ..modeling import ImagePromptForConditionalGeneration
from ..processing import ImagePromptProcessor
from .arguments import ImagePromptTrainingArguments


def score_answers(
    model: ImagePromptForConditionalGeneration,
    processor: ImagePromptProcessor,
    rows: Rows,
    args: ImagePromptTrainingArguments,
) -> dict[str, float]:
    """The scores of the task that `args` name, on at most `args.metric_samples` rows, evenly spread.

    Each process answers its share of the rows; all score all answers, and so return the same.
    """
    task = _task(processor, rows, args)
    rank, count = args.process_index, args.world_size
    own = range(rank, len(task.rows), count)
    records = _answer(_part(task, own), model, processor, args) if own else []
    records = [record | {"row": own[record["row"]]} for record in records]
    if count > 1:
        records = sorted(gather_object(records), key=lambda record: record["row"])
    return task.score(answered(records))["scores"]


def check_metric(
    model: ImagePromptForConditionalGeneration,
    processor: ImagePromptProcessor,
    rows: Rows | dict[str, Rows],
    args: ImagePromptTrainingArguments,
) -> None:
    """Answer and score a row of each data set, if answers are to be scored, so that what could not work in the first
    evaluation stops the run before it starts.

    Raises:
        ValueError: if the rows do not fit the task, or it has no score of the name asked for; those it has are named.
    """
    if args.metric_task is not None:
        for own in rows.values() if isinstance(rows, dict) else [rows]:
            _check_metric(model, processor, own, args)


def _check_metric(
    model: ImagePromptForConditionalGeneration,
    processor: ImagePromptProcessor,
    rows: Rows,
    args: ImagePromptTrainingArguments,
) -> None:
    if not isinstance(rows, Rows):
        raise ValueError(f"--metric_task answers rows of read_rows, not a {type(rows).__name__}.")
    task = _task(processor, rows, args)
    first = next((index for index in range(len(task.rows)) if _is_readable(task.rows, index)), None)
    if first is None:
        raise ValueError(f"None of {len(task.rows)} rows of {rows.source.dataset} can be read, to be answered.")
    scores = task.score(answered(_answer(_part(task, [first]), model, processor, args)))["scores"]
    if args.metric is not None and args.metric not in scores:
        raise ValueError(f"The task {task.name!r} has no score {args.metric!r}; it has {', '.join(scores)}.")


def _task(processor: ImagePromptProcessor, rows: Rows, args: ImagePromptTrainingArguments) -> Task:
    count = min(len(rows), args.metric_samples)
    chosen = rows.select([index * len(rows) // count for index in range(count)])
    settings = Settings(max_new_tokens=args.metric_max_new_tokens, num_beams=args.metric_num_beams)
    return make_task(args.metric_task, chosen, processor, settings)


def _part(task: Task, indices: Sequence[int]) -> Task:
    """The task with some of its rows; its labels and candidate texts stay those of all rows."""
    part = copy.copy(task)
    part.rows, part.texts = task.rows.select(indices), [task.texts[index] for index in indices]
    return part


def _is_readable(rows: Rows, index: int) -> bool:
    try:
        rows[index]
    except BrokenRow:
        return False
    return True


def _answer(
    task: Task,
    model: ImagePromptForConditionalGeneration,
    processor: ImagePromptProcessor,
    args: ImagePromptTrainingArguments,
) -> list[Record]:
    progress = not args.disable_tqdm and args.local_process_index == 0
    batches = answer_rows(task, model, processor, batch_size=args.per_device_eval_batch_size, progress=progress)
    return [record for batch in batches for record in batch]
