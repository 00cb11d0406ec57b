"""`export`: a saved model to a folder of graphs that run without this package, checked before it is said to be done.

What was written is loaded again and compared with the model on a sample before the folder is there.
"""

import json
import os
import shutil
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from ..comparing import Difference, difference
from ..configuration import ImagePromptConfig
from ..folders import new_folder
from ..modeling import ImagePromptForConditionalGeneration
from ..processing import ImagePromptProcessor
from ..provenance import provenance
from . import exported_model
from .exported_model import ExportedModel, OnnxModel, TorchModel
from .graphs import DIMENSIONS, Graph, decoder_graph, image_graph, trace

# What runs each format; the first graph's suffix says which files are written.
FORMATS: dict[str, type[ExportedModel]] = {"onnx": OnnxModel, "torch": TorchModel}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

# The largest difference between the model's logits and those of its graphs, and the same as a part of the largest
# logit: those of pretrained language models reach 100, where fp32 alone rounds to 1e-5.
TOLERANCE, RELATIVE_TOLERANCE = 1e-4, 1e-5

# Generation settings that the loop follows, those that change nothing in greedy search for new tokens, and the values
# with which others change nothing, besides none and 0.
FOLLOWED = {"eos_token_id", "pad_token_id", "suppress_tokens", "max_new_tokens"}
WITHOUT_EFFECT = {
    *("num_beams", "early_stopping", "length_penalty", "do_sample", "temperature", "top_k", "top_p", "min_p"),
    *("typical_p", "epsilon_cutoff", "eta_cutoff", "max_length", "bos_token_id", "decoder_start_token_id"),
    *("use_cache", "cache_implementation", "prefill_chunk_size", "return_dict_in_generate", "output_logits"),
    *("output_scores", "output_attentions", "output_hidden_states", "transformers_version", "_from_model_config"),
}
NEUTRAL = {"repetition_penalty": 1.0, "guidance_scale": 1.0, "num_return_sequences": 1, "num_beam_groups": 1}
# Words that are read one by one after the sample's prompts.
STEPS = 2


def export(
    model: str | os.PathLike, folder: str | os.PathLike, formats: Sequence[str] = ("onnx", "torch")
) -> dict[str, Difference]:
    """Write a model as graphs: vision tower with connector, and language model with its cache, in fp32.

    Args:
        model: a saved model, a local folder or Hub id.
        folder: where to write, new or empty. It will hold `vision` and `decoder` in each format, the
            processor, `generation_config.json`, `export.json`, which describes all inputs and outputs, and
            `exported_model.py`, which generates from them.
        formats: "onnx" (`.onnx` with weights in `.onnx.data`, needs `imageprompt[export]`) and "torch" (`.pt2`).

    Returns:
        For each format how far its logits are from the model's on a sample.

    Raises:
        ValueError: if something is in the folder, packages are missing, the model cannot be exported, or the logits of
            its graphs differ by more than 1e-4 (or 1e-5 of the largest logit, if that is more); nothing is written
            then.
    """
    with new_folder(folder) as draft:
        return _export(model, draft, formats)


def _export(model: str | os.PathLike, folder: Path, formats: Sequence[str]) -> dict[str, Difference]:
    _check_formats(formats)
    config = ImagePromptConfig.from_pretrained(model)
    sample = _sample(config)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{model} is quantized, and export writes fp32: export the model that it was made of.")
    loaded = (
        ImagePromptForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)
    )
    processor = ImagePromptProcessor.from_pretrained(model)
    processor.check_model(loaded)
    _check_generation(loaded.generation_config)

    graphs = {"vision": image_graph(loaded), "decoder": decoder_graph(loaded)}
    for name, graph in graphs.items():
        _write(graph, folder / name, formats)
    description = _describe(config, graphs, formats)
    _save_json(description, folder)
    processor.save_pretrained(folder)
    loaded.generation_config.save_pretrained(folder)
    shutil.copy(exported_model.__file__, folder)
    found = {kind: _compare(loaded, FORMATS[kind](folder), sample) for kind in formats}
    description["verified"] = {kind: each.absolute for kind, each in found.items()}
    _save_json(description, folder)
    return found


def _check_formats(formats: Sequence[str]) -> None:
    if not formats or (unknown := set(formats) - FORMATS.keys()):
        named = f"unknown: {', '.join(sorted(unknown))}" if formats else "none is named"
        raise ValueError(f"`formats` are {' and '.join(FORMATS)}; {named}.")
    for package in ONNX_PACKAGES if "onnx" in formats else ():
        try:
            version(package)
        except PackageNotFoundError as error:
            raise ValueError(f'ONNX needs {package}: pip install "imageprompt[export]".') from error


