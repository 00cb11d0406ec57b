"""`compose`: pretrained parts to one model and its processor.

Everything that can go silently wrong when a vision backbone meets a language model is checked here, once: the head
must reproduce the language model's own logits, the preprocessing must be the one the weights were trained with, and
image plus text must fit the positions.
"""

import copy
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .configuration import ImagePromptConfig, vision_config_of
from .conversion.backbones import PREFIX, is_of_transformers, load_weights, read_backbone
from .image_processing import ImagePromptImageProcessor
from .language_models import load_language_model, refuse_other_kinds
from .modeling import ImagePromptForConditionalGeneration
from .processing import ImagePromptProcessor
from .vision import Backbone, hub_id, resolve_backbone

IMAGE_TOKEN = "<image>"


def compose(
    vision: str | os.PathLike,
    text: str | os.PathLike | PreTrainedConfig,
    *,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    pretrained: bool | str = True,
    model_args: dict[str, Any] | None = None,
    preprocessing: dict[str, Any] | None = None,
    **config_fields,
) -> tuple[ImagePromptForConditionalGeneration, ImagePromptProcessor]:
    """Join a timm backbone and a causal language model into an image-prompt model and its processor.

    Args:
        vision: a timm name, or a Hub id or local folder in timm's Hub layout, or with an encoder of transformers that
            has a twin in timm (`conversion.backbones.TWINS`: CLIP, SigLIP, ViT, DeiT, DINOv2).
        text: a Hub id or local folder of a causal language model, or its configuration (random weights).
        tokenizer: a tokenizer, or where to load it from; by default from `text`.
        pretrained: load weights of every part that names some; `False` starts all from random ones, `"vision"` or
            `"text"` loads those of this part alone.
        model_args: keywords for `timm.create_model`, for example `{"drop_path_rate": 0.1}`.
        preprocessing: overrides of timm's data configuration, for example `{"input_size": (3, 96, 96)}`.
        config_fields: fields of [`ImagePromptConfig`]: `connector`, `num_image_tokens`, `fusion`, `trainable`.

    Returns:
        The model in eval mode, in fp32, and the processor.

    Raises:
        ValueError: for unknown names (with close ones), a missing tokenizer, a language model whose logits a plain
            head does not reproduce, or a mean, std or activation that pretrained weights were not trained with.
    """
    if pretrained not in (True, False, "vision", "text"):
        raise ValueError(f"`pretrained` is True, False, 'vision' or 'text', got {pretrained!r}.")
    trained = find_backbone(vision, model_args=model_args)
    if pretrained in (True, "vision"):
        refuse_foreign_training(preprocessing or {}, trained)
    backbone = find_backbone(vision, model_args=model_args, preprocessing=preprocessing) if preprocessing else trained
    if isinstance(text, PreTrainedConfig):
        text_config = text
    else:
        with loading(text):
            text_config = AutoConfig.from_pretrained(text)
    if text_config.get_text_config(decoder=True) is not text_config:
        raise ValueError(
            f"A {text_config.model_type!r} model holds more than a language model: pass its text part alone, as "
            "`text_config` in its configuration describes it."
        )
    tokenizer = prepare_tokenizer(tokenizer if tokenizer is not None else text, text_config)

    text_config = copy.deepcopy(text_config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text_config, name, getattr(tokenizer, name))
    if pretrained in (True, "text") and not isinstance(text, PreTrainedConfig):
        with loading(text):
            language_model = AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32)
    else:
        language_model = AutoModelForCausalLM.from_config(text_config)
    refuse_other_kinds(language_model)
    # Rows may be missing for the placeholder, or be more than the tokenizer uses.
    text_config.vocab_size = max(text_config.vocab_size, len(tokenizer))

    config = ImagePromptConfig(
        vision_config=vision_config_of(backbone),
        text_config=text_config,
        image_token_id=tokenizer.image_token_id,
        **config_fields,
    )
    model = ImagePromptForConditionalGeneration(config).eval()
    load_language_model(model, language_model.eval())
    model.generation_config = generation_config_of(model, language_model.generation_config, tokenizer)
    base_models = {}
    if pretrained in (True, "vision"):
        model.model.vision_tower.timm_model.load_state_dict(_vision_weights(backbone))
        base_models["vision"] = hub_id(backbone)
    if pretrained in (True, "text") and not isinstance(text, PreTrainedConfig) and not os.path.isdir(text):
        base_models["text"] = os.fspath(text)
    config.base_models = {part: name for part, name in base_models.items() if name} or None

    processor = ImagePromptProcessor(
        ImagePromptImageProcessor.from_pretrained_cfg(config.vision_config.pretrained_cfg),
        tokenizer,
        num_image_tokens=config.image_seq_length,
    )
    processor.check_model(model)
    return model, processor


