"""Captions are cut into words as by coco-caption's Java tokenizer: its recorded output, and itself where it runs."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from imageprompt.evaluation.penn_treebank import tokenize_caption

JAVA = json.loads((Path(__file__).parent / "penn_treebank_java.json").read_text(encoding="utf-8"))["captions"]
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="coco-caption's tokenizer needs a `java` command")


def java_words(captions: list[str]) -> list[str]:
    """What coco-caption makes of captions. (The spaces that it leaves within tokens separate words in its scorers.)"""
    tokenized = PTBTokenizer().tokenize({number: [{"caption": text}] for number, text in enumerate(captions)})
    return [" ".join(tokenized[number][0].split()) for number in range(len(captions))]


@pytest.mark.parametrize(("caption", "words"), JAVA.items())
def test_captions_are_tokenized_as_by_java(caption, words):
    assert tokenize_caption(caption) == words


@needs_java
def test_java_still_says_what_was_recorded():
    assert dict(zip(JAVA, java_words(list(JAVA)), strict=True)) == JAVA


@needs_java
def test_flickr8k_is_tokenized_as_by_java(shared_data):
    table = pyarrow.parquet.read_table(shared_data / "flickr8k" / "test.parquet", columns=["captions"])
    captions = [text for texts in table["captions"].to_pylist() for text in texts]
    wrong = [
        text for text, words in zip(captions, java_words(captions), strict=True) if tokenize_caption(text) != words
    ]
    assert len(captions) == 5000 and wrong == []


@pytest.mark.parametrize("caption", ["", " ", " . ", "...", "''", "🐶"])
def test_a_caption_may_have_no_words(caption):
    assert tokenize_caption(caption) == ""
