"""Try timm's backbones as vision towers, from composition to a reloaded checkpoint, and write down what each gives.

    python scripts/sweep_backbones.py --output docs/backbones/families.json
    python scripts/sweep_backbones.py --every --max-parameters 40 --output docs/backbones/every.json

By default one model of each of timm's modules is tried, the smallest by parameters (of some, with fewer layers); with
`--every`, every architecture below a bound. Each is joined to a tiny GPT-2, from random weights. A file that is there
is completed, so that a long run can be broken off. `docs/backbones.md` shows the result.
"""

import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import transformers
import typer
from PIL import Image
from timm.models import is_model_in_modules
from tqdm import tqdm
from transformers import GPT2Config

from imageprompt import ImagePromptForConditionalGeneration, ImagePromptProcessor, compose
from imageprompt.provenance import provenance
from imageprompt.training.tokenizing import train_tokenizer
from imageprompt.vision import probe_features, resolve_backbone

SEED = 0
# Modules whose smallest model is too large for a quick try get fewer layers.
FEWER_LAYERS: dict[str, dict[str, Any]] = {
    "beit": {"depth": 2},
    "deepseek_vit": {"depth": 2},
    "gemma4_vit": {"depth": 2},
    "naflexvit": {"depth": 2},
    "qwen3_vit": {"depth": 2},
    "vision_transformer_sam": {"depth": 2},
}
TEXTS = ["A photo of a dog.", "Two cats"]


def main(
    output: Annotated[Path, typer.Option(help="JSON file; models that are in it already are not tried again.")],
    every: Annotated[bool, typer.Option("--every", help="All architectures, not one of each module.")] = False,
    max_parameters: Annotated[float, typer.Option(help="Leave out larger backbones, in millions.")] = 1000,
    max_pixels: Annotated[int, typer.Option(help="Leave out larger input images, in pixels a side.")] = 1024,
) -> None:
    transformers.utils.logging.disable_progress_bar()
    output.parent.mkdir(parents=True, exist_ok=True)
    results = earlier_results(output)
    sizes = {name: count_parameters(name) for name in tqdm(timm.list_models(), desc="counting")}
    names = sorted(sizes) if every else [smallest(module, sizes) for module in timm.list_modules()]
    left_out = {}
    for name in tqdm(names, desc="trying"):
        edge = max(resolve_backbone(name).pretrained_cfg["input_size"][1:])
        if sizes[name] > max_parameters * 1e6 or edge > max_pixels:
            left_out[name] = f"{sizes[name] / 1e6:.0f} M parameters, {edge} pixels"
        elif name not in results:
            module = module_of(name)
            model_args = {} if every else FEWER_LAYERS.get(module, {})
            size = {"parameters": sizes[name]} | ({"model_args": model_args} if model_args else {})
            results[name] = {"module": module, **size, **try_backbone(name, model_args)}
            gc.collect()
        write(output, results, left_out)
    if not every:
        print(table(results))


def table(results: dict[str, Any]) -> str:
    """Markdown, a line for each module."""
    lines = ["| module | tried with | layout | grid | width | notes |", "| --- " * 6 + "|"]
    for name, result in sorted(results.items(), key=lambda item: item[1]["module"]):
        if "error" in result:
            lines.append(f"| {result['module']} | {name} | | | | {result['error']} |")
            continue
        notes = []
        if model_args := result.get("model_args"):
            notes.append("with " + ", ".join(f"{key}={value}" for key, value in model_args.items()))
        if result["prefix_tokens"]:
            notes.append(f"{result['prefix_tokens']} class or register tokens left out")
        if result["feature_layer"] is not None:
            notes.append(f"`feature_layer={result['feature_layer']}`")
        if not result["checkpointing"]:
            notes.append("no activation checkpointing")
        if not result["summary"]:
            notes.append("no summary")
        if not result["earlier_blocks"]:
            notes.append("no earlier blocks")
        grid = "x".join(map(str, result["grid"]))
        size = "x".join(map(str, result["input_size"][1:]))
        lines.append(
            f"| {result['module']} | {name} | {result['layout']} | {grid} of {size} pixels | {result['width']} | "
            f"{'; '.join(notes)} |"
        )
    return "\n".join(lines)


def earlier_results(output: Path) -> dict[str, Any]:
    """What a run with the same versions has found; what failed is tried again."""
    saved = json.loads(output.read_text()) if output.exists() else {}
    if saved.get("versions") != provenance()["versions"]:
        return {}
    return {name: result for name, result in saved["models"].items() if "error" not in result}


def write(output: Path, results: dict[str, Any], left_out: dict[str, str]) -> None:
    facts = {
        **provenance(),
        "seed": SEED,
        "works": sum("error" not in result for result in results.values()),
        "tried": len(results),
        "left_out": left_out,
    }
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(results[name])}" for name in sorted(results))
    output.write_text(json.dumps(facts, indent=1).removesuffix("\n}") + f',\n "models": {{\n{rows}\n }}\n}}\n')


