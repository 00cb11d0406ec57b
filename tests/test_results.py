"""The figures of docs/results.md are those of the committed files, and recipes ask in the test as in training."""

import json
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import picture
from datasets import Dataset, Image

RESULTS = Path(__file__).parents[1] / "docs" / "results"
PAGE = (RESULTS.parent / "results.md").read_text()
# What is asked, and the score that counts.
ANSWERS = {
    "mnist": ("MNIST", "Which digit is this?", "accuracy"),
    "cifar10": ("CIFAR-10", "What is this?", "accuracy"),
    "easy_vqa": ("easy-VQA", "the row's question", "exact_match"),
}


def read(task: str, name: str) -> dict:
    return json.loads((RESULTS / task / f"{name}.json").read_text())


@pytest.mark.parametrize("task", ANSWERS)
def test_rows_of_answers_are_what_was_measured(task):
    title, asked, score = ANSWERS[task]
    scores, training = read(task, "scores"), read(task, "training")
    minutes = training["metrics"]["train_runtime"] / 60
    row = f"| [{title}](results/{task}/scores.json) | {asked} | {scores['scores'][score]:.2%} of {scores['rows']:,} | "
    assert f"{row}{minutes:.0f} minutes |" in PAGE, f"{row}{minutes:.0f} minutes |"
    assert scores["broken_rows"] == [] == training["broken_rows"]
    assert training.get("model", scores["model"]) == scores["model"]  # of earlier ones it is not known


def test_a_run_was_repeated():
    first, again = read("mnist", "scores"), read("mnist", "again")
    assert f"gave {again['scores']['accuracy']:.2%} for MNIST" in " ".join(PAGE.split())
    assert first["data_sha256"] == again["data_sha256"] and first["model"] != again["model"]


@pytest.mark.parametrize("task", [*ANSWERS, "flickr8k", "text"])
def test_recipes_ask_in_the_test_as_in_training(task):
    train, evaluate = read(task, "train"), read(task, "evaluate")
    for name in ("dataset", "text_column", "suffix_column", "prompt"):
        assert train.get(name) == evaluate.get(name)
    assert evaluate["model"] == train["output_dir"]
    assert read(task, "scores")["settings"]["model"] == evaluate["model"]
    in_processes = "OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 scripts/train.py"
    command = in_processes if task == "cifar10" else "imageprompt train"
    assert f"\n{command} docs/results/{task}/train.json\n" in PAGE
    assert f"\nimageprompt evaluate docs/results/{task}/evaluate.json\n" in PAGE


@pytest.fixture(scope="module")
def comparison() -> dict:
    """What scripts/compare_captioners.py defines."""
    return runpy.run_path(str(RESULTS.parents[1] / "scripts" / "compare_captioners.py"))