def _check_generation(config: GenerationConfig) -> None:
    """Refuse settings that `model.generate` would follow and the loop would not."""
    others = {
        name: value
        for name, value in sorted(config.to_diff_dict().items())
        if name not in FOLLOWED | WITHOUT_EFFECT and value and value != NEUTRAL.get(name)
    }
    if others:
        raise ValueError(
            f"The model's generation settings hold {', '.join(f'{name}={others[name]}' for name in others)}, which "
            "the exported loop does not follow: reset them in `model.generation_config` and save the model."
        )
    if config.eos_token_id is None:
        raise ValueError("The model's generation settings name no `eos_token_id`, so no answer would end.")


def _write(graph: Graph, path: Path, formats: Sequence[str]) -> None:
    program = trace(graph)
    if "torch" in formats:
        torch.export.save(program, path.with_suffix(TorchModel.suffix))
    if "onnx" in formats:
        with _silenced():
            onnx = torch.onnx.export(
                program,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                verbose=False,
            )
        # torch calls them s0, s1, …
        names: dict[Any, str] = {}
        for value, spec in zip(onnx.model.graph.inputs, graph.inputs.values(), strict=True):
            names |= {old: new for old, new in zip(value.shape, spec.shape, strict=True) if new in DIMENSIONS}
        onnx.rename_axes(names)
        onnx.save(path.with_suffix(OnnxModel.suffix), external_data=True)


@contextmanager
def _silenced():
    """torch warns of its own deprecated calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _describe(config: ImagePromptConfig, graphs: dict[str, Graph], formats: Sequence[str]) -> dict[str, Any]:
    versions = provenance()["versions"]
    if "onnx" in formats:
        versions |= {package: version(package) for package in ONNX_PACKAGES}
    return {
        "fusion": config.fusion,
        "image_token_id": config.image_token_id,
        "image_seq_length": config.image_seq_length,
        "max_positions": getattr(config, "max_position_embeddings", None),
        "graphs": {name: graph.describe() for name, graph in graphs.items()},
        "verified": {},
        "versions": versions,
    }


def _save_json(description: dict[str, Any], folder: Path) -> None:
    (folder / "export.json").write_text(json.dumps(description, indent=2) + "\n")


def _sample(config: ImagePromptConfig) -> dict[str, np.ndarray]:
    """Rows with two images, none and one, padded on the left, of random words and noise.

    Raises:
        ValueError: if an image leaves no room for text.
    """
    random, each = np.random.default_rng(0), config.image_seq_length
    positions = getattr(config, "max_position_embeddings", None) or 1024
    counts = [2 if 2 * each + 3 + STEPS <= positions else 1, 0, 1]
    if max(counts) * each + 3 + STEPS > positions:
        raise ValueError(
            f"An image takes {each} of the {positions} positions, which leaves too few for text: compose the model "
            "with a smaller `num_image_tokens`."
        )
    words = [word for word in range(config.vocab_size) if word != config.image_token_id]
    rows = []
    for count, text in zip(counts, (3, 5, 2), strict=True):
        first, *rest = random.choice(words, text)
        images = [token for number in range(count) for token in [*rest[number:][:1], *[config.image_token_id] * each]]
        rows.append([first, *images, *rest[count:]])
    length = max(map(len, rows))
    return {
        "input_ids": np.array([[words[0]] * (length - len(row)) + row for row in rows]),
        "attention_mask": np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": random.standard_normal((sum(counts), config.num_channels, *config.image_size), np.float32),
        "steps": random.choice(words, (len(rows), STEPS)),
    }


@torch.no_grad()
def _compare(
    model: ImagePromptForConditionalGeneration, exported: ExportedModel, sample: dict[str, np.ndarray]
) -> Difference:
    """The logits over the prompts' tokens and some steps: of all rows, and of one row alone.

    Raises:
        ValueError: if they differ too much.
    """
    pairs = []
    alone = {name: array[-1:] for name, array in sample.items()}
    for rows in (sample, alone):
        prompt = {name: rows[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        output = model(**{name: torch.from_numpy(array) for name, array in prompt.items()}, use_cache=True)
        reading, tokens = exported.read(**prompt, all_logits=True), prompt["attention_mask"] == 1
        pairs.append((reading.logits[tokens], output.logits.numpy()[tokens]))
        for word in np.split(rows["steps"], STEPS, axis=1):
            reading = exported.step(word, reading)
            output = model(
                torch.from_numpy(word),
                attention_mask=torch.from_numpy(reading.attention_mask),
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            pairs.append((reading.logits, output.logits.numpy()))
    found = difference(pairs)
    if not found.within(TOLERANCE, RELATIVE_TOLERANCE):
        raise ValueError(
            f"The logits of the {type(exported).__name__} differ from the model's by up to {found}: nothing was "
            "exported."
        )
    return found
