"""`imageprompt compress`: a saved model to a smaller one, which is there only if it came back from its files."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..comparing import difference
from ..configuration import PARTS
from ..decoding import evaluating
from ..folders import new_folder
from ..modeling import ImagePromptForConditionalGeneration
from ..processing import ImagePromptProcessor
from ..provenance import provenance
from .pruning import prune, share_of_zeros
from .quantizing import quantization_config, quantized_layers, refuse_quantized

# Weights lie elsewhere in memory when they are read, so that sums may round otherwise: as a part of the largest logit.
_TOLERANCE = 1e-3


def compress(
    model: str,
    output: Path,
    *,
    quantize: str | None = None,
    share: float | None = None,
    parts: Sequence[str] | None = None,
    scope: str = "layer",
) -> dict[str, Any]:
    """Prune a saved model, quantise it, or both in this order, and save it with its processor.

    Args:
        model: a local folder or Hub id.
        output: a folder, new or empty. `compression.json` in it says what was done.
        quantize: a kind of [`quantization_config`].
        share: of the weights to prune, see [`prune`].
        parts: of the model; by default "text" is quantised, and all parts are pruned.
        scope: of the share, see [`prune`].

    Returns:
        What `compression.json` holds: bytes of the weights before, of the files after, which layers were quantised, the
        share of zeros, and how far the logits for one image are from the original's, as a part of the largest.

    Raises:
        ValueError: if there is nothing to do or nothing that it could be done to, the model is quantised already, the
            compressed model does not run here, or it does not come back from its files as it was; nothing is written
            then.
    """
    if quantize is None and share is None:
        raise ValueError(
            "Nothing to do: name what to quantise to (--quantize int8), how much to prune (--prune 0.5), or both."
        )
    with new_folder(output) as draft:
        return _compress(model, draft, quantize, share, parts, scope)


def _compress(
    model: str, folder: Path, quantize: str | None, share: float | None, parts: Sequence[str] | None, scope: str
) -> dict[str, Any]:
    original = ImagePromptForConditionalGeneration.from_pretrained(model)
    refuse_quantized(original.config)
    processor = ImagePromptProcessor.from_pretrained(model)
    processor.check_model(original)
    settings = None if quantize is None else quantization_config(quantize, original.config, parts or ("text",))
    before = sum(parameter.numel() * parameter.element_size() for parameter in original.parameters())
    inputs = processor(images=Image.effect_noise((64, 64), 64), text="A", return_tensors="pt")
    expected = _logits(original, inputs)

    compressed = original
    if share is not None:
        prune(original, share, parts or PARTS, scope)
    if settings is not None:
        with tempfile.TemporaryDirectory() as unquantised:
            original.save_pretrained(unquantised)
            compressed = ImagePromptForConditionalGeneration.from_pretrained(unquantised, quantization_config=settings)
    # Saved before it runs: on some CPUs bitsandbytes rounds the scales of weights when they are first used.
    compressed.save_pretrained(folder)
    processor.save_pretrained(folder)
    try:
        logits = _logits(compressed, inputs)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"Quantised as {quantize}, {model} does not run here ({type(error).__name__}: {error}): nothing was "
            "written. Choose another kind, or fewer parts."
        ) from error
    reloaded = ImagePromptForConditionalGeneration.from_pretrained(folder)
    moved = difference([(_logits(reloaded, inputs), logits)])
    if not moved.within(relative=_TOLERANCE):
        raise ValueError(
            f"The compressed model does not come back from its files as it was: logits differ by up to {moved}. "
            "Nothing was written. Choose another kind, or fewer parts."
        )
    report = {
        "model": model,
        "settings": {"quantize": quantize, "prune": share, "parts": parts, "scope": scope},
        "bytes_before": before,
        "bytes_after": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "quantized_layers": sorted(quantized_layers(reloaded)),
        "share_of_zeros": None if share is None else share_of_zeros(original, parts or PARTS),
        "logit_difference": difference([(logits, expected)]).relative,
        **provenance(),
    }
    (folder / "compression.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


@torch.no_grad()
def _logits(model: ImagePromptForConditionalGeneration, inputs) -> torch.Tensor:
    with evaluating(model):
        return model(**inputs.to(model.device)).logits.float().cpu()
