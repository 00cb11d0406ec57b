"""docs/training.md is run from top to bottom, with small parts and for two steps."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_photos, tiny_gpt2
from PIL import Image
from transformers import GPT2LMHeadModel

from imageprompt import ImagePromptCollator, ImagePromptForConditionalGeneration, ImagePromptProcessor
from imageprompt.training.nonfinite import save_batch
from imageprompt.training.pretrain import main as pretrain
from imageprompt.training.train import main as train

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "training.md").read_text()
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", PAGE, re.MULTILINE | re.DOTALL)
SHORT = ["--use_cpu", "--max_steps"]


def test_what_the_page_shows_of_files_is_in_them():
    shown = re.findall(r"^```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    names = ("captioner", "stages", "search")
    assert shown == [(DOCS / "training" / f"{name}.json").read_text() for name in names]


LAUNCHERS = [
    ["accelerate", "launch", "--num_processes", "2"],
    ["OMP_NUM_THREADS=1", "torchrun", "--nproc-per-node", "2"],
]


@pytest.fixture
def workplace(tokenizer, tmp_path, monkeypatch):
    """A folder with all that the page speaks of: photos, a text, and a recipe with small parts."""
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos")
    Path("text").mkdir()
    Path("text/novel.txt").write_text("\n".join(["It was a red square,", "and it was round.", ""] * 30))
    GPT2LMHeadModel(tiny_gpt2(vocab_size=len(tokenizer))).save_pretrained("gpt2")
    tokenizer.save_pretrained("gpt2")
    recipe = json.loads((DOCS / "training" / "captioner.json").read_text())
    recipe |= {"vision": "test_vit4", "text": "gpt2", "pretrained": "text", "image_size": 64, "num_image_tokens": 4}
    shutil.copytree(DOCS / "training", "docs/training")
    Path("docs/training/captioner.json").write_text(json.dumps(recipe))
    return tmp_path


def save_a_broken_batch():
    """What a loss that is not finite would leave."""
    processor = ImagePromptProcessor.from_pretrained("runs/captioner")
    batch = ImagePromptCollator(processor)([{"image": Image.open("photos/00.png"), "suffix": "A red square."}])
    batch["pixel_values"][:] = torch.nan
    save_batch(Path("runs/captioner/nonfinite-step-7.safetensors"), batch, processor, {"step": "7"})


def test_the_page_runs_from_top_to_bottom(workplace, capsys):
    namespace: dict = {}
    for language, block, shown in BLOCKS:
        if language == "python":
            save_a_broken_batch()
            capsys.readouterr()
            exec(compile(block, "training.md", "exec"), namespace)
            assert not shown or capsys.readouterr().out == shown
            continue
        words = shlex.split(block.replace("\\\n", " "))
        if words[:2] == ["imageprompt", "pretrain"]:
            pretrain([*words[2:], *SHORT, "2"])
        elif words[:2] == ["imageprompt", "train"]:
            steps = "3" if "--resume_from_checkpoint" in words else "2"
            train([*words[2:], *SHORT, steps, *(["--trials", "2"] if "--search" in words else [])])
        else:
            launcher, arguments = words[: words.index("scripts/train.py")], words[words.index("scripts/train.py") + 1 :]
            assert launcher in LAUNCHERS  # tests/training/test_train.py starts two processes
            train([*arguments, *SHORT, "2"])
    for folder in Path("runs").iterdir():
        if (folder / "perplexity.json").exists():
            assert json.loads((folder / "perplexity.json").read_text())["perplexity"] > 1
        else:
            ImagePromptForConditionalGeneration.from_pretrained(folder)
    files = {
        "captioner": ["curves.png", "trainer_state.json", "training.json"],
        "staged": ["stage-1-connector/model.safetensors", "stage-2-all/curves.png", "curves.png"],
        "lora": ["adapter/adapter_model.safetensors"],
        "searched": ["search.json"],
    }
    missing = [
        f"{run}/{name}" for run, names in files.items() for name in names if not Path("runs", run, name).exists()
    ]
    assert missing == []
    assert any(Path("runs/watched").rglob("events*"))
    assert {folder.name for folder in Path("runs").iterdir()} == set(re.findall(r"runs/(\w+)", PAGE))
