"""The card of a model on the Hub: what is known of it, in the Hub's metadata and in words.

A card is written from the configuration and from [`CardFacts`]; what is not known is left out, not guessed. A README.md
that is there keeps its text: only what stands between two marks, which an earlier push wrote, is written anew.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module
from yaml import YAMLError

from .configuration import PARTS, REQUIREMENTS, ImagePromptConfig
from .diagnosis.memory import build_on_meta

CARD = "README.md"
SAMPLE = "sample.jpg"

BEGIN = "<!-- imageprompt: every push writes this part anew, from here to the closing mark -->"
END = "<!-- imageprompt: closing mark -->"

# The Hub's task and what to call it, for each task of `imageprompt evaluate`.
_TASKS = {
    "caption": ("image-to-text", "Captioning"),
    "vqa": ("visual-question-answering", "Answering questions"),
    "classify": ("image-classification", "Recognising, in written words"),
    "rank": ("image-classification", "Recognising, by the likeliest label"),
    "retrieval": ("image-text-to-text", "Retrieval, by likelihood"),
    "perplexity": ("image-text-to-text", "Likelihood of the references"),
}

# Stands in an example for the question of a row.
_QUESTION = "What is in the picture?"


@dataclass
class CardFacts:
    """What a card may say besides what the configuration says; what is left out is not mentioned.

    Args:
        license: the Hub's identifier, such as `"apache-2.0"`.
        language: codes of the languages that the model writes, such as `"en"`.
        datasets: Hub ids of data sets that the model was trained on, besides those in `training`.
        tags: further tags.
        prompt: the text that is put before an answer, for the example.
        evaluations: what `imageprompt evaluate` wrote of this model.
        training: what `imageprompt train` wrote of it, its `training.json`.
        sample: a JPEG picture, and what the model said of it for `prompt`.
    """

    license: str | None = None
    language: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    prompt: str | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, Any] | None = None
    sample: tuple[bytes, str] | None = None

    def __post_init__(self):
        for name in ("language", "datasets", "tags"):
            value = getattr(self, name)
            setattr(self, name, [value] if isinstance(value, str) else list(value or []))


def read_card(path: str | Path, origin: str | None = None) -> ModelCard:
    """A card that is there.

    Args:
        origin: where the file can be mended, if it is a copy.

    Raises:
        ValueError: if its metadata cannot be read.
    """
    try:
        return ModelCard.load(Path(path))
    except (YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(
            f"The metadata of {origin or path} cannot be read: {error} Mend the file, or take it away."
        ) from error


def refuse_hidden_sample(card: ModelCard) -> None:
    """Raise a ValueError if a card of somebody's own has no place where a sample would be shown."""
    if card.text.strip() and _between_marks(card.text) is None:
        raise ValueError(
            f"{CARD} has a text of its own, which stays, and no place for the sample: put the lines {BEGIN!r} and "
            f"{END!r} where the written part is to stand, or leave out the sample."
        )


def _between_marks(text: str) -> tuple[str, str] | None:
    """What comes before and after the part that a push wrote, if there is one."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return (before, after) if begin and end else None


def model_card(
    config: ImagePromptConfig, repo_id: str, facts: CardFacts, existing: ModelCard | None = None
) -> ModelCard:
    """The card of a model.

    Args:
        config: the model's.
        repo_id: where it is to be loaded from.
        facts: what is known besides.
        existing: a card that is there already: its text stays but for the part between the marks, and its scores do
            unless an earlier push wrote them; what is known replaces what its metadata says of it, tags come on top.
            One that has metadata alone gets a text.

    Raises:
        ValueError: if there is a sample, and no place for it in the text of the existing card.
    """
    metadata = _metadata(config, repo_id, facts)
    text = f"{BEGIN}\n\n{_text(config, repo_id, facts)}\n\n{END}\n"
    if existing is None:
        return ModelCard.from_template(metadata, template_str="---\n{{ card_data }}\n---\n\n{{ text }}\n", text=text)
    if facts.sample is not None:
        refuse_hidden_sample(existing)
    kept = existing.data
    if not existing.text.strip():
        existing.text = f"\n{text}"
    elif (around := _between_marks(existing.text)) is not None:
        before, after = around
        existing.text = before + text.strip() + after
        kept["eval_results"] = kept["metrics"] = None  # they are of the weights of that push
    new = metadata.eval_results or []
    old = [
        result for result in kept.get("eval_results", []) if not any(result.is_equal_except_value(one) for one in new)
    ]
    metadata.eval_results = old + new or None
    metadata.model_name = kept.get("model_name", metadata.model_name)
    metadata.metrics = _joined(kept.get("metrics"), metadata.metrics) or None
    metadata.tags = _joined(kept.get("tags"), metadata.tags)
    for name, value in vars(metadata).items():
        if value is not None:
            kept[name] = value
    return existing


def _joined(*lists: str | list[str] | None) -> list[str]:
    """Each text once; metadata may hold one text in place of a list."""
    return list(dict.fromkeys(text for each in lists for text in ([each] if isinstance(each, str) else each or [])))


def _metadata(config: ImagePromptConfig, repo_id: str, facts: CardFacts) -> ModelCardData:
    base_models = list(dict.fromkeys((config.base_models or {}).values()))  # once, where one model gave both parts
    trained_on = [source["dataset"] for source in _sources(facts) if source["on_hub"]]
    results = [result for evaluation in facts.evaluations for result in _eval_results(evaluation)]
    return ModelCardData(
        # The task under which the library's pipelines run these models: a prompt may stand beside the image.
        pipeline_tag="image-text-to-text",
        library_name="transformers",
        license=facts.license,
        language=facts.language or None,
        base_model=base_models or None,
        # The Hub would take a model with two of them for a merge.
        base_model_relation="finetune" if base_models else None,
        datasets=_joined(trained_on, facts.datasets) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        tags=["imageprompt", "custom_code", *facts.tags],
        eval_results=results or None,
        model_name=repo_id.rpartition("/")[2] if results else None,
    )


def _eval_results(evaluation: dict[str, Any]) -> list[EvalResult]:
    """The scores of one evaluation in the Hub's form."""
    task_type, task_name = _TASKS[evaluation["task"]]
    settings = evaluation["settings"]
    name, on_hub = _data_name(settings["dataset"], evaluation.get("dataset_on_hub", False))
    return [
        EvalResult(
            task_type=task_type,
            task_name=task_name,
            dataset_type=name if on_hub else "local",
            dataset_name=name,
            dataset_config=settings["subset"],
            dataset_split=settings["split"],
            metric_type=_metric_type(score),
            metric_name=score,
            metric_value=value,
            metric_args=evaluation["decoding"],
        )
        for score, value in evaluation["scores"].items()
        if value is not None
    ]


