"""The recipes in docs/ take a user's folder of images to a scored model: each page is run from top to bottom."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import make_photos
from typer.testing import CliRunner

from imageprompt.cli import app
from imageprompt.evaluation.evaluate import main as evaluate
from imageprompt.training.train import main as train

DOCS = Path(__file__).parents[1] / "docs"
RECIPES = ["captioning", "classification", "few-shot", "vqa"]
SMALL_TEXT = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 400}
# Small, with the feature grid of the page's backbone: 14x14 or 7x7 at 224 pixels.
SMALL_VISION = {"timm/vit_small_patch16_224.augreg_in21k_ft_in1k": "test_vit4", "timm/resnet50.a1_in1k": "resnet10t"}


def instead_of_pretrained(arguments: list[str]) -> list[str]:
    """The same command with small parts from random weights, for two steps."""
    changed = []
    for option, value in zip(arguments[::2], arguments[1::2], strict=True):
        if option == "--text":
            changed += ["--text_config", json.dumps(SMALL_TEXT), "--tokenizer", "tokenizer", "--pretrained", "false"]
        else:
            changed += [option, SMALL_VISION.get(value, value)]
    return [*changed, "--image_size", "224", "--use_cpu", "--max_steps", "2"]


@pytest.mark.parametrize("page", RECIPES)
def test_a_recipe_goes_from_a_folder_to_a_scored_model(page, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos")
    tokenizer.save_pretrained("tokenizer")
    text = (DOCS / f"{page}.md").read_text().split("## Flickr8k")[0]  # which needs its own data
    namespace: dict = {}
    outputs = []
    for language, block in re.findall(r"^```(sh|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(compile(block, page, "exec"), namespace)
            continue
        for command in re.findall(r"(?:[^\n\\]|\\\n)+", block):
            program, action, *arguments = shlex.split(command.replace("\\\n", " "))
            assert program == "imageprompt"
            if action == "train":
                arguments = re.sub(r" --augment(?= )", "", " ".join(map(shlex.quote, arguments)))
                train(instead_of_pretrained(shlex.split(arguments)))
            elif action == "generate":
                assert CliRunner().invoke(app, ["generate", *arguments, "--max-new-tokens", "2"]).exit_code == 0
            else:
                assert action == "evaluate"
                evaluate(arguments)
                outputs.append(Path(arguments[arguments.index("--output") + 1]))
    assert outputs
    for output in outputs:
        result = json.loads(output.read_text())
        assert result["scores"] and all(value >= 0 for value in result["scores"].values() if isinstance(value, float))
    assert {"captioning": "caption", "vqa": "answers", "classification": "best", "few-shot": "answer"}[
        page
    ] in namespace
