"""Texts for many images: `generate` in batches, without the prompt in the answer.

`generate_texts` takes images of any kind and returns all answers; `stream_texts` takes as many files as there are, has
other processes read them while the model answers, and gives each answer when it comes.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
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
    if total is not None:
        _check_prompts(prompt, total)
    with tqdm(total=total, unit="image", disable=not progress) as bar:
        for batch in _batches(images, batch_size):
            done = len(answers)
            prompts = [prompt] * len(batch) if isinstance(prompt, str) else list(prompt[done : done + len(batch)])
            inputs = processor(images=batch, text=prompts, padding=True, return_tensors="pt")
            answers += _answers(model, processor, inputs, generation)
            bar.update(len(batch))
    return answers


@torch.inference_mode()
def stream_texts(
    model: ImagePromptForConditionalGeneration,
    processor: ImagePromptProcessor,
    images: Sequence[str],
    prompt: str | Sequence[str] = "",
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    **generation: Any,
) -> Iterator[tuple[int, str | ValueError]]:
    """The model's answers as they come, each with the number of its image.

    Images with prompts of like length are answered together, so that none is padded much. An image that cannot be read
    gives its error and stops nothing.

    Args:
        images: files or URLs.
        prompt: one text for all, or one for each image.
        batch_size: images that are answered at once.
        num_workers: processes that read images while the model answers; 0 reads them in this one.
        generation: of `generate`: `max_new_tokens`, `num_beams`, …

    Raises:
        ValueError: if there are not as many prompts as images.
    """
    _check_prompts(prompt, len(images))
    prompts = [prompt] * len(images) if isinstance(prompt, str) else list(prompt)
    lengths = {text: len(processor.tokenizer(text).input_ids) for text in set(prompts)}
    order = sorted(range(len(images)), key=lambda index: lengths[prompts[index]])
    items: Any = [(index, images[index], prompts[index]) for index in order]
    model.eval()
    loader: DataLoader = DataLoader(items, batch_size, num_workers=num_workers, collate_fn=partial(_read, processor))
    for inputs, places, errors in loader:
        yield from errors
        if places:
            yield from zip(places, _answers(model, processor, inputs, generation), strict=True)


def _check_prompts(prompt: str | Sequence[str], num_images: int) -> None:
    if not isinstance(prompt, str) and len(prompt) != num_images:
        raise ValueError(f"{len(prompt)} prompts for {num_images} images: pass one for all, or one for each.")


def _read(
    processor: ImagePromptProcessor, items: list[tuple[int, str, str]]
) -> tuple[Any, list[int], list[tuple[int, ValueError]]]:
    """(model inputs, the numbers of their images, numbers and errors of those that cannot be read)."""
    errors = []
    try:
        inputs = _inputs(processor, items)
    except ValueError:  # which image it is shows one by one
        readable = []
        for item in items:
            try:
                _inputs(processor, [item])
                readable.append(item)
            except ValueError as error:
                errors.append((item[0], error))
        items = readable
        inputs = _inputs(processor, items) if items else None
    return inputs, [index for index, _, _ in items], errors


def _inputs(processor: ImagePromptProcessor, items: list[tuple[int, str, str]]) -> Any:
    _, images, texts = zip(*items, strict=True)
    return processor(images=list(images), text=list(texts), padding=True, return_tensors="pt")


def _answers(model, processor, inputs, generation: dict[str, Any]) -> list[str]:
    inputs = inputs.to(model.device)
    ids = model.generate(**inputs, **generation)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def default_length(model: ImagePromptForConditionalGeneration, generation: dict[str, Any]) -> dict[str, Any]:
    """The settings of `generate`, with 30 new tokens where neither they nor the model's own say how many.

    The library would stop at 20, in the middle of many a sentence.
    """
    own = model.generation_config
    if "max_new_tokens" in generation or own.max_new_tokens is not None or own.max_length is not None:
        return generation
    return generation | {"max_new_tokens": 30}


def find_images(sources: Iterable[str], *, recursive: bool = False) -> list[str]:
    """Files and URLs as they are, and every image file of a folder, by name.

    Args:
        recursive: also those in the folder's folders.

    Raises:
        ValueError: if a source does not exist, or a folder holds no image.
    """
    suffixes = image_suffixes()
    found = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            there = path.rglob("*") if recursive else path.iterdir()
            files = sorted(str(file) for file in there if file.suffix.lower() in suffixes)
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
