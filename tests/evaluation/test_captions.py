"""Caption scores against published figures."""

import json

import pytest

from imageprompt.evaluation import caption_scores
from imageprompt.evaluation.captions import tokenize_caption

PUBLISHED = {
    **{f"BLEU-{n}": f"Bleu_{n}" for n in range(1, 5)},
    "ROUGE-L": "ROUGE_L",
    "CIDEr": "CIDEr",
}


def test_pain_27_scores_equal_coco_captions_own(shared_data):
    folder = shared_data / "caption_metrics"
    references = json.loads((folder / "coco_fakecap_tokenized" / "gts.json").read_text())
    results = json.loads((folder / "coco_fakecap_tokenized" / "res.json").read_text())
    expected = json.loads((folder / "EXPECTED.json").read_text())["coco_fakecap_tokenized"]

    scores = caption_scores({image: texts[0] for image, texts in results.items()}, references)

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


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A dog's ball, isn't it?", "a dog 's ball is n't it"),
        ('The "red" car (parked) stops. It is old.', "the red car parked stops it is old"),
        ("A well-dressed man -- smiling ...", "a well-dressed man smiling"),
        ("Bikes, cars etc. on Main St. and a u.s. flag.", "bikes cars etc. on main st. and a u.s. flag"),
        ("Ducks, geese, etc.", "ducks geese etc."),
        (" . ", ""),
    ],
)
def test_captions_are_tokenized_as_by_the_penn_treebank(caption, tokens):
    assert tokenize_caption(caption) == tokens


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"different images.*'b'"):
        caption_scores({"a": "x"}, {"a": ["x"], "b": ["y"]})
    with pytest.raises(ValueError, match="'a' has \\[\\]"):
        caption_scores({"a": "x"}, {"a": []})
    with pytest.raises(ValueError, match="no candidates"):
        caption_scores({}, {})
