"""Images, and any text with them, that went through the model once, for all the texts that follow.

An image is the longest part of most prompts, and it is the same for every question about it, every caption that is
scored and every answer that is ranked. An `ImagePrefix` keeps the keys and values that the language model made of it.
They are written into whatever cache the library makes for a call, so the prefix itself never changes, and beams,
samples and static caches need no care.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from .fusion import ImageState


class ImagePrefix:
    """What `encode_prefix` makes: the beginning of one or more rows.

    Pass it to `generate` or `score`, with the text that follows in each row. `prefix[rows]` chooses and repeats rows:
    `prefix[[0, 0, 1]]` begins two rows with the first image and one with the second. One row serves any number.

    Args:
        input_ids: (rows, positions).
        attention_mask: (rows, positions), 1 at tokens and 0 at padding, which is on the left.
        last_hidden_state: (rows, 1, text width), from which the first token behind the prefix follows.
        cache: keys and values of all positions and layers; with cross-attention, of the images too.
    """

    def __init__(self, input_ids: Tensor, attention_mask: Tensor, last_hidden_state: Tensor, cache: Cache):
        self.input_ids, self.attention_mask = input_ids, attention_mask
        self.last_hidden_state, self._cache = last_hidden_state, cache

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.input_ids)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rows={len(self)}, positions={self.num_positions}, nbytes={self.nbytes})"

    @property
    def num_positions(self) -> int:
        """Positions of the language model that a row takes, with its padding."""
        return self.input_ids.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values."""
        layers = list(self._cache.layers)
        if (images := getattr(self._cache, "images", None)) is not None:
            layers += images.keys_and_values.layers
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> "ImagePrefix":
        """A prefix of these rows, of which each may be chosen several times.

        Raises:
            IndexError: for a row that there is not.
        """
        numbers = torch.arange(len(self), device=self.input_ids.device)
        chosen = numbers[torch.as_tensor(rows, device=numbers.device) if isinstance(rows, Sequence) else rows]
        chosen = chosen.reshape(-1)
        cache = DynamicCache()
        self.write_to(cache, chosen)
        return ImagePrefix(self.input_ids[chosen], self.attention_mask[chosen], self.last_hidden_state[chosen], cache)

    def rows_for(self, count: int) -> Tensor:
        """The row that each of so many texts follows, (texts,): its own, or the only one.

        Raises:
            ValueError: if the prefix has another number of rows.
        """
        if len(self) not in (1, count):
            raise ValueError(
                f"The prefix has {len(self)} rows and {count} texts follow: choose the row that each follows, as "
                "`prefix[[0, 0, 1, …]]` does."
            )
        rows = torch.arange(len(self), device=self.input_ids.device)
        return rows.expand(count)

    def write_to(self, cache: Cache, rows: Tensor) -> None:
        """Put keys and values of these rows into an empty cache of any kind."""
        _copy_layers(self._cache, cache, rows)
        if (images := getattr(self._cache, "images", None)) is not None:
            state = ImageState(DynamicCache(), images.mask[rows], images.passed[rows])
            _copy_layers(images.keys_and_values, state.keys_and_values, rows)
            setattr(cache, "images", state)  # noqa: B010 - where `ImageCache` looks for it

    def followed_by(self, inputs: dict) -> dict:
        """Inputs of a `forward` that goes on behind the prefix: with its cache, and a mask over all positions."""
        rows, cache = self.rows_for(len(inputs["input_ids"])), DynamicCache()
        self.write_to(cache, rows)
        mask = torch.cat([self.attention_mask[rows], inputs["attention_mask"]], dim=1)
        return inputs | {"attention_mask": mask, "past_key_values": cache}


def _copy_layers(source: Cache, target: Cache, rows: Tensor) -> None:
    for index, layer in enumerate(source.layers):
        target.update(layer.keys[rows], layer.values[rows], index)
