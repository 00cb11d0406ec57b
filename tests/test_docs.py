"""The commands in docs/ are commands that work, its Python blocks run, and its figures are those measured."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import timm
import torch
import typer
from conftest import make_photos, picture, tiny, tiny_gpt2
from test_recipes import RECIPES
from transformers import GPT2LMHeadModel, HfArgumentParser
from typer.testing import CliRunner

from imageprompt.data.sources import Source
from imageprompt.evaluation.evaluate import EvaluationArguments
from imageprompt.evaluation.evaluate import main as evaluate
from imageprompt.evaluation.tasks import TASKS
from imageprompt.options import spell_out_recipe
from imageprompt.training.arguments import parse
from imageprompt.training.train import main

DOCS = Path(__file__).parents[1] / "docs"
# Pages whose Python blocks are executed here, each as one program, with a tiny `model` and its `processor` at hand.
PYTHON_PAGES = ["connectors.md", "data.md", "evaluation.md", "preprocessing.md", "prompting.md"]
COMMANDS = [
    shlex.split(command.replace("\\\n", " "))
    for page in sorted(DOCS.glob("*.md"))
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for command in re.findall(r"""(?:'[^']*'|"[^"]*"|\\\n|[^\n\\'"])+""", block)  # quoted lines belong together
]


def commands(*start: str) -> list[list[str]]:
    """The arguments of every command that begins so."""
    found = [command[len(start) :] for command in COMMANDS if command[: len(start)] == list(start)]
    assert found, f"no page shows {' '.join(start)}"
    return found


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_blocks_run_and_print_what_the_page_says(page, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("photo.jpg", "other.jpg", "dog.jpg", "cat.jpg", "photo.png")):
        picture(seed).save(name)
    make_photos(tmp_path / "photos")
    model, processor = tiny(tokenizer)
    namespace = {"model": model, "processor": processor}
    blocks = re.findall(
        r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL
    )
    assert blocks
    for code, shown in blocks:
        exec(compile(code, page, "exec"), namespace)
        assert capsys.readouterr().out == shown


# Pages whose Python blocks run elsewhere: they need a server, checkpoints, the README's model, or are run as a whole.
PYTHON_ELSEWHERE = [
    "bring-your-checkpoint.md",
    "compression.md",
    "export.md",
    "generation.md",
    "serving.md",
    "share-your-model.md",
    "training.md",
    *(f"{page}.md" for page in RECIPES),
]
# Each kind of command, tried below or where its page is tested.
COMMANDS_TRIED = [
    ["imageprompt", "caption"],
    ["imageprompt", "compress"],
    ["imageprompt", "evaluate"],
    ["imageprompt", "export"],
    ["accelerate", "launch"],
    ["imageprompt", "convert"],
    ["imageprompt", "generate"],
    ["imageprompt", "pretrain"],
    ["imageprompt", "push"],
    ["imageprompt", "quickstart"],
    ["imageprompt", "serve"],
    ["imageprompt", "train"],
    ["python", "-m"],
    ["python", "scripts/benchmark.py"],
    ["python", "scripts/benchmark_preprocessing.py"],
    ["python", "scripts/compare_captioners.py"],
    ["python", "scripts/measure_compression.py"],
    ["python", "scripts/scaling.py"],
    ["python", "scripts/sweep_backbones.py"],
    ["python", "scripts/sweep_language_models.py"],
    ["python", "scripts/sweep_preprocessing.py"],
]


def test_no_block_is_left_out():
    with_python = {page.name for page in DOCS.glob("*.md") if "```python" in page.read_text()}
    assert with_python == {*PYTHON_PAGES, *PYTHON_ELSEWHERE}
    shown = [command[:2] for command in COMMANDS if command[0] in ("imageprompt", "python", "accelerate", "make")]
    assert all(command in COMMANDS_TRIED for command in shown), shown


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_pages_hold_no_loose_ends(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not re.findall(r"^[A-Z]{3,}$|TODO|FIXME", prose, re.MULTILINE)


def test_pages_link_to_what_exists():
    for page in DOCS.glob("*.md"):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (DOCS / link).exists(), f"{page.name} links to {link}, which is not there"


def test_options_exist():
    for arguments in commands("imageprompt", "train"):
        parse([*arguments, "--use_cpu"])
    for arguments in commands("imageprompt", "evaluate"):
        HfArgumentParser((EvaluationArguments, Source)).parse_args_into_dataclasses(spell_out_recipe(arguments))


def on_shared_data(arguments: list[str]) -> bool:
    """Whether a command is not about a user's own folder, as those of the recipes are."""
    return any(value.startswith("../shared/data") for value in spell_out_recipe(arguments))


@pytest.mark.parametrize("arguments", filter(on_shared_data, commands("imageprompt", "train")))
def test_training_commands_run(arguments, shared_data, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "shared").symlink_to(shared_data.parent)
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "docs").symlink_to(DOCS)
    monkeypatch.chdir(tmp_path / "clone")
    arguments = spell_out_recipe(arguments)
    if "--text" in arguments:  # of an earlier command of the page
        for part in (GPT2LMHeadModel(tiny_gpt2(n_positions=512)), tokenizer):
            part.save_pretrained(arguments[arguments.index("--text") + 1])
    main([*arguments, "--max_steps", "1", "--per_device_train_batch_size", "2", "--output_dir", "run"])
    assert Path("run/model.safetensors").exists()


