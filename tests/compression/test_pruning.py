"""Pruned models: the smallest weights are zero, as asked, and stay zero while the others learn."""

import copy

import pytest
import torch
from conftest import picture, tiny
from transformers import Trainer, TrainingArguments

from imageprompt import ImagePromptCollator, ImagePromptForConditionalGeneration
from imageprompt.compression import KeepZeros, prune, share_of_zeros
from imageprompt.compression.pruning import prunable_layers

ROWS = [{"image": picture(seed), "text": "What is it?", "suffix": " A dog!"} for seed in range(4)]


@pytest.fixture(scope="module")
def parts(tokenizer):
    return tiny(tokenizer)


def zeros(layer) -> float:
    return (layer.weight == 0).float().mean().item()


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_the_smallest_weights_of_each_layer_become_zero(parts, share):
    original, _ = parts
    model = copy.deepcopy(original)
    prune(model, share)
    layers = prunable_layers(original)
    assert {"model.vision_tower.timm_model.conv1.0", "model.connector.linear_1"} <= layers.keys()
    assert "model.language_model.h.1.mlp.c_proj" in layers and "lm_head" not in layers
    for name, layer in layers.items():
        weight, pruned = layer.weight, model.get_submodule(name).weight
        kept = pruned != 0
        assert zeros(model.get_submodule(name)) == pytest.approx(share, abs=1 / weight.numel())
        assert torch.equal(weight[kept], pruned[kept]) and weight[kept].abs().min() >= weight[~kept].abs().max()
    assert share_of_zeros(model) == pytest.approx(share, abs=1e-3)
    # What is no such layer stays, and nothing of the pruning itself is left in the model.
    pruned = {f"{name}.weight" for name in layers}
    state = model.state_dict()
    assert state.keys() == original.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in original.state_dict().items() if name not in pruned)
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    assert all(parameter.requires_grad for parameter in model.model.connector.parameters())


def test_the_smallest_weights_of_the_model_become_zero(parts):
    original, _ = parts
    model = copy.deepcopy(original)
    prune(model, 0.5, scope="model")
    layers = prunable_layers(original)
    weights = torch.cat([layer.weight.flatten() for layer in layers.values()])
    pruned = torch.cat([model.get_submodule(name).weight.flatten() for name in layers])
    assert share_of_zeros(model) == pytest.approx(0.5, abs=1e-4)
    assert weights[pruned != 0].abs().min() >= weights[pruned == 0].abs().max()
    shares = [zeros(model.get_submodule(name)) for name in layers]
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
    assert zeros(model.model.language_model.h[0].crossattention.c_attn) == 0.5
    assert zeros(model.model.language_model.h[0].attn.c_attn) == 0


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_zeros_stay_while_the_rest_learns(parts, tmp_path, optimizer):
    """With the plain Trainer; momentum, weight decay and steps over several batches included."""
    original, processor = parts
    model = copy.deepcopy(original)
    prune(model, 0.5)
    before = {name: layer.weight.clone() for name, layer in prunable_layers(model).items()}
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
        learnt = model.get_submodule(name).weight
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
