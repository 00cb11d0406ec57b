"""Rows for the collator: `image`, `text` (the prompt) and `suffix` (the text to learn), made when they are read.

So captions are drawn and images augmented anew in every epoch, and a broken row is met when its turn comes: it is
named, counted and left out, until there are too many of them.
"""

import copy
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset, List
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers.utils import logging

from ..image_processing import ImageFeatures, open_image, to_mode
from .sources import Source, load
from .texts import all_texts, class_names_of, draw_texts

logger = logging.get_logger(__name__)

Augmentation = Callable[[Any], Any]


class BrokenRow(ValueError):
    """A row that cannot be used: its image cannot be read, or a text is missing."""


class Draws:
    """What is random about rows.

    It is another at every reading, until an epoch is set: then it depends on the seed, the epoch and the row alone, so
    that it is the same in any data loading process, and in a resumed run.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._epoch = torch.full((), -1).share_memory_()  # data loading processes that live on see it change

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    @contextmanager
    def of(self, index: int) -> Iterator[None]:
        """Draw, within this context, for a row."""
        if self._epoch < 0:
            yield
            return
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # augmentation uses all of them
        digest = hashlib.sha256(repr((self.seed, int(self._epoch), index)).encode()).digest()
        seed = int.from_bytes(digest[:4], "little")
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


class Rows(TorchDataset):
    """The rows of a data set that is not a stream.

    `rows[i]` is a dictionary with `text`, `suffix` and, where there are images, `image` or `images`. A row whose
    prompts and suffixes are both lists becomes one row for each pair, unless several texts of an image come together.

    Args:
        dataset: as [`load`] returns it.
        source: which columns are what.
        augment: applied to every image, PIL to PIL.
        draw: of several suffixes, draw one whenever the row is read, or always take the first, for evaluation.
        texts_per_image: if more than one, draw so many of a row's texts, or all that it has: `text` and `suffix` are
            lists then, and the model encodes the image once for all of them.
        max_broken: so many broken rows are left out in training; one more stops it.
        seed: of what is drawn once an epoch is set; see [`Draws`].
    """

    def __init__(
        self,
        dataset: Dataset,
        source: Source,
        *,
        augment: Augmentation | None = None,
        draw: bool = True,
        texts_per_image: int = 1,
        max_broken: int = 100,
        seed: int = 0,
    ):
        self.source, self.augment, self.draw, self.max_broken = source, augment, draw, max_broken
        self.texts_per_image = check_texts_per_image(texts_per_image)
        self.class_names = class_names_of(dataset, source)
        self._images = dataset.select_columns([source.image_column]) if source.has_images else None
        # Asked once: the library copies all features whenever it is asked for them.
        self._in_lists = source.has_images and isinstance(dataset.features[source.image_column], List)
        self._texts = dataset.select_columns(list(filter(None, {source.text_column, source.suffix_column})))
        self._pairs = self._list_pairs(dataset)
        # A byte per row, in memory that data loading processes share: a row counts once, however often it is read.
        self._broken = torch.zeros(len(self), dtype=torch.uint8).share_memory_()
        self._draws = Draws(seed)
        self._features: Callable[[int], list[ImageFeatures]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """From now on, draw as in this epoch."""
        self._draws.set_epoch(epoch)

    def _list_pairs(self, dataset: Dataset) -> list[tuple[int, int]] | None:
        """(row, number of the pair) of every pair, if prompts are lists."""
        column = self.source.text_column
        if self.texts_per_image > 1 or column is None or not isinstance(dataset.features[column], List):
            return None
        prompts = self._texts[column]
        return [(row, number) for row, texts in enumerate(prompts) for number in range(len(texts or [None]))]

    def select(self, indices: Sequence[int]) -> "Rows":
        """The rows with these numbers alone."""
        chosen = copy.copy(self)
        chosen._pairs = [self._locate(index) for index in indices]
        chosen._broken = self._broken[list(indices)].share_memory_()
        return chosen

    def __len__(self) -> int:
        return len(self._texts) if self._pairs is None else len(self._pairs)

    def _locate(self, index: int) -> tuple[int, int | None]:
        return (index, None) if self._pairs is None else self._pairs[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row.

        Raises:
            BrokenRow: naming it, if its image cannot be read or a text is missing.
        """
        with self._draws.of(index):
            if self.texts_per_image > 1:
                return draw_texts(self.all_texts(index), self.texts_per_image) | self._read_images(index)
            text, suffixes = self.texts(index)
            row = {"text": text, "suffix": random.choice(suffixes) if self.draw else suffixes[0]}
            return row | self._read_images(index)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of a batch, without the broken ones; if all are broken, the next readable row."""
        rows = [row for index in indices if (row := self._unless_broken(index)) is not None]
        following = indices[-1]
        while not rows:
            following = (following + 1) % len(self)
            if (row := self._unless_broken(following)) is not None:
                rows.append(row)
        return rows

    def _unless_broken(self, index: int) -> dict[str, Any] | None:
        if self._broken[index]:
            return None
        try:
            return self[index]
        except BrokenRow as error:
            self._broken[index] = 1
            stop_if_too_many(int(self._broken.sum()), self.max_broken, len(self), error)
            return None

    @property
    def left_out(self) -> list[int]:
        """The numbers of the broken rows that were met so far."""
        return self._broken.nonzero().flatten().tolist()

    def leave_out(self, indices: Sequence[int]) -> None:
        """Take rows with these numbers for broken, as another process or an earlier run found them."""
        self._broken[list(indices)] = 1

    @property
    def broken(self) -> list[str]:
        """The names of the broken rows that were met so far."""
        return [self.name(index) for index in self.left_out]

    def texts(self, index: int) -> tuple[str, list[str]]:
        """The prompt and all suffixes of a row; no image is read.

        Raises:
            BrokenRow: if one is missing.
        """
        with _naming(lambda: self.name(index)):
            (texts,) = self.all_texts(index)
        return texts

    def all_texts(self, index: int) -> list[tuple[str, list[str]]]:
        """Every prompt of a row with its suffixes: more than one only where several texts of an image come together.

        Raises:
            BrokenRow: if one is missing.
        """
        row, number = self._locate(index)
        with _naming(lambda: self.name(index)):
            return all_texts(self._texts[row], self.source, self.class_names, number)

    def count_images(self, index: int) -> int:
        """How many images a row has."""
        if self._images is None:
            return 0
        if not self._in_lists:
            return 1
        return len(self._images[self._locate(index)[0]][self.source.image_column])

    def _read_images(self, index: int) -> dict[str, Any]:
        if self._images is None:
            return {}
        row, _ = self._locate(index)
        with _naming(lambda: self.name(index)):
            if self._features is not None:
                return {"images": self._features(row)}
            value = self._images[row][self.source.image_column]
            return _images(value, self.source.image_root, self.augment)

    def image_digests(self) -> list[list[str]]:
        """SHA-256 of the file of every image of every row of the data set; reads them all."""
        if self._images is None:
            return [[] for _ in range(len(self._texts))]
        root = self.source.image_root
        return [
            [hashlib.sha256(_content(value, root)).hexdigest() for value in _as_list(values)]
            for values in self._images[self.source.image_column]
        ]

    def read_image(self, row: int, number: int) -> Any:
        """An image of a row of the data set, as it is stored.

        Raises:
            OSError, ValueError: if it cannot be read.
        """
        value = _as_list(self._images[row][self.source.image_column])[number]
        return open_image(_file_or_bytes(value, self.source.image_root))

    def use_features(self, features: Callable[[int], list[ImageFeatures]] | None) -> None:
        """From now on, give features in the place of images; `None`: images again.

        Args:
            features: those of all images of a row of the data set; a ValueError if one is not there.
        """
        self._features = features

    def lengths(self) -> list[int]:
        """Characters of prompt and longest suffix of every row, for batches of rows of like length."""
        lengths = []
        for index in range(len(self)):
            try:
                texts = self.all_texts(index)
            except BrokenRow:
                texts = [("", [""])]
            lengths.append(max(len(text) + len(suffix) for text, suffixes in texts for suffix in suffixes))
        return lengths

    def name(self, index: int) -> str:
        """What to call a row in messages: its number and, where it has one, its file."""
        row, number = self._locate(index)
        return self._row_name(row) + ("" if number is None else f", prompt {number}")

    def _row_name(self, row: int) -> str:
        value = self._images[row][self.source.image_column] if self._images is not None else None
        file = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
        return f"Row {row} of {self.source.dataset}" + (f" ({file:.200})" if file else "")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that the rows hold: prompts, suffixes and the images' files; reads them all."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            try:
                digest.update(repr(self.texts(index)).encode())
            except BrokenRow as error:
                digest.update(repr(error).encode())
        for values in self._images[self.source.image_column] if self._images is not None else []:
            for value in _as_list(values):
                digest.update(_content(value, self.source.image_root))
        return digest.hexdigest()


class Mixture(TorchDataset):
    """Rows of several sources in one data set, each with its share.

    A pass over the mixture has as many rows as the sources have together. A source that is to give more rows than it
    has gives some again; one that is to give fewer gives others each time. Each source counts its own broken rows.

    Args:
        parts: the sources' rows, by name.
        weights: the share of each, in any unit; by default each row counts the same.
        seed: of what is drawn once an epoch is set; see [`Draws`].

    Raises:
        ValueError: if there is nothing to mix, or a weight is not positive.
    """

    def __init__(self, parts: dict[str, Rows], weights: Sequence[float] | None = None, seed: int = 0):
        if not parts:
            raise ValueError("A mixture needs at least one source.")
        self.parts = parts
        sizes = [len(rows) for rows in parts.values()]
        shares = check_weights(weights, list(parts)) or sizes
        self.counts = [max(1, round(sum(sizes) * share / sum(shares))) for share in shares]
        self._ends = list(accumulate(self.counts))
        self._draws = Draws(seed)

    def set_epoch(self, epoch: int) -> None:
        """From now on, draw as in this epoch, for each place: a row that comes twice in a pass is drawn for twice."""
        self._draws.set_epoch(epoch)

    def __len__(self) -> int:
        return self._ends[-1]

    def _locate(self, index: int) -> tuple[Rows, int]:
        for rows, count, end in zip(self.parts.values(), self.counts, self._ends, strict=True):
            if index < end:
                place = index - (end - count)
                # Of more rows than places, each place has its own to choose from: none comes twice in a pass.
                choices = range(place, len(rows), count) if count < len(rows) else [place % len(rows)]
                return rows, random.choice(choices)
        raise IndexError(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self._draws.of(index):
            rows, place = self._locate(index)
            return rows[place]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of a batch, without the broken ones."""
        batch = []
        for index in indices:
            with self._draws.of(index):
                rows, place = self._locate(index)
                row = rows._unless_broken(place)
            batch += [] if row is None else [row]
        return batch or self._locate(indices[-1])[0].__getitems__([0])

    @property
    def broken(self) -> list[str]:
        """The names of the broken rows that were met so far."""
        return [name for rows in self.parts.values() for name in rows.broken]

    def lengths(self) -> list[int]:
        """As of [`Rows`]; where a place has several rows to choose from, of the first."""
        lengths = []
        for rows, count in zip(self.parts.values(), self.counts, strict=True):
            own = rows.lengths()
            lengths += [own[place % len(own)] for place in range(count)]
        return lengths


