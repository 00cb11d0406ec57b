"""Magnitude pruning (arXiv 1506.02626) through `torch.nn.utils.prune`, and training that keeps the zeros.

Weights of linear layers, attention and convolutions that are nearest to zero become zero. Embeddings, the head that
shares them, norms and biases are few or matter much, and stay. The zeros are ordinary weights: a file is not smaller
for them and a dense kernel not faster, but a zipped file is smaller.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from ..configuration import PARTS
from ..modeling import ImagePromptForConditionalGeneration, ImagePromptPreTrainedModel
from .quantizing import check_parts, refuse_quantized

PRUNED_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
# torch's attention holds its linear layers as weights of its own, in one matrix or in three.
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
SCOPES = ("layer", "model")


def prune(
    model: ImagePromptForConditionalGeneration, share: float, parts: Sequence[str] = PARTS, scope: str = "layer"
) -> None:
    """Set the weights of least magnitude to zero, for good.

    Args:
        model: changed in place.
        share: how many of the weights, 0.5 for half.
        parts: where, of "vision", "connector" and "text".
        scope: `"layer"`: this share of each layer's weights; `"model"`: of all together, so that layers with small
            weights lose more.

    Raises:
        ValueError: for a share that is not between 0 and 1, an unknown part or scope, or a quantised model.
    """
    if not 0 < share < 1:
        raise ValueError(f"The share of weights to prune lies between 0 and 1, for example 0.5; got {share}.")
    if scope not in SCOPES:
        raise ValueError(f"Unknown scope {scope!r}; known: {', '.join(SCOPES)}.")
    refuse_quantized(model.config)
    weights = [(model.get_submodule(layer), kind) for layer, kind in _places(prunable_weights(model, parts))]
    if scope == "model":
        torch_prune.global_unstructured(weights, torch_prune.L1Unstructured, amount=share)
    for layer, kind in weights:
        if scope == "layer":
            torch_prune.l1_unstructured(layer, kind, amount=share)
        learns = getattr(layer, f"{kind}_orig").requires_grad
        torch_prune.remove(layer, kind)
        getattr(layer, kind).requires_grad_(learns)


def _places(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(layer, name in it) of each parameter."""
    return ((layer, kind) for layer, _, kind in (name.rpartition(".") for name in names))


def prunable_weights(model: ImagePromptPreTrainedModel, parts: Sequence[str] = PARTS) -> dict[str, nn.Parameter]:
    """The weights of linear layers, attention and convolutions of these parts, without the head; by name.

    Raises:
        ValueError: for unknown parts.
    """
    check_parts(parts)
    wanted = {id(parameter) for part in parts for parameter in model._parts[part]}
    head = model.get_output_embeddings()
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, PRUNED_TYPES) and module is not head:
            weights[f"{name}.weight"] = module.weight
        elif isinstance(module, nn.MultiheadAttention):
            weights |= {f"{name}.{kind}": getattr(module, kind) for kind in ATTENTION_WEIGHTS}
    return {name: weight for name, weight in weights.items() if id(weight) in wanted}


def share_of_zeros(model: ImagePromptPreTrainedModel, parts: Sequence[str] = PARTS) -> float:
    """How many of the weights that `prune` looks at are zero, between 0 and 1."""
    weights = prunable_weights(model, parts).values()
    return sum((weight == 0).sum().item() for weight in weights) / sum(weight.numel() for weight in weights)


class KeepZeros(TrainerCallback):
    """For any `Trainer`: weights of layers that are zero when training begins stay zero, whatever the optimizer does.

    Raises:
        ValueError: when training begins, if there are no zeros to keep.
    """

    def __init__(self):
        self.masks: list[tuple[nn.Parameter, Tensor]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        weights = prunable_weights(model).values()
        self.masks = [(weight, weight != 0) for weight in weights if (weight == 0).any()]
        if not self.masks:
            raise ValueError("There are no zeros to keep: prune the model first (`imageprompt compress --prune 0.5`).")

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        for weight, mask in self.masks:
            weight.mul_(mask)
