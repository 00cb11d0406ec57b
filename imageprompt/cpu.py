"""What torch can do on this CPU: bfloat16, and weights laid out beforehand for its faster matrix products.

In decoding, a matrix product has a row for each text and does little but read its weight. MKL, which torch takes for
float32 on x86, can read it several times slower than memory allows. oneDNN, which torch brings along, does not where
the weight lies in the order in which its kernels read it ("prepacked"). Here this is done in place, for a GPT-2 that
only answers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .linear import is_quantized


def multiplies_bf16() -> bool:
    """Whether torch has fast matrix products in bfloat16 on this CPU: on x86, from AVX-512 on."""
    return not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PrepackedLinear(nn.Module):
    """A linear layer of a fixed weight, which oneDNN has laid out for its own kernels.

    Args:
        weight: (outputs, inputs).
        bias: (outputs,), or none.
    """

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None):
        super().__init__()
        # Orientation and layout are not those of other layers' `weight`, which some code reads: hence another name.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = bias

    @torch.compiler.disable  # which knows no layout of oneDNN's
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(…, inputs) to (…, outputs), in the weight's dtype also under autocast."""
        hidden_states = hidden_states.to(self.packed.dtype)
        outputs = torch.ops.mkldnn._linear_pointwise(hidden_states, self.packed, self.bias, "none", [], "")
        if outputs.requires_grad:
            outputs.register_hook(_refuse_gradient)  # torch would pass on none, with a warning
        return outputs

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("Prepacked weights cannot be saved or copied: do so before `prepack_weights`.")

    __reduce_ex__ = _save_to_state_dict  # which `copy.deepcopy` and pickle call

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PrepackedLinear":
        probe = fn(torch.empty(0, dtype=self.packed.dtype))
        if (probe.device.type, probe.dtype) != ("cpu", self.packed.dtype):
            raise RuntimeError(
                f"Prepacked weights stay on the CPU and in {self.packed.dtype}: load the model anew for "
                f"{probe.dtype} on {probe.device}, and call `prepack_weights` last."
            )
        return super()._apply(fn, recurse)


def _refuse_gradient(gradient: torch.Tensor) -> None:
    raise RuntimeError("Prepacked weights pass no gradient on: take a model on which `prepack_weights` was not called.")


def prepack_weights(model: PreTrainedModel, *, strict: bool = True) -> None:
    """Lay out the weights of GPT-2's layers and of the head, in place, for faster generation on a CPU.

    Outputs stay the same but for rounding. The model cannot be trained, saved, copied, moved or cast afterwards, and
    `torch.compile` leaves these layers as they are. A head that shares its weight with the token embeddings gets its
    own: for GPT-2, 154 MB more.

    Args:
        model: an imageprompt model on the CPU, in float32, or in bfloat16 where the CPU multiplies it. Of another
            language model than GPT-2 the head alone is prepacked.
        strict: `False` leaves a model as it is where this cannot be done, as on a GPU.

    Raises:
        ValueError: if it cannot be done, with the reason; the model is as it was.
    """
    if obstacle := _obstacle(model):
        if strict:
            raise ValueError(f"{obstacle}: leave `prepack_weights` out.")
        return
    head = model.get_output_embeddings()
    layers = model.named_modules()
    names = [name for name, part in layers if type(part) is Conv1D or (part is head and type(part) is nn.Linear)]
    for name in names:  # one by one, so that no more than one weight at a time has copies
        layer = model.get_submodule(name)
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()
        model.set_submodule(name, PrepackedLinear(weight, layer.bias))


def _obstacle(model: PreTrainedModel) -> str:
    """Why a model's weights cannot be prepacked; empty if they can."""
    devices, dtypes = ({getattr(p, name) for p in model.parameters()} for name in ("device", "dtype"))
    if elsewhere := sorted({device.type for device in devices} - {"cpu"}):
        return f"Prepacked weights are for CPUs, and this model is on {', '.join(elsewhere)}"
    if not (torch.backends.mkldnn.is_available() and (torch._C.has_mkl or torch.ops.mkldnn._is_mkldnn_acl_supported())):
        return "This torch was built without oneDNN's fast kernels, which prepacked weights are for"
    if any(name.endswith(".base_layer") for name, _ in model.named_modules()):
        return "This model has adapters, which read the weights of its layers; merge them first"
    if any(is_quantized(parameter) for parameter in model.parameters()):
        return "This model's weights are quantised, and have an order of their own"
    if others := sorted(map(str, dtypes - {torch.float32, torch.bfloat16})):
        return f"Weights are prepacked in float32 or bfloat16, and this model is in {', '.join(others)}"
    if torch.bfloat16 in dtypes and not multiplies_bf16():
        return "This CPU has no instructions for bfloat16, in which this model is; load it in float32"
    return ""
