"""What every measured file says of its origin."""

import os
import platform
from importlib.metadata import version
from typing import Any

import torch

_PACKAGES = ("imageprompt", "pillow", "timm", "torch", "torchvision", "transformers")


def provenance() -> dict[str, Any]:
    """Versions and machine, to be stored beside a result."""
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }
