"""What compressing costs and saves: size, speed and accuracy of one trained model in every compressed form.

`python scripts/measure_compression.py` trains a small ViT with a small GPT-2 on real handwritten digits (those of the
quickstart), compresses it in every way, fine-tunes what was pruned, lets each model answer for the held-out scans, and
writes docs/compression/digits.json and the table of docs/compression.md. Speed is the time to answer a batch, in turns
with the original in the same process.
"""

import argparse
import json
import statistics
import time
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import GPT2Config, Trainer, TrainingArguments, set_seed

from imageprompt import ImagePromptCollator, ImagePromptForConditionalGeneration, ImagePromptProcessor, compose
from imageprompt.compression import KeepZeros, compress, share_of_zeros
from imageprompt.configuration import PARTS
from imageprompt.generating import generate_texts
from imageprompt.provenance import provenance
from imageprompt.training.quickstart import PROMPT, scans
from imageprompt.training.tokenizing import train_tokenizer

DOCS = Path(__file__).parents[1] / "docs"
PAGE, RESULTS = DOCS / "compression.md", DOCS / "compression" / "digits.json"
TABLE = ("<!-- table -->\n", "<!-- /table -->")
SEED = 0
VISION = {"img_size": 32, "patch_size": 8, "depth": 4}  # of vit_tiny, 192 wide
TEXT = {"n_layer": 3, "n_embd": 256, "n_head": 4, "n_positions": 64}
TRAINING = {"num_train_epochs": 16.0, "learning_rate": 1e-3}
TUNING = {"num_train_epochs": 4.0, "learning_rate": 3e-4}
BATCH = 60
# Name in the table: what is made of which model, with which settings of `compress`.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("original", {"quantize": "int8"}),
    "int8, all parts": ("original", {"quantize": "int8", "parts": PARTS}),
    "int8-dynamic, all parts": ("original", {"quantize": "int8-dynamic", "parts": PARTS}),
    "int4": ("original", {"quantize": "int4"}),
    "int4, all parts": ("original", {"quantize": "int4", "parts": PARTS}),
    "half pruned": ("original", {"share": 0.5}),
    "half pruned, trained on": ("half pruned", {}),
    "half pruned, trained on, int8, all parts": ("half pruned, trained on", {"quantize": "int8", "parts": PARTS}),
    "80% pruned": ("original", {"share": 0.8}),
    "80% pruned, trained on": ("80% pruned", {}),
}


def fit(model, processor, output: Path, settings: dict[str, float], callbacks=None) -> None:
    """Train on the scans and save model and processor."""
    args = TrainingArguments(
        str(output),
        per_device_train_batch_size=32,
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=50,
        seed=SEED,
        use_cpu=True,
        dataloader_pin_memory=False,
        **settings,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=scans()[0],
        data_collator=ImagePromptCollator(processor),
        processing_class=processor,
        callbacks=callbacks,
    )
    trainer.train()
    trainer.save_model()


def train_original(folder: Path) -> None:
    set_seed(SEED)
    tokenizer = train_tokenizer([row["text"] + row["suffix"] for row in scans()[0]], vocab_size=384)
    model, processor = compose(
        "vit_tiny_patch16_224",
        GPT2Config(vocab_size=len(tokenizer), **TEXT),
        tokenizer=tokenizer,
        pretrained=False,
        model_args=VISION,
        preprocessing={"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0},
    )
    fit(model, processor, folder, TRAINING)


def make_forms(folder: Path) -> None:
    """Every form that is not there yet, in a folder of its name."""
    for name, (source, settings) in FORMS.items():
        if (folder / name / "config.json").exists():
            continue
        print(f"Making: {name}")
        if settings:
            compress(str(folder / source), folder / name, **settings)
        else:
            set_seed(SEED)
            model = ImagePromptForConditionalGeneration.from_pretrained(folder / source)
            processor = ImagePromptProcessor.from_pretrained(folder / source)
            fit(model, processor, folder / name, TUNING, [KeepZeros()])


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Size, speed and accuracy of every form; times are divided by the original's of the same round."""
    held_out = scans()[1]
    images, expected = [row["image"] for row in held_out], [row["suffix"].strip() for row in held_out]
    names = ["original", *FORMS]
    models = {name: ImagePromptForConditionalGeneration.from_pretrained(folder / name) for name in names}
    processor = ImagePromptProcessor.from_pretrained(folder / "original")
    results: dict[str, Any] = {}
    for name, model in models.items():
        answers = generate_texts(model, processor, images, PROMPT, batch_size=BATCH, max_new_tokens=6)
        weights = (folder / name / "model.safetensors").read_bytes()
        results[name] = {
            "bytes": len(weights),
            "zipped_bytes": len(zlib.compress(weights)),
            "right": sum(a == b for a, b in zip(answers, expected, strict=True)),
        }
        if "pruned" in name and "int" not in name:
            results[name]["share_of_zeros"] = share_of_zeros(model)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            generate_texts(model, processor, images[:BATCH], PROMPT, batch_size=BATCH, max_new_tokens=6)
            seconds[name].append(time.perf_counter() - start)
    for name in names:
        ratios = sorted(own / original for own, original in zip(seconds[name], seconds["original"], strict=True))
        quartiles = statistics.quantiles(ratios, n=4)
        results[name]["time_over_original"] = {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]]}
    return {
        "forms": results,
        "held_out": len(expected),
        "parameters": models["original"].num_parameters(),
        "seconds_for_a_batch": statistics.median(seconds["original"]),
        "settings": {
            "vision": {"vit_tiny_patch16_224": VISION},
            "text": TEXT,
            "training": TRAINING,
            "tuning": TUNING,
            "batch": BATCH,
            "rounds": rounds,
            "seed": SEED,
        },
    }


def table(result: dict[str, Any]) -> str:
    """The rows of docs/compression.md."""
    lines = ["| form | file, MB | zipped, MB | time to answer | right answers |", "| --- | --- | --- | --- | --- |"]
    for name, form in result["forms"].items():
        low, high = form["time_over_original"]["quartiles"]
        speed = "1" if name == "original" else f"{form['time_over_original']['median']:.2f} ({low:.2f} to {high:.2f})"
        right = f"{form['right']} ({form['right'] / result['held_out']:.1%})"
        size = f"{form['bytes'] / 1e6:.1f} | {form['zipped_bytes'] / 1e6:.1f}"
        lines.append(f"| {name} | {size} | {speed} | {right} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/compression"), help="For the models; kept.")
    parser.add_argument("--rounds", type=int, default=15, help="Turns of the timing.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not (args.folder / "original" / "config.json").exists():
        train_original(args.folder / "original")
    make_forms(args.folder)
    result = measure(args.folder, args.rounds) | provenance()
    result["versions"] |= {name: version(name) for name in ("bitsandbytes", "torchao")}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    if args.output == RESULTS:
        before, rest = PAGE.read_text().split(TABLE[0])
        PAGE.write_text(before + TABLE[0] + table(result) + TABLE[1] + rest.split(TABLE[1])[1])


if __name__ == "__main__":
    main()
