"""The README's Python blocks, executed in order as one program, and then its commands.

The Hub is stood in for by a local cache in the Hub's own layout, so the real loading code runs: a ViT-S with random
weights and a small GPT-2 under the names that the README uses. Pushing saves to the working directory, from where the
README's next block loads.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
import timm
from conftest import make_photos, picture, tiny_gpt2
from safetensors.torch import save_file
from transformers import GPT2LMHeadModel

from imageprompt import ImagePromptForConditionalGeneration, ImagePromptProcessor
from imageprompt.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^imageprompt (?:[^\n\\]|\\\n)+", README, re.MULTILINE)


def cached_repository(cache: Path, repo_id: str) -> Path:
    """An empty snapshot folder of a repository in a Hub cache."""
    folder = cache / f"models--{repo_id.replace('/', '--')}"
    revision = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    snapshot = folder / "snapshots" / revision
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.fixture
def cached_hub(tmp_path, monkeypatch, tokenizer):
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    vision = cached_repository(cache, "timm/vit_small_patch16_224.augreg_in21k_ft_in1k")
    backbone = timm.create_model("vit_small_patch16_224")
    save_file(backbone.state_dict(), vision / "model.safetensors")
    (vision / "config.json").write_text(json.dumps({"architecture": "vit_small_patch16_224"}))

    text = cached_repository(cache, "openai-community/gpt2")
    GPT2LMHeadModel(tiny_gpt2()).save_pretrained(text)
    tokenizer.save_pretrained(text)


def test_readme_runs(cached_hub, tmp_path, monkeypatch, capsys):
    def save_locally(self, repo_id, **kwargs):
        self.save_pretrained(tmp_path / repo_id)

    for owner in (ImagePromptForConditionalGeneration, ImagePromptProcessor):
        monkeypatch.setattr(owner, "push_to_hub", save_locally)
    monkeypatch.chdir(tmp_path)
    picture().save("photo.jpg")
    assert len(BLOCKS) >= 4 and len(COMMANDS) >= 2
    namespace: dict = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "A photo of" in capsys.readouterr().out
    # The block that loads what was pushed got the very same model.
    assert namespace["model"].config.num_image_tokens == 49
    assert not namespace["model"].config.trainable["vision"]

    make_photos(tmp_path / "photos")
    for command in COMMANDS:
        monkeypatch.setattr("sys.argv", shlex.split(command.replace("\\\n", " ")))
        command_line()
    assert re.search(r"^photos/00\.png\t", capsys.readouterr().out, re.MULTILINE)
    captioner = ImagePromptForConditionalGeneration.from_pretrained("runs/captioner")
    assert not captioner.config.trainable["vision"]
    assert json.loads(Path("runs/captioner/scores.json").read_text())["rows"] == 4


def command_line() -> None:
    """`imageprompt`, whose subcommands end as programs do."""
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code


def test_readme_names_existing_files_and_commands():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), f"README links to {link}, which is not there"
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