def test_captions_are_what_was_measured():
    scores, training = read("flickr8k", "scores"), read("flickr8k", "training")
    rows = {"this recipe": scores["scores"], "the best constant caption": scores["best_constant"]["scores"]}
    for name, found in rows.items():
        figures = " | ".join(f"{found[key]:.3f}" for key in ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr"))
        assert f"| {name} | {figures} |" in PAGE, figures
        assert found["CIDEr"] <= scores["scores"]["CIDEr"]
    sentences = " ".join(PAGE.split())
    assert f"{scores['distinct_captions']} different captions" in sentences
    assert f"in {training['metrics']['train_runtime'] / 60:.0f} minutes" in sentences
    assert scores["broken_rows"] == [] == training["broken_rows"]


def test_the_table_of_connectors_is_what_was_measured(comparison):
    runs = read("flickr8k", "connectors-scores")["runs"]
    assert [run["changes"] for run in runs] == read("flickr8k", "connectors")
    assert comparison["table"](runs) in PAGE
    losses = {(run["changes"]["connector"], run["changes"]["fusion"]): run["loss"] for run in runs}
    assert min(losses, key=losses.get) == ("pool", "prefix")
    better = {name for name, fusion in losses if losses[name, "prefix"] < losses[name, "cross_attention"]}
    assert {name for name, _ in losses} - better == {"resampler"}
    for run in runs:
        assert run["settings"] == comparison["settle"]("ours", run["changes"])
        assert run["split"] == "validation" and f"--minutes {run['minutes']:g} " in PAGE


def test_the_table_of_changes_is_what_was_measured(comparison):
    runs = read("flickr8k", "changes-scores")["runs"]
    assert [run["changes"] for run in runs] == read("flickr8k", "changes")
    assert comparison["table"](runs) in PAGE
    first, *others = runs
    assert first["changes"] == {}
    more = {json.dumps(run["changes"]): run["loss"] - first["loss"] for run in others}
    assert f"{more[json.dumps({'texts_per_image': 1})]:.3f}\n  higher, with five" in PAGE
    assert f"with five {more[json.dumps({'texts_per_image': 5})]:.3f}," in PAGE
    scores = {json.dumps(run["changes"]): (run["scores"]["BLEU-4"], run["scores"]["CIDEr"]) for run in runs}
    chosen = scores.pop(json.dumps({"feature_layer": -2}))
    assert all(chosen[0] > bleu for bleu, _ in scores.values())
    assert sum(chosen[1] < cider for _, cider in scores.values()) == 1
    for run in runs:
        assert run["settings"] == comparison["settle"]("ours", run["changes"])
        assert run["split"] == "validation" and run["seed"] == 0 and f"--minutes {run['minutes']:g} " in PAGE


def test_the_table_of_captioners_is_what_was_measured(comparison):
    runs = read("flickr8k", "peers")["runs"]
    assert comparison["table"](runs) in PAGE
    for run in runs:
        assert run["settings"] == comparison["settle"](run["captioner"], run["changes"]) and run["split"] == "test"
        assert run["changes"] in ({}, *read("flickr8k", "chosen"))
        assert 60 * run["minutes"] <= run["cpu_seconds"] < 60 * run["minutes"] + 10
    found = {
        (name, changed): [run for run in runs if run["captioner"] == name and bool(run["changes"]) == changed]
        for name, changed in (("ours", False), ("ours", True), ("ved", False), ("llava", False))
    }
    assert all(len(own) == 3 for own in found.values())
    *ours, ved, llava = found.values()
    for own, scores in zip(ours, (["CIDEr"], ["CIDEr", "BLEU-4"]), strict=True):
        assert max(run["loss"] for run in own) < min(run["loss"] for run in ved + llava)
        for score in scores:
            assert min(run["scores"][score] for run in own) > max(run["scores"][score] for run in ved + llava)


MULTI_TASK = {**{task: score for task, (*_, score) in ANSWERS.items()}, "flickr8k": "CIDEr"}


def test_one_model_for_all_tasks_is_what_was_measured():
    training, sentences = read("multi_task", "more_training"), " ".join(PAGE.split())
    assert {source["dataset"].split("/")[-1] for source in training["data"]} == MULTI_TASK.keys()
    assert f"second took {training['metrics']['train_runtime'] / 60:.0f} minutes" in sentences
    first, more = read("multi_task", "train"), read("multi_task", "more")
    assert (more["model"], more["learning_rate"]) == (first["output_dir"], first["learning_rate"] / 2)
    trained = {entry["name"]: entry for entry in read("multi_task", "more_mixture")}
    for task, score in MULTI_TASK.items():
        found = read(f"multi_task/{task}", "scores")
        together, alone = found["scores"][score], read(task, "scores")["scores"][score]
        title, form = (ANSWERS[task][0], ".2%") if task in ANSWERS else ("Flickr8k, CIDEr", ".3f")
        row = f"| [{title}](results/multi_task/{task}/scores.json) | {together:{form}} | {alone:{form}} |"
        assert row in PAGE, row
        assert together > alone - 0.02, task
        evaluate = read(f"multi_task/{task}", "evaluate")
        for name in ("dataset", "text_column", "suffix_column", "prompt"):
            assert trained[task].get(name) == evaluate.get(name)
        assert evaluate["model"] == more["output_dir"]
        assert f"imageprompt evaluate docs/results/multi_task/{task}/evaluate.json\n" in PAGE
        assert found["model"] == training["model"] and found["broken_rows"] == []
    assert "\nimageprompt train docs/results/multi_task/train.json\n" in PAGE
    assert "scripts/train.py docs/results/multi_task/more.json\n" in PAGE


def test_the_others_learn_at_the_rate_that_did_best(comparison):
    runs = read("flickr8k", "rates")["runs"]
    assert comparison["table"](runs) in PAGE
    for name in ("ved", "llava"):
        best = min((run for run in runs if run["captioner"] == name), key=lambda run: run["loss"])
        assert best["changes"] == {key: comparison["SETTINGS"][name][key] for key in best["changes"]}
        assert best["split"] == "validation" and best["changes"].keys() == {"learning_rate", "batch_size", "patch_size"}


def test_the_text_only_language_model_is_what_was_measured():
    found = read("text", "perplexity")
    sentences = " ".join(PAGE.split())
    assert f"perplexity of {found['perplexity']:.1f} ({found['bits_per_byte']:.2f} bits per byte)" in sentences
    assert f"{found['tokens']:,} tokens" in sentences
    scores = read("text", "scores")["scores"]
    figures = " | ".join(f"{scores[key]:.3f}" for key in ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr"))
    assert f"| pretrained on captions | {figures} |" in PAGE
    assert f"{scores['CIDEr'] - read('flickr8k', 'scores')['scores']['CIDEr']:.3f} more of CIDEr" in sentences
    assert f"took {read('text', 'training')['metrics']['train_runtime'] / 60:.0f} minutes" in sentences
    shared = {name: value for name, value in read("text", "train").items() if name in read("flickr8k", "train")}
    different = {name for name, value in shared.items() if value != read("flickr8k", "train")[name]}
    assert different == {"pretrained", "output_dir"}


def test_the_comparison_runs_and_goes_on_where_it_stopped(comparison, tokenizer, tmp_path, monkeypatch):
    photos = [picture(seed) for seed in range(8)]
    data = Dataset.from_dict({"image": photos, "captions": [["A dog!", "Two cats on a red sofa."]] * 8})
    (tmp_path / "flickr8k").mkdir()
    for split in ("train", "validation"):
        data.cast_column("image", Image()).to_parquet(tmp_path / "flickr8k" / f"{split}.parquet")
    changes, output = tmp_path / "changes.json", tmp_path / "found.json"
    changes.write_text('[{"batch_size": 4}]')
    small = {"minutes": 0.01, "seeds": 1, "split": "validation"}
    comparison["main"](tmp_path, output, captioners="ours,ved,llava", changes=changes, **small)
    found = json.loads(output.read_text())
    assert len(found["runs"]) == 3
    assert all(0 < run["loss"] < 100 and 1 <= run["distinct_captions"] <= 8 for run in found["runs"])
    assert comparison["table"](found["runs"]).count("\n") == 5

    monkeypatch.setitem(comparison["main"].__globals__, "run", lambda *_: pytest.fail("run again"))
    comparison["main"](tmp_path, output, captioners="ours,ved,llava", changes=changes, **small)
    monkeypatch.undo()
    changes.write_text('[{"patch_size": 16}]')
    with pytest.raises(ValueError, match="ours has no patch_size to change; it has image_size, warmup"):
        comparison["main"](tmp_path, output, captioners="ours", changes=changes, **small)


def test_peers_have_the_loss_and_the_captions_of_the_library(comparison, tokenizer):
    """The inputs that the peers get say what the library's own classes want."""
    settings = comparison["COMMON"] | comparison["SETTINGS"]["llava"]
    rows = [
        {"image": picture(0), "text": "", "suffix": "A dog!"},
        {"image": picture(1), "text": "", "suffix": "Two cats."},
    ]
    for name in ("ved", "llava"):
        captioner = comparison["build"](name, settings, tokenizer)
        model = captioner.model.eval()
        batch = captioner.batch(rows)
        with torch.no_grad():
            logits = model(**batch).logits
        labels = batch["labels"]
        if name == "llava":  # whose logits are of the next token
            logits, labels = logits[:, :-1], labels[:, 1:]
        expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        assert model(**batch).loss.item() == pytest.approx(expected.item(), abs=1e-5)
        supervised = [[token for token in row if token != -100] for row in labels.tolist()]
        assert supervised == [[*tokenizer(row["suffix"])["input_ids"], tokenizer.eos_token_id] for row in rows]
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight or name == "ved"
        assert len(captioner.generate([row["image"] for row in rows])) == 2
