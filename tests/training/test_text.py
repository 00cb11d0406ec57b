"""Documents, the blocks they are cut into, and the measures of how well a model expects them."""

import math

import pytest
import torch
from conftest import tiny_gpt2
from datasets import Dataset
from transformers import GPT2LMHeadModel, default_data_collator

from imageprompt.data.sources import Source
from imageprompt.training.steady import SteadyTrainer, SteadyTrainingArguments
from imageprompt.training.text import Blocks, measure, read_documents

DOCUMENTS = ["A photo of a dog!", "Two cats on a red sofa.", "Ünïcode: 猫", "No"]


def text_file(folder, content: str) -> Source:
    (folder / "text.txt").write_text(content)
    return Source(str(folder / "text.txt"), image_column="none", suffix_column="text")


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("rows", ["One", "line.", "Two", "Three  "]),
        ("paragraphs", ["One\nline.", "Two\nThree"]),
        ("whole", ["One\nline.\n\n\nTwo\nThree  "]),
    ],
)
def test_where_documents_end(tmp_path, documents, expected):
    source = text_file(tmp_path, "One\nline.\n\n\nTwo\nThree  \n\n")
    assert read_documents(source, "train", documents) == expected


def test_lists_of_texts_are_rows_and_parts_of_splits_can_be_read(tmp_path):
    Dataset.from_dict({"captions": [["a", "b"], ["c", None]], "n": [1, 2]}).to_parquet(tmp_path / "t.parquet")
    source = Source(str(tmp_path / "t.parquet"), image_column="none", suffix_column="captions")
    assert read_documents(source, "train") == ["a", "b", "c"]
    assert read_documents(source, "train[1:]") == ["c"]
    source.suffix_column = "n"
    with pytest.raises(ValueError, match=r"Row 0 of .* has no text in 'n': 1"):
        read_documents(source, "train")
    source.suffix_column = "text"
    with pytest.raises(ValueError, match="no column 'text'; it has captions, n"):
        read_documents(source, "train")
    with pytest.raises(ValueError, match=r"text\.txt has no rows"):
        read_documents(text_file(tmp_path, "\n\n"), "train")
    Dataset.from_dict({"captions": [["", None]]}).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="has no text in its column 'captions'"):
        read_documents(Source(str(tmp_path / "empty.parquet"), image_column="none", suffix_column="captions"), "train")


@pytest.mark.parametrize("block_size", [2, 5, 16, 1000])
def test_every_token_is_predicted_once_and_ends_are_learnt(tokenizer, block_size):
    blocks = Blocks(DOCUMENTS, tokenizer, block_size)
    expected = [token for text in DOCUMENTS for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    predicted, seen = [], []
    for block in (blocks[index] for index in range(len(blocks))):
        assert {len(values) for values in block.values()} == {block_size}
        predicted += [label for label in block["labels"][1:] if label != -100]
        real = [token for token, kept in zip(block["input_ids"], block["attention_mask"], strict=True) if kept]
        assert not seen or real[0] == seen[-1]  # the context of the first token that is predicted
        seen += real if not seen else real[1:]
    assert predicted == expected and seen == [tokenizer.eos_token_id, *expected]
    assert blocks.num_bytes == sum(map(len, map(str.encode, DOCUMENTS)))


def trainer_of(tokenizer, folder, model):
    args = SteadyTrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=3)
    return SteadyTrainer(model, args, data_collator=default_data_collator, processing_class=tokenizer)


def test_measures_are_those_of_token_by_token_predictions(tokenizer, tmp_path):
    model = GPT2LMHeadModel(tiny_gpt2(initializer_range=0.3)).eval()
    blocks = Blocks(DOCUMENTS, tokenizer, 7)
    measured = measure(trainer_of(tokenizer, tmp_path, model), blocks)
    tokens, nats = blocks.tokens.tolist(), 0.0
    with torch.no_grad():
        for place in range(1, len(tokens)):
            begin = (place - 1) // 6 * 6  # blocks of seven share a token
            logits = model(torch.tensor([tokens[begin:place]])).logits[0, -1]
            nats -= logits.double().log_softmax(-1)[tokens[place]].item()
    assert measured["nats_per_token"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(nats / (len(tokens) - 1)), rel=1e-4)
    assert measured["bits_per_byte"] == pytest.approx(nats / math.log(2) / len("".join(DOCUMENTS).encode()), rel=1e-5)
    assert (measured["tokens"], measured["bytes"]) == (len(tokens) - 1, len("".join(DOCUMENTS).encode()))


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity(tokenizer, tmp_path):
    model = GPT2LMHeadModel(tiny_gpt2())
    torch.nn.init.zeros_(model.lm_head.weight)
    measured = measure(trainer_of(tokenizer, tmp_path, model), Blocks(DOCUMENTS, tokenizer, 8))
    assert measured["perplexity"] == pytest.approx(400, rel=1e-5)
