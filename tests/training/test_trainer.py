"""`ImagePromptTrainer`: learning rates by part, batches of like length, generated metrics; in one process and two."""

import os
import socket

import pytest
import torch
from conftest import max_difference, tiny, tiny_gpt2
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from trainers import eight_rows, trainer_of
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from imageprompt import ImagePromptCollator
from imageprompt.data.rows import read_rows, stream_rows
from imageprompt.data.sources import Source
from imageprompt.evaluation import generated_metrics
from imageprompt.training import ImagePromptTrainer, ImagePromptTrainingArguments, steady
from imageprompt.training.checkpoints import list_checkpoints
from imageprompt.training.steady import EarlyStopping

COLOURS = ["red", "green", "blue", "white", "black", "yellow", "purple", "cyan"]
RATES = {"vision_learning_rate": 1e-2, "connector_learning_rate": 1e-1, "text_learning_rate": 1e-3}


def part_of(name: str) -> str:
    parts = {"model.vision_tower.": "vision", "model.connector.": "connector"}
    return next((part for start, part in parts.items() if name.startswith(start)), "text")


# --- learning rates


@pytest.mark.parametrize(
    "settings",
    [{}, {"text_config": tiny_gpt2(tie_word_embeddings=False)}, {"fusion": "cross_attention"}],
    ids=["tied", "untied", "cross-attention"],
)
def test_each_part_moves_by_its_own_learning_rate(tokenizer, tmp_path, settings):
    model, processor = tiny(tokenizer, "NLC", **settings)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    rows = eight_rows()[:4]
    model.train()(**ImagePromptCollator(processor)(rows)).loss.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    plain = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "max_steps": 1}
    trainer = trainer_of(tokenizer, tmp_path, rows, (model, processor), **RATES, **plain)
    trainer.train()
    for name, value in model.named_parameters():
        part = "connector" if "crossattention" in name or "ln_cross_attn" in name else part_of(name)
        expected = before[name] - RATES[f"{part}_learning_rate"] * gradients[name]
        assert max_difference(value, expected) <= 1e-6, name
    first = trainer.state.log_history[0]
    assert {name: first[name] for name in RATES} == RATES
    assert any(key.startswith("model.vision_tower.") and gradient.any() for key, gradient in gradients.items())


def test_weight_decay_applies_to_what_it_applies_to_in_the_library(tokenizer, tmp_path):
    model, processor = tiny(tokenizer)
    names = {id(value): name for name, value in model.named_parameters()}

    def decays(trainer):
        groups = trainer.create_optimizer().param_groups
        return {names[id(value)]: group["weight_decay"] for group in groups for value in group["params"]}

    args = TrainingArguments(tmp_path, use_cpu=True, weight_decay=0.1)
    expected = decays(Trainer(model, args))
    assert set(expected.values()) == {0.0, 0.1}
    for rates in ({}, RATES, {"text_learning_rate": 0.0}):
        trainer = trainer_of(tokenizer, tmp_path, model=(model, processor), weight_decay=0.1, **rates)
        assert decays(trainer) == expected
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.0, trainer.args.learning_rate}


def test_without_learning_rates_of_parts_the_optimizer_is_the_librarys(tokenizer, tmp_path):
    trainer = trainer_of(tokenizer, tmp_path, vision_learning_rate=5e-5)  # which is the default of all
    assert len(trainer.create_optimizer().param_groups) == 2


def test_a_learning_rate_for_what_does_not_learn_is_refused(tokenizer, tmp_path):
    model = tiny(tokenizer, trainable={"vision": False})
    with pytest.raises(ValueError, match="--vision_learning_rate is given, but nothing of the part 'vision' learns"):
        trainer_of(tokenizer, tmp_path, model=model, vision_learning_rate=1e-5)
    trainer_of(tokenizer, tmp_path, model=model, text_learning_rate=1e-5)
    with pytest.raises(ValueError, match="takes ImagePromptTrainingArguments, not TrainingArguments"):
        ImagePromptTrainer(model[0], TrainingArguments(tmp_path, use_cpu=True))


# --- batches of like length


class Unread(list):
    """Rows that know their lengths and must not be read for them."""

    def __init__(self, lengths):
        super().__init__(range(len(lengths)))
        self._lengths = lengths

    def lengths(self):
        return self._lengths

    def __getitem__(self, index):
        raise AssertionError("a row was read")


