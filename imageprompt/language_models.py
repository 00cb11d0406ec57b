"""Which language models fit: those whose words stay what they are behind a plain head, in front of and after images.

`compose` asks here. Some causal language models are refused for what they are; for the others the weights decide: this
package's model must give the language model's own logits in every way in which rows are run.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from transformers import AutoModel, DynamicCache, PreTrainedModel

from .modeling import ImagePromptForConditionalGeneration

GPT2_KIND = "Choose a language model of the GPT-2 kind."

# Pretrained logits reach such values.
LARGE_LOGIT = 100.0


def refuse_other_kinds(language_model: PreTrainedModel) -> None:
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
def load_language_model(model: ImagePromptForConditionalGeneration, language_model: PreTrainedModel) -> None:
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
        # Pretrained logits may all be far below 0, where those of random rows are: such a row would take nearly all of
        # the probability. That of the mean row is less than one word's share, as the exponential is convex.
        for words in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
            words.weight[vocab_size:] = words.weight[:vocab_size].mean(0)
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
