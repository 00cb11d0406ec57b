"""Which configuration quantises what: for `from_pretrained(..., quantization_config=...)`, the library's own way.

torchao holds weights in 8 bits, on a CPU and on a GPU. Its 4-bit layouts that can be saved need a GPU, so 4 bits are
bitsandbytes' NF4 (arXiv 2305.14314), which both run.
"""

from collections.abc import Sequence
from importlib.util import find_spec

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..configuration import PARTS, ImagePromptConfig
from ..diagnosis.memory import build_on_meta
from ..linear import is_quantized

KINDS = {"int8": "torchao", "int8-dynamic": "torchao", "int4": "bitsandbytes"}
# Names begin with `model.` in the model with a head only. Cross-attention belongs to the connector, as everywhere.
_NAMES = {
    "vision": [r"(model\.)?vision_tower"],
    "connector": [r"(model\.)?connector", r"(model\.)?language_model\.h\.\d+\.crossattention"],
    "text": [r"(model\.)?language_model\.(?!h\.\d+\.crossattention)"],
}


def quantization_config(
    kind: str, config: ImagePromptConfig, parts: Sequence[str] = ("text",)
) -> QuantizationConfigMixin:
    """What to pass to `from_pretrained` as `quantization_config`.

    Args:
        kind: `"int8"`: weights in 8 bits, one scale for each output. `"int8-dynamic"`: activations in 8 bits besides,
            one scale for each token. `"int4"`: weights in 4 bits, one scale for each 64.
        config: of the model that will be loaded.
        parts: what to quantise, of "vision", "connector" and "text". Only linear layers can be: convolutions,
            embeddings and the head, which shares its weights with them, stay as they are.

    Raises:
        ValueError: for an unknown kind or part, a model that is quantised already, parts without a linear layer, or a
            library that is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"Unknown kind {kind!r}; known: {', '.join(KINDS)}.")
    refuse_quantized(config)
    skipped = skipped_modules(parts)
    layers = [name for name, module in build_on_meta(config).named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    if not any(should_convert_module(name, skipped) for name in layers):
        raise ValueError(
            f"There is nothing to quantise in {', '.join(parts)}: no linear layer (convolutions stay as they are). "
            f"Choose other parts of {', '.join(PARTS)}."
        )
    if find_spec(KINDS[kind]) is None:
        raise ValueError(f'{kind} needs {KINDS[kind]}: pip install "imageprompt[compress]".')
    if kind == "int4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    kinds = {"int8": Int8WeightOnlyConfig, "int8-dynamic": Int8DynamicActivationInt8WeightConfig}
    return TorchAoConfig(kinds[kind](), modules_to_not_convert=skipped)


def skipped_modules(parts: Sequence[str] = ("text",)) -> list[str]:
    """Patterns of the modules that must not be quantised, for a configuration of one's own.

    It goes into `modules_to_not_convert` of a `TorchAoConfig`, `llm_int8_skip_modules` of a `BitsAndBytesConfig`.

    Raises:
        ValueError: for unknown parts, or none.
    """
    check_parts(parts)
    return ["lm_head", *(name for part in PARTS if part not in parts for name in _NAMES[part])]


def quantized_layers(model: PreTrainedModel) -> dict[str, str]:
    """The layers of a loaded model whose weights are held in integers, each with the kind of its weight."""
    return {
        name.removesuffix(".weight"): type(parameter).__name__
        for name, parameter in model.named_parameters()
        if is_quantized(parameter)
    }


def check_parts(parts: Sequence[str]) -> None:
    """Raise a ValueError for parts that do not exist, or if there are none."""
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"Unknown part {unknown[0]!r}; known: {', '.join(PARTS)}.")
    if not parts:
        raise ValueError(f"Name at least one part of {', '.join(PARTS)}.")


def refuse_quantized(config: ImagePromptConfig) -> None:
    """Raise a ValueError if a model with this configuration is quantised already."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("This model is quantised already: start from the one that it was made of.")
