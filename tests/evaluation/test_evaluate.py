"""`evaluate` on a tiny split: what it writes, that it repeats and goes on, and what it refuses."""

import hashlib
import json
import shutil

import pytest
import torch
from conftest import make_photos, picture, tiny
from datasets import ClassLabel, Dataset, Image, load_dataset
from transformers import set_seed

from imageprompt.cpu import PrepackedLinear
from imageprompt.evaluation import caption_scores, tasks
from imageprompt.evaluation.evaluate import best_constant, main

CAPTIONS = [
    ["A dog!", "One dog."],
    ["Two cats.", "Cats on a sofa."],
    ["A red sofa.", "It is red."],
    ["A dog."],
    ["Two"],
]


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    set_seed(0)
    for part in tiny(tokenizer):
        part.save_pretrained(root / "model")
    rows = {"image": [picture(seed) for seed in range(5)], "captions": CAPTIONS, "label": [0, 1, 1, 0, 1]}
    dataset = (
        Dataset.from_dict(rows).cast_column("image", Image()).cast_column("label", ClassLabel(names=["dog", "cat"]))
    )
    (root / "data").mkdir()
    for split in ("train", "test"):
        dataset.to_parquet(root / "data" / f"{split}.parquet")
    return root


@pytest.fixture
def evaluate(folder, tmp_path, monkeypatch):
    """Runs the command on the model and data above, in an empty folder; returns its result."""
    monkeypatch.chdir(tmp_path)

    def run(*more: str, output: str = "scores.json", column: str = "captions") -> dict:
        where = ["--model", str(folder / "model"), "--dataset", str(folder / "data"), "--output", output]
        main([*where, "--suffix_column", column, "--max_new_tokens", "8", "--batch_size", "2", *more])
        return json.loads((tmp_path / output).read_text())

    return run


