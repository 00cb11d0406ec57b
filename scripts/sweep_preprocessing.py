"""Compare the image processor with timm's evaluation transform over every configuration in timm's registry.

`python scripts/sweep_preprocessing.py` takes a few minutes and writes docs/preprocessing/sweep.json, which
docs/preprocessing.md shows. Every architecture is compared with its own settings, with its test-time size where timm
has one, with each crop mode, and with inputs that are not square; nothing is downloaded. The figure is the largest
difference of any value, so 0.0 means the same bits. Configurations that share settings are run once.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import typer
from PIL import Image
from timm.data import create_transform, resolve_data_config
from tqdm.auto import tqdm
from transformers import AutoImageProcessor

from imageprompt import ImagePromptImageProcessor
from imageprompt.provenance import provenance
from imageprompt.vision import resolve_backbone

SEED = 0
CROP_MODES = ("center", "squash", "border")
# (width, height). timm resizes a line in border mode to no rows at all, and fails.
PICTURES = {"landscape": (500, 375), "portrait": (233, 401), "small": (70, 51), "tiny": (3, 2)}
LINE = (3000, 1)


def picture(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Noise, on which filters and roundings differ most."""
    pixels = np.random.default_rng(SEED).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def variants(registered: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of ways to use a registered configuration, and what each changes in it."""
    yield "as registered", {}
    if registered.get("test_input_size") or registered.get("test_crop_pct"):
        at_test = {key: registered.get(f"test_{key}") for key in ("input_size", "crop_pct")}
        yield "at its test size", {key: value for key, value in at_test.items() if value}
    channels, height, width = registered["input_size"]
    for mode in CROP_MODES:
        yield mode, {"crop_mode": mode}
        yield f"{mode}, wide", {"crop_mode": mode, "input_size": (channels, height, width * 3 // 2)}
        yield f"{mode}, tall", {"crop_mode": mode, "input_size": (channels, height * 4 // 3, width)}


def names() -> list[str]:
    """All pretrained configurations, and the default one of each architecture for which timm has no weights."""
    pretrained = timm.list_pretrained()
    with_weights = {name.partition(".")[0] for name in pretrained}
    return pretrained + [name for name in timm.list_models() if name not in with_weights]


def settings_of(name: str, changes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that imageprompt and timm resolve for a name, each by its own way."""
    registered = timm.get_pretrained_cfg(name).to_dict()
    return resolve_backbone(name, preprocessing=changes).pretrained_cfg, resolve_data_config(changes, registered)


def run(process: Callable[[Image.Image], torch.Tensor], image: Image.Image) -> torch.Tensor | None:
    """The pixels, or None where the picture is refused."""
    try:
        return process(image)
    except ValueError:
        return None


def pixels_of(processor: ImagePromptImageProcessor, image: Image.Image) -> torch.Tensor:
    return processor(image, return_tensors="pt")["pixel_values"][0]


@dataclass
class Comparison:
    """What one pair of settings gives. `difference` is inf where only one of the two refuses a picture."""

    difference: float = 0.0
    reloaded_equal: bool = True
    refused_by_both: list[str] = field(default_factory=list)


def compare(
    ours: dict[str, Any],
    timms: dict[str, Any],
    pictures: dict[str, tuple[int, int]] = PICTURES,
    reload: bool = False,
) -> Comparison:
    """Run both on pictures of these sizes; with `reload`, also a processor that was saved and loaded."""
    processors = [ImagePromptImageProcessor.from_pretrained_cfg(ours)]
    if reload:
        with tempfile.TemporaryDirectory() as folder:
            processors[0].save_pretrained(folder)
            processors.append(AutoImageProcessor.from_pretrained(folder, trust_remote_code=False))
    transform = create_transform(**timms, is_training=False)
    result = Comparison()
    for name, size in (pictures | ({"line": LINE} if ours["crop_mode"] == "border" else {})).items():
        image = picture(size)
        expected = run(transform, image)
        mine, *reloaded = (run(partial(pixels_of, processor), image) for processor in processors)
        if expected is None or mine is None:
            if expected is not mine:
                result.difference = float("inf")
            result.refused_by_both.append(name)
            continue
        same_shape = mine.shape == expected.shape
        difference = (mine - expected).abs().max().item() if same_shape else float("inf")
        result.difference = max(result.difference, difference)
        result.reloaded_equal &= all(other is not None and torch.equal(other, mine) for other in reloaded)
    return result


def modes() -> dict[str, float]:
    """Levels (of 255) by which pictures that are not plain RGB differ from `transform(image.convert("RGB"))`."""
    size = PICTURES["small"]
    alpha = picture(size, "L")
    deep = Image.fromarray(np.asarray(alpha).astype(np.uint16) * 257)
    turned = picture(size)
    turned.getexif()[0x0112] = 3
    pictures = {mode: picture(size, mode) for mode in ("L", "1", "P", "CMYK", "YCbCr", "HSV")}
    pictures["RGBA, opaque"] = picture(size, "RGBA")
    pictures["RGBA, transparent"] = Image.merge("RGBA", [*picture(size).split(), alpha])
    pictures["LA, transparent"] = Image.merge("LA", [alpha, alpha])
    pictures["I;16"] = deep
    pictures["I"] = Image.fromarray(np.asarray(alpha).astype(np.int32))
    pictures["F, 0 to 1"] = Image.fromarray(np.asarray(alpha).astype(np.float32) / 255)
    pictures["RGB, turned by EXIF"] = turned
    processor = ImagePromptImageProcessor(image_mean=[0.0] * 3, image_std=[1.0] * 3)
    transform = create_transform(**processor.pretrained_cfg, is_training=False)
    return {
        name: round(255 * (pixels_of(processor, image) - transform(image.convert("RGB"))).abs().max().item())
        for name, image in pictures.items()
    }


def sweep(progress: bool = True) -> dict[str, Any]:
    """All names in all variants. Settings that were seen before are not run again."""
    compared: dict[str, Comparison] = {}
    counts: dict[str, Counter] = {}
    groups: Counter = Counter()
    unequal: dict[str, list[str]] = {}
    distinct: dict[str, set[str]] = {}
    refused: dict[str, Counter] = {}
    for name in tqdm(names(), disable=not progress):
        for variant, changes in variants(timm.get_pretrained_cfg(name).to_dict()):
            ours, timms = settings_of(name, changes)
            key = json.dumps([ours, timms])
            if key not in compared:
                compared[key] = compare(ours, timms, reload=True)
            result = compared[key]
            equal = result.difference == 0 and result.reloaded_equal
            counts.setdefault(variant, Counter()).update(configurations=1, equal=equal)
            distinct.setdefault(variant, set()).add(key)
            refused.setdefault(variant, Counter()).update(result.refused_by_both)
            if variant == "as registered":
                shape = "square" if ours["input_size"][1] == ours["input_size"][2] else "not square"
                groups[f"{ours['crop_mode']}, {ours['interpolation']}, {shape}"] += 1
            if not equal:
                unequal.setdefault(variant, []).append(name)
    return {
        "distinct_settings": len(compared),
        "largest_difference": max(result.difference for result in compared.values()),
        "registered_settings": dict(groups.most_common()),
        "variants": {
            variant: {
                "configurations": count["configurations"],
                "distinct_settings": len(distinct[variant]),
                "equal": count["equal"],
                "pictures_refused_by_both": dict(refused[variant]),
            }
            for variant, count in counts.items()
        },
        "unequal": unequal,
    }


def main(
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("docs/preprocessing/sweep.json"),
) -> None:
    """Sweep timm's registry and write what came out."""
    torch.set_num_threads(1)
    pretrained = timm.list_pretrained()
    report = {
        "pretrained_configurations": len(pretrained),
        "architectures_without_weights": len(names()) - len(pretrained),
        **sweep(),
        "pictures": PICTURES | {"line (border mode only)": LINE},
        "levels_off_convert_rgb": modes(),
        "not_offered": {
            "NaFlex, a sequence of patches in the picture's own aspect": [n for n in pretrained if "naflex" in n],
        },
        "seed": SEED,
        **provenance(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    typer.echo(f"{report['largest_difference']} is the largest difference; see {output}.")


if __name__ == "__main__":
    typer.run(main)
