"""Whether rows that are to be scored were learnt: by what `imageprompt train` has written beside the model."""

import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import ReadInstruction

from ..data.sources import Source, load


def find_learnt_rows(folder: Path, source: Source, split: str) -> str | None:
    """What the model was trained on, if rows of the split are among it.

    Rows are the same if they come from the same data set, and from parts of one of its splits that overlap, or that
    were cut after another shuffling. Copies of rows in other files are not found.

    Args:
        folder: of the model, with the `training.json` of its training.
        source: the data to be scored.
        split: its split.
    """
    record = folder / "training.json"
    trainings = json.loads(record.read_text()).get("data", []) if record.is_file() else []
    for training in trainings:
        same = (_place(training["dataset"]), training["subset"]) == (_place(source.dataset), source.subset)
        with suppress(ValueError):  # from a split that is there no more
            if same and _overlap(source, split, training):
                return f"{training['train_split']} of {training['dataset']} (shuffle_rows {training['shuffle_rows']})"
    return None


def _place(dataset: str | None) -> str:
    path = Path(dataset or "").expanduser()
    return str(path.resolve() if path.exists() else dataset)


def _overlap(source: Source, split: str, training: dict[str, Any]) -> bool:
    names = set(re.split(r"\[[^]]*\]|\+", split + "+" + training["train_split"])) - {""}
    # Sizes need no order of rows: a split is as large however it is shuffled.
    sizes = {name: len(load(replace(source, shuffle_rows=None), name)) for name in names}
    asked, learnt = (ReadInstruction.from_spec(spec).to_absolute(sizes) for spec in (split, training["train_split"]))
    return any(
        mine.splitname == other.splitname
        and (source.shuffle_rows != training["shuffle_rows"] or max(mine.from_, other.from_) < min(mine.to, other.to))
        for mine in asked
        for other in learnt
    )