def predictions(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def test_scores_settings_and_answers_are_written_and_repeat(evaluate, folder, tmp_path):
    more = ["--constants", "2", "--captions", "captions.txt", "--picture", "new/grid.png", "--num_beams", "2"]
    result = evaluate(*more)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    captions = (tmp_path / "captions.txt").read_text().splitlines()
    records = predictions(tmp_path / "scores.predictions.jsonl")
    assert captions == [" ".join(record["answer"].split()) for record in records]
    assert [record["references"] for record in records] == CAPTIONS
    answers = {record["row"]: record["answer"] for record in records}
    assert result["scores"] == pytest.approx(caption_scores(answers, dict(enumerate(CAPTIONS))))
    assert result["rows"] == 5 and result["broken_rows"] == []
    assert result["decoding"] == {"do_sample": False, "max_new_tokens": 8, "num_beams": 2}
    assert result["settings"]["suffix_column"] == "captions" and result["settings"]["seed"] == result["seed"] == 0
    assert result["versions"].keys() >= {"imageprompt", "torch", "transformers"}
    weights = hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert result["model"]["weights_sha256"] == weights
    assert {path.name for path in files} == {"scores.json", "scores.predictions.jsonl", "captions.txt", "grid.png"}

    evaluate(*more)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == files
    (tmp_path / "scores.predictions.jsonl").unlink()
    evaluate(*more)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == files


def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(evaluate, tmp_path, monkeypatch):
    answer, batches = tasks.Caption.answer, []

    def stop_at_the_third(self, model, processor, images, texts):
        batches.append([each.row for each in texts])
        if len(batches) == 3:
            raise KeyboardInterrupt
        return answer(self, model, processor, images, texts)

    monkeypatch.setattr(tasks.Caption, "answer", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate()
    assert len(predictions(tmp_path / "scores.predictions.jsonl")) == 4 and not (tmp_path / "scores.json").exists()
    evaluate()
    assert [len(rows) for rows in batches] == [2, 2, 1, 1] and batches[2] == batches[3]

    files = [tmp_path / "scores.json", tmp_path / "scores.predictions.jsonl"]
    stopped = [file.read_bytes() for file in files]
    files[1].unlink()
    evaluate()
    assert [file.read_bytes() for file in files] == stopped


def test_answers_of_other_settings_models_and_data_are_not_mixed(evaluate, folder, tokenizer, tmp_path):
    evaluate()
    with pytest.raises(ValueError, match=r"decoding\.num_beams 1 instead of 2"):
        evaluate("--num_beams", "2")
    with pytest.raises(ValueError, match="data_sha256"):
        evaluate("--prompt", "A photo of")
    set_seed(1)
    for part in tiny(tokenizer):
        part.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"model\.weights_sha256 .* instead of"):
        evaluate("--model", "other")
    assert evaluate("--num_beams", "2", "--restart")["decoding"]["num_beams"] == 2
    assert evaluate("--num_beams", "2", "--batch_size", "3")["rows"] == 5  # another batch size may go on


def test_answers_chosen_among_other_candidates_are_not_mixed(evaluate, tmp_path):
    make_photos(tmp_path / "photos", 4)
    ranked = ["--dataset", "photos/classes.csv", "--image_column", "file", "--split", "train", "--task", "rank"]
    evaluate(*ranked, "--class_names", "square", "circle", column="shape")
    with pytest.raises(ValueError, match="candidates_sha256"):
        evaluate(*ranked, "--class_names", "square", "circle", "triangle", column="shape")
    (tmp_path / "scores.predictions.jsonl").unlink()
    result = evaluate(*ranked, "--class_names", "square", "circle", "triangle", column="shape")
    assert result["confusion"]["labels"][:3] == ["square", "circle", "triangle"]


@pytest.mark.parametrize("task", ["classify", "rank"])
def test_classes_come_with_their_confusions(evaluate, tmp_path, task):
    result = evaluate("--task", task, "--confusion_picture", "confusion.png", "--picture", "grid.png", column="label")
    assert result["scores"].keys() == {"accuracy", "macro_recall", "macro_f1"}
    assert [sum(counts) for counts in result["confusion"]["counts"]] == [2, 3]
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    expected = {"normalize": "none"} if task == "rank" else {"do_sample": False, "max_new_tokens": 8, "num_beams": 1}
    assert result["decoding"] == expected


def test_captions_that_are_all_equal_are_warned_of(evaluate, monkeypatch, caplog):
    monkeypatch.setattr(tasks, "generate_texts", lambda model, processor, images, *_, **__: ["A dog."] * len(images))
    evaluate()
    assert "All 5 captions are equal ('A dog.'): the model does not look at its images yet." in caplog.text
    caplog.clear()
    evaluate("--split", "test[:1]", output="one.json")
    monkeypatch.undo()
    assert "captions are equal" not in caplog.text


def test_rows_that_the_model_has_learnt_are_warned_of(evaluate, folder, tmp_path, monkeypatch, caplog):
    make_photos(tmp_path / "photos", 10)
    shutil.copytree(folder / "model", tmp_path / "model")
    learnt = {"dataset": "photos/captions.csv", "subset": None, "shuffle_rows": 0, "train_split": "train[:8]"}
    (tmp_path / "model" / "training.json").write_text(json.dumps({"data": [learnt]}))
    monkeypatch.setattr(tasks, "generate_texts", lambda model, processor, images, *_, **__: ["A dog."] * len(images))

    def warns(split):
        caplog.clear()
        source = ["--dataset", str(tmp_path / "photos" / "captions.csv"), "--image_column", "file"]
        evaluate("--model", "model", *source, "--shuffle_rows", "0", "--split", split, "--restart", column="caption")
        return "model was trained on train[:8] of photos/captions.csv (shuffle_rows 0). Rows of" in caplog.text

    assert not warns("train[80%:]")
    assert warns("train[70%:]")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the command takes the GPU")
def test_answers_come_from_prepacked_weights(evaluate, monkeypatch):
    rows, forward = [], PrepackedLinear.forward
    monkeypatch.setattr(
        PrepackedLinear, "forward", lambda self, states: rows.append(len(states)) or forward(self, states)
    )
    evaluate()
    assert rows


def test_each_task_has_its_scores(evaluate):
    assert evaluate("--task", "vqa", output="vqa.json")["scores"].keys() == {"exact_match"}
    result = evaluate("--task", "retrieval", "--normalize", "images", output="retrieval.json")
    assert result["images"] == 5 and result["scores"]["text_to_image_recall@5"] == 1
    alone = ["--image_column", "none", "--prompt", "<|endoftext|>"]
    assert evaluate("--task", "perplexity", *alone, output="text.json")["scores"]["perplexity"] > 1


def test_java_metrics_are_asked_for_and_what_is_missing_is_said(evaluate, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    result = evaluate("--java_metrics")
    assert result["left_out"] == dict.fromkeys(("METEOR", "SPICE"), "There is no `java` command.")
    assert "left_out" not in evaluate("--restart")


def test_broken_rows_are_named(folder, tmp_path, evaluate):
    dataset = load_dataset(str(folder / "data"), split="test").cast_column("image", Image(decode=False))
    rows = dataset.to_list()
    rows[1]["image"] = {"bytes": b"no image", "path": "broken.png"}
    (tmp_path / "data").mkdir()
    Dataset.from_list(rows, features=dataset.features).to_parquet(tmp_path / "data" / "test.parquet")
    result = evaluate("--dataset", "data")
    assert result["rows"] == 4
    (broken,) = result["broken_rows"]
    assert broken.startswith("Row 1 of data (broken.png): ")
    assert [record["row"] for record in predictions(tmp_path / "scores.predictions.jsonl")] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"1 broken rows of 5; the last: Row 1 of data \(broken\.png\)"):
        evaluate("--dataset", "data", "--max_broken_rows", "0", "--restart")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--suffix_column", "texts"], "no column 'texts'; it has image, captions, label"),
        (["--text_column", "question"], "no column 'question'"),
        (["--split", "validation"], "no split 'validation'; it has"),
        (["--split", "test[:0]"], "is empty"),
        (["--dataset", "./nowhere"], "There is no data set at nowhere"),
        (["--task", "rank"], "2 references"),
        (["--max_new_tokens", "253"], "256 positions"),
        (["--batch_size", "0"], "at least 1, got 0"),
        (["--task", "vqa", "--java_metrics"], "`--java_metrics` is for the task caption, not for 'vqa'"),
        (["--confusion_picture", "x.png"], "is for the task classify and rank, not for 'caption'"),
        (["--picture", "x.png", "--image_column", "none"], "there are none"),
        (["--streaming"], "A stream can only be trained on"),
        (["--constants", "2", "--train_split", "training"], "no split 'training'"),
        (["--task", "rank", "--suffix_column", "label", "--class_names", "Cat", "cat"], "'Cat' and 'cat'"),
    ],
)
def test_mistakes_stop_before_the_weights_are_loaded(evaluate, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr(
        "imageprompt.modeling.ImagePromptForConditionalGeneration.from_pretrained",
        lambda *_, **__: pytest.fail("loaded"),
    )
    with pytest.raises(ValueError, match=message):
        evaluate(*more)
    assert not list(tmp_path.glob("scores*"))


def test_a_processor_of_another_model_is_refused(folder, evaluate, tokenizer, tmp_path):
    model, _ = tiny(tokenizer)
    _, processor = tiny(tokenizer, num_image_tokens=1)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="do not belong together: num_image_tokens 1 here, 4 in the model"):
        evaluate("--model", "model")


def test_best_constant_has_the_highest_cider():
    references = dict(enumerate(CAPTIONS))
    candidates = ["a dog", "cats on a sofa", "nothing"]
    caption, scores = best_constant(candidates, references, progress=False)
    ciders = {c: caption_scores(dict.fromkeys(references, c), references)["CIDEr"] for c in candidates}
    assert scores["CIDEr"] == max(ciders.values())
    assert ciders[caption] == scores["CIDEr"]
