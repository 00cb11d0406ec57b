"""Caption scores against published figures."""

import json
import shutil
from types import SimpleNamespace

import pytest

from imageprompt.evaluation import caption_scores, captions
from imageprompt.evaluation.captions import java_caption_scores

PUBLISHED = {
    **{f"BLEU-{n}": f"Bleu_{n}" for n in range(1, 5)},
    "ROUGE-L": "ROUGE_L",
    "CIDEr": "CIDEr",
}


def coco_demo(folder):
    """(candidates, references, published scores) of coco-caption's demo."""
    references, results = (
        json.loads((folder / "coco_fakecap_tokenized" / file).read_text()) for file in ("gts.json", "res.json")
    )
    expected = json.loads((folder / "EXPECTED.json").read_text())["coco_fakecap_tokenized"]
    return {image: texts[0] for image, texts in results.items()}, references, expected


def test_pain_27_scores_equal_coco_captions_own(shared_data):
    candidates, references, expected = coco_demo(shared_data / "caption_metrics")

    scores = caption_scores(candidates, references)

    assert scores == pytest.approx({name: expected[key] for name, key in PUBLISHED.items()}, abs=5e-5)


def test_scores_equal_nlg_evals(shared_data):
    folder = shared_data / "caption_metrics"
    lines = {name: (folder / "nlg-eval" / f"{name}.txt").read_text().splitlines() for name in ("hyp", "ref1", "ref2")}
    expected = json.loads((folder / "EXPECTED.json").read_text())["nlg-eval_readme"]

    scores = caption_scores(
        dict(enumerate(lines["hyp"])), dict(enumerate(zip(lines["ref1"], lines["ref2"], strict=True)))
    )

    assert scores == pytest.approx({name: expected[key] for name, key in PUBLISHED.items()}, abs=5e-5)


def test_a_perfect_caption_scores_one():
    captions = {1: "a dog runs over the green grass", 2: "two men sit on a wooden bench"}
    scores = caption_scores(captions, {image: [text] for image, text in captions.items()})
    assert scores["BLEU-4"] == pytest.approx(1)
    assert scores["ROUGE-L"] == pytest.approx(1)
    assert scores["CIDEr"] == pytest.approx(10)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"different images.*'b'"):
        caption_scores({"a": "x"}, {"a": ["x"], "b": ["y"]})
    with pytest.raises(ValueError, match="'a' has \\[\\]"):
        caption_scores({"a": "x"}, {"a": []})
    with pytest.raises(ValueError, match="no candidates"):
        caption_scores({}, {})
    with pytest.raises(ValueError, match="image 1 has None"):
        caption_scores({1: None}, {1: ["a dog"]})
    with pytest.raises(ValueError, match=r"No reference has a word; the first is '\.\.\.'"):
        caption_scores({1: "a dog", 2: "a cat"}, {1: ["..."], 2: ["!", "."]})


def test_words_that_were_cut_already_are_not_cut_again():
    """A last word keeps its full stop among many texts without any, and loses it where texts are as people write."""
    cut = {number: [f"player {number} is ready to bat"] for number in range(200)}
    for last, equal in (("ready to bat.", False), ("Ready to bat.", True)):
        references = cut | {0: [last]}
        candidates = {number: texts[0] for number, texts in cut.items()} | {0: "ready to bat"}
        assert (caption_scores(candidates, references)["BLEU-1"] == pytest.approx(1)) == equal


def test_captions_without_words_score_nothing():
    assert set(caption_scores({1: ""}, {1: ["a dog"]}).values()) == {0}
    scores = caption_scores({1: "two cats sit here", 2: "a dog"}, {1: ["two cats sit here"], 2: ["..."]})
    assert scores["CIDEr"] == pytest.approx(5) and scores["ROUGE-L"] == pytest.approx(0.5)


@pytest.mark.slow  # half a minute: METEOR reads its tables twice
def test_meteor_equals_the_published_figures(shared_data):
    if shutil.which("java") is None:
        pytest.skip("METEOR needs Java")
    folder = shared_data / "caption_metrics"
    candidates, references, published = coco_demo(folder)
    expected = json.loads((folder / "EXPECTED.json").read_text())["nlg-eval_readme"]
    lines = {name: (folder / "nlg-eval" / f"{name}.txt").read_text().splitlines() for name in ("hyp", "ref1", "ref2")}

    coco, _ = java_caption_scores(candidates, references)
    nlg, _ = java_caption_scores(
        dict(enumerate(lines["hyp"])), dict(enumerate(zip(lines["ref1"], lines["ref2"], strict=True)))
    )

    assert coco["METEOR"] == pytest.approx(published["METEOR"], abs=5e-5)
    assert nlg["METEOR"] == pytest.approx(expected["METEOR"], abs=5e-5)


class Scorer:
    """Stands in for a Java program: it sees what the real one would, and gives a fixed score or fails."""

    def __init__(self, outcome):
        self.outcome, self.seen = outcome, None

    def __call__(self):
        return self

    def compute_score(self, references, candidates):
        self.seen = (references, candidates)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome, []


def test_what_java_is_missing_for_is_said(monkeypatch):
    meteor, spice = Scorer(0.25), Scorer(0.5)
    monkeypatch.setattr(captions, "Meteor", meteor)
    monkeypatch.setattr(captions, "Spice", spice)
    monkeypatch.setattr(captions, "_missing_for_spice", lambda: "no models")
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/java")
    assert java_caption_scores({1: "A dog."}, {1: ["One dog!"]}) == ({"METEOR": 0.25}, {"SPICE": "no models"})
    assert meteor.seen == ({1: ["one dog"]}, {1: ["a dog"]}) and spice.seen is None

    monkeypatch.setattr(captions, "_missing_for_spice", lambda: None)
    meteor.outcome = BrokenPipeError("it died")
    scores, left_out = java_caption_scores({1: "A dog."}, {1: ["One dog!"]})
    assert scores == {"SPICE": 0.5} and left_out == {"METEOR": "Its Java program failed: it died"}

    monkeypatch.setattr("shutil.which", lambda name: None)
    scores, left_out = java_caption_scores({1: "A dog."}, {1: ["One dog!"]})
    assert scores == {} and left_out == dict.fromkeys(("METEOR", "SPICE"), "There is no `java` command.")


def test_spice_never_downloads_its_models(monkeypatch, tmp_path):
    package = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(captions, "find_spec", lambda name: package)
    assert "get_stanford_models" in captions._missing_for_spice()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "stanford-corenlp-3.6.0-models.jar").touch()
    assert captions._missing_for_spice() is None
