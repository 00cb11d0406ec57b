"""Pruned models: the smallest weights are zero, as asked, and stay zero while the others learn."""

import copy

import pytest
import torch
from conftest import picture, tiny
from transformers import Trainer, TrainingArguments

from imageprompt import ImagePromptCollator, ImagePromptForConditionalGeneration
from imageprompt.compression import KeepZeros, prune, share_of_zeros
from imageprompt.compression.pruning import prunable_weights

ROWS = [{"image": picture(seed), "text": "What is it?", "suffix": " A dog!"} for seed in range(4)]


@pytest.fixture(scope="module")
def parts(tokenizer):
    return tiny(tokenizer)


def zeros(weight) -> float:
    return (weight == 0).float().mean().item()


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_the_smallest_weights_of_each_layer_become_zero(parts, share):
    original, _ = parts
    model = copy.deepcopy(original)
    prune(model, share)
    weights = prunable_weights(original)
    assert {"model.vision_tower.timm_model.conv1.0.weight", "model.connector.linear_1.weight"} <= weights.keys()
    assert "model.language_model.h.1.mlp.c_proj.weight" in weights and "lm_head.weight" not in weights
    for name, weight in weights.items():
        pruned = model.get_parameter(name)
        kept = pruned != 0
        assert zeros(pruned) == pytest.approx(share, abs=1 / weight.numel())
        assert torch.equal(weight[kept], pruned[kept]) and weight[kept].abs().min() >= weight[~kept].abs().max()
    assert share_of_zeros(model) == pytest.approx(share, abs=1e-3)
    # What is no such layer stays, and nothing of the pruning itself is left in the model.
    state = model.state_dict()
    assert state.keys() == original.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in original.state_dict().items() if name not in weights)
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    assert all(parameter.requires_grad for parameter in model.model.connector.parameters())


def test_the_smallest_weights_of_the_model_become_zero(parts):
    original, _ = parts
    model = copy.deepcopy(original)
    prune(model, 0.5, scope="model")
    names = prunable_weights(original)
    weights = torch.cat([weight.flatten() for weight in names.values()])
    pruned = torch.cat([model.get_parameter(name).flatten() for name in names])
    assert share_of_zeros(model) == pytest.approx(0.5, abs=1e-4)
    assert weights[pruned != 0].abs().min() >= weights[pruned == 0].abs().max()
    shares = [zeros(model.get_parameter(name)) for name in names]
    assert max(shares) - min(shares) > 0.1


def test_only_the_parts_asked_for_are_pruned(parts, tokenizer):
    model = copy.deepcopy(parts[0])
    model.set_trainable(vision=False)
    prune(model, 0.5, ["vision"])
    assert share_of_zeros(model, ["vision"]) == pytest.approx(0.5, abs=1e-3)
    assert share_of_zeros(model, ["connector", "text"]) == 0
    assert not any(parameter.requires_grad for parameter in model.model.vision_tower.parameters())
    model, _ = tiny(tokenizer, fusion="cross_attention")
    prune(model, 0.5, ["connector"])
    assert zeros(model.model.language_model.h[0].crossattention.c_attn.weight) == 0.5
    assert zeros(model.model.language_model.h[0].attn.c_attn.weight) == 0


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("connector", ["resampler", "clipcap_transformer"])
def test_the_weights_of_attention_are_pruned_too(tokenizer, connector, scope):
    """torch's attention is no linear layer, but its weights are those of three."""
    model, _ = tiny(tokenizer, "NLC", connector=connector, num_image_tokens=4)
    matrices = {
        f"model.connector.{name}": parameter.clone()
        for name, parameter in model.model.connector.named_parameters()
        if name.endswith("weight") and parameter.ndim == 2 and name not in ("queries.weight", "constants.weight")
    }
    assert any(name.endswith("in_proj_weight") for name in matrices)
    assert prunable_weights(model, ["connector"]).keys() == matrices.keys()
    prune(model, 0.5, ["connector"], scope)
    for name, before in matrices.items():
        pruned = model.get_parameter(name)
        assert zeros(pruned) == 0.5 if scope == "layer" else 0 < zeros(pruned) < 1
        assert torch.equal(before[pruned != 0], pruned[pruned != 0]) and pruned.requires_grad
    assert share_of_zeros(model, ["connector"]) == pytest.approx(0.5, abs=1e-4)
    callback = KeepZeros()
    callback.on_train_begin(None, None, None, model=model)
    assert len(callback.masks) == len(matrices)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_zeros_stay_while_the_rest_learns(parts, tmp_path, optimizer):
    """With the plain Trainer; momentum, weight decay and steps over several batches included."""
    original, processor = parts
    model = copy.deepcopy(original)
    prune(model, 0.5)
    before = {name: weight.clone() for name, weight in prunable_weights(model).items()}
    args = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        optim=optimizer,
        optim_args="momentum=0.9" if optimizer == "sgd" else None,
        remove_unused_columns=False,
        save_steps=2,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    collator = ImagePromptCollator(processor)
    trainer = Trainer(
        model, args, train_dataset=ROWS, data_collator=collator, processing_class=processor, callbacks=[KeepZeros()]
    )
    trainer.train()
    for name, weight in before.items():
        learnt = model.get_parameter(name)
        assert torch.equal(learnt == 0, weight == 0), name
        assert name.startswith("model.vision_tower") or not torch.equal(learnt, weight), name
    for folder in ("checkpoint-2", "checkpoint-4"):
        saved = ImagePromptForConditionalGeneration.from_pretrained(tmp_path / folder)
        assert share_of_zeros(saved) == share_of_zeros(model) == pytest.approx(0.5, abs=1e-3)
    # Without the callback they would not stay.
    trainer.remove_callback(KeepZeros)
    trainer.train()
    assert share_of_zeros(model) < 0.4


def test_a_run_that_goes_on_keeps_the_zeros(parts, tmp_path):
    model = copy.deepcopy(parts[0])
    prune(model, 0.5, ["text"])

    def train(steps, **settings):
        args = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=1, remove_unused_columns=False, use_cpu=True, learning_rate=1e-2
        )
        trainer = Trainer(
            copy.deepcopy(model),
            args,
            train_dataset=ROWS,
            data_collator=ImagePromptCollator(parts[1]),
            callbacks=[KeepZeros()],
        )
        trainer.train(**settings)
        return trainer.model

    train(1)
    assert share_of_zeros(train(2, resume_from_checkpoint=True), ["text"]) == share_of_zeros(model, ["text"])


@pytest.mark.parametrize(
    ("share", "settings", "message"),
    [
        (0, {}, r"between 0 and 1, for example 0\.5; got 0"),
        (1.0, {}, r"got 1\.0"),
        (50, {}, "got 50"),
        (0.5, {"parts": ["head"]}, "Unknown part 'head'"),
        (0.5, {"parts": []}, "Name at least one part"),
        (0.5, {"scope": "block"}, "Unknown scope 'block'; known: layer, model"),
    ],
)
def test_what_cannot_be_pruned_is_refused(parts, share, settings, message):
    with pytest.raises(ValueError, match=message):
        prune(parts[0], share, **settings)
    assert share_of_zeros(parts[0]) == 0


def test_zeros_to_keep_must_be_there(parts, tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=1, remove_unused_columns=False, use_cpu=True)
    trainer = Trainer(
        copy.deepcopy(parts[0]),
        args,
        train_dataset=ROWS,
        data_collator=ImagePromptCollator(parts[1]),
        callbacks=[KeepZeros()],
    )
    with pytest.raises(ValueError, match="no zeros to keep: prune the model first"):
        trainer.train()
