"""Rows that do not fit are named before training, and those that do are not."""

import pytest
from conftest import tiny, tiny_gpt2
from datasets import Dataset

from imageprompt.data.rows import Mixture, Rows
from imageprompt.data.sources import Source, undecoded
from imageprompt.training.lengths import check_lengths
from imageprompt.training.train import main


@pytest.fixture(scope="module")
def processor(tokenizer):
    """Of a model with 64 positions, 4 of them for an image."""
    _, processor = tiny(tokenizer, text_config=tiny_gpt2(n_positions=64), num_image_tokens=4)
    return processor


def rows_of(suffixes, prompts=None, images=None):
    columns = {"suffix": suffixes, "image": images or [f"{n}.png" for n in range(len(suffixes))]}
    columns |= {"question": prompts} if prompts else {}
    return Rows(Dataset.from_dict(columns), Source("photos", text_column="question" if prompts else None))


def answer_of(processor, tokens):
    """A text of so many tokens."""
    text = " 7" * tokens
    while len(processor.tokenizer(text)["input_ids"]) > tokens:
        text = text[:-1]
    return text


def test_the_longest_that_fits_and_one_token_more(processor):
    fits, long = (answer_of(processor, tokens) for tokens in (64 - 4 - 1, 64 - 4))
    check_lengths(rows_of(["A dog.", fits]), processor, None)
    batch = processor(images=[[]], text="<image>" * 0 + "a", suffix=fits[:-12], return_tensors="pt")
    assert batch["input_ids"].shape[1] <= 64
    with pytest.raises(
        ValueError, match=r"Row 1 of photos \(1.png\) has 4 tokens before its answer \(4 for each image\)"
    ):
        check_lengths(rows_of(["A dog.", long]), processor, None)
    check_lengths(rows_of(["A dog.", long]), processor, max_length=64)  # is trimmed
    mixture = Mixture({"short": rows_of(["A dog."]), "long": rows_of([long])})
    with pytest.raises(ValueError, match=r"positions. Shorten it, or trim with `--max_length 64`"):
        check_lengths(mixture, processor, None)


def test_a_prompt_that_leaves_no_room(processor):
    rows = rows_of(["Yes."], prompts=[answer_of(processor, 30)])
    check_lengths(rows, processor, max_length=40)
    with pytest.raises(ValueError, match=r"has 34 tokens before its answer .* `--max_length` 34 leaves room for"):
        check_lengths(rows, processor, max_length=34)


def test_lists_of_images_count_and_lists_of_texts_are_all_looked_at(processor):
    files = [["0.png"] * 15, ["1.png"]]
    with pytest.raises(ValueError, match=r"Row 0 of photos has 60 tokens before its answer"):
        check_lengths(rows_of(["A dog and a cat.", "A dog."], images=files), processor, None)
    long = answer_of(processor, 70)
    with pytest.raises(ValueError, match=r"Row 0 of photos"):
        check_lengths(rows_of([["A dog.", long]]), processor, None)


def test_the_placeholder_in_a_text_is_named(processor):
    with pytest.raises(ValueError, match=r"Row 1 of photos .*'<image>' stands for an image, of which the row has 1"):
        check_lengths(rows_of(["A dog.", "An <image> of a dog."]), processor, None)
    with pytest.raises(ValueError, match=r"'<image><image>'"):
        check_lengths(rows_of(["A dog."], prompts=["<image><image>"]), processor, None)
    check_lengths(rows_of(["A dog."], prompts=["<image> What?"]), processor, None)


def test_the_command_looks_before_it_trains(folders, tokenizer, tmp_path, monkeypatch):
    data, _ = folders
    rows = undecoded(Dataset.from_parquet(str(data / "train.parquet"))).remove_columns("captions")
    rows = rows.add_column("captions", ["word " * (200 if number == 5 else 1) for number in range(len(rows))])
    rows.to_parquet(tmp_path / "train.parquet")
    for part in tiny(tokenizer, text_config=tiny_gpt2(n_positions=64)):
        part.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("imageprompt.training.train.run_training", lambda *_: pytest.fail("began"))
    arguments = ["--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "train.parquet"), "--use_cpu"]
    with pytest.raises(ValueError, match=r"Row 5 of .*positions"):
        main([*arguments, "--suffix_column", "captions", "--output_dir", str(tmp_path / "run")])
