"""VisionEncoderDecoder checkpoints with a GPT-2 decoder, as models of this package with the same captions.

The encoder goes onto its twin in timm (`backbones.TWINS`). All of its tokens, the class token too, go through
`enc_to_dec_proj`, or unchanged where the checkpoint has none, into GPT-2's own cross-attention. The token with which
the decoder starts becomes the placeholder of the image: it is read with that token's embedding, at that token's
position, so a prompt may follow as it did there.
"""

import copy
import os

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, VisionEncoderDecoderModel

from ..comparing import Difference, verify
from ..composing import generation_config_of, load_tokenizer, loading, prepare_tokenizer
from ..configuration import ImagePromptConfig, vision_config_of
from ..image_processing import ImagePromptImageProcessor
from ..modeling import ImagePromptForConditionalGeneration
from ..processing import ImagePromptProcessor
from .backbones import (
    convert_encoder,
    find_twin,
    load_pretrained,
    read_encoder,
    read_transformers_config,
    without_reports,
)
from .conversion import Conversion

NUM_TOKENS = 8  # of the texts whose logits are compared
PADDED_ROWS = 128  # of the embeddings that may have no word, as where their number was rounded up
NEW_TOKENS = 16  # of the captions that are compared, at most


@torch.no_grad()
def convert_vision_encoder_decoder(source: str | os.PathLike, *, revision: str | None = None) -> Conversion:
    """Read a VisionEncoderDecoder checkpoint, and compare what becomes of it with transformers' own class.

    Args:
        source: local folder or Hub id with config, weights, tokenizer and `preprocessor_config.json`.
        revision: branch, tag or commit of a Hub id; `main` by default.

    Returns:
        A captioner that says what the checkpoint says, in eval mode and fp32, and the differences of logits.

    Raises:
        ValueError: if the checkpoint is not there, the encoder has no twin in timm, the decoder is not GPT-2, a file is
            missing, or sample inputs do not give the same pixels, features, logits and captions.
    """
    name = os.fspath(source)
    with loading(source):
        settings = read_transformers_config(source, revision)
    if settings is None or settings["model_type"] != "vision-encoder-decoder":
        found = "no config.json of transformers" if settings is None else f"a {settings['model_type']!r} model"
        raise ValueError(f"{name!r} holds {found}, not a vision-encoder-decoder.")
    if (kind := settings["decoder"]["model_type"]) != "gpt2":
        raise ValueError(f"The decoder of {name!r} is {kind!r}: only GPT-2 can be imported.")
    twin = find_twin(settings["encoder"]["model_type"])
    config = AutoConfig.from_pretrained(source, revision=revision)
    backbone = read_encoder(source, config.encoder, revision=revision)
    if twin.last_norm is not None:  # the decoder reads what has not passed it
        backbone.model_args["final_norm"] = False
    tokenizer = prepare_tokenizer(load_tokenizer(source, revision=revision), config.decoder)
    if (wordless := config.decoder.vocab_size - len(tokenizer)) > PADDED_ROWS:
        raise ValueError(
            f"The tokenizer of {name!r} lacks {wordless} of the {config.decoder.vocab_size} words of its decoder: are "
            "its files there (tokenizer.json, or vocab.json and merges.txt)?"
        )
    peer = load_pretrained(VisionEncoderDecoderModel, source, revision=revision)
    start, generation_config = _read_generation(peer, name)
    converted = convert_encoder(
        peer.encoder, backbone.pretrained_cfg["input_size"][1:], backbone.model_args, last_norm=twin.last_norm is None
    )

    text_config = copy.deepcopy(config.decoder)
    text_config.vocab_size = max(text_config.vocab_size, len(tokenizer))
    text_config.tie_word_embeddings = False  # see `_copy_words`
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text_config, token, getattr(tokenizer, token))
    model = ImagePromptForConditionalGeneration(
        ImagePromptConfig(
            vision_config=vision_config_of(backbone),
            text_config=text_config,
            connector="linear",
            fusion="cross_attention",
            feature_layer="tokens",
            image_token_id=tokenizer.image_token_id,
        )
    ).eval()
    model.model.vision_tower.timm_model.load_state_dict(converted.timm_model.state_dict())
    _copy_projection(model, peer)
    _copy_words(model, peer, start)
    if not os.path.isdir(source):
        model.config.base_models = {"vision": name, "text": name}
    model.generation_config = generation_config_of(model, generation_config, tokenizer)
    processor = ImagePromptProcessor(
        ImagePromptImageProcessor.from_pretrained_cfg(backbone.pretrained_cfg),
        tokenizer,
        num_image_tokens=model.config.image_seq_length,
    )
    processor.check_model(model)
    differences = _compare_logits(model, peer, start)
    _compare_captions(model, peer)
    return Conversion(model, processor, differences)


