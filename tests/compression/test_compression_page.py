"""docs/compression.md is run from top to bottom, and its table is what was measured."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from conftest import make_photos, tiny, tiny_gpt2
from typer.testing import CliRunner

from imageprompt.cli import app
from imageprompt.compression import quantized_layers, share_of_zeros
from imageprompt.compression.quantizing import KINDS
from imageprompt.evaluation.evaluate import main as evaluate
from imageprompt.modeling import ImagePromptForConditionalGeneration
from imageprompt.training.train import main as train

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "compression.md").read_text()
RESULT = json.loads((ROOT / "docs" / "compression" / "digits.json").read_text())


@pytest.mark.filterwarnings("ignore")
def test_the_page_runs_from_top_to_bottom(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos")
    for part in tiny(tokenizer, text_config=tiny_gpt2(n_embd=64)):
        part.save_pretrained("runs/captioner")
    namespace: dict = {}
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", PAGE, re.MULTILINE | re.DOTALL)
    for language, block, shown in blocks:
        if language == "python":
            capsys.readouterr()
            exec(compile(block, "compression.md", "exec"), namespace)
            assert not shown or capsys.readouterr().out.endswith(shown)
            continue
        for command in re.findall(r"(?:[^\n\\]|\\\n)+", block):
            program, action, *arguments = shlex.split(command.replace("\\\n", " "))
            if program == "python" or action == "quickstart":
                continue  # the measurement, which takes minutes; tried below
            assert program == "imageprompt"
            if action == "train":
                train([*arguments, "--use_cpu", "--max_steps", "2"])
            elif action == "evaluate":
                evaluate(arguments)
            else:
                assert action == "compress"
                result = CliRunner().invoke(app, [action, *arguments])
                assert result.exit_code == 0, result.output
    small = ImagePromptForConditionalGeneration.from_pretrained("runs/small")
    assert len(quantized_layers(small)) == 8
    trained = ImagePromptForConditionalGeneration.from_pretrained("runs/half-trained")
    assert share_of_zeros(trained) == pytest.approx(0.5, abs=1e-3)
    assert Path("runs/captioner-int8/scores.json").exists()


def test_the_page_names_every_kind():
    assert re.findall(r"^\| `([\w-]+)` \|", PAGE, re.MULTILINE) == list(KINDS)


def test_the_table_is_what_was_measured():
    script = runpy.run_path(str(ROOT / "scripts" / "measure_compression.py"))
    assert f"{script['TABLE'][0]}{script['table'](RESULT)}{script['TABLE'][1]}" in PAGE
    assert set(RESULT["forms"]) == {"original", *script["FORMS"]}
    assert RESULT["versions"].keys() >= {"torch", "torchao", "bitsandbytes"} and RESULT["settings"]["seed"] == 0
    shares = {name: form.get("share_of_zeros") for name, form in RESULT["forms"].items()}
    assert shares["half pruned"] == shares["half pruned, trained on"] == pytest.approx(0.5, abs=1e-3)
    assert shares["80% pruned"] == shares["80% pruned, trained on"] == pytest.approx(0.8, abs=1e-3)


def test_figures_in_the_text_are_those_of_the_table():
    text = " ".join(PAGE.split("<!-- /table -->")[1].split())
    right = {name: form["right"] for name, form in RESULT["forms"].items()}
    assert f"{RESULT['parameters'] / 1e6:.1f} M parameters" in text
    assert f"One answer in {RESULT['held_out']} is {1 / RESULT['held_out']:.1%}" in text
    assert RESULT["settings"]["tuning"]["num_train_epochs"] == 2 and "two passes" in text
    assert right["original"] == right["int8"] == right["int8-dynamic"] == right["int4"]  # "costs no answer"
    assert f"from {right['80% pruned']} right answers to {right['80% pruned, trained on']}" in text


@pytest.mark.slow
def test_the_measurement_runs(tokenizer, tmp_path, monkeypatch):
    script = runpy.run_path(str(ROOT / "scripts" / "measure_compression.py"))
    script["TUNING"]["num_train_epochs"] = 0.1
    for part in tiny(tokenizer, text_config=tiny_gpt2(n_embd=64)):
        part.save_pretrained(tmp_path / "model")
    output = tmp_path / "digits.json"
    monkeypatch.setattr(
        "sys.argv", ["measure_compression.py", str(tmp_path / "model"), "--rounds", "2", "--output", str(output)]
    )
    script["main"]()
    result = json.loads(output.read_text())
    assert result["forms"].keys() == RESULT["forms"].keys() and result["settings"]["rounds"] == 2
    sizes = {name: form["language_model_bytes"] for name, form in result["forms"].items()}
    assert sizes["int4"] < sizes["int8"] == sizes["int8-dynamic"] < sizes["original"] == sizes["half pruned"]
