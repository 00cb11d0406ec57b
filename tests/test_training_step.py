"""One training step: the loss and its gradients, frozen parts, checkpointing, and processes without images."""

import os

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKBONES, max_difference, picture, tiny, tiny_gpt2
from torch import nn

from imageprompt import compose

ROWS = [  # image, prompt and answer of each row
    (picture(0), "A photo of", " a dog!"),
    (None, "What is it?", " It is the number seven."),
    (picture(1), "", "Two cats"),
]


def batch(processor, rows=ROWS, **kwargs):
    images, texts, answers = zip(*rows, strict=True)
    images = [[] if image is None else [image] for image in images]
    return processor(images=images, text=list(texts), suffix=list(answers), padding=True, return_tensors="pt", **kwargs)


def reference_loss(model, inputs):
    """Cross-entropy over full logits, written out in float64."""
    labels = inputs["labels"]
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return F.cross_entropy(logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten())


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(first, second, tolerance=1e-5):
    assert first.keys() == second.keys()
    for name in first:
        scale = max(1.0, first[name].abs().max().item())
        assert max_difference(first[name], second[name]) <= tolerance * scale, name


def without_statistics(model):
    """Batch norm in eval mode, so that runs over different batches can be compared."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
            module.eval()
    return model


# --- the loss


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_pain_08_loss_and_gradients_are_those_of_full_logits(tokenizer, training, side):
    model, processor = tiny(tokenizer, "NLC")
    model.train(training)
    inputs = batch(processor, padding_side=side)
    loss, expected = model(**inputs).loss, reference_loss(model, inputs)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert_same_gradients(gradients(model, loss), gradients(model, expected))


def test_pain_08_num_items_in_batch_divides_the_sum(tokenizer):
    model, processor = tiny(tokenizer)
    inputs = batch(processor)
    count = (inputs["labels"] != -100).sum()
    mean = model(**inputs).loss.item()
    for items in (count * 4, int(count) * 4):
        assert model(**inputs, num_items_in_batch=items).loss.item() == pytest.approx(mean / 4, rel=1e-5)


def test_in_training_the_head_sees_supervised_positions_only(tokenizer):
    model, processor = tiny(tokenizer)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:-1].numel()))
    inputs = batch(processor)
    output = model.train()(**inputs)
    assert seen == [(inputs["labels"][:, 1:] != -100).sum().item()]
    assert output.logits is None and output.loss.requires_grad
    assert model.eval()(**inputs).logits.shape[:2] == inputs["labels"].shape


def test_labels_that_supervise_nothing_are_refused(tokenizer):
    model, processor = tiny(tokenizer)
    inputs = batch(processor)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    with pytest.raises(ValueError, match="suffix="):
        model(**inputs)


def test_a_micro_batch_without_labels_adds_nothing_to_an_accumulated_step(tokenizer):
    model, processor = tiny(tokenizer)
    inputs = batch(processor)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = model.train()(**inputs, num_items_in_batch=7).loss
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


@pytest.mark.parametrize("side", ["left", "right"])
def test_score_is_the_log_likelihood_of_each_answer(tokenizer, side):
    model, processor = tiny(tokenizer, text_config=tiny_gpt2(initializer_range=0.2))
    scores = model.score(**batch(processor, padding_side=side))
    for score, row in zip(scores, ROWS, strict=True):
        inputs = batch(processor, [row])
        labels = inputs.pop("labels")
        log_probabilities = model(**inputs).logits[0].double().log_softmax(-1)
        expected = sum(log_probabilities[i - 1, t] for i, t in enumerate(labels[0].tolist()) if t != -100 and i > 0)
        assert score.item() == pytest.approx(expected.item(), abs=1e-4)
    assert not scores.requires_grad


def test_score_of_a_row_without_labels_is_zero(tokenizer):
    model, processor = tiny(tokenizer)
    inputs = batch(processor)
    inputs["labels"][1] = -100
    scores = model.score(**inputs)
    assert scores[1] == 0 and (scores[[0, 2]] < 0).all()


# --- frozen parts


@pytest.mark.parametrize("frozen", ["vision", "connector", "text"])
def test_a_frozen_part_gets_no_gradient_and_the_others_do(tokenizer, frozen):
    model, processor = tiny(tokenizer, trainable={frozen: False})
    names = {"vision": "model.vision_tower.", "connector": "model.connector.", "text": "model.language_model."}
    learned = gradients(model, model.train()(**batch(processor)).loss)
    for part, prefix in names.items():
        assert any(name.startswith(prefix) for name in learned) == (part != frozen)
    if frozen != "connector":
        assert all(learned[f"model.connector.{name}"].any() for name in ("linear_1.weight", "linear_2.weight"))


def test_pain_11_a_training_step_moves_no_statistics_of_a_frozen_tower(tokenizer):
    model, processor = tiny(tokenizer, trainable={"vision": False})
    tower = model.model.vision_tower
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model.train()(**batch(processor)).loss.backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    model.set_trainable(vision=True)
    model(**batch(processor))
    assert not torch.equal(tower.state_dict()["timm_model.bn1.running_mean"], before["timm_model.bn1.running_mean"])


def saved_elements(model, inputs):
    """How many elements autograd keeps for the backward pass, weights left out."""
    weights, sizes = {p.data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    return sum(sizes.values()), output


@pytest.mark.parametrize("layout", BACKBONES)
def test_a_frozen_tower_keeps_no_graph(tokenizer, layout):
    model, processor = tiny(tokenizer, layout, trainable={"vision": False})
    inputs = batch(processor)
    frozen, output = saved_elements(model.train(), inputs)
    assert output.last_hidden_state.grad_fn is None and output.pooler_output.grad_fn is not None
    model.set_trainable(vision=True)
    learning, output = saved_elements(model, inputs)
    assert output.last_hidden_state.grad_fn is not None
    assert frozen < learning / 5


def test_pixels_that_ask_for_a_gradient_get_one_through_a_frozen_tower(tokenizer):
    model, processor = tiny(tokenizer, trainable={"vision": False})
    inputs = batch(processor)
    inputs["pixel_values"].requires_grad_()
    model(**inputs).loss.backward()
    assert inputs["pixel_values"].grad.abs().sum() > 0


# --- activation checkpointing


@pytest.mark.parametrize("vision", [True, False], ids=["tower learns", "tower frozen"])
@pytest.mark.parametrize("layout", BACKBONES)
def test_pain_10_checkpointed_activations_change_no_gradient(tokenizer, layout, vision):
    model, processor = tiny(tokenizer, layout, trainable={"vision": vision})
    without_statistics(model.train())
    inputs = batch(processor)
    expected = gradients(model, model(**inputs).loss)
    model.activation_checkpointing_enable()
    assert_same_gradients(gradients(model, model(**inputs).loss), expected)


@pytest.mark.parametrize("layout", BACKBONES)
def test_pain_10_checkpointing_reaches_timm_and_goes_away_again(tokenizer, layout):
    model, processor = tiny(tokenizer, layout)
    model.train()
    inputs = batch(processor)
    everything, _ = saved_elements(model, inputs)
    model.activation_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert saved_elements(model, inputs)[0] < everything
    model.gradient_checkpointing_disable()
    assert saved_elements(model, inputs)[0] == everything


def test_pain_10_a_backbone_that_cannot_checkpoint_says_so(tokenizer, caplog):
    model, processor = tiny(tokenizer)
    model.model.vision_tower.supports_gradient_checkpointing = False
    model.activation_checkpointing_enable()
    assert "cannot checkpoint activations" in caplog.text
    model.train()(**batch(processor)).loss.backward()


# --- several processes


def distributed_step(rank, folder, tokenizer, settings):
    """Rank 0 has images, rank 1 only text; both must finish, with the same gradients."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, processor = tiny(tokenizer, **settings)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    without_statistics(model.train())
    parallel = nn.parallel.DistributedDataParallel(model)
    inputs = batch(processor, [ROWS[0] if rank == 0 else ROWS[1]])
    parallel(**inputs).loss.backward()
    torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_pain_07_a_batch_without_images_reaches_the_image_parts_and_changes_nothing(
    tokenizer, process_group, checkpointing, fusion
):
    model, processor = tiny(tokenizer, fusion=fusion)
    model.train()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    norms[0].eval()  # as users do who freeze only some statistics
    before = [norm.running_mean.clone() for norm in norms]
    if checkpointing:
        model.activation_checkpointing_enable()
    loss = model(**batch(processor, [(None, "Two cats on a", " red sofa.")])).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(p.grad.any() for p in model.model.vision_tower.parameters())
    assert [norm.training for norm in norms] == [False] + [True] * (len(norms) - 1)
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))


