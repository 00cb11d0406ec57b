"""What every measured file says of its origin, and which files a checkpoint is made of."""

import hashlib
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

_PACKAGES = ("imageprompt", "pillow", "timm", "torch", "torchvision", "transformers")

# What a checkpoint consists of, as far as answers depend on it.
MODEL_FILES = {
    "weights_sha256": ["*.safetensors"],
    "config_sha256": ["config.json", "generation_config.json"],
    "processor_sha256": [
        "added_tokens.json",
        "chat_template.jinja",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ],
}

# Names under which the library saves weights and looks for them; files with others are somebody's own.
_WEIGHTS = re.compile(r"model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors")


def provenance() -> dict[str, Any]:
    """Versions and machine, to be stored beside a result."""
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }


def model_folder(model: str) -> Path:
    """Where a model's files are; those of a Hub model are fetched."""
    if Path(model).is_dir():
        return Path(model)
    return Path(snapshot_download(model, allow_patterns=[name for names in MODEL_FILES.values() for name in names]))


def model_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's files of each kind (`MODEL_FILES`), one after the other."""
    digests = {}
    for kind, names in MODEL_FILES.items():
        digest = hashlib.sha256()
        for file in sorted({file for name in names for file in folder.glob(name)}):
            with file.open("rb") as content:
                while block := content.read(1 << 20):
                    digest.update(block)
        digests[kind] = digest.hexdigest()
    return digests


def differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """Each setting in which a file's origin is not the one wanted, by its name, with both values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            difference
            for key in sorted(found.keys() | wanted.keys())
            for difference in differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if found == wanted else [f"{name} {found!r} instead of {wanted!r}"]


def is_weights(name: str) -> bool:
    """Whether `from_pretrained` takes a file of this name for (a part of) a model's weights."""
    return _WEIGHTS.fullmatch(name) is not None
