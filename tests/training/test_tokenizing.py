"""A new tokenizer holds what its texts repeat, can write any text, and marks the end."""

import pytest

from imageprompt.training.tokenizing import train_tokenizer

TEXTS = ["a dog on the snow", "a dog in the grass", "the dog"] * 5


def test_it_learns_what_is_repeated_and_writes_anything():
    tokenizer = train_tokenizer(TEXTS, vocab_size=280)
    assert len(tokenizer) <= 280 and tokenizer.eos_token == "<|endoftext|>"
    assert len(tokenizer(" dog").input_ids) == 1
    for text in ("the dog", "Ein Hündchen, 日本!"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="A vocabulary of 256 tokens cannot hold the 256 bytes"):
        train_tokenizer(TEXTS, vocab_size=256)
