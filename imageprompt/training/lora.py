"""LoRA (arXiv 2106.09685) through peft: small adapters learn, and in the end are merged into a plain model.

peft says nothing when a module to be saved does not exist, and lets adapters on tied embeddings be merged into weights
that do something else. Both are refused here, before work starts.
"""

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers.pytorch_utils import Conv1D

from ..configuration import PARTS
from ..decoding import evaluating
from ..modeling import ImagePromptForConditionalGeneration
from ..processing import ImagePromptProcessor

if TYPE_CHECKING:
    from peft import PeftModel

# What peft can put an adapter on, as far as these models have it.
_LAYERS = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, Conv1D)
_PART_MODULES = {"vision": "vision_tower", "connector": "connector", "text": "language_model"}
# Merged and adapted weights may differ by rounding: as a part of the largest logit.
_TOLERANCE = 1e-3


def add_lora(model: ImagePromptForConditionalGeneration, settings: dict[str, Any]) -> "PeftModel":
    """The model with adapters that learn, and all else frozen.

    Args:
        model: changed in place.
        settings: of `peft.LoraConfig`. `target_modules` get adapters, `modules_to_save` learn as a whole, by default
            the connector, which is often new.

    Raises:
        ValueError: for unknown settings, names that no module has (those there are, are named), or an adapter on
            embeddings that the head shares.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils import ModulesToSaveWrapper

    known = {field.name for field in fields(LoraConfig) if field.init}
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"--lora: peft's LoraConfig has no setting {name!r}.{hint}")
    layers = _names(name for name, module in model.named_modules() if isinstance(module, _LAYERS))
    modules = _names(name for name, _ in model.named_modules())
    config = LoraConfig(**{"modules_to_save": ["connector"], **settings})
    if not config.target_modules:
        raise ValueError(f"--lora needs target_modules: all-linear, or names of layers: {layers}.")
    if not isinstance(config.target_modules, str):
        for target in sorted(config.target_modules):
            if not any(name == target or name.endswith(f".{target}") for name, _ in model.named_modules()):
                raise ValueError(
                    f"--lora: target_modules has {target!r}, which no layer is called. There are {layers}."
                )
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    pair = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {name for name, module in model.named_modules() if module in pair}
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"--lora: {error} This model's layers are {layers}.") from error
    saved = [name for name, module in adapted.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    for name in config.modules_to_save or []:
        if not any(module.endswith(name) for module in saved):
            raise ValueError(f"--lora: modules_to_save has {name!r}, which no module is called. There are {modules}.")
    shared = [name for name in adapted.base_model.targeted_module_names if name in embeddings]
    if tied and shared:
        raise ValueError(
            f"--lora: {shared[0]} shares its weights (head and embeddings are tied), so that a merged adapter would "
            "change both. Leave it out, or name it in modules_to_save, which unties them."
        )
    # A tower with adapters in it stays in eval mode: batch-norm statistics are no part of an adapter.
    learns = {part: any(name.endswith(module) for name in saved) for part, module in _PART_MODULES.items()}
    model.config.trainable = {part: learns[part] for part in PARTS}
    for name, parameter in adapted.named_parameters():
        # What the features do not depend on gets no gradient, for which distributed training would wait.
        if any(_belongs_to(name, unused) for unused in model.config.unused_parameters):
            parameter.requires_grad_(False)
    adapted.train(adapted.training)
    return adapted


def merge_lora(
    adapted: "PeftModel", processor: ImagePromptProcessor, trainable: dict[str, bool]
) -> ImagePromptForConditionalGeneration:
    """The plain model that does what the adapted one does.

    Args:
        adapted: from [`add_lora`]; of no use afterwards.
        processor: the model's.
        trainable: which parts are to learn from now on.

    Raises:
        ValueError: if the merged weights give other logits.
    """
    inputs = processor(images=Image.effect_noise((64, 64), 64), text="A", return_tensors="pt")
    model = adapted.get_base_model()  # with the adapters in it, and without autocast around it
    with torch.no_grad(), evaluating(model):
        expected = model(**inputs.to(model.device)).logits.float()
    merged = adapted.merge_and_unload()
    merged.set_trainable(**trainable)
    with torch.no_grad(), evaluating(merged):
        difference = ((merged(**inputs).logits.float() - expected).abs().max() / expected.abs().max()).item()
    if not difference <= _TOLERANCE:
        raise ValueError(
            f"Merged into the weights, the adapter gives other logits (by {difference:.1e} of the largest). Use it "
            "unmerged, with peft.PeftModel.from_pretrained."
        )
    return merged


def _belongs_to(name: str, unused: str) -> bool:
    """Whether a parameter is this one of the timm model, saved as a whole, or an adapter on it."""
    return name.endswith(f"timm_model.{unused}") or f"timm_model.{unused.removesuffix('.weight')}.lora_" in name


def _names(names: Iterable[str]) -> str:
    """What modules are called, without where they are."""
    last = {name.rpartition(".")[2] for name in names}
    return ", ".join(sorted(name for name in last if name and not name.isdigit()))