def module_of(name: str) -> str:
    return next(module for module in timm.list_modules() if is_model_in_modules(name, [module]))


def count_parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name, num_classes=0).parameters())


def smallest(module: str, sizes: dict[str, int]) -> str:
    return min(timm.list_models(module=module), key=lambda name: (sizes[name], name))


def try_backbone(name: str, model_args: dict[str, Any]) -> dict[str, Any]:
    """What the backbone gives, or the first thing that does not hold, under `error`."""
    start = time.perf_counter()
    torch.manual_seed(SEED)
    try:
        return check(name, model_args) | {"seconds": round(time.perf_counter() - start, 1)}
    except Exception as error:  # whatever it is belongs in the table
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def check(name: str, model_args: dict[str, Any]) -> dict[str, Any]:
    tokenizer = train_tokenizer(TEXTS, vocab_size=384)
    special = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    text_config = GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=8192, vocab_size=len(tokenizer), **special)
    model, processor = compose(
        name, text_config, tokenizer=tokenizer, pretrained=False, model_args=model_args, connector="mlp"
    )
    config = model.config
    rows = [(noise(seed), text) for seed, text in enumerate(TEXTS)]

    batch = processor(
        images=[image for image, _ in rows],
        text=[text for _, text in rows],
        suffix=[" a dog", " cats"],
        padding=True,
        return_tensors="pt",
    )
    model.train()
    loss = model(**batch).loss
    loss.backward()
    tower = list(model.model.vision_tower.parameters())
    learning = [parameter for parameter in tower if parameter.requires_grad]
    expect(bool(loss.isfinite()), "the loss is not finite")
    expect(all(parameter.grad is not None for parameter in learning), "some parameters get no gradient")
    expect(all(bool(parameter.grad.isfinite().all()) for parameter in learning), "some gradients are not finite")
    expect(any(bool(parameter.grad.any()) for parameter in learning), "no gradient reaches the tower")

    model.zero_grad()
    model.eval()
    inputs = [processor(images=image, text=text, return_tensors="pt") for image, text in rows]
    together = processor(
        images=[image for image, _ in rows], text=[text for _, text in rows], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = [model(**row).logits[0, -1] for row in inputs]
        distance = (torch.stack(logits) - model(**together).logits[:, -1]).abs().max().item()
        scale = torch.stack(logits).abs().max().clamp(min=1).item()
        expect(distance <= 1e-4 * scale, f"rows differ from the batch by {distance:.2g}")
        ids = model.generate(**together, max_new_tokens=4)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            loaded = ImagePromptForConditionalGeneration.from_pretrained(folder)
            again = ImagePromptProcessor.from_pretrained(folder)
        expect(same_weights(model, loaded), "the reloaded weights differ")
        # The same weights at other addresses may take other kernels, so not to the last bit.
        reloaded = (loaded(**inputs[0]).logits[0, -1] - logits[0]).abs().max().item()
        expect(reloaded <= 1e-5 * scale, f"the reloaded model differs by {reloaded:.2g}")
        expect(
            torch.equal(loaded.generate(**together, max_new_tokens=4), ids), "the reloaded model says something else"
        )
    pixels = again(images=rows[0][0], text=rows[0][1], return_tensors="pt")["pixel_values"]
    expect(torch.equal(pixels, inputs[0]["pixel_values"]), "the reloaded processor gives other pixels")
    expect(list(pixels.shape[1:]) == config.vision_config.pretrained_cfg["input_size"], "the pixels have another size")

    return {
        "input_size": config.vision_config.pretrained_cfg["input_size"],
        "layout": config.feature_layout,
        "grid": config.feature_grid,
        "width": config.feature_size,
        "prefix_tokens": config.num_prefix_tokens,
        "feature_layer": config.feature_layer,
        "unused_parameters": len(config.unused_parameters),
        "checkpointing": bool(model.model.vision_tower.supports_gradient_checkpointing),
        "earlier_blocks": has_earlier_blocks(config),
        "summary": gives(config, "pooled"),
        "row_distance": float(f"{distance:.1e}"),
        "reload_distance": float(f"{reloaded:.1e}"),
    }


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (90, 120, 3), dtype=np.uint8))


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def same_weights(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    state, loaded = model.state_dict(), other.state_dict()
    return state.keys() == loaded.keys() and all(torch.equal(value, loaded[name]) for name, value in state.items())


def gives(config, feature_layer) -> bool:
    vision = config.vision_config
    try:
        probe_features(vision.architecture, vision.model_args, vision.pretrained_cfg["input_size"], feature_layer)
    except ValueError:
        return False
    return True


def has_earlier_blocks(config) -> bool:
    return gives(config, 0) and gives(config, [-2, -1])


if __name__ == "__main__":
    typer.run(main)
