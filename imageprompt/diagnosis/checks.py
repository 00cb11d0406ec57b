"""The checks of a diagnosis. Each is a function that yields what it found, with the mend in the message.

They ask the code that will run (the processor, `from_pretrained`, peft, a forward pass) and know no rules of their own
where that code has some.
"""

from collections.abc import Iterator
from pathlib import Path

import timm
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..checkpoints import listed
from ..configuration import ImagePromptConfig
from ..modeling import ImagePromptForConditionalGeneration
from ..processing import ImagePromptProcessor
from .memory import estimate_memory, on_fake_tensors, quiet, stored_bytes
from .report import Budget, Check, Diagnosis, Memory, Part, Plan

# Below this many samples per step, batch statistics get noisy enough to cost accuracy (Group Normalization, arXiv
# 1803.08494, figure 1).
SMALL_BATCH = 16
# What fake tensors cannot follow; it says nothing about a real run.
_UNTRACEABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
    UnsupportedFakeTensorException,
)


def check_positions(
    config: ImagePromptConfig, processor: ImagePromptProcessor | None, budget: Budget, plan: Plan
) -> Iterator[Check]:
    if budget.positions is None:
        yield Check("positions", "ok", "The language model does not limit them.")
        return
    images = plan.images_per_row * budget.positions_per_image
    needed = images + plan.text_tokens + plan.max_new_tokens
    sum_ = f"{images} for images + {plan.text_tokens} of text + {plan.max_new_tokens} new = {needed}"
    if needed > budget.positions:
        mend = "Lower num_image_tokens, the images per row, the text, or max_new_tokens."
        yield Check("positions", "error", f"{sum_}, more than the {budget.positions} there are. {mend}")
    elif 4 * (budget.positions - images) < budget.positions:
        mend = "A smaller num_image_tokens makes room."
        yield Check("positions", "warning", f"{sum_} of {budget.positions}: images leave little room. {mend}")
    else:
        yield Check("positions", "ok", f"{sum_} of {budget.positions}")
    if processor is not None and processor.tokenizer.model_max_length > budget.positions:
        yield Check(
            "tokenizer length",
            "warning",
            f"The tokenizer allows {processor.tokenizer.model_max_length} tokens, so a long row stops training instead "
            f"of being refused or trimmed by the processor: set its model_max_length to {budget.positions}.",
        )


def check_processor(config: ImagePromptConfig, processor: ImagePromptProcessor) -> Iterator[Check]:
    missing = [name for name in ("eos_token", "pad_token") if getattr(processor.tokenizer, name) is None]
    if missing:
        mend = "No answer can learn to end without EOS, and no batch be padded without a padding token: set both."
        yield Check("tokenizer", "error", f"The tokenizer has no {' and no '.join(missing)}. {mend}")
        return
    try:
        processor.check_model(config)
        row = processor(images=Image.new("RGB", (8, 8)), text="a", suffix="b", return_tensors="pt")
    except (TypeError, ValueError) as error:
        yield Check("processor", "error", str(error))
        return
    placeholders = int((row["input_ids"] == config.image_token_id).sum())
    yield Check("processor", "ok", f"prepares a row as the model takes it, with {placeholders} image tokens")

    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    try:
        problem = None
        if (marks := processor.apply_chat_template(chat).count(processor.image_token)) != 1:
            problem = f"it writes {marks} image marks for one image"
    except Exception as error:  # a template is a program of its own, and may raise anything
        problem = str(error)
    if problem:
        mend = "Chats with images will fail; plain rows do not use it."
        yield Check("chat template", "warning", f"The saved template cannot show an image: {problem}. {mend}")
    else:
        yield Check("chat template", "ok", "shows an image")


def check_statistics(config: ImagePromptConfig) -> Iterator[Check]:
    """Whether any weights that timm has for this architecture were trained with the saved mean and std."""
    mine, architecture = config.vision_config.pretrained_cfg, config.vision_config.architecture
    cfgs = [timm.get_pretrained_cfg(name).to_dict() for name in timm.list_pretrained(f"{architecture}.*")]
    known = {(tuple(cfg["mean"]), tuple(cfg["std"])) for cfg in cfgs}
    if len(mine["mean"]) != 3 or not known or (tuple(mine["mean"]), tuple(mine["std"])) in known:
        yield Check("preprocessing", "ok", "contradicts no weights that timm has for this backbone")
    else:
        expected = " or ".join(f"mean {list(mean)}, std {list(std)}" for mean, std in sorted(known))
        yield Check(
            "preprocessing",
            "warning",
            f"mean {mine['mean']}, std {mine['std']}, but timm's weights for {architecture} were trained with "
            f"{expected}. Right only if this backbone was trained from random weights: else compose it anew.",
        )


