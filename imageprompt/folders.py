"""What a command writes: a new folder, or a file, whole or not there at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp


@contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """A draft to write into, which becomes `folder` when the block ends; if the block fails, nothing of it is left.

    Args:
        folder: does not exist yet, or is empty.

    Raises:
        ValueError: before the block runs, if there is something that would be overwritten.
    """
    folder = Path(folder)
    there = folder.exists()
    if there and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not an empty folder: nothing is overwritten. Name a new one.")
    # In the same place, so that it can be renamed: what is there may be another disk, or where a shell stands.
    place = folder if there else folder.parent
    place.mkdir(parents=True, exist_ok=True)
    draft = Path(mkdtemp(prefix=f".{folder.name}-", dir=place))
    try:
        yield draft
        if there:
            for path in draft.iterdir():
                path.rename(folder / path.name)
        else:
            draft.chmod(0o755)  # a temporary folder is its owner's alone
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_whole(file: Path, text: str) -> None:
    """Write a file, or put another in its place, in one step: who stops it on the way leaves `<name>.draft`."""
    draft = file.with_name(f"{file.name}.draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, file)
