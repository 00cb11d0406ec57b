"""Smaller models: weights quantised to 8 or 4 bits, weights pruned to zero, and both measured against the original."""

from .compress import compress
from .pruning import KeepZeros, prune, share_of_zeros
from .quantizing import quantization_config, quantized_layers, skipped_modules

__all__ = [
    "KeepZeros",
    "compress",
    "prune",
    "quantization_config",
    "quantized_layers",
    "share_of_zeros",
    "skipped_modules",
]