def _metric_type(score: str) -> str:
    """The name under which the Hub knows a score of `imageprompt evaluate`, such as "bleu" for BLEU-4."""
    name = score.lower().removeprefix("macro_")
    return next((known for known in ("bleu", "rouge") if name.startswith(known)), name)


def _data_name(dataset: str, on_hub: bool) -> tuple[str, bool]:
    """What to call a data set; where a local one lies is nobody's business."""
    return dataset if on_hub else Path(dataset).name, on_hub


def _sources(facts: CardFacts) -> list[dict[str, Any]]:
    return (facts.training or {}).get("data") or []


def _text(config: ImagePromptConfig, repo_id: str, facts: CardFacts) -> str:
    parts = [f"# {repo_id.rpartition('/')[2]}", _introduction(config)]
    if facts.sample is not None:
        prompt = example_prompt(facts)
        asked = f" after the prompt `{prompt}`" if prompt else ""
        answer = f"What the model says{asked}:\n\n```text\n{facts.sample[1]}\n```"
        parts += [f"![An image that the model was shown]({SAMPLE})", answer]
    parts += ["## How to use", _usage(config, repo_id, facts)]
    parts += ["## Tokens and pixels", _tokens(config), _pixels(config)]
    if facts.training is not None:
        parts += ["## Training", _training(facts.training)]
    if facts.evaluations:
        parts += ["## Scores", *map(_scores, facts.evaluations)]
    return "\n\n".join(parts)


def _introduction(config: ImagePromptConfig) -> str:
    text, base = config.text_config, config.base_models or {}
    vision_from, text_from = (f" (from `{base[part]}`)" if part in base else "" for part in ("vision", "text"))
    size = f", {text.num_hidden_layers} layers of width {text.hidden_size}"
    reads = "as a part of the text" if config.fusion == "prefix" else "beside the text, through cross-attention"
    return (
        f"An image prompt: the features of timm's `{config.vision_config.architecture}`{vision_from} are projected "
        f"into a language model, {text.model_type}{size}{text_from}, which reads them {reads}. Made with imageprompt."
        f"{_quantization(config)}"
    )


def _quantization(config: ImagePromptConfig) -> str:
    """A sentence on quantised weights, if there are any: the library, its kind, and the parts with such layers."""
    if (settings := config.quantization) is None:
        return ""
    library, kind = str(getattr(settings["quant_method"], "value", settings["quant_method"])), ""
    if library == "torchao":
        kind = f", `{settings['quant_type']['default']['_type']}`"
    elif library == "bitsandbytes":
        kind = f", 4 bits ({settings['bnb_4bit_quant_type']})" if settings["load_in_4bit"] else ", 8 bits"
    skipped = settings.get("modules_to_not_convert") or settings.get("llm_int8_skip_modules") or []
    model = build_on_meta(config)
    owners = {id(parameter): part for part, parameters in model._parts.items() for parameter in parameters}
    parts = {
        owners[id(module.weight)]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and should_convert_module(name, skipped)
    }
    layers = f"linear layers of {', '.join(part for part in PARTS if part in parts)}"
    return f" The weights of the {layers} are quantised: {library}{kind}."


