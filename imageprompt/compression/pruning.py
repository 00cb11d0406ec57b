"""Magnitude pruning (arXiv 1506.02626) through `torch.nn.utils.prune`, and training that keeps the zeros.

Weights of linear layers and convolutions that are nearest to zero become zero. Embeddings, the head that shares them,
norms and biases are few or matter much, and stay. The zeros are ordinary weights: a file is not smaller for them and a
dense kernel not faster, but a zipped file is smaller.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from ..configuration import PARTS
from ..modeling import ImagePromptForConditionalGeneration, ImagePromptPreTrainedModel
from .quantizing import check_parts, refuse_quantized

PRUNED_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
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
    layers = [(layer, "weight") for layer in prunable_layers(model, parts).values()]
    if scope == "model":
        torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=share)
    for layer, name in layers:
        if scope == "layer":
            torch_prune.l1_unstructured(layer, name, amount=share)
        learns = layer.weight_orig.requires_grad
        torch_prune.remove(layer, name)
        layer.weight.requires_grad_(learns)


def prunable_layers(model: ImagePromptPreTrainedModel, parts: Sequence[str] = PARTS) -> dict[str, nn.Module]:
    """The linear layers and convolutions of these parts, without the head; by name.

    Raises:
        ValueError: for unknown parts.
    """
    check_parts(parts)
    wanted = {id(parameter) for part in parts for parameter in model._parts[part]}
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PRUNED_TYPES) and module is not head and id(module.weight) in wanted
    }


def share_of_zeros(model: ImagePromptPreTrainedModel, parts: Sequence[str] = PARTS) -> float:
    """How many of the weights that `prune` looks at are zero, between 0 and 1."""
    weights = [layer.weight for layer in prunable_layers(model, parts).values()]
    return sum((weight == 0).sum().item() for weight in weights) / sum(weight.numel() for weight in weights)


class KeepZeros(TrainerCallback):
    """For any `Trainer`: weights of layers that are zero when training begins stay zero, whatever the optimizer does.

    Raises:
        ValueError: when training begins, if there are no zeros to keep.
    """

    def __init__(self):
        self.masks: list[tuple[nn.Parameter, Tensor]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        layers = prunable_layers(model).values()
        self.masks = [(layer.weight, layer.weight != 0) for layer in layers if (layer.weight == 0).any()]
        if not self.masks:
            raise ValueError("There are no zeros to keep: prune the model first (`imageprompt compress --prune 0.5`).")

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        for weight, mask in self.masks:
            weight.mul_(mask)
