"""The recipes in docs/ take a user's folder of images to a scored model: each page is run from top to bottom."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import make_photos
from datasets import ReadInstruction
from typer.testing import CliRunner

from imageprompt.cli import app
from imageprompt.evaluation.evaluate import main as evaluate
from imageprompt.options import spell_out_recipe
from imageprompt.training.train import main as train

DOCS = Path(__file__).parents[1] / "docs"
RECIPES = ["captioning", "classification", "few-shot", "vqa"]
SMALL_TEXT = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 400}
# Small, with the feature grid of the page's backbone: 14x14 or 7x7 at 224 pixels.
SMALL_VISION = {"timm/vit_small_patch16_224.augreg_in21k_ft_in1k": "test_vit4", "timm/resnet50.a1_in1k": "resnet10t"}


# What each page scores: rows of the fifth of 20 photos that was not learnt, and what its last Python block finds.
SCORED = {
    "captioning": (4, {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"}, "caption"),
    "classification": (4, {"accuracy", "macro_recall", "macro_f1"}, "best"),
    "few-shot": (4, {"exact_match"}, "answer"),
    "vqa": (8, {"exact_match"}, "answers"),  # two questions for each photo
}


def instead_of_pretrained(arguments: list[str]) -> list[str]:
    """The same command with small parts from random weights, for two steps."""
    changed = [SMALL_VISION.get(word, word) for word in arguments]
    text = changed.index("--text")
    changed[text : text + 2] = ["--text_config", json.dumps(SMALL_TEXT), "--tokenizer", "tokenizer"]
    return [*changed, "--pretrained", "false", "--image_size", "224", "--use_cpu", "--max_steps", "2"]


def run_page(page: str, tokenizer, more: Sequence[str] = ()) -> tuple[dict[str, dict], list[Path], dict]:
    """Run a page from top to bottom, in a folder with `photos`.

    Args:
        more: options for every training and evaluation.

    Returns:
        Its `training.json` by folder, the files of its scores, and the variables of its Python blocks.
    """
    tokenizer.save_pretrained("tokenizer")
    namespace: dict = {}
    trainings, outputs = {}, []
    text = (DOCS / f"{page}.md").read_text()
    for language, block in re.findall(r"^```(sh|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(compile(block, page, "exec"), namespace)
            continue
        for command in re.findall(r"(?:[^\n\\]|\\\n)+", block):
            program, action, *arguments = shlex.split(command.replace("\\\n", " "))
            assert program == "imageprompt"
            if action == "train":
                train([*instead_of_pretrained(arguments), *more])
                folder = arguments[arguments.index("--output_dir") + 1]
                trainings[folder] = json.loads(Path(folder, "training.json").read_text())
            elif action in ("generate", "caption"):
                assert CliRunner().invoke(app, [action, *arguments, "--max-new-tokens", "2"]).exit_code == 0
            else:
                assert action == "evaluate"
                evaluate([*arguments, *more])
                outputs.append(Path(arguments[arguments.index("--output") + 1]))
    return trainings, outputs, namespace


def predictions(output: Path) -> list[dict]:
    lines = output.with_suffix(".predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


@pytest.mark.parametrize("page", RECIPES)
def test_a_recipe_goes_from_a_folder_to_a_scored_model(page, tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos")
    trainings, outputs, namespace = run_page(page, tokenizer)
    scored, names, found = SCORED[page]
    ((folder, training),) = trainings.items()
    assert training["rows"] == 4 * scored and training["metrics"]["train_loss"] > 0
    assert training["data"][0]["augment"] == (page == "classification")
    assert outputs and "was trained on" not in caplog.text
    for output in outputs:
        result, records = json.loads(output.read_text()), predictions(output)
        assert result["settings"]["model"] == folder and result["scores"].keys() == names
        assert result["rows"] == len(records) == scored and result["broken_rows"] == []
        right = [record["answer"].strip().lower() in map(str.lower, record["references"]) for record in records]
        for name in names & {"accuracy", "exact_match"}:
            assert result["scores"][name] == sum(right) / scored
    texts = namespace[found] if page == "vqa" else [namespace[found]]
    assert [type(text) for text in texts] == [str] * (2 if page == "vqa" else 1)
    assert page != "classification" or namespace[found] in namespace["names"]
    if page == "captioning":
        lines = [json.loads(line) for line in Path("runs/captions.jsonl").read_text().splitlines()]
        assert [line["image"] for line in lines] == [f"photos/{number:02}.png" for number in range(20)]
        assert all(type(line["caption"]) is str for line in lines)


def test_the_captioning_recipe_joins_rows_of_the_same_photo(tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    table = make_photos(tmp_path / "photos") / "captions.csv"
    heading, *rows = table.read_text().splitlines()
    table.write_text("\n".join([heading, *rows, *(row.replace("A ", "One ") for row in rows)]) + "\n")
    trainings, (output,), _ = run_page("captioning", tokenizer, ["--join_rows", "true"])
    assert [training["rows"] for training in trainings.values()] == [16] and "was trained on" not in caplog.text
    captions = [record["references"] for record in predictions(output)]
    assert len(captions) == 4 and all(other == first.replace("A ", "One ") for first, other in captions)


# --- no page scores rows that its model has learnt

Part = tuple[str, str, str]  # data set, seed of shuffling, split


def shown_commands() -> list[tuple[str, str, dict[str, str]]]:
    """(page, what is done, its options) of every command that trains or evaluates, recipes spelled out."""
    found = []
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for command in re.findall(r"""(?:'[^']*'|"[^"]*"|\\\n|[^\n\\'"])+""", block):
                words = shlex.split(command.replace("\\\n", " "))
                if words[:2] == ["accelerate", "launch"]:
                    words = ["imageprompt", "train", *words[words.index("scripts/train.py") + 1 :]]
                if words[:1] == ["imageprompt"] and words[1] in ("train", "pretrain", "evaluate"):
                    words[2:] = spell_out_recipe(words[2:])
                    pairs = zip(words[2:], [*words[3:], ""], strict=True)
                    options = {option[2:]: value for option, value in pairs if option.startswith("--")}
                    found.append((page.name, words[1], options))
    return found


