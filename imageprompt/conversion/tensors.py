"""The tensors of a foreign checkpoint, by name, without running what the file holds besides.

PyTorch's own files are read with `weights_only=True`. TorchScript archives, as OpenAI publishes CLIP, are programs:
`torch.jit.load` would compile and run them. Here their pickle is read with a stand-in for every class that it names,
and the tensors are picked out of the tree that results.
"""

import math
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read a `.pt` or `.pth` file: a state dict, or a TorchScript archive.

    Args:
        path: a local file.

    Returns:
        Every tensor under its full name, such as "visual.proj", on the CPU and in the file's precision.

    Raises:
        ValueError: if there is no such file, it is no checkpoint of PyTorch, it needs code to be run, or it does not
            hold tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        tensors = _archived(path) if _is_torchscript(path) else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or foreign file fails in any way
        if needed := _code_in(path):
            raise ValueError(
                f"{path} holds Python objects besides tensors ({', '.join(needed)}), and reading them would run code. "
                "Where you trust the file, load it once and save its `state_dict()` with torch.save."
            ) from error
        raise ValueError(
            f"{path} is no checkpoint of PyTorch, or a damaged one ({error or type(error).__name__})."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} holds no tensors by name: save the model's `state_dict()` alone with torch.save.")
    return tensors


def first_mismatch(error: Exception) -> str:
    """What `load_state_dict` found first; it lists every tensor of a model that does not fit."""
    return " ".join(line.strip() for line in str(error).splitlines()[:2]).rstrip(".")


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())


def _code_in(path: Path) -> list[str]:
    try:
        return get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a file in PyTorch's format
        return []


def _archived(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of a TorchScript archive."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
        with archive.open(name) as file:
            root = _TensorUnpickler(file, archive, name.removesuffix(".pkl")).load()
    return dict(_named_tensors(root))


class _Inert:
    """Stands for any object that an archive names: keeps its attributes and does nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _TensorUnpickler(pickle.Unpickler):
    """Builds tensors, and an inert object for everything else."""

    def __init__(self, file, archive: zipfile.ZipFile, folder: str):
        super().__init__(file)
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        return _Inert

    def persistent_load(self, reference: tuple) -> Tensor:
        _, dtype, key, _, count = reference
        data = bytearray(self.archive.read(f"{self.folder}/{key}"))
        return torch.frombuffer(data, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_) -> Tensor:
    if math.prod(size) == 0:
        return storage.new_empty(size)
    return storage.as_strided(size, stride, offset)


def _named_tensors(module: Any, prefix: str = ""):
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Inert):
            yield from _named_tensors(value, f"{prefix}{name}.")
