"""`diagnose`: what a model will cost, and whether training it would fail, before any weight is made.

The parts are composed as `compose` does it, on the meta device. Weights are never downloaded; of those in a local
folder, names and shapes alone are read.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ..composing import find_backbone, loading, prepare_tokenizer, refuse_foreign_training
from ..configuration import ImagePromptConfig, vision_config_of
from ..image_processing import ImagePromptImageProcessor
from ..language_models import refuse_other_kinds
from ..options import new_gpt2
from ..processing import ImagePromptProcessor
from .checks import (
    add_lora,
    check_batch_norm,
    check_learning,
    check_positions,
    check_processor,
    check_statistics,
    check_weights,
    try_memory,
)
from .memory import build_on_meta, count_parts, quiet
from .report import Budget, Check, Diagnosis, Plan


def diagnose(
    model: str | os.PathLike,
    text: str | os.PathLike | PreTrainedConfig | None = None,
    *,
    plan: Plan | None = None,
    tokenizer: Any = None,
    model_args: dict[str, Any] | None = None,
    preprocessing: dict[str, Any] | None = None,
    pretrained: bool = True,
    **config_fields,
) -> Diagnosis:
    """Examine a model, a configuration or a pair of parts, without making or downloading weights.

    Args:
        model: a saved model (local folder or Hub id), a `config.json`, or, with `text`, a backbone as `compose` takes.
        text: Hub id, local folder or configuration of the language model; or the settings of a new GPT-2, as JSON.
        plan: how the model will be used.
        tokenizer, model_args, preprocessing, pretrained, config_fields: of `compose`; for pairs only.

    Raises:
        ValueError: if a name or file means nothing that can be examined.
        OSError: if a file cannot be read.
        ModuleNotFoundError: if the plan has LoRA, and peft is not installed.
    """
    report = Diagnosis(f"{model}" if text is None else f"{model} + {text}", plan or Plan())
    composition = {"tokenizer": tokenizer, "model_args": model_args, "preprocessing": preprocessing, **config_fields}
    if text is None:
        if given := [name for name, value in composition.items() if value is not None]:
            raise ValueError(f"{', '.join(given)}: only for a pair of names; {model} is composed already.")
        config, processor, folder = _open_saved(model, report)
    else:
        config, processor = _compose_pair(model, text, report, pretrained, **composition)
        folder = None
    if config is None:
        return report
    config.trainable |= report.plan.trainable
    config.validate_parts()

    report.budget = _budget(config, report.plan)
    report.preprocessing = dict(config.vision_config.pretrained_cfg)
    report.checks += check_positions(config, processor, report.budget, report.plan)
    if processor is not None:
        report.checks += check_processor(config, processor)
    if text is None:
        report.checks += check_statistics(config)
    if folder is not None:
        report.checks += check_weights(config, folder)
    meta = build_on_meta(config, report.plan.dtype)
    if report.plan.lora:
        report.checks += add_lora(meta, report.plan)
    quantized = config.quantization is not None
    if quantized:
        meta.requires_grad_(False)
    meta.train()
    report.parts = count_parts(meta)
    report.checks += check_learning(config, report.parts)
    report.checks += check_batch_norm(meta, report.plan)
    if all(check.name != "positions" or check.status != "error" for check in report.checks):
        report.memory = try_memory(meta, report, folder if quantized else None)
        if quantized and folder is None:
            message = "The weights are quantised, and their files are not here: they are counted as not quantised."
            report.checks.append(Check("memory", "warning", message))
    return report


def _open_saved(
    source: str | os.PathLike, report: Diagnosis
) -> tuple[ImagePromptConfig | None, ImagePromptProcessor | None, Path | None]:
    """The configuration, and for a whole checkpoint its processor and folder."""
    path = Path(source)
    if not path.exists():
        try:
            ignored = ["*.safetensors", "*.bin", "*.pt", "*.pth"]
            path = Path(snapshot_download(os.fspath(source), ignore_patterns=ignored))
        except (HFValidationError, LocalEntryNotFoundError) as error:
            raise ValueError(f"{source} is no local file or folder, and not to be had from the Hub: {error}") from error
    settings, _ = PreTrainedConfig.get_config_dict(path)
    if settings.get("model_type") != ImagePromptConfig.model_type:
        raise ValueError(
            f"{source} is of the kind {settings.get('model_type')!r}, not a model of imageprompt. For parts that are "
            "not composed yet, name both: a backbone and a language model."
        )
    with _as_check(report, "configuration"):
        config = ImagePromptConfig.from_dict(settings)
        if path.is_file():
            return config, None, None
        processor = None
        with _as_check(report, "processor"):
            processor = ImagePromptProcessor.from_pretrained(path)
        # Of a model on the Hub, the weights were left there.
        here = Path(source).exists() or any(path.glob("*.safetensors"))
        return config, processor, path if here else None
    return None, None, None


def _compose_pair(
    vision: str | os.PathLike,
    text: str | os.PathLike | PreTrainedConfig,
    report: Diagnosis,
    pretrained: bool,
    tokenizer: Any,
    model_args: dict[str, Any] | None,
    preprocessing: dict[str, Any] | None,
    **config_fields,
) -> tuple[ImagePromptConfig | None, ImagePromptProcessor | None]:
    """What `compose` does, up to the weights."""
    trained = find_backbone(vision, model_args=model_args)
    if isinstance(text, str) and text.lstrip().startswith("{"):
        text = new_gpt2("The language model's settings", text)
    if isinstance(text, PreTrainedConfig):
        text_config = copy.deepcopy(text)
    else:
        with loading(text):
            text_config = AutoConfig.from_pretrained(text)
        tokenizer = tokenizer if tokenizer is not None else text
    with _as_check(report, "language model"), torch.device("meta"), quiet():
        refuse_other_kinds(AutoModelForCausalLM.from_config(copy.deepcopy(text_config)))
    if text_config.model_type != "gpt2":
        report.checks.append(
            Check(
                "language model",
                "warning",
                f"Whether a plain head is exact for {text_config.model_type}, `compose` finds out from its weights, "
                "which were not read here.",
            )
        )
    if tokenizer is None:
        report.checks.append(Check("tokenizer", "warning", "None was given, so none was checked; training needs one."))
    else:
        with _as_check(report, "tokenizer"):
            tokenizer = prepare_tokenizer(tokenizer, text_config)
            text_config.vocab_size = max(text_config.vocab_size, len(tokenizer))
            config_fields["image_token_id"] = tokenizer.image_token_id
    if pretrained:
        with _as_check(report, "preprocessing", "is what the weights were trained with"):
            refuse_foreign_training(preprocessing or {}, trained)
    with _as_check(report, "composition"):
        config_fields = {name: value for name, value in config_fields.items() if value is not None}
        backbone = find_backbone(vision, model_args=model_args, preprocessing=preprocessing)
        config = ImagePromptConfig(vision_config=vision_config_of(backbone), text_config=text_config, **config_fields)
        if "image_token_id" not in config_fields:
            return config, None
        images = ImagePromptImageProcessor.from_pretrained_cfg(config.vision_config.pretrained_cfg)
        return config, ImagePromptProcessor(images, tokenizer, num_image_tokens=config.image_seq_length)
    return None, None


@contextmanager
def _as_check(report: Diagnosis, name: str, fine: str | None = None) -> Iterator[None]:
    """Turn a refusal into an error of the report; with `fine`, say so where there is none."""
    try:
        yield
    except (OSError, StrictDataclassError, TypeError, ValueError) as error:
        report.checks.append(Check(name, "error", str(error)))
    else:
        if fine:
            report.checks.append(Check(name, "ok", fine))


def _budget(config: ImagePromptConfig, plan: Plan) -> Budget:
    positions, per_image = getattr(config, "max_position_embeddings", None), config.image_seq_length
    text = None
    if positions is not None:
        text = [positions - images * per_image for images in range(1, max(4, plan.images_per_row) + 1)]
    return Budget(config.num_image_tokens, list(config.feature_grid), per_image, positions, text)
