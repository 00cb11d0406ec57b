"""lmms-eval asks a tiny model through its own evaluator, and gets what the model says when asked directly.

Runs where lmms-eval is installed: `pip install "imageprompt[lmms]"`.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import picture, tiny
from datasets import Dataset, Image

from imageprompt.generating import generate_texts

pytest.importorskip("lmms_eval")

from lmms_eval.__main__ import cli_evaluate
from lmms_eval.api.instance import Instance
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import MODEL_REGISTRY_V2

from imageprompt.evaluation.lmms_eval import ImagePrompt, manifest

QUESTIONS = ["What is it?", "A photo of", "Two"]
CHOICES = [" a dog", " two cats on a red sofa", " seven"]
PROMPT = "Q: {text} A:"


TASK = """\
task: shapes
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function show.image
doc_to_text: question
doc_to_target: question
generation_kwargs: {{max_new_tokens: 5}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("lmms")
    for part in tiny(tokenizer):
        part.save_pretrained(root / "model")
    rows = {"image": [picture(row) for row in range(3)], "question": QUESTIONS}
    Dataset.from_dict(rows).cast_column("image", Image()).to_parquet(root / "test.parquet")
    return root


@pytest.fixture(scope="module")
def lmm(folder):
    """The adapter, as lmms-eval makes it, with the documents of a task at hand."""
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    made = MODEL_REGISTRY_V2.get_model_class("imageprompt").create_from_arg_string(
        f"pretrained={folder}/model,prompt={PROMPT}", {"batch_size": 2, "device": None, "max_batch_size": None}
    )
    made.task_dict["shapes"] = {"test": [{"image": picture(row), "question": QUESTIONS[row]} for row in range(3)]}
    return made


def request(kind: str, *arguments) -> Instance:
    return Instance(kind, arguments, 0, metadata={"task": "shapes", "doc_id": 0, "repeats": 1})


def image_of(doc) -> list:
    return [doc["image"]]


def directly(lmm, rows, **settings) -> list[str]:
    prompts = [PROMPT.replace("{text}", QUESTIONS[row]) for row in rows]
    return generate_texts(lmm.model, lmm.processor, [picture(row) for row in rows], prompts, **settings)


def test_the_evaluator_gets_what_generate_says(lmm, folder):
    answers = directly(lmm, range(3), max_new_tokens=5)
    config = {
        "task": "shapes",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(folder / "test.parquet")}},
        "test_split": "test",
        "output_type": "generate_until",
        "generation_kwargs": {"max_new_tokens": 5, "temperature": 0, "until": []},
        "doc_to_visual": image_of,
        "doc_to_text": lambda doc: doc["question"],
        "doc_to_target": lambda doc: answers[0],
        "process_results": lambda doc, results: {"said": results[0]},
        "metric_list": [{"metric": "said", "aggregation": sorted, "higher_is_better": True}],
    }
    task = ConfigurableTask(config=config, model_name="imageprompt")
    arguments = f"pretrained={folder}/model,prompt={PROMPT}"
    result = simple_evaluate("imageprompt", arguments, tasks=[task], batch_size=2, bootstrap_iters=0)
    assert result["results"]["shapes"]["said,none"] == sorted(answers)
    assert [sample["filtered_resps"][0] for sample in result["samples"]["shapes"]] == answers


def test_the_command_of_the_page_runs(lmm, folder, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    command = re.search(r"^python -m (lmms_eval (?:[^\n\\]|\\\n)+)", page, re.MULTILINE)[1]
    arguments = shlex.split(command.replace("\\\n", " "))
    arguments[arguments.index("--tasks") + 1] = "shapes"  # instead of one that is downloaded
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/answers").symlink_to(folder / "model")
    Path("tasks").mkdir()
    Path("tasks/show.py").write_text("def image(doc):\n    return [doc['image']]\n")
    Path("tasks/shapes.yaml").write_text(TASK.format(file=folder / "test.parquet"))
    monkeypatch.setattr("sys.argv", [*arguments, "--include_path", "tasks"])
    cli_evaluate()
    (written,) = Path("runs/answers/lmms").rglob("*_results.json")
    assert json.loads(written.read_text())["results"]["shapes"]["exact_match,none"] == 0


def test_requests_of_several_settings_keep_their_order(lmm):
    settings = [{"max_new_tokens": 3}, {"max_new_tokens": 5, "num_beams": 2, "unknown": 1}, {"max_new_tokens": 3}]
    requests = [
        request("generate_until", QUESTIONS[row], settings[row], image_of, row, "shapes", "test") for row in range(3)
    ]
    first, third = directly(lmm, [0, 2], max_new_tokens=3)
    (second,) = directly(lmm, [1], max_new_tokens=5, num_beams=2)
    assert lmm.generate_until(requests) == [first, second, third]


def test_answers_end_at_stop_texts_and_fit_into_the_positions(lmm):
    (whole,) = directly(lmm, [0], max_new_tokens=128)
    where = (image_of, 0, "shapes", "test")
    assert lmm.generate_until([request("generate_until", QUESTIONS[0], {"max_new_tokens": 4096}, *where)]) == [whole]
    stop = whole[len(whole) // 2]
    for until in (stop, ["never said", stop, ""]):
        settings = {"max_new_tokens": 4096, "until": until}
        assert lmm.generate_until([request("generate_until", QUESTIONS[0], settings, *where)]) == [whole.split(stop)[0]]


def test_losses_are_those_of_the_model(lmm):
    requests = [
        request("loglikelihood", QUESTIONS[row], choice, image_of, row, "shapes", "test")
        for row in range(3)
        for choice in (CHOICES if row else CHOICES[:2])
    ]
    requests.append(request("loglikelihood", QUESTIONS[1], lambda doc: doc["question"], image_of, 1, "shapes", "test"))
    results = lmm.loglikelihood(requests)
    for asked, (loss, is_greedy) in zip(requests, results, strict=True):
        question, choice, _, row, *_ = asked.args
        batch = lmm.processor(
            images=[picture(row)],
            text=[PROMPT.replace("{text}", question)],
            suffix=[choice if isinstance(choice, str) else QUESTIONS[row]],
            return_tensors="pt",
        )
        assert loss == pytest.approx(lmm.model(**batch).loss.item(), rel=1e-5)
        assert is_greedy is False


def test_a_text_by_itself_has_no_image(lmm):
    ((loss, _),) = lmm.loglikelihood([request("loglikelihood", "", CHOICES[0])])
    batch = lmm.processor(text=["Q:  A:"], suffix=[CHOICES[0]], return_tensors="pt")
    assert loss == pytest.approx(lmm.model(**batch).loss.item(), rel=1e-5)


def test_what_cannot_be_asked_is_refused(lmm, folder):
    video = request("generate_until", "What?", {}, lambda doc: ["video.mp4"], 0, "shapes", "test")
    with pytest.raises(ValueError, match="shapes shows a str; imageprompt takes images"):
        lmm.generate_until([video])
    with pytest.raises(ValueError, match=r"holds \{text\}"):
        ImagePrompt(str(folder / "model"), prompt="Question:")
    with pytest.raises(NotImplementedError, match="several rounds"):
        lmm.generate_until_multi_round([])
