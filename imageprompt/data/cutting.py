"""Parts of splits. Rows that show the same image stay together: on one side of a cut, or joined to one row."""

import hashlib
import random
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from datasets import Dataset, List, ReadInstruction, Value, concatenate_datasets
from transformers.utils import logging

if TYPE_CHECKING:
    from .sources import Source

logger = logging.get_logger(__name__)

_NAMES = (Value("string"), Value("large_string"))


def cut(source: "Source", splits: dict[str, Dataset], split: str) -> Dataset:
    """The rows of a split, or of parts of some, of which each counts images where several rows show the same.

    Args:
        splits: all that there are, their images undecoded.
        split: as of [`load`].

    Raises:
        ValueError: if there is no such split, it is empty, or no images are there by which rows could be joined.
    """
    if source.join_rows and not source.has_images:
        raise ValueError("Rows are joined by their images: leave out `--join_rows`, or name an `--image_column`.")
    chosen, together = dict(splits), {}
    for name, part in splits.items():
        if name in split:  # others are only there to be named in messages
            # Images inside the data set are long to read, and only compared where that decides something.
            compares = source.join_rows or "[" in split
            compared = compares or _is_named(part, source)
            chosen[name], together[name] = units(part, source) if compared else (part, None)
    sizes = {name: len(together.get(name) or part) for name, part in chosen.items()}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(sizes)
    except ValueError as error:
        raise ValueError(
            f"{source.dataset} has no split {split!r}; it has {', '.join(splits)}. A part of one is cut like "
            f'"{next(iter(splits))}[:80%]".'
        ) from error
    pieces = []
    for part in parts:
        numbers = list(range(sizes[part.splitname]))
        if source.shuffle_rows is not None:
            random.Random(source.shuffle_rows).shuffle(numbers)
        numbers = numbers[part.from_ : part.to]
        if (rows := together[part.splitname]) is not None:
            numbers = [row for number in numbers for row in rows[number]]
        pieces.append(chosen[part.splitname].select(numbers))
    dataset = concatenate_datasets(pieces)
    if len(dataset) == 0:
        raise ValueError(f"The split {split!r} of {source.dataset} is empty.")
    return dataset


def units(dataset: Dataset, source: "Source") -> tuple[Dataset, list[list[int]] | None]:
    """What parts of a split count.

    Returns:
        The data set, with rows joined if that is asked for, and its rows that stay together as they share images, in
        the order of the first of them; None if no two do.
    """
    images = images_of_rows(dataset, source)
    if not source.join_rows:
        together = _together(images)
        if together is not None and source.text_column is None:
            logger.warning_once(
                f"{source.dataset} shows {len(set().union(*images)):,} images in {len(dataset):,} rows: `--join_rows` "
                "makes one row of each, of whose texts training draws one and scoring uses all."
            )
        return dataset, together
    same = defaultdict(list)
    for row, own in enumerate(images):
        same[own or row].append(row)  # without images, a row is like no other
    if len(same) < len(dataset):
        dataset = _joined(dataset, list(same.values()), source)
        images = [images[rows[0]] for rows in same.values()]
    return dataset, _together(images)


def _is_named(dataset: Dataset, source: "Source") -> bool:
    feature = dataset.features.get(source.image_column)
    return (feature.feature if isinstance(feature, List) else feature) in _NAMES


def images_of_rows(dataset: Dataset, source: "Source") -> list[tuple[str, ...]]:
    """What each image of each row is known by: its file's name, or the SHA-256 of one that the data set holds."""
    if not source.has_images:
        return [()] * len(dataset)
    return [
        tuple(map(_identity, filter(None, values if isinstance(values, list) else [values])))
        for values in dataset[source.image_column]
    ]


def _identity(image: Any) -> str:
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    return hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else str(image)


def _together(images: list[tuple[str, ...]]) -> list[list[int]] | None:
    """The rows that share images, also by way of other rows."""
    leaders = list(range(len(images)))

    def leader(row: int) -> int:
        while leaders[row] != row:
            leaders[row] = row = leaders[leaders[row]]
        return row

    first: dict[str, int] = {}
    for row, own in enumerate(images):
        for image in own:
            leaders[leader(row)] = leader(first.setdefault(image, row))
    groups = defaultdict(list)
    for row in range(len(images)):
        groups[leader(row)].append(row)
    return list(groups.values()) if len(groups) < len(images) else None


def _joined(dataset: Dataset, groups: list[list[int]], source: "Source") -> Dataset:
    """One row for each group, with lists of its texts and, where there are some, of its prompts."""
    # Lists of captions become one, as do lists of prompts and suffixes; several suffixes of one prompt stay a list.
    flat = source.text_column is None or isinstance(dataset.features[source.text_column], List)
    joined = dataset.select([rows[0] for rows in groups]).select_columns([source.image_column])
    for column in filter(None, (source.text_column, source.suffix_column)):
        feature, values = dataset.features[column], dataset[column]
        texts = [[values[row] for row in rows] for rows in groups]
        if flat and isinstance(feature, List):
            feature, texts = feature.feature, [[text for own in lists for text in own or []] for lists in texts]
        joined = joined.add_column(column, texts, feature=List(feature))
    return joined
