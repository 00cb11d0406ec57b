"""`pretrain`, as a user calls it: from nothing, further, composed afterwards, and with mistakes."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, pipeline

from imageprompt import ImagePromptForConditionalGeneration
from imageprompt.data import Source
from imageprompt.training.pretrain import main
from imageprompt.training.text import read_documents
from imageprompt.training.train import main as train

TINY = json.dumps({"n_layer": 1, "n_embd": 64, "n_head": 2, "n_positions": 32, "resid_pdrop": 0, "embd_pdrop": 0})
LINES = ["the cat sat on the mat .", "the dog sat on the log .", "a cat and a dog sat on a mat ."]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(LINES * 40))
    return file


def options(text, output, *more: str) -> list[str]:
    data = ["--dataset", str(text), "--train_split", "train[:90%]", "--eval_split", "train[90%:]"]
    steps = ["--max_steps", "60", "--learning_rate", "1e-2", "--per_device_train_batch_size", "8", "--use_cpu"]
    return [*data, *steps, "--output_dir", str(output), *more]


@pytest.fixture(scope="module")
def pretrained(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    main(options(text, folder, "--text_config", TINY, "--new_tokenizer", "300"))
    return folder


def test_a_model_from_nothing_learns_the_text_and_says_how_well(pretrained):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(pretrained), AutoTokenizer.from_pretrained(pretrained)
    assert type(model) is GPT2LMHeadModel and model.config.vocab_size == len(tokenizer) <= 300
    measured = json.loads((pretrained / "perplexity.json").read_text())
    assert 1 < measured["perplexity"] < 3  # words from a handful of sentences; of a model that knows nothing, 300
    assert measured["trained_on"]["bytes"] == sum(map(len, (LINES * 40)[:108]))
    assert measured["bytes"] == sum(map(len, (LINES * 40)[108:]))
    assert measured["versions"].keys() >= {"torch", "transformers"} and measured["seed"] == 42
    assert (pretrained / "curves.png").stat().st_size > 5_000
    # Every line was a document: an answer ends by itself.
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    written = write("the dog sat", max_new_tokens=20, do_sample=False)[0]["generated_text"]
    assert written in LINES


def test_it_goes_on_from_a_model_and_resumes(pretrained, text, tmp_path):
    more = ["--text", str(pretrained), "--learning_rate", "1e-3", "--max_steps", "4", "--save_steps", "2"]
    more += ["--eval_strategy", "steps", "--eval_steps", "2", "--block_size", "16", "--bf16"]
    main(options(text, tmp_path / "run", *more))
    before, after = (
        json.loads((folder / "perplexity.json").read_text())["perplexity"] for folder in (pretrained, tmp_path / "run")
    )
    assert after == pytest.approx(before, rel=0.3)  # it did not begin anew
    main(options(text, tmp_path / "run", *more, "--max_steps", "6", "--resume_from_checkpoint", "true"))
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [2, 4, 6]


def test_an_earlier_run_is_not_trained_over(pretrained, text):
    with pytest.raises(ValueError, match=r"checkpoint-60 is of an earlier run: .*--resume_from_checkpoint true"):
        main(options(text, pretrained, "--text_config", TINY, "--new_tokenizer", "300"))


def test_rows_are_shuffled_before_they_are_cut(tmp_path):
    lines = [f"the number {number}" for number in range(20)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    more = ["--text_config", TINY, "--new_tokenizer", "300", "--max_steps", "1", "--shuffle_rows", "0"]
    main(options(tmp_path / "lines.txt", tmp_path / "run", *more))
    measured = json.loads((tmp_path / "run" / "perplexity.json").read_text())
    held_out = read_documents(Source(str(tmp_path / "lines.txt"), None, "none", "text", shuffle_rows=0), "train[90%:]")
    assert len(held_out) == 2 and held_out != lines[18:]
    assert measured["bytes"] == sum(map(len, held_out)) and measured["text"]["shuffle_rows"] == 0


def test_it_is_composed_with_a_backbone(pretrained, folders, tmp_path):
    composed = ["--vision", "test_resnet", "--text", str(pretrained), "--pretrained", "text", "--image_size", "32"]
    composed += ["--dataset", str(folders[0]), "--suffix_column", "captions", "--use_cpu", "--max_steps", "1"]
    train([*composed, "--train_text", "false", "--output_dir", str(tmp_path / "run")])
    model = ImagePromptForConditionalGeneration.from_pretrained(tmp_path / "run")
    gpt2 = GPT2LMHeadModel.from_pretrained(pretrained)
    learnt = dict(model.model.language_model.named_parameters())
    for name, value in gpt2.transformer.named_parameters():
        assert (learnt[name][: len(value)] == value).all(), name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "Pass one of --text, a model to go on with, and --text_config"),
        (["--text", "x", "--text_config", TINY], "Pass one of --text"),
        (["--text_config", TINY], "A new model takes one of --tokenizer and --new_tokenizer"),
        (["--text", "x", "--new_tokenizer", "300"], "one to go on with brings its own"),
        (["--text_config", '{"n_layers": 1}', "--new_tokenizer", "300"], "GPT-2 has no setting 'n_layers'"),
        (
            ["--text_config", TINY, "--new_tokenizer", "300", "--block_size", "64"],
            "between 2 and the model's 32 positions",
        ),
        (["--text_config", TINY, "--new_tokenizer", "200"], "cannot hold the 256 bytes"),
        (["--text", "/no/such/model"], "Cannot load '/no/such/model'"),
        (["--text_config", TINY, "--new_tokenizer", "300", "--text_column", "words"], "no column 'words'; it has text"),
        (["--text_config", TINY, "--new_tokenizer", "300", "--eval_split", "test"], "no split 'test'; it has train"),
        (
            ["--text_config", TINY, "--new_tokenizer", "300", "--documents", "whole", "--shuffle_rows", "0"],
            "`--shuffle_rows` would tear documents apart",
        ),
        (
            ["--text_config", '{"vocab_size": 10}', "--new_tokenizer", "300"],
            "The tokenizer has .* the model only 10",
        ),
    ],
)
def test_mistakes_stop_before_anything_is_written(text, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        main(options(text, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_ones_own(text, folders, tmp_path):
    main(options(text, tmp_path / "run", "--text_config", TINY, "--tokenizer", str(folders[1]), "--max_steps", "1"))
    own = AutoTokenizer.from_pretrained(folders[1])
    assert AutoTokenizer.from_pretrained(tmp_path / "run").get_vocab() == own.get_vocab()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.eos_token_id == own.eos_token_id
