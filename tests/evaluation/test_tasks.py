"""Each task against the plainest way to compute the same, one row at a time."""

import io
import math

import pytest
import torch
from conftest import picture, tiny
from datasets import ClassLabel, Dataset, Image
from transformers import set_seed

from imageprompt.data.rows import Rows
from imageprompt.data.sources import Source
from imageprompt.evaluation import caption_scores, generated_metrics, tasks
from imageprompt.evaluation.classification import classification_scores
from imageprompt.evaluation.retrieval import retrieval_scores
from imageprompt.evaluation.tasks import Settings, answer_rows, answered, make_task
from imageprompt.generating import generate_texts

CAPTIONS = [["A dog!", "One dog."], ["Two cats.", "A photo of two cats on a sofa."], ["A red sofa."], ["One dog."]]
CLASSES = ["dog", "two cats", "red sofa"]


def file(image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def make_rows(columns, images=True, labels=None, max_broken=100, **source) -> Rows:
    """Rows of the columns given and, beside each, a picture of its own or the content of a file."""
    size = len(next(iter(columns.values())))
    if images:
        contents = images if isinstance(images, list) else [file(picture(row)) for row in range(size)]
        columns = {"image": [{"bytes": content, "path": None} for content in contents]} | columns
    dataset = Dataset.from_dict(columns)
    if images:
        dataset = dataset.cast_column("image", Image(decode=False))
    if labels:
        dataset = dataset.cast_column("suffix", ClassLabel(names=labels))
    source = {"image_column": "image" if images else "none"} | source
    return Rows(dataset, Source("animals", **source), draw=False, max_broken=max_broken)


@pytest.fixture(scope="module")
def parts(tokenizer):
    set_seed(0)
    return tiny(tokenizer)


def run(parts, rows, name, batch_size=3, **settings):
    """What a task makes of rows: its result and its records."""
    task = make_task(name, rows, parts[1], Settings(**settings))
    records = [record for batch in answer_rows(task, *parts, batch_size=batch_size) for record in batch]
    return task.score(answered(records)), records


def score(parts, image, prompt, suffix) -> float:
    model, processor = parts
    images = None if image is None else [image]
    return model.score(**processor(images=images, text=[prompt], suffix=[suffix], return_tensors="pt")).item()


def test_caption_scores_what_generate_says(parts):
    rows = make_rows({"suffix": CAPTIONS}, prompt="A photo of")
    result, records = run(parts, rows, "caption", max_new_tokens=5, num_beams=2)
    alone = [generate_texts(*parts, [picture(row)], "A photo of", max_new_tokens=5, num_beams=2)[0] for row in range(4)]
    assert [record["answer"] for record in records] == alone
    assert records[1] == {
        "row": 1,
        "name": "Row 1 of animals",
        "prompt": "A photo of",
        "references": CAPTIONS[1],
        "answer": alone[1],
    }
    assert result["scores"] == caption_scores(dict(enumerate(alone)), dict(enumerate(CAPTIONS)))
    assert result["distinct_captions"] == len(set(alone))


@pytest.fixture
def answers(monkeypatch):
    """Lets the model, whose own words are noise, answer so: prompts to answers."""
    answers: dict[str, str] = {}
    monkeypatch.setattr(tasks, "generate_texts", lambda *args, **_: [answers[prompt] for prompt in args[3]])
    return answers


def test_vqa_has_its_accuracy_with_ten_people_and_exact_match_without(parts, answers):
    answers |= {"What is it?": "A dog.", "How many?": "two", "Where?": "here"}
    people = [["dog"] * 2 + ["cat"] * 8, ["2"] * 5 + ["3"] * 5, ["sofa"] * 10]
    rows = make_rows({"q": list(answers), "suffix": people}, text_column="q")
    assert run(parts, rows, "vqa")[0]["scores"] == pytest.approx({"vqa_accuracy": (0.6 + 1 + 0) / 3})
    accepted = [["cat", "a DOG."], ["two"], ["sofa"]]
    rows = make_rows({"q": list(answers), "suffix": accepted}, text_column="q")
    assert generated_metrics(*parts, rows, "vqa") == pytest.approx({"exact_match": 2 / 3})


def test_classify_compares_what_the_model_writes(parts, answers):
    answers |= {"a": "dog", "b": "Two cats", "c": "dog", "d": "red"}
    rows = make_rows({"q": list(answers), "suffix": [0, 1, 2, 2]}, labels=CLASSES, text_column="q")
    result, records = run(parts, rows, "classify")
    assert [record["references"] for record in records] == [["dog"], ["two cats"], ["red sofa"], ["red sofa"]]
    assert result == classification_scores([CLASSES[n] for n in (0, 1, 2, 2)], list(answers.values()), CLASSES)
    assert result["scores"]["accuracy"] == 0.5


@pytest.mark.parametrize("normalize", ["none", "tokens", "text"])
@pytest.mark.parametrize("prompt", ["What is it?", ""])
def test_rank_takes_the_likeliest_label(parts, normalize, prompt):
    rows = make_rows({"suffix": [0, 1, 2, 1, 0]}, labels=CLASSES, prompt=prompt)
    result, records = run(parts, rows, "rank", normalize=normalize)
    suffixes = [f" {name}" if prompt else name for name in CLASSES]
    for row, record in enumerate(records):
        scores = [score(parts, picture(row), prompt, suffix) for suffix in suffixes]
        if normalize == "tokens":
            scores = [
                value / (1 + len(parts[1].tokenizer(suffix)["input_ids"]))
                for value, suffix in zip(scores, suffixes, strict=True)
            ]
        if normalize == "text":
            alone = [score(parts, None, prompt or "<|endoftext|>", suffix) for suffix in suffixes]
            scores = [value - other for value, other in zip(scores, alone, strict=True)]
        assert record["label_scores"] == pytest.approx(dict(zip(CLASSES, scores, strict=True)), rel=1e-6, abs=1e-5)
        assert record["answer"] == CLASSES[max(range(3), key=scores.__getitem__)]
    truth = [CLASSES[label] for label in (0, 1, 2, 1, 0)]
    right = sum(record["answer"] == label for record, label in zip(records, truth, strict=True))
    assert result["scores"]["accuracy"] == pytest.approx(right / 5)


def test_rank_without_classes_takes_the_texts_that_occur(parts):
    _, records = run(parts, make_rows({"suffix": ["seven", "two", "seven"]}), "rank")
    assert list(records[0]["label_scores"]) == ["seven", "two"]


@pytest.mark.parametrize("normalize", ["none", "images"])
def test_retrieval_ranks_all_texts_of_all_images(parts, normalize):
    result, records = run(parts, make_rows({"suffix": CAPTIONS}), "retrieval", normalize=normalize, batch_size=2)
    texts = ["A dog!", "One dog.", "Two cats.", "A photo of two cats on a sofa.", "A red sofa."]  # one of them twice
    scores = torch.tensor([[score(parts, picture(row), "", text) for text in texts] for row in range(4)])
    matches = torch.tensor([[text in captions for text in texts] for captions in CAPTIONS])
    for row, record in enumerate(records):
        assert record["text_scores"] == pytest.approx(scores[row].tolist(), rel=1e-6, abs=1e-5)
    # From the batch's own scores: images differ so little for this model that rounding may change their order.
    scores = torch.tensor([record["text_scores"] for record in records], dtype=torch.float64)
    if normalize == "images":
        scores = scores - scores.mean(0)
    assert result == {"scores": retrieval_scores(scores, matches), "images": 4, "texts": 5}


def test_retrieval_leaves_out_the_texts_of_broken_images(parts):
    contents = [file(picture(0)), b"no image", file(picture(2)), file(picture(3))]
    result, _ = run(parts, make_rows({"suffix": CAPTIONS}, contents), "retrieval")
    assert (result["images"], result["texts"]) == (3, 3)


@pytest.mark.parametrize("images", [True, False])
def test_perplexity_is_that_of_the_loss(parts, images):
    prompt = "" if images else "<|endoftext|>"
    result, records = run(parts, make_rows({"suffix": CAPTIONS}, images, prompt=prompt), "perplexity")
    flat = [(row, text) for row, texts in enumerate(CAPTIONS) for text in texts]
    model, processor = parts
    batch = processor(
        images=[picture(row) for row, _ in flat] if images else None,
        text=[prompt] * len(flat),
        suffix=[text if images else f" {text}" for _, text in flat],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert result["scores"] == pytest.approx({"perplexity": math.exp(loss), "nats_per_token": loss}, rel=1e-5)
    assert result["tokens"] == (batch["labels"] != -100).sum()
    assert [len(record["tokens"]) for record in records] == [2, 2, 1, 1]


def test_the_size_of_batches_changes_nothing(parts):
    rows = make_rows({"q": ["What is it?", "A", "Two cats on"], "suffix": ["dog", "sofa", "dog"]}, text_column="q")
    for name in ("caption", "vqa", "classify", "rank", "perplexity"):
        alone = generated_metrics(*parts, rows, name, batch_size=1, max_new_tokens=4)
        assert generated_metrics(*parts, rows, name, batch_size=3, max_new_tokens=4) == pytest.approx(alone, rel=1e-5)


def test_rows_with_several_images_none_and_pairs(parts):
    first, second = picture(0), picture(1)
    images = [[{"bytes": file(first), "path": None}, {"bytes": file(second), "path": None}], []]
    dataset = Dataset.from_dict({"image": images, "text": ["Both:", "None:"], "suffix": ["a", "b"]})
    rows = Rows(dataset, Source("animals", text_column="text"), draw=False)
    _, records = run(parts, rows, "perplexity")
    model, processor = parts
    alone = processor(images=[[first, second]], text=["Both:"], suffix=[" a"], return_tensors="pt")
    assert records[0]["log_likelihoods"] == pytest.approx(model.score(**alone).tolist(), rel=1e-6, abs=1e-5)
    assert records[1]["log_likelihoods"] == pytest.approx([score(parts, None, "None:", " b")], rel=1e-6, abs=1e-5)

    rows = make_rows({"q": [["What?", "Who?"], ["How many?"]], "suffix": [["a", "b"], ["c"]]}, text_column="q")
    _, records = run(parts, rows, "perplexity")
    assert [(record["prompt"], record["references"]) for record in records] == [
        ("What?", ["a"]),
        ("Who?", ["b"]),
        ("How many?", ["c"]),
    ]


def test_a_model_in_training_is_measured_and_left_in_training(tokenizer):
    model, processor = tiny(tokenizer)
    rows = make_rows({"suffix": CAPTIONS})
    expected = generated_metrics(model, processor, rows, "perplexity")
    model.train()
    model.model.connector.eval()
    assert generated_metrics(model, processor, rows, "perplexity") == pytest.approx(expected, rel=1e-6)
    generated_metrics(model, processor, rows, "caption", max_new_tokens=2)
    assert model.training and model.model.vision_tower.training and not model.model.connector.training


# --- rows that cannot be used


def test_broken_rows_are_named_and_left_out(parts):
    half = file(picture(1))[:2000]
    rows = make_rows({"suffix": [*CAPTIONS, []]}, [file(picture(0)), half, b"", file(picture(3)), file(picture(4))])
    result, records = run(parts, rows, "perplexity", batch_size=2)
    assert [record["row"] for record in records if "broken" in record] == [1, 2, 4]
    assert records[1]["broken"].startswith("Row 1 of animals: ")
    assert "no text in 'suffix'" in records[4]["broken"]
    whole = make_rows({"suffix": [CAPTIONS[0], CAPTIONS[3]]}, [file(picture(0)), file(picture(3))])
    assert result["scores"] == pytest.approx(run(parts, whole, "perplexity")[0]["scores"], rel=1e-6)


def test_too_many_broken_rows_stop_the_run(parts):
    contents = [file(picture(0)), b"x", b"y", file(picture(3))]
    rows = make_rows({"suffix": CAPTIONS}, contents, max_broken=1)
    with pytest.raises(ValueError, match=r"2 broken rows of 4; the last: Row 2 of animals.*--max_broken_rows"):
        run(parts, rows, "perplexity", batch_size=1)
    with pytest.raises(ValueError, match="4 broken rows of 4"):
        run(parts, make_rows({"suffix": CAPTIONS}, [b"x"] * 4), "caption")


def test_broken_rows_of_the_run_before_count(parts):
    rows = make_rows({"suffix": CAPTIONS}, [b"x", file(picture(1)), b"y", file(picture(3))], max_broken=1)
    task = make_task("perplexity", rows, parts[1], Settings())
    done = next(answer_rows(task, *parts, batch_size=2))
    with pytest.raises(ValueError, match="2 broken rows"):
        list(answer_rows(task, *parts, batch_size=2, done=done))


# --- what is refused before the model is asked


@pytest.mark.parametrize(
    ("name", "columns", "settings", "message"),
    [
        ("translate", {"suffix": ["a"]}, {}, "no task 'translate'; there are caption, vqa"),
        ("caption", {"suffix": [[], []]}, {}, "2 broken rows of 2.*no text in 'suffix'"),
        ("caption", {"suffix": ["a"]}, {"max_new_tokens": 0}, "at least 1, got 0 and 1"),
        ("caption", {"suffix": ["a"]}, {"normalize": "text"}, "'caption', `normalize` is one of none, not 'text'"),
        ("caption", {"suffix": ["...", "-"]}, {}, r"No reference has a word; the first is '\.\.\.'"),
        ("rank", {"suffix": ["a"]}, {"normalize": "images"}, "'rank', `normalize` is one of none, tokens, text"),
        ("rank", {"suffix": CAPTIONS}, {}, "Row 0 of animals has 2 references; the task 'rank' takes one label"),
        ("classify", {"suffix": [["a"], ["a", "b"]]}, {}, "Row 1 of animals has 2 references"),
        ("classify", {"suffix": ["Cat", "dog", "cat"]}, {}, "Two labels are equal but .*: 'Cat' and 'cat'"),
        ("rank", {"suffix": ["Cat", "dog", "cat"]}, {}, "Two labels are equal but .*: 'Cat' and 'cat'"),
        ("vqa", {"suffix": [["a"] * 10, ["a"]]}, {}, "Row 0 of animals has 10 answers, Row 1 of animals has 1: VQA"),
        ("vqa", {"suffix": ["dog", "Assistant!?"]}, {"max_new_tokens": 2}, r"Row 1 .* than . tokens \('Assistant!\?'"),
        ("caption", {"suffix": ["a"]}, {"max_new_tokens": 253}, "Row 0 of animals has 4 tokens .*lower `max_new"),
        ("perplexity", {"suffix": ["a", "b" * 255]}, {}, "Row 1 of animals has 4 tokens .*256 in it.*256 positions"),
        ("retrieval", {"suffix": ["a", "b" * 255]}, {}, "256 positions. Shorten the texts.$"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_is_asked(parts, name, columns, settings, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, make_rows(columns), parts[1], Settings(**settings))


@pytest.mark.parametrize("name", ["classify", "rank"])
def test_a_truth_that_is_no_class_is_refused_before_the_model_is_asked(parts, name, monkeypatch):
    monkeypatch.setattr(Rows, "texts", lambda self, index: ("", ["dog"]))
    rows = make_rows({"suffix": ["cat"]}, class_names=["cat", "bird"])
    with pytest.raises(ValueError, match="'dog' is none of the labels cat, bird"):
        make_task(name, rows, parts[1], Settings())


def test_text_alone_needs_a_prompt_and_is_not_retrieved_by(parts):
    rows = make_rows({"suffix": ["a"]}, images=False)
    with pytest.raises(ValueError, match=r"neither image nor prompt.*--prompt '<\|endoftext\|>'"):
        make_task("perplexity", rows, parts[1], Settings())
    with pytest.raises(ValueError, match="'retrieval' needs images"):
        make_task("retrieval", rows, parts[1], Settings())
    with pytest.raises(ValueError, match="animals has no rows"):
        make_task("caption", make_rows({"suffix": ["a"]}).select([]), parts[1], Settings())
