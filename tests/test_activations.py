"""The one kernel computes what the library's eight operations do, and for training keeps less."""

import pytest
import torch
from conftest import tiny, tiny_gpt2
from transformers.activations import NewGELUActivation

from imageprompt.activations import fuse_gelu


def values(dtype):
    return torch.linspace(-12, 12, 4001, dtype=dtype).requires_grad_()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)], ids=str
)
def test_values_and_gradients_are_those_of_the_formula(dtype, tolerance):
    mlp = torch.nn.Sequential(NewGELUActivation())
    exact, rounded = values(torch.float64), values(dtype)
    expected = mlp(exact)
    expected.sum().backward()
    fuse_gelu(mlp)
    found = mlp(rounded)
    found.sum().backward()
    scale = exact.abs().clamp(min=1)  # what is rounded is as large as the value itself
    assert ((found.double() - expected) / scale).abs().max() <= tolerance
    assert ((rounded.grad.double() - exact.grad) / scale).abs().max() <= tolerance


def test_a_model_has_no_other_and_its_configuration_stays(tokenizer):
    model, _ = tiny(tokenizer)
    assert not [name for name, part in model.named_modules() if isinstance(part, NewGELUActivation)]
    assert model.config.text_config.activation_function == "gelu_new"


def test_other_activations_stay(tokenizer):
    model, _ = tiny(tokenizer, text_config=tiny_gpt2(activation_function="relu"))
    assert {type(block.mlp.act) for block in model.model.language_model.h} == {torch.nn.ReLU}


def test_its_input_alone_is_kept_for_the_gradient():
    kept = []
    mlp = torch.nn.Sequential(NewGELUActivation())
    for fuse in (False, True):
        sizes = []
        if fuse:
            fuse_gelu(mlp)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            mlp(values(torch.float32))
        kept.append(sum(size for size in sizes if size > 1) // 4001)
    assert kept[1] == 1 < kept[0]