def order(trainer, epoch):
    sampler = trainer._get_train_sampler()
    sampler.set_epoch(epoch)
    torch.rand(7 * epoch + os.getpid() % 5)  # what else draws from the global generator must not matter
    return list(sampler)


def test_batches_hold_rows_of_like_length_and_no_image_is_read_for_that(tokenizer, tmp_path):
    lengths = [(7 * i) % 101 for i in range(101)]
    settings = {"train_sampling_strategy": "group_by_length"}
    trainer = trainer_of(tokenizer, tmp_path, Unread(lengths), **settings)
    epochs = [order(trainer, epoch) for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]
    for indices in epochs:
        assert sorted(indices) == list(range(101))
        groups = [[lengths[index] for index in indices[start : start + 4]] for start in range(0, 100, 4)]
        spreads = [max(group) - min(group) for group in groups]
        assert sum(spreads) / len(spreads) < 25  # of rows in random order: about 60


def test_the_order_by_length_follows_the_seed(tokenizer, tmp_path):
    rows = Unread(list(range(64)))
    settings = {"train_sampling_strategy": "group_by_length"}
    first, second = (order(trainer_of(tokenizer, tmp_path, rows, seed=seed, **settings), 0) for seed in (0, 1))
    assert first != second
    assert order(trainer_of(tokenizer, tmp_path, rows, seed=5, data_seed=1, **settings), 0) == second


# --- metrics of generated answers, and two processes


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Rows to classify: eight colours, which a model learns in a few steps; the last image is broken."""
    folder = tmp_path_factory.mktemp("colours")
    for colour in COLOURS:
        Image.new("RGB", (64, 64), colour).save(folder / f"{colour}.png")
    (folder / f"{COLOURS[-1]}.png").write_bytes(b"no image")
    rows = {"image": [str(folder / f"{colour}.png") for colour in COLOURS], "suffix": COLOURS}
    Dataset.from_dict(rows).to_parquet(folder / "rows.parquet")
    return read_rows(Source(str(folder / "rows.parquet"), prompt="What?"), "train", draw=False)


METRIC = {"eval_strategy": "steps", "eval_steps": 1, "metric_task": "classify", "metric": "accuracy"}
METRIC |= {"metric_max_new_tokens": 10, "per_device_eval_batch_size": 3}


def test_an_evaluation_scores_generated_answers_as_the_evaluation_command_does(tokenizer, tmp_path, colours):
    model, processor = tiny(tokenizer, num_image_tokens=1, connector="pool")
    settings = {"max_steps": 40, "learning_rate": 1e-2, "eval_steps": 20, "per_device_train_batch_size": 8}
    trainer = trainer_of(tokenizer, tmp_path, colours, (model, processor), **METRIC | settings)
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("eval_accuracy", True)
    trainer.train()
    metrics = trainer.evaluate()
    expected = generated_metrics(model, processor, colours, "classify", batch_size=8, max_new_tokens=10)
    assert expected["accuracy"] >= 0.5  # of seven readable rows
    assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected)
    logged = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(logged) == 3 and trainer.state.best_metric == max(logged)
    assert not any("accuracy" in name for name in trainer.predict(colours).metrics)


def test_so_many_rows_are_answered_evenly_spread(tokenizer, tmp_path, colours, monkeypatch):
    answered = []
    monkeypatch.setattr(
        "imageprompt.evaluation.tasks.generate_texts",
        lambda model, processor, images, prompts, **kwargs: answered.append(kwargs) or ["red"] * len(images),
    )
    trainer = trainer_of(tokenizer, tmp_path, colours, **METRIC | {"metric_samples": 4, "metric_num_beams": 2})
    assert trainer.evaluate()["eval_accuracy"] == 0.25  # red, blue, black, purple
    assert [entry["batch_size"] for entry in answered] == [3, 1]
    assert {(entry["max_new_tokens"], entry["num_beams"]) for entry in answered} == {(10, 2)}


SCORES = [0.1, 0.3, 0.2, 0.3, 0.25, 0.9]


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations that give these scores, one after the other."""
    scores = iter(SCORES)
    monkeypatch.setattr("imageprompt.training.trainer.check_metric", lambda *_: None)
    monkeypatch.setattr("imageprompt.training.trainer.score_answers", lambda *_: {"accuracy": next(scores)})


BEST = METRIC | {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "max_steps": 6}


