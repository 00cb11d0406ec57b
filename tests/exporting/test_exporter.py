"""Exported graphs against the model: logits, tokens, the page's commands, and what is refused."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import batch_inputs, picture, tiny, tiny_gpt2
from transformers import LlamaConfig
from typer.testing import CliRunner

from imageprompt import ImagePromptForConditionalGeneration, ImagePromptProcessor
from imageprompt.cli import app
from imageprompt.connectors import CONNECTORS
from imageprompt.exporting import OnnxModel, TorchModel, exporter
from imageprompt.exporting.exporter import export

for package in exporter.ONNX_PACKAGES:
    pytest.importorskip(package, reason="exporting to ONNX needs imageprompt[export]")

import onnxruntime  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
# A CNN in the text, and a vision transformer beside it; its ONNX graphs, which take seconds to make, are left to the
# slow tests.
KINDS = {
    "prefix": {"layout": "NCHW", "connector": "mlp"},
    "cross_attention": {"layout": "NLC", "connector": "attention_pool"},
}
FORMATS = {"prefix": ["onnx", "torch"], "cross_attention": ["torch"]}
# Rows of (images, text): several images, none, one; their lengths differ, so there is padding.
ROWS = [
    ([picture(0), picture(1)], "A photo <image> of <image> two"),
    ([], "What is it? It is"),
    ([picture(2)], "dog"),
    ([], "Two cats"),
]
BATCHES = {"a row": ROWS[:1], "a row without images": ROWS[1:2], "rows without images": ROWS[1::2], "mixed rows": ROWS}
NEW_TOKENS = 8


def one_thread() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return options


def run(folder: Path, kind: str):
    return OnnxModel(folder, session_options=one_thread()) if kind == "onnx" else TorchModel(folder)


def lively(tokenizer, **settings):
    """A tiny model from weights so large that its answers vary."""
    settings = {"text_config": tiny_gpt2(initializer_range=0.3)} | settings
    return tiny(tokenizer, **settings)


def save(folder, *parts) -> str:
    for part in parts:
        part.save_pretrained(folder)
    return str(folder)


def check_answers(model, processor, folder: Path) -> None:
    """Export in both formats, and compare the answers."""
    differences = export(save(folder / "model", model, processor), folder / "exported").values()
    assert all(each.within(1e-4) for each in differences)
    inputs = batch_inputs(processor, ROWS)
    expected = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    for kind in ("onnx", "torch"):
        answers = run(folder / "exported", kind).generate(**inputs, max_new_tokens=NEW_TOKENS)
        np.testing.assert_array_equal(answers, expected)


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tokenizer, tmp_path_factory) -> SimpleNamespace:
    """A model, its processor, and the folder that the page's command makes of it."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    model, processor = lively(tokenizer, fusion=request.param, **KINDS[request.param])
    # An end that comes early in some rows and not in others.
    ids = model.generate(**batch_inputs(processor, ROWS), max_new_tokens=NEW_TOKENS)
    model.generation_config.eos_token_id = [model.generation_config.eos_token_id, int(ids[0, -NEW_TOKENS + 2])]
    save(folder / "runs" / "captioner", model, processor)
    (command,) = re.findall(r"^imageprompt (export runs.*)$", PAGE.read_text(), re.MULTILINE)
    formats = FORMATS[request.param]
    if len(formats) == 1:
        command += f" --format {formats[0]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 0, result.output
    return SimpleNamespace(
        model=model,
        processor=processor,
        root=folder,
        folder=folder / "exported",
        formats=formats,
        printed=result.output,
        runners=[run(folder / "exported", kind) for kind in formats],
    )


def test_the_command_prints_the_difference_that_it_found(exported):
    found = dict(re.findall(r"(\w+): logits differ .* by up to (\S+) in float32", exported.printed, re.MULTILINE))
    written = json.loads((exported.folder / "export.json").read_text())["verified"]
    assert found == {kind: f"{difference:.1e}" for kind, difference in written.items()}
    assert list(found) == exported.formats
    assert max(written.values()) <= 1e-4


@pytest.mark.parametrize("batch", BATCHES)
@torch.no_grad()
def test_logits_are_the_models(exported, batch):
    inputs = batch_inputs(exported.processor, BATCHES[batch])
    expected = exported.model(**inputs).logits.numpy()
    for runner in exported.runners:
        logits = runner.read(**inputs, all_logits=True).logits
        difference = np.abs(logits - expected)[inputs["attention_mask"] == 1]
        assert difference.max() <= 1e-4 < np.abs(expected).max()


@pytest.mark.parametrize("batch", BATCHES)
def test_pain_24_greedy_answers_are_the_models_token_by_token(exported, batch):
    inputs = batch_inputs(exported.processor, BATCHES[batch])
    expected = exported.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1).numpy()
    if batch == "mixed rows":
        new = expected[:, -NEW_TOKENS:]
        ends = exported.model.generation_config.eos_token_id
        assert len({tuple(row) for row in new}) == len(ROWS) and len(set(new.flat)) > NEW_TOKENS
        assert len({np.isin(row, ends).argmax() for row in new}) > 1  # rows end at different places, or not at all
    for runner in exported.runners:
        np.testing.assert_array_equal(runner.generate(**inputs, max_new_tokens=NEW_TOKENS), expected)


