"""The quickstart: from nothing to a model that reads handwritten digits and answers in words.

It uses real scans (scikit-learn ships them), a small timm network and a small GPT-2, both from random weights, and
goes the whole way a user goes: compose, fine-tune with Trainer, save, load in a new process through the Auto classes,
answer. `python -m imageprompt.training.quickstart FOLDER` is that new process.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GPT2Config,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..composing import compose
from ..data import ImagePromptCollator
from ..evaluation.pictures import save_grid
from ..generating import generate_texts
from .tokenizing import train_tokenizer

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPT = "Which digit is this?"
SEED = 0


def scans() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out rows: 1,437 and 360 scans of 8×8 pixels, each digit in the same proportion."""
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    rows = [
        {"image": Image.fromarray(image), "text": PROMPT, "suffix": f" {WORDS[target]}"}
        for image, target in zip(pixels, digits.target, strict=True)
    ]
    train, held_out = train_test_split(rows, test_size=0.2, random_state=SEED, stratify=digits.target)
    return train, held_out


def quickstart(folder: Path, epochs: float = 12) -> None:
    """Train, save to `folder`, and let a new process answer for the held-out scans.

    Raises:
        subprocess.CalledProcessError: if the new process fails.
    """
    set_seed(SEED)
    train, _ = scans()
    tokenizer = train_tokenizer([row["text"] + row["suffix"] for row in train], vocab_size=384)
    text_config = GPT2Config(
        n_layer=2,
        n_head=4,
        n_embd=128,
        n_positions=64,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model, processor = compose(
        "resnet10t",
        text_config,
        tokenizer=tokenizer,
        pretrained=False,
        preprocessing={"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0},
        connector="linear",
    )
    print(f"Training on {len(train):,} scans: {model.num_parameters() / 1e6:.1f} M parameters, from random weights.")
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=50,
        seed=SEED,
        dataloader_pin_memory=False,
    )
    collator = ImagePromptCollator(processor)
    trainer = Trainer(model, arguments, train_dataset=train, data_collator=collator, processing_class=processor)
    trainer.train()
    trainer.save_model()
    print(f"Saved model and processor to {folder}. Now a new process loads them and answers.")
    subprocess.run([sys.executable, "-m", __name__, str(folder)], check=True)


def answer(folder: Path) -> float:
    """Load the saved model, answer for the held-out scans, write `answers.png` and `accuracy.json`.

    Returns:
        The share of held-out scans that are answered with the right word.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    _, held_out = scans()
    images = [row["image"] for row in held_out]
    answers = generate_texts(model, processor, images, PROMPT, batch_size=90, max_new_tokens=6)
    expected = [row["suffix"].strip() for row in held_out]
    right = sum(a == b for a, b in zip(answers, expected, strict=True))
    accuracy = right / len(expected)
    (folder / "accuracy.json").write_text(json.dumps({"held_out": len(expected), "right": right, "accuracy": accuracy}))
    save_grid(images[:24], answers[:24], folder / "answers.png", columns=8)
    print(f'Asked "{PROMPT}" of {len(expected)} held-out scans: {accuracy:.1%} answered with the right word.')
    print(f"Picture: {folder / 'answers.png'}")
    return accuracy


if __name__ == "__main__":
    answer(Path(sys.argv[1]))