def test_the_best_checkpoint_by_the_metric_is_kept_and_loaded_in_the_end(tokenizer, tmp_path, scripted, colours):
    trainer = trainer_of(tokenizer, tmp_path, colours, **BEST, early_stopping_patience=3, save_total_limit=1)
    trainer.train()
    assert trainer.state.global_step == 5  # 0.3 at step 2, then three evaluations that are not better
    assert trainer.state.best_metric == 0.3
    (best,) = list_checkpoints(tmp_path)
    assert best.name == "checkpoint-2"
    weights = load_file(best / "model.safetensors")
    assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in weights.items())


def test_patience_goes_on_counting_in_a_resumed_run(tokenizer, tmp_path, scripted, colours):
    trainer_of(tokenizer, tmp_path, colours, **BEST | {"max_steps": 4}, early_stopping_patience=3).train()
    resumed = trainer_of(tokenizer, tmp_path, colours, **BEST, early_stopping_patience=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    # A new run of the same trainer begins to count anew.
    resumed.args.max_steps = 1
    resumed.train()
    (stopping,) = [one for one in resumed.callback_handler.callbacks if isinstance(one, EarlyStopping)]
    assert (resumed.state.best_metric, stopping.early_stopping_patience_counter) == (0.9, 0)


def test_metrics_of_several_data_sets_are_averaged_and_decide_together(tokenizer, tmp_path, scripted, colours, caplog):
    rows = {"first": colours, "second": colours.select([0, 1])}
    trainer = trainer_of(
        tokenizer, tmp_path, colours, eval_rows=rows, **BEST | {"max_steps": 3}, early_stopping_patience=1
    )
    trainer.train()
    own = [(entry["eval_accuracy"]) for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert own == pytest.approx([0.2, 0.25, 0.575])
    assert trainer.state.best_global_step == 3 and "early stopping is disabled" not in caplog.text
    losses = {name: entry for entry in trainer.state.log_history for name in entry if name.endswith("_loss")}
    assert losses.keys() >= {"eval_first_loss", "eval_second_loss", "eval_loss"}
    assert not any(name in entry for entry in trainer.state.log_history for name in ("eval_runtime",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric_task": "classify"}, "--metric_task is about evaluations: say when with --eval_strategy"),
        ({"early_stopping_patience": 2}, "--early_stopping_patience is about evaluations"),
        ({"metric": "CIDEr", "eval_strategy": "epoch"}, "--metric CIDEr is a score of answers: say of what"),
        (METRIC | {"metric": "acuracy"}, "The task 'classify' has no score 'acuracy'; it has accuracy"),
        (METRIC | {"metric_task": "captions"}, "There is no task 'captions'; there are caption"),
        (METRIC | {"metric_samples": 0}, "--metric_samples is at least 1, got 0"),
        (METRIC | {"early_stopping_patience": 0}, "--early_stopping_patience is at least 1, got 0"),
        (METRIC | {"metric_max_new_tokens": 1}, "`max_new_tokens` 1 is too small"),
        (METRIC | {"fp16": True}, "--fp16 needs a GPU; on the CPU it would be ignored. Use --bf16"),
    ],
)
def test_mistakes_stop_before_the_first_step(tokenizer, tmp_path, colours, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tokenizer, tmp_path, colours, **settings).train()
    with pytest.raises(ValueError, match="--metric_task answers rows of read_rows, not a list"):
        trainer_of(tokenizer, tmp_path, **METRIC).train()


@pytest.mark.parametrize("has_instructions", [False, True])
def test_bf16_without_instructions_for_it_is_said_beforehand(tmp_path, caplog, monkeypatch, has_instructions):
    monkeypatch.setattr(steady, "multiplies_bf16", lambda: has_instructions)
    ImagePromptTrainingArguments(tmp_path, bf16=True, use_cpu=True)
    assert ("no instructions for bfloat16" in caplog.text) is not has_instructions


def test_of_some_scores_less_is_better(tmp_path):
    for task, metric, greater in (("perplexity", "perplexity", False), ("caption", "CIDEr", True)):
        args = ImagePromptTrainingArguments(tmp_path, eval_strategy="epoch", metric_task=task, metric=metric)
        assert args.greater_is_better is greater
    args = ImagePromptTrainingArguments(tmp_path, eval_strategy="epoch", early_stopping_patience=2)
    assert (args.metric_for_best_model, args.greater_is_better) == ("eval_loss", False)


class Noted(torch.utils.data.Dataset):
    """Rows that write down which of them are read."""

    def __init__(self, rows):
        self.rows, self.read = rows, []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.read.append(index)
        torch.rand(index)  # processes draw unequally often
        return self.rows[index]

    def lengths(self):
        return [len(row["suffix"]) for row in self.rows]


PERPLEXITY = METRIC | {"metric_task": "perplexity", "metric": "perplexity"}


def one_of_two(rank, folder, port, tokenizer, colours):
    """Two epochs with a learning rate for each part, and evaluations; and the last step of them once more, resumed."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, processor = tiny(tokenizer, num_image_tokens=1, connector="pool")
    rows = Noted(eight_rows())
    settings = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2, "max_steps": 4}
    settings |= {"save_strategy": "steps", "save_steps": 1}
    evaluates = PERPLEXITY | {"eval_steps": 4}
    trainer = trainer_of(tokenizer, folder, rows, (model, processor), eval_rows=colours, **evaluates | settings | RATES)
    trainer.train()
    found = {"read": rows.read, "metrics": trainer.state.log_history, "weights": model.state_dict()}
    for strategy in ("group_by_length", "random"):
        settings["train_sampling_strategy"] = strategy
        run = [Noted(eight_rows()), Noted(eight_rows())]
        for rows, resumes in zip(run, (None, f"{folder}/{strategy}/checkpoint-3"), strict=True):
            again = trainer_of(tokenizer, f"{folder}/{strategy}", rows, (model, processor), **settings)
            again.train(resume_from_checkpoint=resumes)
        found[strategy] = [rows.read for rows in run]
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_answers_and_see_the_same_scores(tokenizer, tmp_path, colours):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = (str(tmp_path), port, tokenizer, colours)
    torch.multiprocessing.start_processes(one_of_two, args=arguments, nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for start in (0, 4):  # in each epoch each row once, by one of the two
        assert sorted(first["read"][start : start + 4] + second["read"][start : start + 4]) == list(range(8))
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    first_scores, second_scores = (
        {
            name: value
            for entry in found["metrics"]
            for name, value in entry.items()
            if name in ("eval_perplexity", "eval_loss")
        }
        for found in (first, second)
    )
    assert first_scores == second_scores and len(first_scores) == 2

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-4")
    processor = AutoProcessor.from_pretrained(tmp_path / "checkpoint-4")
    expected = generated_metrics(model, processor, colours, "perplexity")
    assert first_scores["eval_perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    logged = next(entry for entry in first["metrics"] if "learning_rate" in entry)
    assert {name: logged[name] for name in RATES} == RATES
    for found in (first, second):
        for strategy in ("group_by_length", "random"):
            unbroken, resumed = found[strategy]
            assert resumed == unbroken[-2:], strategy


def stream_of_two(rank, folder, port, tokenizer):
    """The colours that this process sees of a stream, with what it is told of them."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    model, processor = tiny(tokenizer, num_image_tokens=1, connector="pool")
    source = Source(f"{folder}/rows.parquet", suffix_column="captions", streaming=True)
    rows = stream_rows(source, "train", texts_per_image=2)
    settings = {"per_device_train_batch_size": 2, "max_steps": 2}
    seen = []
    for batch in trainer_of(tokenizer, folder, rows, (model, processor), **settings).get_train_dataloader():
        for ids, labels, index in zip(batch["input_ids"], batch["labels"], batch["image_index"], strict=True):
            told = processor.decode(ids[labels != -100], skip_special_tokens=True).split()[-1]
            image = processor.image_processor(Image.new("RGB", (8, 8), told), return_tensors="pt")["pixel_values"][0]
            seen.append((told, max_difference(batch["pixel_values"][index], image)))
    torch.save(seen, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_share_a_stream_and_see_texts_with_their_own_images(tokenizer, tmp_path):
    for colour in COLOURS:
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{colour}.png")
    rows = {"image": [str(tmp_path / f"{colour}.png") for colour in COLOURS]}
    rows["captions"] = [[colour, f"very very {colour}"] for colour in COLOURS]
    Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = (str(tmp_path), port, tokenizer)
    torch.multiprocessing.start_processes(stream_of_two, args=arguments, nprocs=2, start_method="spawn")
    seen = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(difference < 1e-6 for own in seen for _, difference in own)
    told = [{colour for colour, _ in own} for own in seen]
    assert sorted([*told[0], *told[1]]) == sorted(COLOURS)