def evaluate_with_a_tiny_model(arguments: list[str], tokenizer) -> dict:
    """Run a command of a page in the working directory, where its model is a tiny one; returns what it wrote."""
    for part in tiny(tokenizer):
        part.save_pretrained(arguments[arguments.index("--model") + 1])
    evaluate(arguments)
    return json.loads(Path(arguments[arguments.index("--output") + 1]).read_text())


def test_the_commands_of_the_evaluation_page_run(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos")
    page = (DOCS / "evaluation.md").read_text()
    shown = [command[2:] for command in COMMANDS if command[:2] == ["imageprompt", "evaluate"]]
    shown = [arguments for arguments in shown if arguments[0] == "--task"]
    assert len(shown) == page.count("imageprompt evaluate --task")
    for arguments in shown:
        assert evaluate_with_a_tiny_model(arguments, tokenizer)["task"] == arguments[1]
    assert {arguments[1] for arguments in shown} == set(TASKS)


@pytest.mark.parametrize("arguments", filter(on_shared_data, commands("imageprompt", "evaluate")))
def test_evaluation_commands_on_shared_data_run(arguments, shared_data, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(DOCS.parent)  # where its recipe is
    (tmp_path / "shared").symlink_to(shared_data.parent)
    arguments = [*spell_out_recipe(arguments), "--split", "test[:3]"]
    arguments += ["--constants", "2"] if "--constants" in arguments else []
    (tmp_path / "clone").mkdir()
    monkeypatch.chdir(tmp_path / "clone")
    assert evaluate_with_a_tiny_model(arguments, tokenizer)["rows"] >= 3  # questions of three images may be more


def test_the_mixture_of_the_data_page_trains(tokenizer, tmp_path, monkeypatch):
    page = (DOCS / "data.md").read_text()
    arguments = shlex.split(re.search(r"^imageprompt train (--mixture.*)$", page, re.MULTILINE)[1])
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos")
    Path("mixture.json").write_text(re.search(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1])
    for part in tiny(tokenizer):
        part.save_pretrained("runs/captioner")
    main([*arguments, "--max_steps", "1", "--use_cpu", "--eval_strategy", "steps", "--eval_steps", "1"])
    history = json.loads(Path("runs/both/trainer_state.json").read_text())["log_history"]
    logged = {name for entry in history for name in entry}
    assert {"eval_captions_loss", "eval_questions_loss"} <= logged


@pytest.mark.parametrize(
    ("script", "less"),
    [
        ("sweep_preprocessing", {"names": lambda: ["resnet18.a1_in1k", "eva_giant_patch14_336.clip_ft_in1k"]}),
        ("benchmark_preprocessing", {"NUM_PHOTOS": 2}),
    ],
)
def test_preprocessing_commands_run_and_write_what_is_committed(script, less, shared_data, tmp_path, monkeypatch):
    monkeypatch.chdir(DOCS.parent)
    (arguments,) = commands("python", f"scripts/{script}.py")
    main = runpy.run_path(f"scripts/{script}.py")["main"]
    for name, value in less.items():
        monkeypatch.setitem(main.__globals__, name, value)
    app = typer.Typer()
    app.command()(main)
    output = tmp_path / "report.json"
    short = ["--rounds", "3"] if script.startswith("benchmark") else []
    result = CliRunner().invoke(app, [*arguments, *short, "--output", str(output)])
    assert result.exit_code == 0, result.output
    committed = DOCS / "preprocessing" / f"{script.removesuffix('_preprocessing')}.json"
    assert json.loads(output.read_text()).keys() == json.loads(committed.read_text()).keys()


def table(page: str, *first: str) -> dict[str, list[str]]:
    """The rows of the table whose heading begins so, by their first cells."""
    heading = " | ".join(first)
    (rows,) = re.findall(rf"^\| {re.escape(heading)} .*\n\|[- |]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    cells = [row.strip("|").split("|") for row in rows.splitlines()]
    return {" | ".join(c.strip() for c in row[: len(first)]): [c.strip() for c in row[len(first) :]] for row in cells}


def test_the_figures_of_the_preprocessing_page_are_those_of_the_sweep():
    measured = json.loads((DOCS / "preprocessing" / "sweep.json").read_text())
    page = " ".join((text := (DOCS / "preprocessing.md").read_text()).split())
    assert f"{measured['pretrained_configurations']:,} pretrained configurations" in page
    assert f"{measured['architectures_without_weights']} architectures for which timm has no weights" in page
    assert f"Each of the {measured['distinct_settings']:,} settings" in page
    assert f"The largest difference of any value is {measured['largest_difference']}." in page
    assert measured["unequal"] == {}
    assert f"{measured['variants']['at its test size']['configurations']} configurations have another one" in page
    for width, height in measured["pictures"].values():
        assert f"{width}x{height}" in page
    assert table(text, "settings") == {
        name: [f"{row['configurations']:,}", str(row["distinct_settings"]), f"{row['equal']:,}"]
        for name, row in measured["variants"].items()
    }
    levels = {name: int(cells[0]) for name, cells in table(text, "picture").items()}
    assert levels == measured["levels_off_convert_rgb"]
    (naflex,) = measured["not_offered"].values()
    assert naflex and all(f"`{name}`" in page for name in naflex)


def test_the_figures_of_the_preprocessing_page_are_those_of_the_benchmark():
    measured = json.loads((DOCS / "preprocessing" / "benchmark.json").read_text())
    page = (DOCS / "preprocessing.md").read_text()
    shown = table(page, "photo", "source")
    for result in measured["results"]:
        width, height = result["photo_size"]
        first, third = result["quartiles"]
        figures = f"{result['ratio']:.2f} ({first:.2f} to {third:.2f})"
        assert shown[f"{width}x{height} | {result['source']}"][result["batch_size"] > 1] == figures
    assert len(measured["results"]) == 2 * len(shown)
    assert f"median over {measured['rounds']} rounds" in page
    assert f"Photos are {measured['photos']}, as stored and enlarged, for `{measured['backbone']}`" in page


def script(name: str) -> dict:
    """What scripts/`name`.py defines."""
    return runpy.run_path(str(DOCS.parent / "scripts" / f"{name}.py"))


def test_the_tables_of_backbones_and_connectors_are_those_measured():
    measured = json.loads((DOCS / "backbones" / "families.json").read_text())
    page = (DOCS / "backbones.md").read_text()
    assert script("sweep_backbones")["table"](measured["models"]) in page
    assert f"**{measured['works']} of {measured['tried']} work**" in page
    assert {result["module"] for result in measured["models"].values()} == set(timm.list_modules())
    every = json.loads((DOCS / "backbones" / "every.json").read_text())
    assert f"**{every['works']} of {every['tried']} work**" in page
    assert f"The other {len(every['left_out'])} are listed" in page
    for sweep in (measured, every):
        assert sweep["tried"] == len(sweep["models"])
        distance = max(result["row_distance"] for result in sweep["models"].values())
        assert f"alone by at most {distance:.1e}" in " ".join(page.split())

    costs = json.loads((DOCS / "connectors" / "connectors.json").read_text())["backbones"]
    definitions = script("describe_connectors")
    assert definitions["table"](costs) in (DOCS / "connectors.md").read_text()
    assert costs["resnet50"]["mlp"] == definitions["describe"]("resnet50", {"input_size": (3, 256, 256)}, "mlp")


@pytest.mark.parametrize("more", [[], ["--every", "--max-parameters", "0.4"]], ids=["families", "every"])
def test_the_sweep_of_backbones_goes_on_where_it_stopped(more, tmp_path, monkeypatch):
    definitions = script("sweep_backbones")
    sweep, output = definitions["main"], tmp_path / "found.json"
    names = ["test_resnet", "test_vit", "resnet18"]
    monkeypatch.setattr("timm.list_models", lambda *args, **kwargs: names)
    monkeypatch.setattr("timm.list_modules", lambda: ["resnet"])
    monkeypatch.setitem(sweep.__globals__, "is_model_in_modules", lambda name, modules: True)
    app = typer.Typer()
    app.command()(sweep)
    for _ in range(2):
        result = CliRunner().invoke(app, ["--output", str(output), *more])
        assert result.exit_code == 0, result.output
        found = json.loads(output.read_text())
        expected = {"test_resnet", "test_vit"} if more else {min(names, key=definitions["count_parameters"])}
        assert found["models"].keys() == expected and found["works"] == found["tried"] == len(expected)
        assert found["left_out"].keys() == ({"resnet18"} if more else set())
        monkeypatch.setitem(sweep.__globals__, "try_backbone", lambda *_: pytest.fail("tried again"))


@pytest.mark.parametrize("name", ["test_resnet", "crossvit_tiny_240", "test_vit"])
def test_the_sweep_of_backbones_runs(name):
    measured = json.loads((DOCS / "backbones" / "families.json").read_text())["models"].get(name, {})
    result = script("sweep_backbones")["try_backbone"](name, {})
    assert "error" not in result
    kept = ("layout", "grid", "width", "prefix_tokens", "feature_layer", "checkpointing", "earlier_blocks", "summary")
    assert {key: result[key] for key in kept if key in measured} == {key: measured[key] for key in kept if measured}


def test_the_sweep_of_backbones_finds_what_does_not_hold(monkeypatch):
    monkeypatch.setattr("imageprompt.modeling.positions_from_mask", lambda mask, length: torch.arange(length)[None])
    monkeypatch.setattr("imageprompt.language_models.TEXT_CHECKS", {})
    assert script("sweep_backbones")["try_backbone"]("test_resnet", {})["error"].startswith(
        "AssertionError: rows differ from the batch by"
    )