def test_the_length_is_that_of_the_generation_settings(exported, tmp_path):
    inputs = batch_inputs(exported.processor, ROWS[1:2])
    runner = exported.runners[0]
    for setting, count in ((3, 3), (None, 20)):
        runner.generation = {"eos_token_id": 399, "max_new_tokens": setting}
        runner.generation["suppress_tokens"] = [399]
        assert runner.generate(**inputs).shape[1] == inputs["input_ids"].shape[1] + count
    runner.generation = json.loads((exported.folder / "generation_config.json").read_text())


@pytest.mark.parametrize("exported", ["prefix"], indirect=True)
def test_graphs_name_their_dimensions_as_the_description_does(exported):
    described = json.loads((exported.folder / "export.json").read_text())["graphs"]
    for name, session in exported.runners[0].sessions.items():
        for part, values in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            # Sums of dimensions come in any order.
            shapes = {value.name: [tuple(sorted(str(size).split(" + "))) for size in value.shape] for value in values}
            assert shapes == {
                key: [tuple(sorted(str(size).split(" + "))) for size in spec["shape"]]
                for key, spec in described[name][part].items()
            }
            assert all(
                described[name][part][value.name]["dtype"].rstrip("0123456789") in value.type for value in values
            )


def test_each_file_holds_the_weights_of_its_part_alone(exported):
    base = exported.model.model
    cross = [block.crossattention.c_attn for block in base.language_model.h if hasattr(block, "crossattention")]
    shown = [tensor for part in (base.vision_tower, base.connector, *cross) for tensor in part.parameters()]
    for name, parameters in (("vision", shown), ("decoder", list(base.language_model.parameters()))):
        size = 4 * sum(parameter.numel() for parameter in parameters)
        suffixes = {"onnx": ".onnx.data", "torch": ".pt2"}
        stored = [(exported.folder / f"{name}{suffixes[kind]}").stat().st_size for kind in exported.formats]
        # Graphs, constants and the archive's own come on top.
        assert 0.8 * size < min(stored) and max(stored) < size + 1e6


def test_the_folder_loads_as_a_processor(exported):
    processor = ImagePromptProcessor.from_pretrained(exported.folder)
    again, first = batch_inputs(processor, ROWS), batch_inputs(exported.processor, ROWS)
    assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("exported", ["prefix"], indirect=True)
