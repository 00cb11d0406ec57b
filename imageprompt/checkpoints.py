"""Checkpoints that are not what they should be: refused, with the names of the files and tensors.

The library starts missing tensors from random values, reads pickles where there are no safetensors files, follows an
index wherever it points, and does not say which file is broken. Here each of these is an error, before a model is
handed out, of a folder and of a Hub repository. A format version tells settings that a
newer version of this package has written from those of other tools.
"""

import json
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    has_file,
    logging,
)

logger = logging.get_logger(__name__)

# Raised with every change after which older code would misread a checkpoint: a field, a connector, a renamed tensor.
# tests/checkpoints/ keeps checkpoints of each.
FORMAT_VERSION = 1

# In bytes. A safetensors file begins with this length, and the library's reader takes no more.
_LONGEST_HEADER = 100_000_000


def check_format(file: str, saved_format: Any, unknown: Collection[str] = ()) -> None:
    """Refuse settings of a newer version of this package; of other tools, name them in a warning.

    Args:
        file: where the settings were read.
        saved_format: their `format_version`; `None` for files that were written before there was one.
        unknown: names of settings that this version does not know.

    Raises:
        ValueError: if the format is newer than this code, naming the settings that are.
    """
    names = listed(f"`{name}`" for name in unknown)
    if saved_format is None or saved_format in range(1, FORMAT_VERSION + 1):
        if unknown:
            logger.warning(f"This version of imageprompt makes no use of {names} in {file}.")
        return
    new = f" It does not know {names}, which may change every result." if unknown else ""
    raise ValueError(
        f"{file} was written by a newer version of imageprompt: its format_version is {saved_format!r}, and this one "
        f"reads up to {FORMAT_VERSION}.{new} Update it: pip install --upgrade imageprompt"
    )


# What of a caller's keywords says where on the Hub a file is.
_PLACE = ("cache_dir", "local_files_only", "proxies", "revision", "token")


@contextmanager
def reading(source: Any, *, pickles: bool = False, **kwargs: Any) -> Iterator[None]:
    """Refuse files before the library reads them, and name those that it could not read.

    Args:
        source: where the library looks, a folder or a Hub id; `None` for weights from memory.
        pickles: allow pickles, which `torch.load` reads with `weights_only=True`.
        kwargs: those of `from_pretrained`, of which `subfolder`, `variant`, `revision`, `token`, … say where files are.

    Raises:
        ValueError: naming the files that are pickles, broken or outside the folder.
    """
    subfolder, variant = kwargs.get("subfolder") or "", kwargs.get("variant")
    place = {name: kwargs[name] for name in _PLACE if kwargs.get(name) is not None}
    local = Path(source, subfolder) if source is not None and Path(source, subfolder).is_dir() else None
    on_hub = source is not None and not os.path.exists(source)
    if local is not None:
        _check_names(local, pickles)
    elif on_hub and (index := _cached(source, SAFE_WEIGHTS_INDEX_NAME, variant, subfolder=subfolder, **place)):
        _check_index(index)
    try:
        yield
    except SafetensorError as error:
        folder = local
        if on_hub:  # where the library has just put them
            place |= {"subfolder": subfolder, "local_files_only": True}
            names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
            folder = next((file.parent for name in names if (file := _cached(source, name, variant, **place))), None)
        files = sorted(folder.glob("*.safetensors")) if folder is not None else []
        broken = listed(fault for file in files if (fault := _fault(file))) or f"A safetensors file is broken ({error})"
        raise ValueError(
            f"{source} cannot be loaded. {broken}. Copy it again, or download it again with `force_download=True`."
        ) from error
    except OSError as error:
        if on_hub and not pickles and (pickled := _only_pickles(source, subfolder, variant, place)):
            raise _refusal_of_pickles(source, pickled) from error
        raise


def _cached(source: Any, name: str, variant: str | None, **place: Any) -> Path | None:
    """A file of a Hub repository, in the cache; `None` if there is none, or the Hub cannot say so."""
    with suppress(OSError):  # which the library will raise as well, if it is one for it
        file = cached_file(
            source,
            _of_variant(name, variant),
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **place,
        )
        return Path(file) if file else None
    return None


def _of_variant(name: str, variant: str | None) -> str:
    """As the library names them: model.fp16.safetensors, model.safetensors.index.fp16.json."""
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}" if variant else name


