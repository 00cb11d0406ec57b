"""How far `imageprompt doctor` is off: the memory it expects for training, beside what a process really needs.

`python scripts/measure_memory.py docs/doctor/memory.json` trains a ResNet-18 with a small GPT-2 for three steps and
writes the growth of the process's resident memory at its peak, and the expected figure. Linux only.
"""

import json
import os
import resource
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, set_seed

from imageprompt import ImagePromptConfig, ImagePromptForConditionalGeneration
from imageprompt.diagnosis import Plan, diagnose
from imageprompt.provenance import provenance

SEED = 0
SETTINGS = {"n_layer": 4, "n_embd": 256, "n_head": 4}
PLAN = Plan(batch_size=16, text_tokens=48)


def resident() -> int:
    """Bytes that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def train(steps: int) -> None:
    config = ImagePromptConfig.from_backbones("resnet18", GPT2Config(**SETTINGS))
    model = ImagePromptForConditionalGeneration(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    text = torch.randint(0, 50_000, (PLAN.batch_size, PLAN.text_tokens))
    images = torch.full((PLAN.batch_size, config.num_image_tokens), config.image_token_id)
    ids = torch.cat([images, text], dim=1)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # a padded batch, as most are
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(ids == config.image_token_id, -100)}
    for _ in range(steps):
        pixels = torch.randn(PLAN.batch_size, 3, *config.image_size)
        model(**batch, pixel_values=pixels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main(output: Path) -> None:
    set_seed(SEED)
    expected = diagnose("resnet18", json.dumps(SETTINGS), plan=PLAN).memory.training
    before = resident()
    train(steps=3)
    measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    result = {
        "expected_bytes": expected,
        "measured_bytes": measured,
        "measured_over_expected": measured / expected,
        "model": {"vision": "resnet18", "text": SETTINGS},
        "plan": {"batch_size": PLAN.batch_size, "text_tokens": PLAN.text_tokens, "dtype": PLAN.dtype},
        "seed": SEED,
        **provenance(),
    }
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
