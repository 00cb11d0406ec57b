"""Whether rows that are to be scored were learnt: by what `imageprompt train` has written beside the model."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, Image

from ..data.cutting import images_of_rows
from ..data.sources import Source, load

_IMAGE = Image(decode=False)  # as `load` leaves images


def find_learnt_rows(folder: Path, source: Source, split: str) -> str | None:
    """What the model was trained on, if rows of the split are among it.

    Rows are the same if they come from the same data set and show the same image; or, where one side has no images, if
    all else that both have is equal. Copies of rows in other files are not found.

    Args:
        folder: of the model, with the `training.json` of its training.
        source: the data to be scored.
        split: its split.
    """
    for training in learnt_data(folder):
        known = {each.name: training[each.name] for each in fields(Source) if each.name in training}
        known |= {"streaming": False, "join_rows": False}  # which rows they are is the same
        with suppress(ValueError):  # from a split or a column that is there no more
            asked = replace(source, join_rows=False)
            if _share_rows(asked, split, replace(source, **known), training["train_split"]):
                return f"{training['train_split']} of {training['dataset']} (shuffle_rows {training['shuffle_rows']})"
    return None


def learnt_data(folder: Path) -> list[dict[str, Any]]:
    """The data sets that the model in a folder has learnt, and those of the models that it started from."""
    file = folder / "training.json"
    record = json.loads(file.read_text()) if file.is_file() else {}
    return [*record.get("data", []), *record.get("base_data", [])]


def _share_rows(asked: Source, split: str, learnt: Source, train_split: str) -> bool:
    places = [_place(source) for source in (asked, learnt)]
    if places[0] == places[1] and asked.subset == learnt.subset:
        names, learnt_names = ({part.split("[")[0] for part in spec.split("+")} for spec in (split, train_split))
        if names.isdisjoint(learnt_names):
            return False
        if names & set(train_split.split("+")):  # which was learnt whole
            return True
    elif places[0] not in places[1].parents and places[1] not in places[0].parents:
        return False  # else a folder is named by one, and the table in it by the other
    rows, learnt_rows = load(asked, split), load(learnt, train_split)
    if asked.has_images and learnt.has_images:
        return not _images(rows, asked).isdisjoint(_images(learnt_rows, learnt))
    columns = [name for name, kind in rows.features.items() if name in learnt_rows.features and kind != _IMAGE]
    return not set(_lines(rows, columns)).isdisjoint(_lines(learnt_rows, columns))


def _place(source: Source) -> Path:
    path = Path(source.dataset or "").expanduser()
    return path.resolve() if path.exists() else path


def _images(rows: Dataset, source: Source) -> set[str]:
    """What each image is known by, wherever the data set is named from."""
    root = source.image_root.resolve()
    return {os.path.normpath(root / image) for own in images_of_rows(rows, source) for image in own}


def _lines(rows: Dataset, columns: list[str]) -> Iterator[str]:
    return (json.dumps(row, default=str) for row in rows.select_columns(columns))
