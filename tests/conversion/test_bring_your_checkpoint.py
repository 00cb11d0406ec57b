"""docs/bring-your-checkpoint.md: its commands and Python blocks run, on small checkpoints of the layouts it names."""

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from conftest import picture, tiny_gpt2
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, GPT2LMHeadModel
from typer.testing import CliRunner

from imageprompt.cli import app
from imageprompt.conversion.backbones import TWINS, WITH_TEXT

from test_backbones import TEXT, WIDE  # isort: skip
from test_vision_encoder_decoder import write  # isort: skip

PAGE = (Path(__file__).parents[2] / "docs" / "bring-your-checkpoint.md").read_text()


def blocks(section: str) -> list[tuple[str, str, str]]:
    """(language, code, output shown) of each block in a section."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    found = re.findall(r"^```(sh|python)\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", text, re.MULTILINE | re.DOTALL)
    assert found and len(found) == len(re.findall(r"^```(?!text)\w", text, re.MULTILINE))
    return found


@pytest.fixture
def checkpoints(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    picture().save("photo.jpg")
    write(Path("nlpconnect/vit-gpt2-image-captioning"), tokenizer)
    clip = CLIPConfig(vision_config=WIDE | {"image_size": 224, "patch_size": 32}, text_config=TEXT)
    CLIPModel(clip).save_pretrained("openai/clip-vit-base-patch32")
    CLIPImageProcessor().save_pretrained("openai/clip-vit-base-patch32")
    timm.models.save_for_hf(timm.create_model("resnet10t"), "my-resnet", safe_serialization=True)
    for folder in ("openai-community/gpt2", "my-gpt2"):
        GPT2LMHeadModel(tiny_gpt2()).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("section", ["VisionEncoderDecoder", "Plain parts"])
def test_the_blocks_run_and_print_what_the_page_says(section, checkpoints, capsys):
    namespace: dict = {}
    for language, code, shown in blocks(section):
        if language == "sh":
            for line in code.splitlines():
                result = CliRunner().invoke(app, shlex.split(line)[1:])
                assert result.exit_code == 0, result.exception
                assert "Logits differ" in result.output or "photo.jpg\t" in result.output
            continue
        exec(compile(code, section, "exec"), namespace)
        printed = capsys.readouterr().out
        assert printed == shown or not shown
    last = namespace["model"].config.vision_config.architecture
    assert last == {"VisionEncoderDecoder": "vit_base_patch16_224", "Plain parts": "resnet10t"}[section]


def test_the_table_names_every_kind_that_has_a_twin():
    table = "\n".join(line for line in PAGE.splitlines() if line.startswith("|"))
    for kind in (*TWINS, *WITH_TEXT):
        assert re.search(rf"\b{kind}\b", table), kind
    for twin in TWINS.values():
        assert f"`{twin.model_class}`" in table
