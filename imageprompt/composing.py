"""`compose`: pretrained parts to one model and its processor.

Everything that can go silently wrong when a vision backbone meets a language model is checked here, once: the head
must reproduce the language model's own logits, the preprocessing must be the one the weights were trained with, and
image plus text must fit the positions.
"""

import copy
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .configuration import ImagePromptConfig
from .image_processing import ImagePromptImageProcessor
from .modeling import ImagePromptForConditionalGeneration
from .processing import ImagePromptProcessor
from .vision import Backbone, resolve_backbone

IMAGE_TOKEN = "<image>"

GPT2_KIND = "Choose a language model of the GPT-2 kind."

# Pretrained logits reach such values.
LARGE_LOGIT = 100.0


def compose(
    vision: str | os.PathLike,
    text: str | os.PathLike | PreTrainedConfig,
    *,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    pretrained: bool = True,
    model_args: dict[str, Any] | None = None,
    preprocessing: dict[str, Any] | None = None,
    **config_fields,
) -> tuple[ImagePromptForConditionalGeneration, ImagePromptProcessor]:
    """Join a timm backbone and a causal language model into an image-prompt model and its processor.

    Args:
        vision: a timm name, a Hub id, or a local folder in timm's Hub layout.
        text: a Hub id or local folder of a causal language model, or its configuration (random weights).
        tokenizer: a tokenizer, or where to load it from; by default from `text`.
        pretrained: load weights of every part that names some; `False` starts all from random ones.
        model_args: keywords for `timm.create_model`, for example `{"drop_path_rate": 0.1}`.
        preprocessing: overrides of timm's data configuration, for example `{"input_size": (3, 96, 96)}`.
        config_fields: fields of [`ImagePromptConfig`]: `connector`, `num_image_tokens`, `fusion`, `trainable`.

    Returns:
        The model in eval mode, in fp32, and the processor.

    Raises:
        ValueError: for unknown names (with close ones), a missing tokenizer, a language model whose logits a plain
            head does not reproduce, or a mean, std or activation that pretrained weights were not trained with.
    """
    backbone = resolve_backbone(vision, model_args=model_args, preprocessing=preprocessing)
    if pretrained:
        _refuse_foreign_training(preprocessing or {}, resolve_backbone(vision, model_args=model_args))
    if isinstance(text, PreTrainedConfig):
        text_config = text
    else:
        with _loading(text):
            text_config = AutoConfig.from_pretrained(text)
    if text_config.get_text_config(decoder=True) is not text_config:
        raise ValueError(
            f"A {text_config.model_type!r} model holds more than a language model: pass its text part alone, as "
            "`text_config` in its configuration describes it."
        )
    tokenizer = _prepare_tokenizer(tokenizer if tokenizer is not None else text, text_config)

    text_config = copy.deepcopy(text_config)
    if os.path.isdir(text_config.name_or_path):
        text_config.name_or_path = ""  # a path of this machine means nothing where the model is loaded
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text_config, name, getattr(tokenizer, name))
    if pretrained and not isinstance(text, PreTrainedConfig):
        with _loading(text):
            language_model = AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32)
    else:
        language_model = AutoModelForCausalLM.from_config(text_config)
    _refuse_other_kinds(language_model)
    # Rows may be missing for the placeholder, or be more than the tokenizer uses.
    text_config.vocab_size = max(text_config.vocab_size, len(tokenizer))

    config = ImagePromptConfig.from_backbones(
        vision,
        text_config,
        model_args=model_args,
        preprocessing=preprocessing,
        image_token_id=tokenizer.image_token_id,
        **config_fields,
    )
    model = ImagePromptForConditionalGeneration(config).eval()
    _load_language_model(model, language_model.eval())
    model.generation_config = _generation_config(model, language_model, tokenizer)
    if pretrained:
        model.model.vision_tower.timm_model.load_state_dict(_timm_weights(backbone))

    processor = ImagePromptProcessor(
        ImagePromptImageProcessor.from_pretrained_cfg(config.vision_config.pretrained_cfg),
        tokenizer,
        num_image_tokens=config.image_seq_length,
    )
    processor.check_model(model)
    return model, processor


