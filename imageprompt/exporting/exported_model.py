"""Generation from an exported model: greedy search in plain numpy around two graphs.

This file is copied into every export, and needs numpy and what runs the graphs: onnxruntime for `OnnxModel`, torch for
`TorchModel`. It knows nothing else of imageprompt; `export.json` beside it says what the graphs take and give.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass
class Reading:
    """What has been read so far.

    Args:
        logits: (rows, positions asked for, vocabulary).
        attention_mask: (rows, positions).
        cache: `past_key_values.<layer>.<key or value>`, (rows, heads, positions, width of a head).
        images: what a further step takes of the images.
    """

    logits: np.ndarray
    attention_mask: np.ndarray
    cache: Arrays
    images: Arrays


class ExportedModel:
    """An export and its loop; subclasses run the graphs.

    Args:
        folder: what `imageprompt export` wrote.

    Raises:
        ValueError: if the folder is no export, or has no graphs of this kind.
    """

    suffix = ""

    def __init__(self, folder: str | os.PathLike):
        folder = Path(folder)
        if not (folder / "export.json").is_file():
            raise ValueError(
                f"{folder} is no export: it has no export.json. `imageprompt export MODEL FOLDER` makes one."
            )
        self.description: dict[str, Any] = json.loads((folder / "export.json").read_text())
        self.generation: dict[str, Any] = json.loads((folder / "generation_config.json").read_text())
        self.files = {name: folder / f"{name}{self.suffix}" for name in self.description["graphs"]}
        for file in self.files.values():
            if not file.is_file():
                raise ValueError(f"{folder} holds {', '.join(self.description['verified'])}, but no {file.name}.")

    def run(self, name: str, inputs: Arrays) -> Arrays:
        """Run the graph `name`, "vision" or "decoder", on inputs as `export.json` describes them."""
        raise NotImplementedError

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        pixel_values: Any = None,
        max_new_tokens: int | None = None,
    ) -> np.ndarray:
        """The likeliest next tokens, one after the other: what `model.generate` gives with one beam and no sampling.

        Args:
            input_ids: (rows, positions), padded on the left, as the processor does.
            attention_mask: (rows, positions), 1 at tokens and 0 at padding.
            pixel_values: (images, channels, height, width), in the order of the placeholders, row by row.
            max_new_tokens: by default that of `generation_config.json`, or 20.

        Returns:
            (rows, positions + new), int64: the prompts and what follows, with padding behind an end.

        Raises:
            ValueError: if images and placeholders do not match, images have another size than those exported, padding
                is on the right, or prompt and answer need more positions than the model has.
        """
        if max_new_tokens is None:
            max_new_tokens = self.generation.get("max_new_tokens") or 20
        ids = np.asarray(input_ids, dtype=np.int64)
        reading = self.read(ids, attention_mask, pixel_values, new_tokens=max_new_tokens)
        ends = np.atleast_1d(self.generation["eos_token_id"])
        padding = self.generation.get("pad_token_id")
        padding = ends[0] if padding is None else padding
        going_on = np.ones(len(ids), dtype=bool)
        for step in range(max_new_tokens):
            if step:
                reading = self.step(ids[:, -1:], reading)
            logits = reading.logits[:, -1]
            logits[:, self.generation.get("suppress_tokens") or []] = -np.inf
            chosen = np.where(going_on, logits.argmax(-1), padding)
            ids = np.concatenate([ids, chosen[:, None]], axis=1)
            going_on &= ~np.isin(chosen, ends)
            if not going_on.any():
                break
        return ids

    def read(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        pixel_values: Any = None,
        *,
        new_tokens: int = 0,
        all_logits: bool = False,
    ) -> Reading:
        """Read the prompts; arguments and errors as for `generate`.

        Args:
            new_tokens: how many are to follow, for which positions must be left.
            all_logits: give those of every position, not only those of the last.
        """
        ids = np.asarray(input_ids, dtype=np.int64)
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, dtype=np.int64)
        placeholders = ids == self.description["image_token_id"]
        pixels = None if pixel_values is None else np.asarray(pixel_values, dtype=np.float32)
        self._check(mask, placeholders, pixels, new_tokens)
        images = self._images(placeholders, pixels)
        cache = {}
        for name, spec in self.description["graphs"]["decoder"]["inputs"].items():
            if name.startswith("past_key_values."):
                _, heads, _, width = spec["shape"]
                cache[name] = np.zeros((len(ids), heads, 0, width), np.float32)
        length = ids.shape[1]
        return self._decode(ids, mask, cache, images, np.arange(length) if all_logits else np.array([length - 1]))

    def step(self, input_ids: np.ndarray, reading: Reading) -> Reading:
        """Read one more token in each row, (rows, 1): words or padding, no placeholders."""
        mask = np.concatenate([reading.attention_mask, np.ones_like(input_ids)], axis=1)
        return self._decode(input_ids, mask, reading.cache, reading.images, np.array([0]))

    def _decode(self, ids: np.ndarray, mask: np.ndarray, cache: Arrays, images: Arrays, keep: np.ndarray) -> Reading:
        inputs = {"input_ids": ids, "attention_mask": mask, "logits_to_keep": keep, **images, **cache}
        outputs = self.run("decoder", inputs)
        logits = outputs.pop("logits")
        cache = {name.replace("present", "past_key_values"): array for name, array in outputs.items()}
        if "image_embeds" in images:  # they are in the cache now
            images = {"image_embeds": images["image_embeds"][:0]}
        else:
            images = {**images, "images_passed": images["images_passed"][:, -1:]}
        return Reading(logits, mask, cache, images)

    def _images(self, placeholders: np.ndarray, pixels: np.ndarray | None) -> Arrays:
        """What the decoder takes of the images: all in order, or with cross-attention side by side in their rows."""
        encoded = {} if pixels is None else self.run("vision", {"pixel_values": pixels})
        outputs = self.description["graphs"]["vision"]["outputs"]
        if self.description["fusion"] == "prefix":
            return encoded or {"image_embeds": np.zeros((0, *outputs["image_embeds"]["shape"][1:]), np.float32)}
        counts = placeholders.sum(-1)
        has_image = np.arange(max(1, counts.max())) < counts[:, None]  # attention over nothing is undefined
        images = {"images_passed": placeholders.cumsum(-1)}
        for name, spec in outputs.items():
            images[name] = np.zeros((*has_image.shape, *spec["shape"][1:]), np.float32)
            if encoded:
                images[name][has_image] = encoded[name]
        return images

    def _check(self, mask: np.ndarray, placeholders: np.ndarray, pixels: np.ndarray | None, new_tokens: int) -> None:
        expected = self.description["graphs"]["vision"]["inputs"]["pixel_values"]["shape"]
        if pixels is not None and (pixels.ndim != 4 or list(pixels.shape[1:]) != expected[1:]):
            raise ValueError(
                f"The model was exported for pixel_values of shape (images, {', '.join(map(str, expected[1:]))}), not "
                f"{pixels.shape}: use the processor in its folder, or export it with another image size."
            )
        each, count = self.description["image_seq_length"], 0 if pixels is None else len(pixels)
        if placeholders.sum() != each * count or (placeholders.sum(-1) % each).any():
            raise ValueError(
                f"{placeholders.sum()} placeholders for {count} images, which take {each} each in their row: pass "
                "input_ids and pixel_values from one call of the processor."
            )
        if mask.shape != placeholders.shape or not mask[:, -1].all():
            raise ValueError("New tokens follow the last position: pad on the left, with an attention_mask of all ids.")
        length, positions = int(mask.sum(-1).max()), self.description["max_positions"]
        if positions is not None and length + new_tokens > positions:
            raise ValueError(
                f"{length} tokens in a row and {new_tokens} new ones need more than the model's {positions} positions: "
                "shorten the text, pass fewer images, or lower `max_new_tokens`."
            )


class OnnxModel(ExportedModel):
    """The ONNX graphs, run by onnxruntime.

    Args:
        folder: what `imageprompt export` wrote.
        providers: where onnxruntime is to run them.
        session_options: an `onnxruntime.SessionOptions`, for example with fewer threads.
    """

    suffix = ".onnx"

    def __init__(
        self,
        folder: str | os.PathLike,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        session_options: Any = None,
    ):
        super().__init__(folder)
        import onnxruntime

        self.sessions = {
            name: onnxruntime.InferenceSession(str(file), session_options, providers=list(providers))
            for name, file in self.files.items()
        }

    def run(self, name: str, inputs: Arrays) -> Arrays:
        outputs = self.description["graphs"][name]["outputs"]
        return dict(zip(outputs, self.sessions[name].run(list(outputs), inputs), strict=True))


class TorchModel(ExportedModel):
    """The graphs of `torch.export`, run by torch."""

    suffix = ".pt2"

    def __init__(self, folder: str | os.PathLike):
        super().__init__(folder)
        import torch

        self.modules = {name: torch.export.load(file).module() for name, file in self.files.items()}

    def run(self, name: str, inputs: Arrays) -> Arrays:
        import torch

        graph = self.description["graphs"][name]
        tensors = [torch.from_numpy(np.ascontiguousarray(inputs[key])) for key in graph["inputs"]]
        with torch.no_grad():
            outputs = self.modules[name](*tensors)
        return {key: tensor.numpy() for key, tensor in zip(graph["outputs"], outputs, strict=True)}