def test_the_pages_programs_run(exported, monkeypatch, capsys):
    """The first with the package; the others in new processes that have neither it nor transformers, one not torch."""
    monkeypatch.chdir(exported.root)
    for seed, name in enumerate(("photo.jpg", "other.jpg")):
        picture(seed).save(name)
    with_package, without_torch, with_torch = re.findall(
        r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
    namespace: dict = {}
    exec(compile(with_package, "export.md", "exec"), namespace)
    inputs = {name: torch.from_numpy(array) for name, array in namespace["inputs"].items()}
    expected = exported.model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert namespace["ids"].tolist() == expected.tolist()
    capsys.readouterr()

    for program, missing in ((without_torch, ["torch"]), (with_torch, ["onnxruntime"])):
        blocked = [*missing, "imageprompt", "transformers", "timm"]
        block = f"import sys\nsys.modules.update(dict.fromkeys({blocked}))\n"
        process = subprocess.run(
            [sys.executable, "-c", block + program], cwd=exported.folder, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr
        if missing == ["torch"]:
            row = exported.processor(images=picture(0), text="A photo of", return_tensors="pt")
            row["pixel_values"] = inputs["pixel_values"][:1]  # of the stored photo
            ids = exported.model.generate(**row, max_new_tokens=20, do_sample=False)
            shown = exported.processor.batch_decode(ids, skip_special_tokens=True)[0]
            assert process.stdout.strip() == shown.strip()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": np.zeros((3, 3, 32, 64), np.float32)}, r"\(images, 3, 64, 64\), not \(3, 3, 32, 64\)"),
        ({"pixel_values": np.zeros((2, 3, 64, 64), np.float32)}, "placeholders for 2 images"),
        ({"pixel_values": None}, "placeholders for 0 images"),
        ({"attention_mask": np.eye(4)}, "pad on the left"),
        ({"max_new_tokens": 255}, "and 255 new ones need more than the model's 256 positions"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(exported, change, message):
    inputs = batch_inputs(exported.processor, ROWS)
    for runner in exported.runners:
        with pytest.raises(ValueError, match=message):
            runner.generate(**{**inputs, **change})


def test_padding_on_the_right_is_refused(exported):
    inputs = {name: tensor.flip(1) for name, tensor in batch_inputs(exported.processor, ROWS[1::2]).items()}
    assert not inputs["attention_mask"].all()
    with pytest.raises(ValueError, match="pad on the left"):
        exported.runners[0].generate(**inputs)


# Every connector, with fusions and layouts in turns.
COMBINATIONS = list(zip(CONNECTORS, cycle(KINDS), cycle(["NCHW", "NLC", "NHWC"]), strict=False))


@pytest.mark.slow
@pytest.mark.parametrize(("connector", "fusion", "layout"), COMBINATIONS)
def test_every_connector_is_exported_with_equal_answers(connector, fusion, layout, tokenizer, tmp_path):
    count = 1 if connector == "pixel_shuffle" else 4
    model, processor = lively(tokenizer, layout=layout, connector=connector, fusion=fusion, num_image_tokens=count)
    check_answers(model, processor, tmp_path)


SMALL = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "bos_token_id": 0}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "eos_token_id": 0}


@pytest.mark.slow
def test_another_language_model_with_a_plain_cache_is_exported(tokenizer, tmp_path):
    check_answers(*tiny(tokenizer, text_config=LlamaConfig(**SMALL, initializer_range=0.3)), tmp_path)


@pytest.fixture
def saved(tokenizer, tmp_path) -> Path:
    return Path(save(tmp_path / "model", *tiny(tokenizer)))


@pytest.mark.parametrize("exported", ["prefix"], indirect=True)
def test_graphs_that_differ_from_the_model_are_refused(exported):
    sample = exporter._sample(exported.model.config)
    other = ImagePromptForConditionalGeneration.from_pretrained(exported.root / "runs" / "captioner").eval()
    for runner in exported.runners:
        assert exporter._compare(other, runner, sample).within(1e-4)
    with torch.no_grad():
        other.model.connector.linear_2.bias[0] += 1.0
    for runner in exported.runners:
        with pytest.raises(ValueError, match=rf"logits of the {type(runner).__name__} differ from .* by up to [1-9]"):
            exporter._compare(other, runner, sample)


def test_an_export_that_fails_leaves_nothing(saved, tmp_path, monkeypatch):
    def write(graph, path, formats):
        path.write_text("half of a graph")
        raise ValueError("no space left")

    monkeypatch.setattr(exporter, "_write", write)
    assert "no space left" in refusal(saved, tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def refusal(saved: Path, folder: Path, formats=("torch",)) -> str:
    with pytest.raises(ValueError) as error:
        export(saved, folder, formats)
    assert not (folder / "export.json").exists()
    return str(error.value)


def test_mistakes_are_refused_before_work_starts(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "trace", lambda graph: pytest.fail("work has started"))
    folder = tmp_path / "exported"
    assert "model is there already and not an empty folder" in refusal(saved, saved)
    assert "`formats` are onnx and torch; unknown: coreml" in refusal(saved, folder, ["coreml"])
    assert "none is named" in refusal(saved, folder, [])

    model = ImagePromptForConditionalGeneration.from_pretrained(saved)
    for name, value, message in (
        ("repetition_penalty", 1.5, "hold repetition_penalty=1.5, which the exported loop does not follow"),
        ("eos_token_id", None, "name no `eos_token_id`"),
    ):
        other = shutil.copytree(saved, tmp_path / name)
        settings = json.loads((other / "generation_config.json").read_text()) | {name: value}
        (other / "generation_config.json").write_text(json.dumps(settings))
        assert message in refusal(other, folder)
    model.config.quantization_config = {"quant_method": "torchao"}
    model.config.save_pretrained(saved)
    assert "is quantized, and export writes fp32" in refusal(saved, folder)

    def version(package):
        raise exporter.PackageNotFoundError(package)

    monkeypatch.setattr(exporter, "version", version)
    assert 'ONNX needs onnx: pip install "imageprompt[export]"' in refusal(saved, folder, ["onnx"])


def test_a_model_whose_images_leave_no_room_is_refused(tokenizer, tmp_path):
    text = tiny_gpt2(n_positions=32)
    model, _ = tiny(tokenizer, text_config=text, connector="attention_pool", num_image_tokens=28)
    with pytest.raises(ValueError, match="An image takes 28 of the 32 positions"):
        exporter._sample(model.config)


def test_settings_without_effect_on_greedy_search_are_accepted(tokenizer):
    model, _ = tiny(tokenizer)
    settings = model.generation_config
    settings.num_beams, settings.do_sample, settings.temperature, settings.repetition_penalty = 4, True, 0.7, 1.0
    settings.min_length = 0
    exporter._check_generation(settings)
    settings.min_length = 1
    with pytest.raises(ValueError, match="hold min_length=1, which"):
        exporter._check_generation(settings)


@pytest.mark.parametrize("exported", ["cross_attention"], indirect=True)
def test_a_format_that_was_not_written_is_named(exported):
    with pytest.raises(ValueError, match=r"holds torch, but no vision\.onnx"):
        OnnxModel(exported.folder)


def test_a_folder_that_is_no_export_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is no export: it has no export\.json"):
        OnnxModel(tmp_path)
