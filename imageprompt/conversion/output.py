"""Where a converted model goes: a folder of its own."""

from pathlib import Path


def refuse_used_folder(folder: Path) -> None:
    """Raise ValueError if there is something that saving would overwrite, before any work starts."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not an empty folder: nothing is overwritten. Name a new one.")
