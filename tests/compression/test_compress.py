"""`imageprompt compress`: from a folder to a smaller one, and every mistake named before it is written."""

import json

import pytest
import torch
from conftest import picture, tiny, tiny_gpt2
from typer.testing import CliRunner

from imageprompt import ImagePromptForConditionalGeneration, ImagePromptProcessor
from imageprompt.cli import app
from imageprompt.compression import compress, quantized_layers, share_of_zeros
from imageprompt.training.train import main as train

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for part in tiny(tokenizer, text_config=tiny_gpt2(n_embd=64)):
        part.save_pretrained(folder / "plain")
    picture().save(folder / "photo.png")
    return folder


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic", "int4"])
def test_quantise(saved, tmp_path, kind):
    output = tmp_path / "small"
    said = run("compress", saved / "plain", output, "--quantize", kind)
    report = json.loads((output / "compression.json").read_text())
    assert len(report["quantized_layers"]) == 8 and "Quantised 8 layers." in said
    assert report["bytes_after"] == (output / "model.safetensors").stat().st_size < report["bytes_before"]
    assert f"{report['bytes_before'] / 1e6:.1f} MB became {report['bytes_after'] / 1e6:.1f} MB" in said
    assert 0 < report["logit_difference"] < 0.5 and report["versions"]["torch"] == torch.__version__.split("+")[0]
    assert str(tmp_path) not in (output / "config.json").read_text()
    line = run("generate", output, saved / "photo.png", "--max-new-tokens", "3")
    assert line.startswith(f"{saved / 'photo.png'}\t")


def test_prune_then_train_then_quantise(saved, folders, tmp_path):
    said = run("compress", saved / "plain", tmp_path / "half", "--prune", 0.5, "--scope", "model")
    half = ImagePromptForConditionalGeneration.from_pretrained(tmp_path / "half")
    assert "50.0% of the weights of layers are zero." in said and "(100%)" in said
    data = ["--dataset", str(folders[0]), "--suffix_column", "captions", "--eval_strategy", "no"]
    more = ["--max_steps", "2", "--learning_rate", "1e-2", "--use_cpu", "--output_dir", str(tmp_path / "tuned")]
    train(["--model", str(tmp_path / "half"), "--keep_zeros", "true", *data, *more])
    tuned = ImagePromptForConditionalGeneration.from_pretrained(tmp_path / "tuned")
    assert share_of_zeros(tuned) == share_of_zeros(half) == pytest.approx(0.5, abs=1e-4)
    assert not torch.equal(tuned.model.connector.linear_1.weight, half.model.connector.linear_1.weight)
    said = run("compress", tmp_path / "tuned", tmp_path / "small", "--quantize", "int8")
    small = ImagePromptForConditionalGeneration.from_pretrained(tmp_path / "small")
    assert "Quantised 8 layers." in said
    for name in quantized_layers(small):
        pruned = tuned.get_submodule(name).weight.t() == 0
        assert (small.get_submodule(name).weight.dequantize()[pruned] == 0).all()


def test_both_at_once_in_one_part(saved, tmp_path):
    run("compress", saved / "plain", tmp_path, "--prune", 0.5, "--quantize", "int8", "--part", "connector")
    report = json.loads((tmp_path / "compression.json").read_text())
    assert report["quantized_layers"] == ["model.connector.linear_1", "model.connector.linear_2"]
    assert report["share_of_zeros"] == pytest.approx(0.5, abs=1e-4)
    model = ImagePromptForConditionalGeneration.from_pretrained(tmp_path)
    assert (model.model.connector.linear_1.weight.dequantize() == 0).float().mean() >= 0.5
    assert (model.model.language_model.h[0].attn.c_attn.weight == 0).float().mean() == 0
    ImagePromptProcessor.from_pretrained(tmp_path).check_model(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Nothing to do: name what to quantise to"),
        ({"quantize": "int2"}, "Unknown kind 'int2'; known: int8, int8-dynamic, int4"),
        ({"share": 1.5}, r"between 0 and 1, for example 0\.5; got 1\.5"),
        ({"quantize": "int8", "parts": ["vision"]}, "nothing to quantise in vision"),
        ({"share": 0.5, "parts": ["eyes"]}, "Unknown part 'eyes'"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(saved, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        compress(str(saved / "plain"), tmp_path / "small", **settings)
    assert not (tmp_path / "small").exists()


def test_what_is_there_is_not_overwritten(saved, tmp_path):
    """Whatever it is: not a model alone."""
    for name in ("model.safetensors", "tokenizer.json", "notes.txt"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(ValueError, match="not an empty folder: nothing is overwritten"):
            compress(str(saved / "plain"), folder, share=0.5)
        assert [path.read_text() for path in folder.iterdir()] == ["mine"]


def test_a_model_that_does_not_come_back_as_it_was_is_not_left_there(saved, tmp_path, monkeypatch):
    save = ImagePromptForConditionalGeneration.save_pretrained

    def save_something_else(model, folder, **settings):
        model.lm_head.weight.data[5, 0] += 1
        save(model, folder, **settings)
        model.lm_head.weight.data[5, 0] -= 1

    monkeypatch.setattr(ImagePromptForConditionalGeneration, "save_pretrained", save_something_else)
    with pytest.raises(ValueError, match=r"does not come back from its files as it was.*Nothing was written"):
        compress(str(saved / "plain"), tmp_path / "small", share=0.5)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    compress(str(saved / "plain"), tmp_path / "small", share=0.5)  # the next try finds nothing in its way


def test_a_quantised_model_is_not_compressed_or_trained_again(saved, folders, tmp_path):
    compress(str(saved / "plain"), tmp_path / "small", quantize="int8")
    for settings in ({"quantize": "int4"}, {"share": 0.5}):
        with pytest.raises(ValueError, match="quantised already: start from the one that it was made of"):
            compress(str(tmp_path / "small"), tmp_path / "smaller", **settings)
    data = ["--dataset", str(folders[0]), "--suffix_column", "captions", "--eval_strategy", "no", "--use_cpu"]
    with pytest.raises(ValueError, match="Quantised weights do not learn: train the model that this one was made of"):
        train(["--model", str(tmp_path / "small"), *data, "--output_dir", str(tmp_path / "run")])


def test_a_kind_that_does_not_run_here_is_named(saved, tmp_path, monkeypatch):
    def fail(self, x):
        raise AssertionError("N must be divisible by block_n")

    monkeypatch.setattr("bitsandbytes.nn.Linear4bit.forward", fail)
    with pytest.raises(ValueError, match=r"Quantised as int4.*does not run here \(AssertionError: N must"):
        compress(str(saved / "plain"), tmp_path / "small", quantize="int4")
    assert list(tmp_path.iterdir()) == []


def test_zeros_and_adapters_do_not_go_together(saved, folders, tmp_path):
    lora = ["--lora", '{"r": 2, "target_modules": ["c_attn"]}', "--keep_zeros", "true", "--use_cpu"]
    data = ["--dataset", str(folders[0]), "--suffix_column", "captions", "--eval_strategy", "no"]
    with pytest.raises(ValueError, match="--keep_zeros: adapters merged into the weights would fill the zeros"):
        train(["--model", str(saved / "plain"), *lora, *data, "--output_dir", str(tmp_path)])