def parts(options: dict[str, str], split: str, default: str = "") -> list[Part]:
    """What a command reads as that split, of one source or of a mixture's."""
    sources: list[dict] = [options]
    if "mixture" in options:
        (shown,) = re.findall(r"^```json\n(.*?)^```", (DOCS / "data.md").read_text(), re.MULTILINE | re.DOTALL)
        file = Path(options["mixture"])
        sources = json.loads(file.read_text() if file.exists() else shown)
    named = [(source["dataset"], str(source.get("shuffle_rows")), source.get(split, default)) for source in sources]
    return [part for part in named if part[2]]


def share_rows(first: Part, second: Part) -> bool:
    sizes = dict.fromkeys(("train", "validation", "test"), 100)
    rows = [
        {
            (each.splitname, row)
            for each in ReadInstruction.from_spec(split).to_absolute(sizes)
            for row in range(100)[each.from_ : each.to]
        }
        for _, _, split in (first, second)
    ]
    names = [{name for name, _ in of_one} for of_one in rows]
    shuffled_otherwise = first[1] != second[1] and names[0] & names[1]
    return first[0] == second[0] and bool(shuffled_otherwise or rows[0] & rows[1])


def test_no_command_scores_rows_that_its_model_has_learnt(monkeypatch):
    monkeypatch.chdir(DOCS.parent)
    commands = shown_commands()
    trainings = [options for _, action, options in commands if action != "evaluate"]

    def learnt(folder: str | None) -> set[Part]:
        """By the model of that folder, and by those that it started from."""
        found: set[Part] = set()
        for options in trainings:
            if options["output_dir"] == folder:
                found |= {*parts(options, "train_split", "train"), *learnt(options.get("model"))}
                found |= learnt(options.get("text"))
        return found

    scored = 0
    for page, action, options in commands:
        if action == "evaluate":
            tested, known = parts(options, "split", "test"), learnt(options["model"])
            known |= set(parts(options, "train_split", "train")) if "constants" in options else set()
        else:
            tested, known = parts(options, "eval_split"), learnt(options["output_dir"])
        shared = [(mine, other) for mine in tested for other in known if share_rows(mine, other)]
        assert not shared, f"{page}: {action} of {options.get('model') or options['output_dir']}: {shared}"
        scored += bool(tested and known)
    assert scored >= 20
    assert share_rows(("a", "0", "train[:80%]"), ("a", "None", "train[80%:]"))
    assert share_rows(("a", "0", "train[:80%]"), ("a", "0", "train[79%:]"))
    assert not share_rows(("a", "0", "train[:80%]"), ("b", "0", "train[:80%]"))