def parts_of(rows: Any) -> list[Any]:
    """The rows of every source: of a mixture, its parts; else the rows themselves."""
    return list(rows.parts.values()) if isinstance(rows, Mixture) else [rows]


def read_rows(
    source: Source,
    split: str,
    *,
    augment: Augmentation | None = None,
    draw: bool = True,
    texts_per_image: int = 1,
    max_broken: int = 100,
    seed: int = 0,
) -> Rows:
    """The rows of one split of a source; see [`Rows`] for the arguments.

    Raises:
        ValueError: as [`load`] does, or for a streaming source, which has no rows to count.
    """
    if source.streaming:
        raise ValueError("A stream can only be trained on: leave out `--streaming`.")
    return Rows(
        load(source, split),
        source,
        augment=augment,
        draw=draw,
        texts_per_image=texts_per_image,
        max_broken=max_broken,
        seed=seed,
    )


def stream_rows(
    source: Source,
    split: str,
    *,
    augment: Augmentation | None = None,
    texts_per_image: int = 1,
    max_broken: int = 100,
) -> IterableDataset:
    """The rows of a stream, as of [`Rows`]; broken ones are left out as they come.

    Every data loading process counts its own broken rows, each once.

    Raises:
        ValueError: as [`load`] does, or if no row can be read.
    """
    dataset = load(source, split)
    class_names = class_names_of(dataset, source)
    check_texts_per_image(texts_per_image)
    broken = set()

    def to_rows(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        values = {column: entries[0] for column, entries in batch.items()}
        name = f"Row {indices[0]} of {source.dataset}"
        rows = []
        try:
            with _naming(lambda: name):
                texts = all_texts(values, source, class_names)
                images = _images(values[source.image_column], source.image_root, augment) if source.has_images else {}
                if texts_per_image > 1:
                    rows.append(draw_texts(texts, texts_per_image) | images)
                else:
                    rows += [{"text": text, "suffix": random.choice(suffixes), **images} for text, suffixes in texts]
        except BrokenRow as error:
            if name not in broken:
                broken.add(name)
                stop_if_too_many(len(broken), max_broken, None, error)
        return {key: [row[key] for row in rows] for key in (rows[0] if rows else ("text", "suffix"))}

    rows = dataset.map(
        to_rows, with_indices=True, batched=True, batch_size=1, remove_columns=list(dataset.features), features=None
    )
    if next(iter(rows), None) is None:
        raise ValueError(f"The split {split!r} of {source.dataset} has no row that could be read.")
    return rows


class StreamMixture(TorchIterableDataset):
    """Rows of several streams, drawn by weight, until every stream has ended; those that end sooner begin again.

    Args:
        parts: the streams, by name.
        weights: the share of each, in any unit; only one stream alone needs none.
        seed: of the draws.

    Raises:
        ValueError: if several streams have no weights, or a weight is not positive.
    """

    def __init__(self, parts: dict[str, IterableDataset], weights: Sequence[float] | None = None, seed: int = 0):
        self.parts, self.seed, self.epoch = parts, seed, 0
        if weights is None and len(parts) > 1:
            raise ValueError(f"How many rows streams have is not known: give each of {', '.join(parts)} a `weight`.")
        self.weights = check_weights(weights, list(parts)) or [1.0]

    def set_epoch(self, epoch: int) -> None:
        """Draw in another order, and let the streams shuffle anew."""
        self.epoch = epoch
        for stream in self.parts.values():
            stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        draws = random.Random(f"{self.seed} {self.epoch}")
        streams = list(self.parts.values())
        iterators = [iter(stream) for stream in streams]
        weights, going = list(self.weights), set(range(len(streams)))
        while going:
            (drawn,) = draws.choices(range(len(streams)), weights)
            row = next(iterators[drawn], None)
            if row is None:
                going.discard(drawn)
                iterators[drawn] = iter(streams[drawn])
                if (row := next(iterators[drawn], None)) is None:  # nothing for this data loading process
                    weights[drawn] = 0
                    going = going if any(weights) else set()
                    continue
            if going:
                yield row


def check_weights(weights: Sequence[float] | None, names: Sequence[str]) -> list[float] | None:
    """The weights, if there are any.

    Raises:
        ValueError: naming the source, if one is not a positive number, or there is not one for each.
    """
    if weights is None:
        return None
    if len(weights) != len(names):
        raise ValueError(f"{len(weights)} weights for {len(names)} sources ({', '.join(names)}).")
    for name, weight in zip(names, weights, strict=True):
        if not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ValueError(f"The weight of {name} is a positive number, got {weight!r}.")
    return list(weights)


def stop_if_too_many(broken: int, max_broken: int, of: int | None, error: BrokenRow) -> None:
    """Say that a row is left out, or that it is one too many.

    Raises:
        ValueError: for row `max_broken` + 1, or when no row is left.
    """
    if broken > max_broken or broken == of:
        total = "" if of is None else f" of {of:,}"
        raise ValueError(
            f"{broken} broken rows{total}; the last: {error} Mend the data, or raise `--max_broken_rows` "
            f"(now {max_broken}) to go on without them."
        )
    logger.warning(f"Left out: {error}")


@contextmanager
def _naming(name: Callable[[], str]) -> Iterator[None]:
    """Whatever goes wrong with a row is a [`BrokenRow`] that names it."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise BrokenRow(f"{name()}: {error}") from error


def check_texts_per_image(number: int) -> int:
    """The number itself.

    Raises:
        ValueError: if it is not positive.
    """
    if number < 1:
        raise ValueError(f"`--texts_per_image` is at least 1, got {number}.")
    return number


def _images(value: Any, root: Path, augment: Augmentation | None) -> dict[str, Any]:
    def read(value: Any) -> Any:
        image = open_image(_file_or_bytes(value, root))
        # Upright and with all of its bits, as the processor would make it.
        return augment(to_mode(image, "RGB")) if augment else image

    if isinstance(value, list):
        return {"images": [read(item) for item in value]}
    return {"image": read(value)}


def _as_list(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [values]


def _file_or_bytes(value: Any, root: Path) -> str | bytes:
    """What `datasets` knows of an image: its bytes, or where it lies."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError(f"no image, but {value!r:.100}.")
    if "://" in value or value.startswith("data:"):
        return value
    if not (root / value).exists():
        raise ValueError(f"there is no file {root / value}.")
    return str(root / value)


def _content(value: Any, root: Path) -> bytes:
    try:
        found = _file_or_bytes(value, root)
        return found if isinstance(found, bytes) else Path(found).read_bytes()
    except (OSError, ValueError):  # unreadable, or on the network: its name must do
        return repr(value).encode()