def _prepare_tokenizer(source: Any, text_config: PreTrainedConfig) -> PreTrainedTokenizerBase:
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
        with _loading(source):
            tokenizer = AutoTokenizer.from_pretrained(source, **settings)
    if tokenizer.eos_token is None:
        raise ValueError("The tokenizer has no `eos_token`: without one, no answer can learn to end.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _refuse_foreign_training(preprocessing: dict[str, Any], trained: Backbone) -> None:
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


def _generation_config(
    model: PreTrainedModel, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """How the language model generates, ending also at the EOS that is learnt here, and never with a placeholder."""
    generation_config = copy.deepcopy(language_model.generation_config)
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


def _timm_weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    with _loading(backbone.weights):
        model = timm.create_model(backbone.weights, pretrained=True, num_classes=0, **backbone.model_args)
    return model.state_dict()


@contextmanager
def _loading(source: str | os.PathLike) -> Iterator[None]:
    """Say what could not be loaded: the libraries' own messages often leave the name out."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"Cannot load {os.fspath(source)!r}: {error} Offline, pass a local folder, or pretrained=False for a timm "
            "name."
        ) from error


def _refuse_other_kinds(language_model: PreTrainedModel) -> None:
    """Refuse what cannot stand behind image tokens, whatever its weights are."""
    config, base, head = language_model.config, language_model.base_model, language_model.get_output_embeddings()
    kind = f"{type(language_model).__name__} ({config.model_type})"
    # A model's own wrapper around its decoder is not what `AutoModel` makes of the same configuration.
    if config.is_encoder_decoder or AutoModel._model_mapping.get(type(config), None) is not type(base):
        raise ValueError(f"{kind} is the decoder of a larger model, not a language model by itself. {GPT2_KIND}")
    missing = {"inputs_embeds", "past_key_values"} - inspect.signature(base.forward).parameters.keys()
    if missing:
        raise ValueError(f"{kind} takes no {' and no '.join(f'`{name}`' for name in sorted(missing))}. {GPT2_KIND}")
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        bias = " has a bias" if getattr(head, "bias", None) is not None else f" is {head}"
        raise ValueError(f"{kind} does more than a plain head: its head{bias}. {GPT2_KIND}")
    widths = {config.hidden_size, head.in_features, base.get_input_embeddings().weight.shape[1]}
    if len(widths) > 1:
        raise ValueError(f"{kind} has embeddings, states or a head of several widths: {sorted(widths)}. {GPT2_KIND}")
    rope = getattr(config, "rope_parameters", None) or {}
    if (
        rope.get("rope_type") == "longrope"
        and rope["original_max_position_embeddings"] < config.max_position_embeddings
    ):
        raise ValueError(
            f"{kind} chooses its rotary embedding (longrope) by the longest row of a batch: a row would depend on its "
            f"neighbours. {GPT2_KIND}"
        )


@torch.no_grad()
def _load_language_model(model: ImagePromptForConditionalGeneration, language_model: PreTrainedModel) -> None:
    """Copy the weights, and check that this model treats words as the language model itself does.

    The reference is the language model on whole rows without padding. Its logits must be those of this model: some
    models do more between their last layer and their logits (scales, soft-caps), or look at ids and not only at
    embeddings. They must stay the same beside padding, from a cache, and in front of image tokens: models that count
    positions by themselves, or see later tokens, are found out there.
    """
    vocab_size = language_model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[ids == model.config.image_token_id] = 0
    head, name = language_model.get_output_embeddings(), type(language_model).__name__
    with _running(name, "by itself"), _amplified(head, 1.0) as seen:
        language_model(ids)
    # As large as pretrained logits: what bends those may leave the small ones of random weights alone.
    factor = LARGE_LOGIT / seen[0].abs().max().clamp(min=1e-12).item()
    with _amplified(head, factor):
        expected = language_model(ids).logits

    with _running(name, "with a token more"):
        language_model.resize_token_embeddings(model.config.vocab_size, mean_resizing=False)
        decoder = model.model.language_model
        # Cross-attention is new, and keeps its random weights.
        decoder.load_state_dict(decoder.state_dict() | language_model.base_model.state_dict())
    model.lm_head.load_state_dict({"weight": language_model.get_output_embeddings().weight})

    with _amplified(model.lm_head, factor):
        for what, run in TEXT_CHECKS.items():
            with _running(name, what):
                logits = run(model, ids)[..., :vocab_size]
            difference = (logits - expected[:, : logits.shape[1]]).abs().max() / LARGE_LOGIT
            if not difference <= 1e-5:
                raise ValueError(
                    f"{name} does more than a plain head on a decoder: {what}, its logits differ by {difference:.2g} "
                    f"of the largest. {GPT2_KIND}"
                )


def _alone(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def _padded(model: PreTrainedModel, ids: torch.Tensor, padding: tuple[int, int]) -> torch.Tensor:
    """Logits of rows with (left, right) tokens of padding."""
    mask = F.pad(torch.ones_like(ids), padding)
    return model(F.pad(ids, padding), attention_mask=mask).logits[:, padding[0] : padding[0] + ids.shape[1]]


def _cached(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a padded prompt, and of the last token behind its cache."""
    ids, mask = F.pad(ids, (3, 0)), F.pad(torch.ones_like(ids), (3, 0))
    cache = DynamicCache(config=model.config.get_text_config())
    prompt = model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, use_cache=True)
    step = model(ids[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True)
    return torch.cat([prompt.logits, step.logits], dim=1)[:, 3:]


def _before_images(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the first words of rows that end with embeddings of no word."""
    words = model.get_input_embeddings()(ids)
    return model(inputs_embeds=torch.cat([words[:, :8], -1.5 * words[:, 8:]], dim=1)).logits[:, :8]


TEXT_CHECKS: dict[str, Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]] = {
    "for plain text": _alone,
    "padded on the left": partial(_padded, padding=(3, 0)),
    "padded on the right": partial(_padded, padding=(0, 3)),
    "from a cache": _cached,
    "in front of image tokens": _before_images,
}


@contextmanager
def _running(name: str, what: str) -> Iterator[None]:
    """Say which language model does not run, and how it was run."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} does not run {what} ({error}). {GPT2_KIND}") from error


@contextmanager
def _amplified(head: torch.nn.Module, factor: float) -> Iterator[list[torch.Tensor]]:
    """Multiply what the head gives, and collect it."""
    outputs: list[torch.Tensor] = []

    def multiply(module, args, output):
        outputs.append(output * factor)
        return outputs[-1]

    hook = head.register_forward_hook(multiply)
    try:
        yield outputs
    finally:
        hook.remove()