def _read_generation(peer: VisionEncoderDecoderModel, name: str) -> tuple[int, GenerationConfig]:
    """The token with which the decoder starts, and its generation settings with lengths that count new tokens."""
    settings = copy.deepcopy(peer.generation_config)
    start = settings.decoder_start_token_id if settings.decoder_start_token_id is not None else settings.bos_token_id
    if not isinstance(start, int):
        raise ValueError(
            f"{name!r} starts its captions with {start}: one token is needed. Set `decoder_start_token_id` in its "
            "generation_config.json."
        )
    if settings.repetition_penalty not in (None, 1.0):
        raise ValueError(
            f"`repetition_penalty={settings.repetition_penalty}` in the generation_config.json of {name!r} also "
            "punishes the token that starts a caption, which here is the image's placeholder: captions would differ. "
            "Take it out, and pass it to `generate` if you want it."
        )
    settings.decoder_start_token_id = None
    for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if getattr(settings, total) and getattr(settings, new) is None:
            setattr(settings, new, getattr(settings, total) - 1)  # the start counts there
    return start, settings


def _copy_projection(model: ImagePromptForConditionalGeneration, peer: VisionEncoderDecoderModel) -> None:
    linear = model.model.connector.linear
    if hasattr(peer, "enc_to_dec_proj"):
        linear.load_state_dict(peer.enc_to_dec_proj.state_dict())
        return
    if linear.in_features != linear.out_features:
        raise ValueError(
            f"The encoder is {linear.in_features} wide, the decoder {linear.out_features}, and there is no "
            "`enc_to_dec_proj` between them: transformers' GPT-2 cannot read these images either."
        )
    torch.nn.init.eye_(linear.weight)
    torch.nn.init.zeros_(linear.bias)


def _copy_words(model: ImagePromptForConditionalGeneration, peer: VisionEncoderDecoderModel, start: int) -> None:
    """GPT-2's weights, and new rows for the placeholder and for what else the tokenizer has.

    The placeholder is read as the start, but must not be as likely as it, which often is the end of a caption, too. So
    embeddings and head are no longer tied, and in the head new rows are the mean of the others: by the convexity of
    the exponential they get less than one word's share of the probability.
    """
    text, head = peer.decoder.transformer.state_dict(), peer.decoder.lm_head.weight
    rows = [start] * (model.config.vocab_size - len(head))
    text["wte.weight"] = torch.cat([text["wte.weight"], text["wte.weight"][rows]])
    mean = head.mean(0, keepdim=True)
    head = torch.cat([head, mean.expand(len(rows), -1)])
    placeholder = model.config.image_token_id
    text["wte.weight"][placeholder], head[placeholder] = text["wte.weight"][start], mean[0]
    model.model.language_model.load_state_dict(text)
    model.lm_head.load_state_dict({"weight": head})


def _sample_pixels(model: ImagePromptForConditionalGeneration) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, model.config.num_channels, *model.config.image_size, generator=generator)


def _compare_logits(
    model: ImagePromptForConditionalGeneration, peer: VisionEncoderDecoderModel, start: int
) -> dict[str, Difference]:
    """How far the logits of all words are apart."""
    pixels, placeholder = _sample_pixels(model), model.config.image_token_id
    vocab_size = peer.decoder.lm_head.out_features
    ids = torch.randint(0, vocab_size, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(2))
    ids[ids == placeholder] = start
    ids[:, 0] = start
    ours = ids.clone()
    ours[:, 0] = placeholder
    words = torch.arange(vocab_size) != placeholder

    def logits(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        expected = peer.to(dtype)(pixel_values=pixels.to(dtype), decoder_input_ids=ids).logits
        got = model.to(dtype)(input_ids=ours, pixel_values=pixels.to(dtype)).logits[..., :vocab_size]
        return [(got[..., words], expected[..., words])]

    return verify(logits, "The logits of the imported model and of the checkpoint", "Please report this checkpoint.")


def _compare_captions(model: ImagePromptForConditionalGeneration, peer: VisionEncoderDecoderModel) -> None:
    """Greedy search, four beams and the checkpoint's own way must give the same tokens."""
    pixels = _sample_pixels(model)
    prompt = torch.full((len(pixels), 1), model.config.image_token_id)
    length = min(NEW_TOKENS, model.config.max_position_embeddings - 1)
    common = {"do_sample": False, "max_new_tokens": length, "pad_token_id": model.generation_config.pad_token_id}
    for settings in ({"num_beams": 1}, {"num_beams": 4}, {}):
        with without_reports():
            expected = peer.generate(pixel_values=pixels, **common, **settings)[:, 1:].tolist()
            got = model.generate(prompt, pixel_values=pixels, **common, **settings)[:, 1:].tolist()
        if got != expected:
            raise ValueError(
                f"With {settings or 'its own settings'} the imported model says {got} where the checkpoint says "
                f"{expected}: nothing was written. Look for unusual settings in generation_config.json."
            )
