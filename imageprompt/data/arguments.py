"""Options of training that say which data, and the rows that they ask for."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ..options import json_object
from .augmenting import augmentation
from .rows import BrokenRow, Mixture, StreamMixture, check_weights, read_rows, stream_rows
from .sources import Source


@dataclass
class TrainingSource(Source):
    """A source with its splits and the augmentation of its images."""

    train_split: str = field(default="train", metadata={"help": 'Such as train, "train[:80%%]" or train+validation.'})
    eval_split: str | None = field(default="validation", metadata={"help": "Used with --eval_strategy."})
    texts_per_image: int = field(
        default=1, metadata={"help": "Learn so many of an image's texts at once; it is encoded once for all of them."}
    )
    augment: bool = field(default=False, metadata={"help": "Crop and mirror training images at random."})
    augment_args: dict | str | None = field(
        default=None,
        metadata={
            "help": 'How, in timm\'s words, JSON: \'{"scale": [0.8, 1], "hflip": 0, "auto_augment": "rand-m7"}\'.'
        },
    )


@dataclass
class DataArguments(TrainingSource):
    """Which data: one source (`--dataset` and the names of its columns) or a mixture of several."""

    mixture: str | None = field(
        default=None,
        metadata={
            "help": "Instead of --dataset, a JSON file with a list of sources: objects with these same settings, and "
            "`name` and `weight`, its share of the rows."
        },
    )
    max_length: int | None = field(default=None, metadata={"help": "Trim longer answers; in tokens, with the image."})
    pack_length: int | None = field(
        default=None,
        metadata={"help": "In training, lay rows one behind the other in lines of so many tokens, instead of padding."},
    )
    max_broken_rows: int = field(
        default=100, metadata={"help": "Leave out so many rows of a source that cannot be read."}
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Rows of a stream that are shuffled among each other."})


def check_data(args: DataArguments) -> None:
    """Open every source, so that a wrong name or column is met before a model is loaded.

    Raises:
        ValueError: naming what is wrong.
    """
    for source, _ in read_sources(args).values():
        if source.streaming:
            stream_rows(source, source.train_split)
        else:  # whole splits: to cut them, every image that is in the data set is read
            read_rows(source, re.sub(r"\[[^]]*\]", "", source.train_split))


def training_data(
    args: DataArguments, image_size: tuple[int, int], *, evaluates: bool, seed: int = 0
) -> tuple[Dataset, Any]:
    """Rows to train on and, if `evaluates`, rows to evaluate on; of a mixture, a dictionary with those of each source.

    Raises:
        ValueError: for anything that is missing or cannot be; all sources are opened before any work starts.
    """
    sources = read_sources(args)
    streams = any(source.streaming for source, _ in sources.values())
    broken = {"max_broken": args.max_broken_rows}
    training: dict[str, Any] = {}
    for name, (source, _) in sources.items():
        augment = augmentation(image_size, json_object("--augment_args", source.augment_args))
        read = stream_rows if streams else read_rows
        augment = augment if source.augment else None
        more = broken if streams else broken | {"seed": seed}
        rows = read(source, source.train_split, augment=augment, texts_per_image=source.texts_per_image, **more)
        training[name] = rows.shuffle(seed=seed, buffer_size=args.shuffle_buffer) if streams else rows
    evaluation = {
        name: read_rows(replace(source, streaming=False), source.eval_split, draw=False, **broken)
        for name, (source, _) in sources.items()
        if evaluates and source.eval_split is not None
    }
    if args.mixture is None:
        return training["data"], evaluation.get("data")
    given = [weight for _, weight in sources.values()]
    weights = None if None in given else given
    mixture = (StreamMixture if streams else Mixture)(training, weights, seed)
    return mixture, evaluation or None


def training_texts(args: DataArguments) -> Iterator[str]:
    """Every prompt and suffix of the training rows, without those of broken rows; no image is read.

    Raises:
        ValueError: for a stream, which would have to be read to its end.
    """
    for source, _ in read_sources(args).values():
        rows = read_rows(source, source.train_split)
        for index in range(len(rows)):
            with suppress(BrokenRow):
                text, suffixes = rows.texts(index)
                yield from [text, *suffixes] if text else suffixes


def data_facts(args: DataArguments) -> list[dict[str, Any]]:
    """What the training rows came from, to be written down: the settings of each source, its weight, and whether it is
    on the Hub."""
    return [
        {**asdict(source), "on_hub": source.on_hub, "weight": weight} for source, weight in read_sources(args).values()
    ]


def read_sources(args: DataArguments) -> dict[str, tuple[TrainingSource, Any]]:
    """Settings and weight of every source, by name.

    Raises:
        ValueError: for a mixture that is no list of sources, or one of its settings.
    """
    return dict(_read_sources(args))


def _read_sources(args: DataArguments) -> Iterator[tuple[str, tuple[TrainingSource, Any]]]:
    names = [setting.name for setting in fields(TrainingSource)]
    if args.mixture is None:
        yield "data", (TrainingSource(**{name: getattr(args, name) for name in names}), None)
        return
    if args.dataset is not None:
        raise ValueError("Pass `--dataset` or `--mixture`, not both.")
    try:
        entries = json.loads(Path(args.mixture).expanduser().read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"--mixture is a JSON file with a list of sources; {args.mixture!r} is not ({error})."
        ) from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{args.mixture} holds no list of sources, each an object with `dataset` and its columns.")
    streaming = {bool(entry.get("streaming")) for entry in entries}
    if len(streaming) > 1:
        raise ValueError(f"{args.mixture}: either all sources stream or none.")
    weighted = {"weight" in entry for entry in entries}
    if len(weighted) > 1:
        raise ValueError(f"{args.mixture}: give every source a `weight`, or none.")
    seen = set()
    for entry in entries:
        settings = dict(entry)
        weight = settings.pop("weight", None)
        name = str(settings.pop("name", Path(str(entry.get("dataset"))).stem))
        if unknown := sorted(settings.keys() - set(names)):
            raise ValueError(
                f"{args.mixture}: a source has no setting {', '.join(unknown)}. It has {', '.join(names)}."
            )
        if name in seen:
            raise ValueError(f"{args.mixture}: two sources are called {name!r}; give them a `name` each.")
        seen.add(name)
        check_weights(None if weight is None else [weight], [name])
        yield name, (TrainingSource(**settings), weight)