def _only_pickles(source: Any, subfolder: str, variant: str | None, place: dict[str, Any]) -> list[str]:
    """The pickles of a Hub repository that has its weights in no safetensors file."""

    def there(name: str) -> bool:
        return has_file(source, f"{subfolder}/{name}".lstrip("/"), **place)

    with suppress(OSError):
        safe, pickled = (
            [name for kind in kinds if there(name := _of_variant(kind, variant))]
            for kinds in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME))
        )
        return [] if safe else pickled
    return []


def _check_names(folder: Path, pickles: bool) -> None:
    names = sorted(path.name for path in folder.iterdir())
    pickled = [name for name in names if name.startswith("pytorch_model") and name.endswith(".bin")]
    if pickled and not pickles and not any(".safetensors" in name for name in names):
        raise _refusal_of_pickles(folder, pickled)
    for name in names:
        if name.endswith(".index.json"):
            _check_index(folder / name)


def _refusal_of_pickles(source: Any, names: list[str]) -> ValueError:
    return ValueError(
        f"{source} holds its weights in {listed(names)} and in no safetensors file. That is a pickle, which can run "
        "code when it is read. If you trust it, load it once with `use_safetensors=False` and save it again."
    )


def _check_index(path: Path) -> None:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        shards = {os.fspath(name) for name in index["weight_map"].values()}  # refuses what is no name
        index["metadata"].items()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no index of weights: {type(error).__name__}: {error}.") from error
    # Both kinds of path: a folder may be copied from one system to the other.
    outside = [name for name in shards if {PurePosixPath(name).name, PureWindowsPath(name).name} != {name}]
    if outside:
        raise ValueError(f"{path} points outside its folder, to {listed(map(repr, outside))}: nothing was read.")
    foreign = [name for name in shards if not name.endswith(".safetensors")]
    if foreign and ".safetensors." in path.name:
        raise ValueError(f"{path} names {listed(foreign)}, which is no safetensors file: nothing was read.")


def _fault(path: Path) -> str | None:
    try:
        with safe_open(path, "pt"):
            return None
    except SafetensorError as error:
        with path.open("rb") as file:
            start = file.read(8)
        too_long = int.from_bytes(start, "little") > _LONGEST_HEADER
        if start.startswith(b"PK\x03\x04") or (start.startswith(b"\x80") and too_long):  # torch's archives; pickles
            return f"{path.name} is a pickle under a false name, and was not unpickled"
        return f"{path.name} is broken or cut short ({error})"


def check_loaded(source: Any, model: PreTrainedModel, report: dict[str, Any], strict: bool, any_size: bool) -> None:
    """Refuse weights that are not this model's.

    Args:
        source: what was loaded.
        model: what came of it.
        report: the library's loading information.
        strict: refuse tensors that are missing or too many.
        any_size: allow tensors of another shape.

    Raises:
        ValueError: naming the tensors.
    """
    faults = []
    if strict and (missing := report["missing_keys"] | _left_empty(model)):
        faults.append(f"It lacks {listed(missing)}, which would start from random values.")
    if strict and report["unexpected_keys"]:
        faults.append(f"The model has no place for {listed(report['unexpected_keys'])}.")
    if not any_size and report["mismatched_keys"]:
        shapes = (f"{name} {tuple(saved)} instead of {tuple(own)}" for name, saved, own in report["mismatched_keys"])
        faults.append(f"These have another shape: {listed(shapes)}.")
    if faults:
        raise ValueError(
            f"The weights of {source} are not those of the model in its config.json. {' '.join(faults)} To use what "
            "fits all the same: `strict=False` for tensors that are missing or too many, "
            "`ignore_mismatched_sizes=True` for other shapes."
        )


def _left_empty(model: PreTrainedModel) -> set[str]:
    """Parameters of a quantised model that no file held; some of the library's quantisers do not report them."""
    places = set(getattr(model, "hf_device_map", {}).values())
    if getattr(model, "hf_quantizer", None) is None or len(places) > 1 or "meta" in places:  # offloaded ones are empty
        return set()
    return {name for name, parameter in model.named_parameters() if parameter.is_meta}


def listed(names: Iterable[str]) -> str:
    """The first names of many, in order, and how many there are besides."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
