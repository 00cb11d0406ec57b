"""transformers.Trainer as users call it: accumulation changes nothing, captions are learnt to their end."""

import pytest
import torch
import torch.nn.functional as F
from conftest import max_difference, picture, tiny, tiny_gpt2
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from imageprompt import ImagePromptCollator

COLOURS = ["red", "green", "blue", "white", "black", "yellow", "purple", "cyan"]
CAPTIONS = [  # of different lengths; some end in what looks like an end
    "A red sofa!",
    "!",
    "It is the number seven <|end",
    "endoftext|>",
    "Two cats...",
    "A photo of a dog on a red sofa. Two cats.",
    " What is it?",
    "User: Assistant:\n",
]


def train(model, processor, rows, folder, **settings):
    """One `Trainer` run; returns it after training."""
    settings = {"max_grad_norm": 1e6, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"} | settings
    args = TrainingArguments(
        output_dir=folder, use_cpu=True, remove_unused_columns=False, disable_tqdm=True, logging_steps=1, **settings
    )
    collator = ImagePromptCollator(processor)
    trainer = Trainer(model, args, train_dataset=rows, data_collator=collator, processing_class=processor)
    trainer.train()
    return trainer


def eight_rows():
    """Rows with and without images and prompts, with answers of very different lengths."""
    rows = [{"image": picture(i), "text": "A photo of"[:i], "suffix": text} for i, text in enumerate(CAPTIONS)]
    rows[2]["image"], rows[5]["image"] = None, None
    return rows


def one_step(tokenizer, folder, batch_size, **settings):
    torch.manual_seed(0)
    model, processor = tiny(tokenizer, "NLC", text_config=tiny_gpt2(initializer_range=0.1))
    trainer = train(
        model,
        processor,
        eight_rows(),
        folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=8 // batch_size,
        max_steps=1,
        save_strategy="no",
        **settings,
    )
    return trainer.state.log_history[0], model.state_dict()


@pytest.fixture(scope="module")
def one_batch_of_eight(tokenizer, tmp_path_factory):
    return one_step(tokenizer, tmp_path_factory.mktemp("run"), 8)


@pytest.mark.parametrize(
    ("batch_size", "settings"),
    [(1, {}), (2, {}), (4, {}), (8, {"activation_checkpointing": True}), (2, {"activation_checkpointing": True})],
    ids=["8x1", "4x2", "2x4", "checkpointed", "4x2 checkpointed"],
)
def test_pain_08_accumulation_changes_neither_loss_nor_step(
    tokenizer, tmp_path, one_batch_of_eight, batch_size, settings
):
    expected, expected_weights = one_batch_of_eight
    log, weights = one_step(tokenizer, tmp_path, batch_size, **settings)
    assert log["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert log["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    for name, value in weights.items():
        assert max_difference(value, expected_weights[name]) <= 1e-5, name


def test_pain_08_the_logged_loss_is_the_mean_over_tokens(tokenizer, one_batch_of_eight):
    torch.manual_seed(0)
    model, processor = tiny(tokenizer, "NLC", text_config=tiny_gpt2(initializer_range=0.1))
    inputs = ImagePromptCollator(processor)(eight_rows())
    scores, tokens = -model.score(**inputs), (inputs["labels"] != -100).sum()
    assert one_batch_of_eight[0]["loss"] == pytest.approx((scores.sum() / tokens).item(), rel=1e-4)


@pytest.fixture(scope="module")
def overfitted(tokenizer, tmp_path_factory):
    """(folder with checkpoints, model, processor) after learning eight captions by heart."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("overfitted")
    model, processor = tiny(tokenizer, text_config=tiny_gpt2(n_embd=64), num_image_tokens=1, connector="pool")
    rows = [
        {"image": Image.new("RGB", (64, 64), colour), "suffix": caption}
        for colour, caption in zip(COLOURS, CAPTIONS, strict=True)
    ]
    settings = {"optim": "adamw_torch", "learning_rate": 5e-3, "save_strategy": "steps", "save_steps": 120}
    train(model, processor, rows, folder, per_device_train_batch_size=8, max_steps=120, seed=0, **settings)
    return folder, model.eval(), processor


def captions(model, processor, **settings):
    """What the model says about each colour, special tokens included, and the ids."""
    inputs = processor(images=[Image.new("RGB", (64, 64), colour) for colour in COLOURS], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=40, **settings)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(output, skip_special_tokens=True), output


@pytest.mark.parametrize("settings", [{}, {"num_beams": 4}, {"use_cache": False}], ids=["greedy", "beams", "uncached"])
def test_pain_09_eight_captions_are_learnt_to_the_last_token(overfitted, settings):
    _, model, processor = overfitted
    texts, output = captions(model, processor, **settings)
    assert texts == CAPTIONS
    assert (output == processor.tokenizer.eos_token_id).any(1).all()  # each stopped by itself


def test_pain_15_a_trainers_checkpoint_reloads_model_and_processor(overfitted):
    folder, _, _ = overfitted
    checkpoint = folder / "checkpoint-120"
    processor = AutoProcessor.from_pretrained(checkpoint)
    reloaded = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert captions(reloaded, processor)[0] == CAPTIONS
    assert (checkpoint / "modeling.py").exists() and (checkpoint / "processing.py").exists()
    assert (checkpoint / "model.safetensors").exists()


def test_evaluation_returns_losses_and_plain_logits(tokenizer, tmp_path):
    model, processor = tiny(tokenizer)
    args = TrainingArguments(tmp_path, use_cpu=True, remove_unused_columns=False, disable_tqdm=True)
    rows = [row for row in eight_rows() if row["image"]][:2]
    trainer = Trainer(model, args, eval_dataset=rows, data_collator=ImagePromptCollator(processor))
    prediction = trainer.predict(rows)
    assert prediction.predictions.shape[0] == 2 and prediction.predictions.shape[-1] == model.config.vocab_size
    inputs = ImagePromptCollator(processor)(rows)
    assert prediction.metrics["test_loss"] == pytest.approx(model.eval()(**inputs).loss.item(), rel=1e-4)


def test_label_smoothing_compares_predictions_with_the_next_token(tokenizer, tmp_path):
    model, processor = tiny(tokenizer, "NLC", text_config=tiny_gpt2(initializer_range=0.2))
    args = TrainingArguments(tmp_path, use_cpu=True, remove_unused_columns=False, label_smoothing_factor=0.1)
    collator = ImagePromptCollator(processor)
    inputs = collator(eight_rows())
    trainer = Trainer(model, args, data_collator=collator)
    loss = trainer.compute_loss(model.train(), dict(inputs))
    labels = inputs.pop("labels")
    logits = model.eval()(**inputs).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
