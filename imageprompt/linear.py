"""GPT-2's layers as `nn.Linear`, for torchao, which quantises no others.

GPT-2 holds its layers as the library's `Conv1D`: linear layers whose weight lies the other way round. torchao passes
them over without a word, so that of a GPT-2 nothing would be quantised. Here they become linear layers first; what a
layer computes does not change. The configuration remembers it (`conv1d_as_linear`), so that a saved model is built with
the layers that its weights were saved from. bitsandbytes knows `Conv1D` by itself.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def replace_conv1d(module: nn.Module) -> list[str]:
    """Put an `nn.Linear` that computes the same in the place of every `Conv1D`; returns their names."""
    names = [name for name, part in module.named_modules() if isinstance(part, Conv1D)]
    for name in names:
        conv = module.get_submodule(name)
        with torch.device("meta"):
            linear = nn.Linear(conv.nx, conv.nf)
        learns = conv.weight.requires_grad
        linear.weight = nn.Parameter(conv.weight.detach().t().contiguous(), requires_grad=learns)
        linear.bias = conv.bias
        linear.train(conv.training)
        module.set_submodule(name, linear)
    return names


def finish_quantization(model: PreTrainedModel) -> None:
    """Quantise with torchao the layers that it has passed over in `from_pretrained`.

    Raises:
        ValueError: if torchao cannot quantise them so on this device, or nothing at all has been quantised.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.pre_quantized or quantizer.quantization_config.quant_method != "torchao":
        return
    kind = quantizer.quantization_config.quant_type
    if passed_over := replace_conv1d(model):
        if type(kind).__name__ == "FqnToConfig":
            raise ValueError(
                "`FqnToConfig` would quantise the weights of GPT-2's layers the wrong way round: pass one "
                "configuration for all, and name what to leave out in `modules_to_not_convert`."
            )
        model.config.conv1d_as_linear = True
    for name in (f"{layer}.weight" for layer in passed_over):
        if quantizer.param_needs_quantization(model, name):
            weight = model.get_parameter(name)
            try:
                quantizer.get_quantize_ops().convert(
                    {name: weight.detach()}, model=model, full_layer_name=name, missing_keys=set()
                )
            except (AssertionError, ImportError, NotImplementedError, RuntimeError) as error:
                raise ValueError(
                    f"torchao cannot quantise {name} with {kind} on {weight.device.type}: {error}. Its int4 layouts "
                    "need a GPU; on a CPU choose an int8 configuration, or bitsandbytes for 4 bits."
                ) from error
    if not any(is_quantized(parameter) for parameter in model.parameters()):
        raise ValueError(
            f"{type(kind).__name__} has quantised nothing: every layer is named in `modules_to_not_convert`, or has a "
            "width that the configuration does not take (groups must divide it)."
        )


def is_quantized(parameter: nn.Parameter) -> bool:
    """Whether a weight is held in integers; torchao's and bitsandbytes' may pass for floating point."""
    return type(parameter).__module__.partition(".")[0] in ("bitsandbytes", "torchao")