@pytest.mark.parametrize(
    ("name", "model_args"),
    [
        ("convnext_atto", {}),
        ("mobilenetv3_small_050", {}),
        ("vit_base_patch16_siglip_224", {"depth": 1, "embed_dim": 48, "num_heads": 2}),
    ],
)
def test_pain_07_every_parameter_that_learns_gets_a_gradient(tokenizer, name, model_args):
    settings = {"preprocessing": {"input_size": (3, 64, 64)}, "model_args": model_args, "num_image_tokens": 4}
    model, processor = compose(name, tiny_gpt2(), tokenizer=tokenizer, pretrained=False, **settings)
    model.train()(**batch(processor)).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    frozen = {name for name, p in model.model.vision_tower.timm_model.named_parameters() if not p.requires_grad}
    assert frozen == set(model.config.unused_parameters) != set()


def test_score_leaves_dropout_out_and_the_mode_as_it_was(tokenizer):
    model, processor = tiny(tokenizer, text_config=tiny_gpt2(resid_pdrop=0.5))
    inputs = batch(processor)
    expected = model.eval().score(**inputs)
    model.train().model.language_model.eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(model.score(**inputs), expected)
    with pytest.raises(ValueError, match="pixel_values"):
        model.score(**(inputs | {"pixel_values": torch.zeros(1, 3, 8, 8)}))
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    "settings",
    [{}, {"trainable": {"vision": False}}, {"fusion": "cross_attention"}],
    ids=["all learn", "tower frozen", "cross-attention"],
)
def test_pain_07_a_process_without_images_does_not_stop_the_others(tokenizer, tmp_path, settings):
    torch.multiprocessing.start_processes(
        distributed_step, args=(os.fspath(tmp_path), tokenizer, settings), nprocs=2, start_method="spawn"
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert_same_gradients(first, second, tolerance=0)

    torch.manual_seed(0)
    model, processor = tiny(tokenizer, **settings)
    without_statistics(model.train())
    losses = [model(**batch(processor, [row])).loss for row in ROWS[:2]]
    assert_same_gradients(first, gradients(model, sum(losses) / 2))