def example_prompt(facts: CardFacts) -> str | None:
    """The text before an answer: as given, or else that of an evaluation or of the training, as far as it is known."""
    if facts.prompt is not None:
        return facts.prompt
    for settings in (*(evaluation["settings"] for evaluation in facts.evaluations), *_sources(facts)):
        if settings["text_column"] is None:
            return settings["prompt"]
        return settings["prompt"].replace("{text}", _QUESTION) or _QUESTION
    return None


def example_tokens(config: ImagePromptConfig) -> int:
    """How many new tokens an example asks for: not more than there are positions for, beside an image and a prompt."""
    positions = getattr(config, "max_position_embeddings", None) or 1024
    return max(1, min(30, (positions - config.image_seq_length) // 2))


def _usage(config: ImagePromptConfig, repo_id: str, facts: CardFacts) -> str:
    prompt = example_prompt(facts)
    text = f", text={json.dumps(prompt, ensure_ascii=False)}" if prompt else ""
    return f"""\
```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{repo_id}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)

inputs = processor(images=Image.open("photo.jpg"){text}, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens={example_tokens(config)})[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(ids, skip_special_tokens=True)[0])
```

`{REQUIREMENTS}` names the packages that this needs. `trust_remote_code` runs the Python files of this repository: read
them, and pin what you have read with `revision`. Where imageprompt is installed and imported, it is not needed."""


def _tokens(config: ImagePromptConfig) -> str:
    varies = "; images may have any size that the backbone takes" if config.dynamic_image_size else ""
    lines = [
        f"- connector: `{config.connector}`{_arguments(config.connector_args)}",
        f"- fusion: `{config.fusion}`",
        f"- tokens per image: {config.num_image_tokens}{varies}",
    ]
    if (positions := getattr(config, "max_position_embeddings", None)) is not None:
        takes = f"{config.image_seq_length} of them" if config.image_seq_length > 1 else "one of them"
        lines.append(f"- positions of the language model: {positions}; an image takes {takes}")
    return "\n".join(lines)


def _arguments(arguments: dict[str, Any] | None) -> str:
    return f" ({', '.join(f'{name} {value}' for name, value in arguments.items())})" if arguments else ""


def _pixels(config: ImagePromptConfig) -> str:
    cfg = config.vision_config.pretrained_cfg
    height, width = config.image_size
    rows = {
        "height and width": f"{height} x {width} pixels",
        "channels": config.num_channels,
        "resized with": cfg["interpolation"],
        "share that is kept": f"{cfg['crop_pct']}, {cfg['crop_mode']}",
        "mean": ", ".join(map(str, cfg["mean"])),
        "standard deviation": ", ".join(map(str, cfg["std"])),
    }
    lines = "\n".join(f"- {name}: {value}" for name, value in rows.items())
    return f"The processor that is saved here prepares images like this:\n\n{lines}"


def _training(training: dict[str, Any]) -> str:
    lines = []
    for source in training.get("data") or []:
        name, on_hub = _data_name(source["dataset"], source["on_hub"])
        prompt = f", prompt `{source['prompt']}`" if source["prompt"] else ""
        lines.append(f"- data: `{name}`{'' if on_hub else ' (a local one)'}, split `{source['train_split']}`{prompt}")
    if training.get("rows") is not None:
        lines.append(f"- rows: {training['rows']:,}")
    if training.get("lora"):
        lines.append("- what learnt: LoRA adapters, merged into the weights")
    elif training.get("learns"):
        learnt = [part for part, learns in training["learns"].items() if learns]
        lines.append(f"- what learnt: {', '.join(learnt)}")
    options = dict(training.get("options") or {})
    options.pop("num_train_epochs" if options.get("max_steps", -1) > 0 else "max_steps", None)  # the other one counts
    lines += [f"- {name}: {value}" for name, value in options.items() if value is not None]
    metrics, versions = training.get("metrics") or {}, training.get("versions") or {}
    lines += [f"- {name}: {metrics[name]:.4g}" for name in ("epoch", "train_loss") if name in metrics]
    if versions:
        lines.append(f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items())}")
    return "\n".join(lines)


def _scores(evaluation: dict[str, Any]) -> str:
    settings = evaluation["settings"]
    name, on_hub = _data_name(settings["dataset"], evaluation.get("dataset_on_hub", False))
    decoding = ", ".join(f"{key} {value}" for key, value in evaluation["decoding"].items())
    prompt = f", prompt `{settings['prompt']}`" if settings["prompt"] else ""
    rows = "\n".join(f"| {key} | {value:.4g} |" for key, value in evaluation["scores"].items() if value is not None)
    return (
        f"{_TASKS[evaluation['task']][1]}: {evaluation['rows']:,} rows of `{name}`{'' if on_hub else ' (a local one)'},"
        f" split `{settings['split']}`{prompt}; {decoding}.\n\n| score | |\n| --- | --- |\n{rows}"
    )
