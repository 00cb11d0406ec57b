"""Checkpoints that are whole or not there: a full disk or a killed process must not cost what was learnt before.

The library writes a checkpoint file by file, `trainer_state.json` last. A folder is taken for whole here only if every
file that resuming needs is there and complete, whoever wrote it.
"""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..provenance import is_weights

logger = logging.get_logger(__name__)

# What a full disk raises: Python and the tokenizers, safetensors, and torch.save.
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)


def find_checkpoint(output_dir: str | os.PathLike, wanted: str | bool) -> Path:
    """The checkpoint to go on from.

    Args:
        output_dir: the run's folder.
        wanted: a checkpoint's folder, or `True` or `"true"` for the newest whole one in `output_dir`.

    Raises:
        ValueError: if the folder that is wanted is not whole, or no checkpoint is; what they lack is named.
    """
    if str(wanted).lower() != "true":
        if lack := what_lacks(Path(wanted)):
            raise ValueError(f"{wanted} cannot be resumed from: {lack}.")
        return Path(wanted)
    lacks: dict[str, str] = {}
    for folder in reversed(list_checkpoints(output_dir)):
        if (lack := what_lacks(folder)) is None:
            for name in lacks:
                logger.warning(f"{name} is half-written ({lacks[name]}): going on from {folder.name} instead.")
            return folder
        lacks[folder.name] = lack
    found = "; ".join(f"{name} is half-written ({lack})" for name, lack in lacks.items()) or "there is none"
    raise ValueError(
        f"No whole checkpoint in {output_dir} to resume from: {found}. "
        "Leave out --resume_from_checkpoint to start anew."
    )


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoint folders of a run, whole or not, by their step."""
    steps = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if folder.is_dir() and (step := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)):
            steps[int(step[1])] = folder
    return [steps[step] for step in sorted(steps)]


def refuse_earlier_run(output_dir: str | os.PathLike, resumes: str | None) -> None:
    """Refuse to train anew beside the checkpoints of an earlier run, which would be taken for its own.

    Args:
        output_dir: the run's folder.
        resumes: the option `--resume_from_checkpoint`.

    Raises:
        ValueError: naming the newest of them. Half-written ones do not count: there is nothing to go on from.
    """
    whole = [folder for folder in list_checkpoints(output_dir) if what_lacks(folder) is None]
    if resumes is None and whole:
        raise ValueError(
            f"{whole[-1]} is of an earlier run: go on from there with --resume_from_checkpoint true, name another "
            "--output_dir, or delete the checkpoints."
        )


def what_lacks(folder: Path) -> str | None:
    """What is missing or cut short in a checkpoint's folder; `None` if training can be resumed from it."""
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / TRAINER_STATE_NAME).is_file():
        return f"{TRAINER_STATE_NAME} is missing"
    weights = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, ADAPTER_SAFE_WEIGHTS_NAME]
    # Sharded optimisers (FSDP, DeepSpeed) keep weights and states in folders, which their own loaders check.
    if not any(path.is_dir() for path in folder.iterdir()):
        if not any((folder / name).is_file() for name in weights):
            return f"{SAFE_WEIGHTS_NAME} is missing"
        for name in (OPTIMIZER_NAME, SCHEDULER_NAME):
            if not (folder / name).is_file():
                return f"{name} is missing (--save_only_model leaves it out)"
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file() and not _is_cut_short(index):
        for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            if not (folder / name).is_file():
                return f"{name} is missing"
    for file in sorted(folder.iterdir()):
        if file.is_file() and _is_cut_short(file):
            return f"{file.name} is cut short"
    return None


def _is_cut_short(file: Path) -> bool:
    """Whether a file of a format that says where it ends does not get there."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                return False
        except SafetensorError:
            return True
    if file.suffix in (".pt", ".pth"):
        return not zipfile.is_zipfile(file)
    if file.suffix == ".json":
        try:
            json.loads(file.read_text())
        except ValueError:
            return True
    return False


@contextmanager
def whole_or_nothing(folder: Path, what: str, run: Path) -> Iterator[None]:
    """Remove a folder in which not everything could be written, and say how to go on.

    A folder of that name that was there before is kept aside meanwhile: it is put back, or goes when all is written.

    Args:
        folder: what is being written.
        what: its name in the message.
        run: the run's folder, with its checkpoints.

    Raises:
        OSError: in place of the error of a failed write.
    """
    before = folder.with_name(f"before-{folder.name}")
    if folder.exists():
        shutil.rmtree(before, ignore_errors=True)
        folder.rename(before)
    try:
        yield
        shutil.rmtree(before, ignore_errors=True)
    except BaseException as error:
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
        shutil.rmtree(folder, ignore_errors=True)
        if before.exists():
            before.rename(folder)
        if not isinstance(error, WRITE_ERRORS):
            raise
        whole = [kept for kept in list_checkpoints(run) if what_lacks(kept) is None]
        mend = (
            f"{whole[-1].name} is whole: make room and go on with --resume_from_checkpoint true"
            if whole
            else "there is no checkpoint to go on from: make room and start anew"
        )
        raise OSError(
            f"{what} could not be written to {folder.parent} ({free / 2**20:,.1f} MiB were free there): {error}. "
            f"What was written of it is removed; {mend}."
        ) from error


def move_model(source: Path, target: Path) -> None:
    """Move the files of a saved model into a folder, in place of a model that is there."""
    for stale in target.iterdir():  # a model in one file would hide one in several
        if is_weights(stale.name):
            stale.unlink()
    for file in source.iterdir():
        os.replace(file, target / file.name)
    source.rmdir()
