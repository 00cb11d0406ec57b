"""Cross-attention fusion: image tokens beside the text instead of in it.

GPT-2's own cross-attention layers (`add_cross_attention`) let every position read the image tokens of its row, and of
each image one placeholder stays in the text. It says to which row an image belongs, and where: a position reads the
images whose placeholder it has passed, and one that has passed none, as in rows of plain text, skips cross-attention
entirely. So a row does not depend on its neighbours, and text without images stays what GPT-2 makes of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache


@dataclass
class ImageState:
    """What a conversation keeps of its images.

    Args:
        keys_and_values: of the image tokens, for every layer; computed once.
        mask: (rows, image tokens), true where a row has that image token; `None` while there are no images.
        passed: (rows, positions), placeholders passed up to each position that went into the cache.
    """

    keys_and_values: DynamicCache
    mask: Tensor | None = None
    passed: Tensor | None = None


class ImageCache(EncoderDecoderCache):
    """A text cache together with the images that its text reads.

    The images' part hangs on the text cache, so it is found again by whoever passed in a text cache and passes it
    again. Rows are reordered, repeated or selected through this cache, not through the text's.

    Args:
        text_cache: a cache of the library, for the self-attention.
        config: the language model's configuration.
    """

    def __init__(self, text_cache: Cache, config):
        state = getattr(text_cache, "images", None)
        if state is None:
            state = ImageState(DynamicCache(config=config))
            setattr(text_cache, "images", state)  # noqa: B010 - the library's class does not declare it
        self.images: ImageState = state
        self.config = config
        super().__init__(text_cache, state.keys_and_values)

    @classmethod
    def of(cls, cache: Cache | None, config) -> "ImageCache":
        """A cache with its images, which an empty one has none of."""
        if not isinstance(cache, cls):
            text = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
            cache = cls(DynamicCache(config=config) if text is None else text, config)
            is_empty = cache.get_seq_length() == 0
        else:
            length = cache.get_seq_length()
            is_empty = isinstance(length, int) and length == 0  # a static cache counts in a tensor: no stall per step
        if is_empty and cache.images.mask is not None:
            cache.forget_images()
        return cache

    @property
    def holds_images(self) -> bool:
        return self.images.mask is not None

    def forget_images(self) -> None:
        """Go on with the text alone."""
        delattr(self.self_attention_cache, "images")
        self.__init__(self.self_attention_cache, self.config)

    def passed_before(self) -> Tensor | int:
        """Placeholders that each row has passed, (rows, 1); what was cropped away since does not count."""
        passed, length = self.images.passed, self.get_seq_length()
        if passed is not None and isinstance(length, int):  # static caches are not cropped
            passed = passed[:, :length]
        return 0 if passed is None or not passed.shape[1] else passed[:, -1:]

    def remember(self, mask: Tensor, passed: Tensor) -> None:
        """Keep what the next step needs: which images there are, and what each position of this one has passed."""
        before, length = self.images.passed, self.get_seq_length()
        if isinstance(length, int):
            before = passed.new_zeros(len(passed), length) if before is None else before[:, :length]
            passed = torch.cat([before, passed], dim=1)
        self.images.mask, self.images.passed = mask, passed

    def reset(self):
        self.self_attention_cache.reset()
        self.forget_images()

    def reorder_cache(self, beam_idx: Tensor):
        super().reorder_cache(beam_idx)
        self._change_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int):
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor):
        super().batch_select_indices(indices)
        self._change_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def _change_rows(self, change) -> None:
        if self.images.mask is not None and self.images.passed is not None:
            self.images.mask, self.images.passed = change(self.images.mask), change(self.images.passed)


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
