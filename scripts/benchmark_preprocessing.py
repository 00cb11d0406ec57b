"""Time the image processor against timm's own transform, side by side in one process.

`python scripts/benchmark_preprocessing.py` takes about a minute and writes docs/preprocessing/benchmark.json, which
docs/preprocessing.md shows. The peer is what one would write with timm alone: open, convert to RGB, transform, stack.
In every round each side processes the same photos, in turns first, and what counts is the ratio of their CPU times.
"""

import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import typer
from PIL import Image, ImageFilter
from timm.data import create_transform, resolve_data_config
from tqdm.auto import tqdm

from imageprompt import ImagePromptImageProcessor
from imageprompt.provenance import provenance

BACKBONE = "vit_small_patch16_224.augreg_in21k_ft_in1k"
NUM_PHOTOS = 32
SIZES = [(160, 160), (500, 375)]  # (width, height)


def load_photos(dataset: Path | None) -> list[Image.Image]:
    """The first photos of a data set's validation split, or coloured clouds where there is none."""
    if dataset is not None:
        from datasets import load_dataset

        return [
            photo.convert("RGB") for photo in load_dataset(str(dataset), split=f"validation[:{NUM_PHOTOS}]")["image"]
        ]
    random = np.random.default_rng(0)
    small = [Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)) for _ in range(NUM_PHOTOS)]
    return [image.resize(SIZES[-1]).filter(ImageFilter.GaussianBlur(2)) for image in small]


def sources(photos: list[Image.Image], folder: Path) -> dict[str, tuple[list[Any], Callable[[Any], Image.Image]]]:
    """The photos in every form, and how one opens that form for timm's transform."""

    def opened(file: Any) -> Image.Image:
        return Image.open(file).convert("RGB")

    paths = [folder / f"{index}.jpg" for index in range(len(photos))]
    for photo, path in zip(photos, paths, strict=True):
        photo.save(path, quality=90)
    return {
        "PIL image": (photos, lambda image: image),
        "numpy array": ([np.asarray(photo) for photo in photos], Image.fromarray),
        "JPEG file": (paths, opened),
        "JPEG bytes": ([path.read_bytes() for path in paths], lambda data: opened(io.BytesIO(data))),
    }


def compare(ours: Callable[[], Any], peers: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Ratio of the CPU times, ours by the peer's: median and quartiles over rounds, and the median times."""
    times: dict[Callable, list[float]] = {ours: [], peers: []}
    for index in range(-1, rounds):  # the first round warms up
        for side in (ours, peers) if index % 2 else (peers, ours):
            start = time.process_time()
            side()
            if index >= 0:
                times[side].append(time.process_time() - start)
    ratios = [mine / theirs for mine, theirs in zip(times[ours], times[peers], strict=True)]
    first, median, third = statistics.quantiles(ratios, n=4)
    milliseconds = [1000 * statistics.median(times[side]) / NUM_PHOTOS for side in (ours, peers)]
    return {
        "ratio": round(median, 3),
        "quartiles": [round(first, 3), round(third, 3)],
        "ms_per_photo": [round(value, 3) for value in milliseconds],
    }


def benchmark(photos: list[Image.Image], rounds: int) -> list[dict[str, Any]]:
    """All sizes, sources and batch sizes."""
    cfg = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(BACKBONE).to_dict())
    processor, transform = ImagePromptImageProcessor.from_pretrained_cfg(cfg), create_transform(**cfg)

    def ours(batches: list[list[Any]]) -> list[torch.Tensor]:
        return [processor(batch, return_tensors="pt")["pixel_values"] for batch in batches]

    def peers(batches: list[list[Any]], opening: Callable[[Any], Image.Image]) -> list[torch.Tensor]:
        return [torch.stack([transform(opening(item)) for item in batch]) for batch in batches]

    results = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(SIZES) * 8) as progress:
        for size in SIZES:
            resized = [photo.resize(size, Image.Resampling.BICUBIC) for photo in photos]
            for source, (items, opening) in sources(resized, Path(folder)).items():
                for batch_size in (1, NUM_PHOTOS):
                    batches = [items[start : start + batch_size] for start in range(0, NUM_PHOTOS, batch_size)]
                    sides = partial(ours, batches), partial(peers, batches, opening)
                    assert all(map(torch.equal, sides[0](), sides[1]()))
                    case = {"photo_size": list(size), "source": source, "batch_size": batch_size}
                    results.append(case | compare(*sides, rounds))
                    progress.update()
    return results


def main(
    photos: Annotated[
        Path | None, typer.Option(help="Data set with real photos; without it, they are made up.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("docs/preprocessing/benchmark.json"),
    rounds: Annotated[int, typer.Option(help="Rounds per case.", min=3)] = 25,
) -> None:
    """Time both sides and write the ratios."""
    torch.set_num_threads(1)
    report = {
        "results": benchmark(load_photos(photos), rounds),
        "backbone": BACKBONE,
        "photos": f"{NUM_PHOTOS} of {photos.name}" if photos else f"{NUM_PHOTOS} made up",
        "rounds": rounds,
        **provenance(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    ratios = [result["ratio"] for result in report["results"]]
    typer.echo(f"ours / timm's: {min(ratios)} to {max(ratios)}; see {output}.")


if __name__ == "__main__":
    typer.run(main)