def check_weights(config: ImagePromptConfig, folder: Path) -> Iterator[Check]:
    """What `from_pretrained` says of the files, on the meta device: it reads names and shapes alone."""
    if config.quantization is not None and config.quantization["quant_method"] != "torchao":
        yield Check(
            "weights",
            "warning",
            "Not examined: of quantised ones, the library reads torchao's alone without making them.",
        )
        return
    try:
        with quiet():
            _, found = ImagePromptForConditionalGeneration.from_pretrained(
                folder, device_map="meta", output_loading_info=True, strict=False, ignore_mismatched_sizes=True
            )
    except Exception as error:  # broken files raise what their readers please
        yield Check("weights", "error", str(error))
        return
    wrong = [
        f"{name} has the shape {tuple(saved)} instead of {tuple(needed)}"
        for name, saved, needed in found["mismatched_keys"]
    ]
    if wrong:
        yield Check("weights", "error", f"{listed(wrong)}. The files are of another model than config.json.")
    if found["missing_keys"]:
        mend = "They would start from random values: save the whole model."
        yield Check("weights", "error", f"The files lack {listed(found['missing_keys'])}. {mend}")
    if found["unexpected_keys"]:
        yield Check("weights", "warning", f"The model has no place for {listed(found['unexpected_keys'])}.")
    if not any(found.values()):
        yield Check("weights", "ok", "names and shapes in the files are the model's")


def add_lora(model: ImagePromptForConditionalGeneration, plan: Plan) -> Iterator[Check]:
    """Put adapters in as peft does; its own matching decides where."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=plan.lora, modules_to_save=plan.modules_to_save or None)
    try:
        with quiet():
            names = get_peft_model(model, config).base_model.targeted_module_names
    except ValueError as error:
        yield Check("LoRA", "error", str(error))
        return
    owners = {"vision": "model.vision_tower.", "connector": "model.connector.", "text": ""}
    matched = dict.fromkeys(owners, 0)
    for name in names:
        matched[next(part for part, start in owners.items() if name.startswith(start))] += 1
    unmatched = [] if isinstance(plan.lora, str) else [t for t in plan.lora if not _matches(t, names)]
    if unmatched:
        yield Check("LoRA", "warning", f"No module is called {', '.join(unmatched)}.")
    yield Check("LoRA", "ok", ", ".join(f"{count} modules in {part}" for part, count in matched.items()))
    if not any(parameter.requires_grad for parameter in model.model.connector.parameters()):
        yield Check(
            "LoRA and connector",
            "warning",
            'LoRA freezes the connector: a new one stays random. Name it in modules_to_save: ["connector"].',
        )


def _matches(target: str, names: list[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)


def check_learning(config: ImagePromptConfig, parts: dict[str, Part]) -> Iterator[Check]:
    learning = [name for name, part in parts.items() if part.learning]
    if config.quantization is not None:
        mend = "train the model that this one was made of, then compress it."
        yield Check("learning", "error", f"Quantised weights do not learn: {mend}")
    elif learning:
        yield Check("learning", "ok", ", ".join(learning))
    else:
        yield Check("learning", "error", "Every part is frozen: let at least the connector learn.")


def check_batch_norm(model: ImagePromptForConditionalGeneration, plan: Plan) -> Iterator[Check]:
    layers = [
        module
        for module in model.model.vision_tower.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    samples = plan.batch_size * plan.images_per_row
    if not any(layer.training for layer in layers):
        message = f"{len(layers)} layers keep their statistics in training" if layers else "none in the backbone"
        yield Check("batch norm", "ok", message)
    elif samples < SMALL_BATCH:
        yield Check(
            "batch norm",
            "warning",
            f"{len(layers)} layers of the backbone learn statistics from {samples} images at a time, which is noisy "
            f"below {SMALL_BATCH}: freeze the vision tower, or enlarge the batch (accumulation does not help).",
        )
    else:
        yield Check("batch norm", "ok", f"{len(layers)} layers learn statistics from {samples} images at a time")


def try_memory(
    model: ImagePromptForConditionalGeneration, report: Diagnosis, folder: Path | None = None
) -> Memory | None:
    """The memory, and as a check whether a training step and a prefill run at all; a folder has quantised weights."""
    try:
        with on_fake_tensors(model):
            memory = estimate_memory(model, report.plan, None if folder is None else stored_bytes(folder))
    except _UNTRACEABLE as error:
        report.checks.append(Check("dry run", "warning", f"This model runs on real tensors only: {error}"))
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        report.checks.append(Check("dry run", "error", f"A training step fails: {error}"))
    else:
        report.checks.append(Check("dry run", "ok", "a training step and a prefill run"))
        return memory
    return None