def find_backbone(
    name: str | os.PathLike,
    *,
    model_args: dict[str, Any] | None = None,
    preprocessing: dict[str, Any] | None = None,
) -> Backbone:
    """`resolve_backbone`, and also for Hub ids and local folders with an encoder of transformers: its twin in timm."""
    hub_id = os.fspath(name)
    of_timm = "/" not in hub_id or hub_id.startswith(("timm/", "hf-hub:"))
    is_theirs = (os.path.isdir(name) or not of_timm) and is_of_transformers(name)
    find = read_backbone if is_theirs else resolve_backbone
    return find(name, model_args=model_args, preprocessing=preprocessing)


def prepare_tokenizer(source: Any, text_config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer with a placeholder, a padding token and left padding, all of which `save_pretrained` keeps."""
    if isinstance(source, PreTrainedConfig):
        raise ValueError("A language-model configuration brings no tokenizer: pass `tokenizer=`.")
    settings = {
        "extra_special_tokens": {"image_token": IMAGE_TOKEN},
        "padding_side": "left",  # an attribute set later would not be saved
    }
    if (positions := getattr(text_config, "max_position_embeddings", None)) is not None:
        settings["model_max_length"] = positions
    if isinstance(source, PreTrainedTokenizerBase):
        with tempfile.TemporaryDirectory() as folder:  # a copy: the caller's tokenizer stays as it is
            source.save_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
    else:
        tokenizer = load_tokenizer(source, **settings)
    if tokenizer.eos_token is None:
        raise ValueError("The tokenizer has no `eos_token`: without one, no answer can learn to end.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_tokenizer(source: str | os.PathLike, **settings) -> PreTrainedTokenizerBase:
    """The library's `AutoTokenizer`, which makes one without any words where it finds a `config.json` alone.

    Raises:
        ValueError: if the tokenizer cannot be loaded, or has no words.
    """
    with loading(source):
        tokenizer = AutoTokenizer.from_pretrained(source, **settings)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(
            f"There is no tokenizer in {os.fspath(source)}: put its files there (`tokenizer.save_pretrained`), or name "
            "another place as `tokenizer`."
        )
    return tokenizer


def refuse_foreign_training(preprocessing: dict[str, Any], trained: Backbone) -> None:
    for key in preprocessing.keys() & {"mean", "std"}:
        if list(preprocessing[key]) != trained.pretrained_cfg[key]:
            raise ValueError(
                f"The weights of {trained.architecture} were trained with {key} {trained.pretrained_cfg[key]}, not "
                f"{preprocessing[key]}: leave it out of `preprocessing`, or compose with pretrained=False."
            )
    natively_quick = "quickgelu" in " ".join(trained.notes).lower()
    if natively_quick and "quickgelu" not in trained.architecture and "act_layer" not in trained.model_args:
        raise ValueError(
            f"The weights {trained.weights!r} were trained with QuickGELU, which {trained.architecture} does not use: "
            f"choose timm's quickgelu variant of the name (see `timm.list_models('*quickgelu*')`)."
        )


def generation_config_of(
    model: PreTrainedModel, trained: GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """The language model's settings, ending also at the EOS that is learnt here, and never with a placeholder."""
    generation_config = copy.deepcopy(trained)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(generation_config, name) is None:
            setattr(generation_config, name, getattr(tokenizer, name))
    # A total length does not count image tokens; and what only sampling uses may not be saved without it.
    generation_config.max_length = generation_config.min_length = None
    if not generation_config.do_sample:
        for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(generation_config, name, None)
    ends = generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    if tokenizer.eos_token_id not in ends:
        generation_config.eos_token_id = [*ends, tokenizer.eos_token_id]
    suppressed = [*(generation_config.suppress_tokens or []), *model.generation_config.suppress_tokens]
    generation_config.suppress_tokens = suppressed
    return generation_config


def _vision_weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    if backbone.weights.startswith(PREFIX):
        return load_weights(backbone).timm_model.state_dict()
    with loading(backbone.weights):
        model = timm.create_model(backbone.weights, pretrained=True, num_classes=0, **backbone.model_args)
    return model.state_dict()


@contextmanager
def loading(source: str | os.PathLike) -> Iterator[None]:
    """Say what could not be loaded: the libraries' own messages often leave the name out."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, UnpicklingError, ValueError) as error:
        raise ValueError(
            f"Cannot load {os.fspath(source)!r}: {error} Offline, pass a local folder, or pretrained=False for a timm "
            "name."
        ) from error
