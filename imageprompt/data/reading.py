"""Data sets to rows: a local folder or Hub name in, `image`, `text` and `suffix` out.

Rows are made when they are read, so that captions are drawn and images augmented anew in every epoch.
"""

import random
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from torchvision.transforms import v2


def read_split(source: str, split: str) -> Dataset:
    """One split of a data set that `datasets` can load: a local folder or a Hub name.

    Raises:
        ValueError: if there is no such folder or split; what is there is named.
    """
    looks_local = source.startswith((".", "/", "~"))
    source = str(Path(source).expanduser()) if looks_local else source
    if looks_local and not Path(source).exists():
        raise ValueError(f"There is no data set at {source}.")
    splits = load_dataset(source)
    if split not in splits:
        raise ValueError(f"{source} has no split {split!r}; it has {', '.join(splits)}.")
    return splits[split]


def require_columns(dataset: Dataset, *columns: str) -> None:
    """Raise a ValueError that names the columns found, if one of `columns` is missing."""
    for column in columns:
        if column not in dataset.column_names:
            raise ValueError(f"The data set has no column {column!r}; it has {', '.join(dataset.column_names)}.")


def as_rows(
    dataset: Dataset,
    *,
    image_column: str = "image",
    suffix_column: str = "suffix",
    text_column: str | None = None,
    prompt: str = "",
    augment: Callable[[Any], Any] | None = None,
    draw: bool = True,
) -> Dataset:
    """The data set as rows for [`ImagePromptCollator`].

    Args:
        dataset: with the columns named.
        image_column: images.
        suffix_column: the text to learn, or a list of texts.
        text_column: a prompt for each row, for example a question.
        prompt: one prompt for all rows, where there is no `text_column`.
        augment: applied to every image, PIL to PIL.
        draw: of a list of texts, draw one whenever the row is read, or always take the first, for evaluation.

    Raises:
        ValueError: if a column is missing; the columns found are named.
    """
    require_columns(dataset, image_column, suffix_column, *([text_column] if text_column else []))

    def rows(batch: dict[str, list]) -> dict[str, list]:
        images = batch[image_column]
        texts = batch[text_column] if text_column else [prompt] * len(images)
        choose = random.choice if draw else itemgetter(0)
        suffixes = [s if isinstance(s, str) else choose(s) for s in batch[suffix_column]]
        return {
            "image": [augment(image.convert("RGB")) for image in images] if augment else images,
            "text": texts,
            "suffix": [separate(text, suffix) for text, suffix in zip(texts, suffixes, strict=True)],
        }

    return dataset.with_transform(rows)


def separate(text: str, suffix: str) -> str:
    """The suffix with a space in front where the words would otherwise run together."""
    return suffix if not text or text[-1].isspace() or suffix[:1].isspace() else f" {suffix}"


def augmentation(image_size: tuple[int, int]) -> Callable[[Any], Any]:
    """Random crops of at least half the picture, mirrored at random, at (height, width) pixels."""
    return v2.Compose([v2.RandomResizedCrop(image_size, scale=(0.5, 1.0), antialias=True), v2.RandomHorizontalFlip()])
