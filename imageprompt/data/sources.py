"""Where data comes from: everything that people keep images and texts in, as a `datasets.Dataset`.

A [`Source`] names a data set and says which of its columns are what. Its fields are options of `imageprompt train` and
`imageprompt evaluate`. [`load`] reads it; images stay undecoded, so that one broken file does not stop the rest.
"""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError

from ..generating import image_suffixes
from .annotated import read_annotated
from .cutting import cut

# The builder of `datasets` that reads a file of each kind.
_BUILDERS = {
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".tsv": "csv",
    ".txt": "text",
}
_TABLES = {".csv", ".json", ".jsonl", ".parquet", ".tsv"}


@dataclass
class Source:
    """A data set, and which of its columns hold the image, the prompt and the text to learn (or to compare with)."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Hub name, local folder or file: parquet, csv, tsv, json, jsonl, txt, webdataset .tar, a folder of "
            "images with a table, COCO, Karpathy or VQA JSON."
        },
    )
    subset: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    image_column: str = field(default="image", metadata={"help": "Images, paths or lists of them; none: only text."})
    suffix_column: str = field(default="suffix", metadata={"help": "The text to learn: a text, several, or a class."})
    text_column: str | None = field(
        default=None, metadata={"help": "A prompt for each row, such as a question, or a list: one for each suffix."}
    )
    prompt: str = field(
        default="", metadata={"help": "One prompt for all rows; with --text_column, {text} stands for the row's own."}
    )
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Words for the classes 0, 1, … of --suffix_column; the data set's own."}
    )
    image_folder: str | None = field(default=None, metadata={"help": "Where image paths start; the file's folder."})
    annotations: str | None = field(default=None, metadata={"help": "The file of answers to a VQA file of questions."})
    shuffle_rows: int | None = field(
        default=None, metadata={"help": "Seed to shuffle the rows with before a split such as train[:80%%] is cut."}
    )
    join_rows: bool = field(
        default=False, metadata={"help": "Rows that show the same image become one, with a list of their texts."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read on while training, without a copy on the disk."})

    @property
    def has_images(self) -> bool:
        """Whether rows have images."""
        return self.image_column.lower() != "none"

    @property
    def on_hub(self) -> bool:
        """Whether the name is that of a data set on the Hub, as nothing on this machine has it."""
        return self.dataset is not None and not Path(self.dataset).expanduser().exists()

    @property
    def image_root(self) -> Path:
        """Where relative image paths start."""
        if self.image_folder is not None:
            return Path(self.image_folder).expanduser()
        path = Path(self.dataset or "").expanduser()
        return path if path.is_dir() else path.parent


def load(source: Source, split: str) -> Dataset | IterableDataset:
    """One split of a source, with its images undecoded.

    Args:
        split: a name, or a part or sum of splits as `datasets` writes them: "train[:80%]", "train+validation".

    Raises:
        ValueError: if there is no such data, split or column (what is there is named), it cannot be read, or the split
            is empty.
    """
    splits = _load_splits(source)
    if source.streaming:
        return _prepared(_stream(source, splits, split), source)
    asked = {name: _prepared(part, source) if name in split else part for name, part in splits.items()}
    return cut(source, asked, split)


def _prepared(dataset: Any, source: Source) -> Any:
    """The data set with its images undecoded, if it has the columns that are asked for."""
    columns = dataset.column_names
    if columns is None:  # a stream of which the first row is not read yet
        with _reading(source.dataset):
            dataset = dataset._resolve_features()
        columns = dataset.column_names
    wanted = [source.suffix_column] + [source.image_column] * source.has_images + [source.text_column or ""]
    for column in filter(None, wanted):
        if column not in columns:
            raise ValueError(f"{source.dataset} has no column {column!r}; it has {', '.join(columns)}.")
    return undecoded(dataset)


def undecoded(dataset: Dataset | IterableDataset) -> Any:
    """The data set with its images as files or bytes, to be opened one by one."""
    for column, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(column, List(Image(decode=False)))
    return dataset


def _load_splits(source: Source) -> Any:
    """All splits by name."""
    name = source.dataset
    if not name:
        raise ValueError("Which data? Pass `--dataset`: a local folder or file, or a Hub name.")
    path = Path(name).expanduser()
    if not path.exists():
        if name.startswith((".", "/", "~")) or path.suffix in _BUILDERS:
            raise ValueError(f"There is no data set at {path}.")
        with _reading(name):
            return load_dataset(name, source.subset, streaming=source.streaming)
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            with _reading(path):
                saved = load_from_disk(str(path))
            return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
        table = _table_beside_images(path)
        if table is None:
            with _reading(path):
                return load_dataset(str(path), source.subset, streaming=source.streaming)
        path = table
    if path.suffix not in _BUILDERS:
        raise ValueError(f"{path} is of no kind that can be read; those are {', '.join(sorted(_BUILDERS))}.")
    if path.stat().st_size < 1000 and not path.read_bytes().strip():
        raise ValueError(f"{path} has no rows.")
    if path.suffix == ".json":
        annotated = read_annotated(path, source.image_root, source.annotations)
        if annotated is not None:
            return annotated
    builder = _BUILDERS[path.suffix]
    options = _csv_options(path) if builder == "csv" else {}
    with _reading(path):
        return load_dataset(builder, data_files={"train": str(path)}, streaming=source.streaming, **options)


@contextmanager
def _reading(name: Any) -> Iterator[None]:
    """Whatever `datasets` raises about data is a ValueError that names it: each kind of file has errors of its own."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        raise ValueError(f"{name} cannot be read: {cause or error}") from error


