"""Texts for many images: `generate` in batches, without the prompt in the answer."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from .modeling import ImagePromptForConditionalGeneration
from .processing import ImagePromptProcessor


@torch.inference_mode()
def generate_texts(
    model: ImagePromptForConditionalGeneration,
    processor: ImagePromptProcessor,
    images: Iterable[Any],
    prompt: str | Sequence[str] = "",
    *,
    batch_size: int = 32,
    progress: bool = False,
    **generation: Any,
) -> list[str]:
    """The model's answer for each image, in order.

    Args:
        images: any number, loaded batch by batch; what an image may be: see [`ImagePromptImageProcessor`].
        prompt: one text for all, or one for each image.
        batch_size: images that are answered at once.
        progress: show a bar.
        generation: of `generate`: `max_new_tokens`, `num_beams`, …

    Raises:
        ValueError: if there are not as many prompts as images, or an image cannot be read.
    """
    model.eval()
    answers: list[str] = []
    total = len(images) if isinstance(images, Sequence) else None
    if not isinstance(prompt, str) and total is not None and len(prompt) != total:
        raise ValueError(f"{len(prompt)} prompts for {total} images: pass one for all, or one for each.")
    with tqdm(total=total, unit="image", disable=not progress) as bar:
        for batch in _batches(images, batch_size):
            done = len(answers)
            prompts = [prompt] * len(batch) if isinstance(prompt, str) else list(prompt[done : done + len(batch)])
            inputs = processor(images=batch, text=prompts, padding=True, return_tensors="pt").to(model.device)
            ids = model.generate(**inputs, **generation)[:, inputs["input_ids"].shape[1] :]
            answers += [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
            bar.update(len(batch))
    return answers


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def find_images(sources: Iterable[str]) -> list[str]:
    """Files and URLs as they are, and every image file of a folder, by name.

    Raises:
        ValueError: if a source does not exist, or a folder holds no image.
    """
    suffixes = image_suffixes()
    found = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files = sorted(str(file) for file in path.iterdir() if file.suffix.lower() in suffixes)
            if not files:
                raise ValueError(f"The folder {source} holds no images.")
            found += files
        elif path.exists() or source.startswith(("http://", "https://")):
            found.append(source)
        else:
            raise ValueError(f"There is no image {source}.")
    return found


def image_suffixes() -> set[str]:
    """How the names of image files end that can be read: ".jpg", …"""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
