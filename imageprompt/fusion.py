"""Cross-attention fusion: image tokens beside the text instead of in it.

GPT-2's own cross-attention layers (`add_cross_attention`) let every position read the image tokens of its row, and of
each image one placeholder stays in the text. It says to which row an image belongs, and where: a position reads the
images whose placeholder it has passed, and one that has passed none, as in rows of plain text, skips cross-attention
entirely. So a row does not depend on its neighbours, and text without images stays what GPT-2 makes of it.
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache


class ImageCache(EncoderDecoderCache):
    """A text cache, and beside it the keys and values of each row's images, which are computed once.

    Args:
        text_cache: any cache of the library, for the self-attention.
        config: the language model's configuration.

    Attributes:
        image_mask (`Tensor`, *optional*): (rows, image tokens), true where a row has that image token.
        images_passed (`Tensor`, *optional*): (rows, 1), placeholders passed so far.
    """

    def __init__(self, text_cache: Cache, config):
        super().__init__(text_cache, DynamicCache(config=config))
        self.image_mask: Tensor | None = None
        self.images_passed: Tensor | None = None
        setattr(text_cache, "image_cache", self)  # noqa: B010 - whoever passed only a text cache may pass it again

    @classmethod
    def of(cls, cache: Cache | None, config) -> "ImageCache":
        """The image cache of a text cache that has been used before, or a new one."""
        if isinstance(cache, cls):
            return cache
        cache = DynamicCache(config=config) if cache is None else cache
        known = getattr(cache, "image_cache", None)
        return cls(cache, config) if known is None or cache.get_seq_length() == 0 else known


def group_by_row(placeholders: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The image tokens of each row, side by side.

    Args:
        placeholders: (rows, positions), true at the placeholders, one for each image.
        image_tokens: (images, num_image_tokens, width), row by row.

    Returns:
        (rows, most images of a row * num_image_tokens, width), and which of them a row has, (rows, image tokens).
    """
    counts = placeholders.sum(-1)
    has_image = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
    tokens = image_tokens.new_zeros(*has_image.shape, *image_tokens.shape[1:])
    tokens[has_image] = image_tokens
    return tokens.flatten(1, 2), has_image.repeat_interleave(image_tokens.shape[1], dim=1)


def attention_to_images(image_mask: Tensor, images_passed: Tensor, num_image_tokens: int, dtype: torch.dtype) -> Tensor:
    """What to add to the attention scores: (rows, 1, positions, image tokens), 0 where a position reads a token.

    Args:
        image_mask: (rows, image tokens), true where a row has that token.
        images_passed: (rows, positions), how many placeholders each position has passed, itself included.
        num_image_tokens: tokens of one image.
    """
    image = torch.arange(image_mask.shape[1], device=image_mask.device) // num_image_tokens
    reads = image_mask[:, None, :] & (image < images_passed[..., None])
    return torch.zeros(reads.shape, dtype=dtype, device=reads.device).masked_fill(~reads, torch.finfo(dtype).min)[
        :, None
    ]


def cross_attention_parts(language_model: nn.Module) -> list[nn.Module]:
    """The modules that GPT-2 has only for cross-attention."""
    return [part for block in language_model.h for part in (block.crossattention, block.ln_cross_attn)]


def skip_positions_without_images(language_model: nn.Module) -> None:
    """Let positions that may read no image token add nothing; a softmax over nothing would average everything."""
    for block in language_model.h:
        block.crossattention.register_forward_hook(_skip, with_kwargs=True)


def _skip(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple:
    reads_any = (kwargs["encoder_attention_mask"] == 0).any(-1).squeeze(1)
    return (output[0] * reads_any[..., None].to(output[0].dtype), *output[1:])