def _csv_options(path: Path) -> dict[str, Any]:
    """How to read a table as it is written: 007 stays 007, and None a word.

    Raises:
        ValueError: for a file without rows, or a line that has not as many cells as the first, which names the columns.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            heading = file.readline()
            separator = "\t" if path.suffix == ".tsv" else max(",;\t", key=heading.count)
            file.seek(0)
            rows = csv.reader(file, delimiter=separator)
            columns, empty = next(rows, []), True
            for row in rows:
                empty = False
                if len(row) not in (0, len(columns)):
                    raise ValueError(
                        f"{path}, line {rows.line_num}: {len(row)} cells, but {len(columns)} columns "
                        f"({', '.join(columns)}). Put texts that hold {separator!r} between double quotes."
                    )
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}. Write the table as UTF-8.") from error
    if empty:
        raise ValueError(f"{path} has no rows.")
    features = Features({column: Value("string") for column in columns})
    return {"sep": separator, "features": features, "na_filter": False, "encoding": "utf-8-sig"}


def _stream(source: Source, splits: IterableDatasetDict, split: str) -> IterableDataset:
    if source.join_rows:
        raise ValueError("The rows of a stream cannot be joined, as they come one by one: leave out `--join_rows`.")
    if source.shuffle_rows is not None:
        raise ValueError("A stream has no end from which it could be shuffled: leave out `--shuffle_rows`.")
    if isinstance(splits, DatasetDict):
        splits = IterableDatasetDict({name: part.to_iterable_dataset() for name, part in splits.items()})
    if split not in splits:
        raise ValueError(
            f"{source.dataset} has no split {split!r}; it has {', '.join(splits)}. Parts of splits need an end, which "
            "a stream does not have: for them, leave out `--streaming`."
        )
    return splits[split]


def _table_beside_images(folder: Path) -> Path | None:
    """The one table in a folder of images, where `datasets` does not find it by its name."""
    files = [file for file in folder.iterdir() if file.is_file()]
    tables = [file for file in files if file.suffix in _TABLES]
    named = any(file.stem == "metadata" for file in tables)
    suffixes = image_suffixes()
    holds_images = any(file.suffix.lower() in suffixes for file in folder.rglob("*"))
    return tables[0] if len(tables) == 1 and not named and holds_images else None
