"""What compressing costs and saves: size, speed and accuracy of the quickstart's model in every compressed form.

`python scripts/measure_compression.py runs/quickstart` takes the model that `imageprompt quickstart` has trained,
compresses it in every way, fine-tunes what was pruned, lets each model answer for the held-out scans, and writes
docs/compression/digits.json and the table of docs/compression.md. Speed is the processor's time to answer a batch on
one thread, which other work on the machine disturbs least, in turns with the original in the same process.
"""

import argparse
import json
import statistics
import tempfile
import time
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments, set_seed

from imageprompt import ImagePromptCollator, ImagePromptForConditionalGeneration, ImagePromptProcessor
from imageprompt.compression import KeepZeros, compress, share_of_zeros
from imageprompt.generating import generate_texts
from imageprompt.provenance import provenance
from imageprompt.training.quickstart import PROMPT, scans

DOCS = Path(__file__).parents[1] / "docs"
PAGE, RESULTS = DOCS / "compression.md", DOCS / "compression" / "digits.json"
TABLE = ("<!-- table -->\n", "<!-- /table -->")
SEED = 0
TUNING = {"num_train_epochs": 2.0, "learning_rate": 3e-4}
BATCH = 60
# Name in the table: what is made of which model, with which settings of `compress`.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("original", {"quantize": "int8"}),
    "int8-dynamic": ("original", {"quantize": "int8-dynamic"}),
    "int4": ("original", {"quantize": "int4"}),
    "half pruned": ("original", {"share": 0.5}),
    "half pruned, trained on": ("half pruned", {}),
    "80% pruned": ("original", {"share": 0.8}),
    "80% pruned, trained on": ("80% pruned", {}),
    "80% pruned, trained on, int8": ("80% pruned, trained on", {"quantize": "int8"}),
}


def make_form(model: Path, output: Path, settings: dict[str, Any]) -> None:
    """Compress, or without settings train on."""
    if settings:
        compress(str(model), output, **settings)
        return
    set_seed(SEED)
    args = TrainingArguments(
        str(output),
        per_device_train_batch_size=32,
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        remove_unused_columns=False,
        save_strategy="no",
        seed=SEED,
        use_cpu=True,
        dataloader_pin_memory=False,
        **TUNING,
    )
    processor = ImagePromptProcessor.from_pretrained(model)
    trainer = Trainer(
        ImagePromptForConditionalGeneration.from_pretrained(model),
        args,
        train_dataset=scans()[0],
        data_collator=ImagePromptCollator(processor),
        processing_class=processor,
        callbacks=[KeepZeros()],
    )
    trainer.train()
    trainer.save_model()


def measure(folders: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Size, speed and accuracy of every form; times are divided by the original's of the same round."""
    held_out = scans()[1]
    images, expected = [row["image"] for row in held_out], [row["suffix"].strip() for row in held_out]
    models = {name: ImagePromptForConditionalGeneration.from_pretrained(folder) for name, folder in folders.items()}
    processor = ImagePromptProcessor.from_pretrained(folders["original"])
    results: dict[str, Any] = {}
    for name, model in models.items():
        answers = generate_texts(model, processor, images, PROMPT, batch_size=BATCH, max_new_tokens=6)
        file = folders[name] / "model.safetensors"
        tensors = load_file(file)
        results[name] = {
            "bytes": file.stat().st_size,
            "language_model_bytes": sum(value.nbytes for key, value in tensors.items() if "language_model" in key),
            "zipped_bytes": len(zlib.compress(file.read_bytes())),
            "right": sum(a == b for a, b in zip(answers, expected, strict=True)),
        }
        if "pruned" in name and "int" not in name:
            results[name]["share_of_zeros"] = share_of_zeros(model)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            start = time.process_time()
            generate_texts(model, processor, images[:BATCH], PROMPT, batch_size=BATCH, max_new_tokens=6)
            seconds[name].append(time.process_time() - start)
    for name in models:
        ratios = sorted(own / original for own, original in zip(seconds[name], seconds["original"], strict=True))
        quartiles = statistics.quantiles(ratios, n=4)
        results[name]["time_over_original"] = {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]]}
    return {
        "forms": results,
        "held_out": len(expected),
        "parameters": models["original"].num_parameters(),
        "seconds_for_a_batch": statistics.median(seconds["original"]),
        "settings": {"tuning": TUNING, "batch": BATCH, "rounds": rounds, "seed": SEED},
    }


def table(result: dict[str, Any]) -> str:
    """The rows of docs/compression.md."""
    lines = [
        "| form | file, MB | zipped, MB | language model, MB | time to answer | right answers |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, form in result["forms"].items():
        low, high = form["time_over_original"]["quartiles"]
        speed = "1" if name == "original" else f"{form['time_over_original']['median']:.2f} ({low:.2f} to {high:.2f})"
        right = f"{form['right']} ({form['right'] / result['held_out']:.1%})"
        sizes = (form[key] / 1e6 for key in ("bytes", "zipped_bytes", "language_model_bytes"))
        lines.append(f"| {name} | {' | '.join(f'{size:.2f}' for size in sizes)} | {speed} | {right} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="What `imageprompt quickstart` has made.")
    parser.add_argument("--rounds", type=int, default=15, help="Turns of the timing.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folders = {"original": args.model} | {name: Path(folder, name) for name in FORMS}
        for name, (source, settings) in FORMS.items():
            print(f"Making: {name}", flush=True)
            make_form(folders[source], folders[name], settings)
        result = measure(folders, args.rounds) | provenance()
    result["versions"] |= {name: version(name) for name in ("bitsandbytes", "torchao")}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    if args.output == RESULTS:
        before, rest = PAGE.read_text().split(TABLE[0])
        PAGE.write_text(before + TABLE[0] + table(result) + TABLE[1] + rest.split(TABLE[1])[1])


if __name__ == "__main__":
    main()
