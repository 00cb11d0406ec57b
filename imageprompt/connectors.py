"""Connectors: from the backbone's features to the language model's width.

One registry, one contract: `connector(features, grid)` takes (images, rows * columns, feature_size), with the rows and
columns where they are not the configuration's, and returns (images, num_image_tokens, text width).

| name                | what it does                                         | tokens by default     |
|---------------------|------------------------------------------------------|-----------------------|
| linear              | one linear layer                                     | the whole grid        |
| mlp                 | linear, GELU, linear                                 | the whole grid        |
| pool                | layer norm, linear                                   | 1                     |
| attention_pool      | each token a learned average of the grid, linear     | 8                     |
| pixel_shuffle       | each r x r square side by side in one token, linear  | a quarter of the grid |
| resampler           | learned queries attend to the grid in several layers | 64                    |
| clipcap_mlp         | the image's summary through linear, tanh, linear     | 10                    |
| clipcap_transformer | the image's summary and constants through 8 layers   | 10                    |

linear, mlp and pool first average the grid down to `num_image_tokens`, which changes nothing when the counts are equal.
Learned vectors are kept in `nn.Embedding`s, which the library initialises as it does every other layer. Each class
names its source.
"""

import heapq
import inspect
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Connectors with learned queries make any number of tokens; more than this is a slip of the pen.
MAX_NUM_IMAGE_TOKENS = 65_536


def resolve_num_image_tokens(connector: str, grid: list[int], requested: int | None) -> int:
    """Tokens per image that a connector makes of a feature grid: the one place where this number is decided.

    Args:
        connector: name in `CONNECTORS`.
        grid: (rows, columns) of the feature map.
        requested: what the user asks for, or `None` for the connector's default.

    Raises:
        ValueError: if the connector is unknown, or cannot make that count of the grid; the nearest that it can are
            named.
    """
    kind = connector_class(connector)
    counts = kind.possible_counts(grid)
    count = kind.default_num_tokens(grid) if requested is None else requested
    if requested is None and count not in counts:
        raise ValueError(
            f"Connector {connector!r} has no default for a {grid[0]}x{grid[1]} feature map: pass `num_image_tokens`, "
            f"one of {', '.join(map(str, counts))}, or another image size."
        )
    if count not in counts:
        near = sorted(heapq.nsmallest(3, counts, key=lambda possible: abs(possible - count)))
        raise ValueError(
            f"With connector {connector!r} a {grid[0]}x{grid[1]} feature map cannot become num_image_tokens={count}; "
            f"nearest possible: {', '.join(map(str, near))}."
        )
    return count


def connector_class(name: str) -> type["Connector"]:
    """The class behind a name, or ValueError with the known ones."""
    if name not in CONNECTORS:
        raise ValueError(f"Unknown connector {name!r}; known: {', '.join(CONNECTORS)}.")
    return CONNECTORS[name]


def build_connector(config) -> "Connector":
    """The connector that `config.connector` and `config.connector_args` name, sized for `config`.

    Raises:
        ValueError: for arguments that this connector does not take or cannot use.
    """
    kind = connector_class(config.connector)
    known = {
        name: value.default
        for name, value in inspect.signature(kind).parameters.items()
        if value.kind == value.KEYWORD_ONLY
    }
    arguments: dict[str, Any] = config.connector_args or {}
    if unknown := sorted(arguments.keys() - known.keys()):
        raise ValueError(
            f"{config.connector!r} takes no {', '.join(unknown)} in `connector_args`; it takes "
            f"{', '.join(known) or 'none'}."
        )
    for name, value in arguments.items():
        if isinstance(known[name], bool):
            if not isinstance(value, bool):
                raise ValueError(f"`connector_args[{name!r}]` is True or False, got {value!r}.")
        elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`connector_args[{name!r}]` is a positive whole number, got {value!r}.")
    return kind(config, **arguments)


def pooled_grid(grid: list[int], count: int) -> tuple[int, int]:
    """The (rows, columns) inside `grid` with rows * columns = count that keep closest to its shape."""

    def distortion(pair: tuple[int, int]) -> Fraction:  # exact, so that ties fall alike on every machine
        sides = pair[0] * grid[1], pair[1] * grid[0]
        return Fraction(max(sides), min(sides))

    return min(_pairs_inside(grid, count), key=distortion)


def _pairs_inside(grid: list[int], count: int) -> list[tuple[int, int]]:
    return [
        (rows, count // rows)
        for rows in range(1, min(grid[0], count) + 1)
        if count % rows == 0 and count // rows <= grid[1]
    ]


class Connector(nn.Module):
    """What all connectors share. Subclasses define `forward`, and the counts that they can make.

    Keyword-only arguments of a subclass are what `config.connector_args` may hold.
    """

    # Which of the backbone's features to read when the configuration does not say; see `vision.read_features`.
    feature_layer: str | None = None
    # Whether images of another size than the configuration's still become `num_image_tokens`.
    takes_any_grid = True

    def __init__(self, config):
        super().__init__()
        self.num_tokens = config.num_image_tokens
        self.grid = tuple(config.feature_grid)
        self.feature_size = config.feature_size
        self.width = config.text_config.hidden_size

    @staticmethod
    def possible_counts(grid: list[int]) -> Sequence[int]:
        """Every number of tokens that can be made of a grid, ascending; by default any."""
        return range(1, MAX_NUM_IMAGE_TOKENS + 1)

    @staticmethod
    def default_num_tokens(grid: list[int]) -> int:
        """Tokens per image when the user names no count."""
        raise NotImplementedError

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """(images, rows * columns, feature_size) to (images, num_image_tokens, text width).

        `grid` is (rows, columns) of these features, by default the configuration's.
        """
        raise NotImplementedError


class AveragingConnector(Connector):
    """Averages the grid to `num_image_tokens`, then calls `project`, which subclasses define."""

    def __init__(self, config):
        super().__init__(config)
        self.pooled_grid = pooled_grid(config.feature_grid, self.num_tokens)

    @staticmethod
    def possible_counts(grid: list[int]) -> Sequence[int]:
        return [count for count in range(1, math.prod(grid) + 1) if _pairs_inside(grid, count)]

    @staticmethod
    def default_num_tokens(grid: list[int]) -> int:
        return math.prod(grid)

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        grid = grid or self.grid
        if self.pooled_grid != grid:
            maps = features.transpose(1, 2).unflatten(2, grid)
            features = F.adaptive_avg_pool2d(maps, self.pooled_grid).flatten(2).transpose(1, 2)
        return self.project(features)

    def project(self, features: Tensor) -> Tensor:
        """(images, num_image_tokens, feature_size) to (images, num_image_tokens, text width)."""
        raise NotImplementedError


class LinearConnector(AveragingConnector):
    """One linear layer for every token, as in LLaVA (arXiv 2304.08485)."""

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(self.feature_size, self.width)

    def project(self, features: Tensor) -> Tensor:
        return self.linear(features)


class MLPConnector(AveragingConnector):
    """Two linear layers with a GELU between, as in LLaVA-1.5 (arXiv 2310.03744)."""

    def __init__(self, config):
        super().__init__(config)
        self.linear_1 = nn.Linear(self.feature_size, self.width)
        self.linear_2 = nn.Linear(self.width, self.width)

    def project(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


class PoolConnector(AveragingConnector):
    """Few averaged tokens, normalised, then one linear layer: the cheapest prefix.

    Global average pooling (arXiv 1312.4400) when there is one token. The mean of many positive activations shrinks
    with the backbone's sparsity; the norm removes that scale.
    """

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.LayerNorm(self.feature_size)
        self.linear = nn.Linear(self.feature_size, self.width)

    @staticmethod
    def default_num_tokens(grid: list[int]) -> int:
        return 1

    def project(self, features: Tensor) -> Tensor:
        return self.linear(self.norm(features))


class AttentionPoolConnector(Connector):
    """Each token is an average of the grid with weights of its own, learned from the features.

    A linear layer scores every place of the grid for every token, a softmax over the grid turns the scores into
    weights: TokenLearner (arXiv 2106.11297) with a single layer of scores. Then one linear layer.
    """

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.LayerNorm(self.feature_size)
        self.scores = nn.Linear(self.feature_size, self.num_tokens)
        self.linear = nn.Linear(self.feature_size, self.width)

    @staticmethod
    def default_num_tokens(grid: list[int]) -> int:
        return 8

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        features = self.norm(features)
        weights = self.scores(features).softmax(dim=1)
        return self.linear(weights.transpose(1, 2) @ features)


class PixelShuffleConnector(Connector):
    """Puts each r x r square of the grid side by side into one token, then one linear layer; nothing is averaged.

    The inverse of the pixel shuffle (arXiv 1609.05158), used for this purpose in Idefics3 (arXiv 2408.12637).
    `num_image_tokens` says what r is; a grid that r does not divide is refused, not padded.
    """

    takes_any_grid = False

    def __init__(self, config):
        super().__init__(config)
        self.factor = math.isqrt(math.prod(self.grid) // self.num_tokens)
        self.linear = nn.Linear(self.feature_size * self.factor**2, self.width)

    @staticmethod
    def possible_counts(grid: list[int]) -> Sequence[int]:
        sides = [side for side in range(min(grid), 0, -1) if grid[0] % side == 0 == grid[1] % side]
        return [math.prod(grid) // side**2 for side in sides]

    @staticmethod
    def default_num_tokens(grid: list[int]) -> int:
        return max(1, math.prod(grid) // 4)

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        maps = features.transpose(1, 2).unflatten(2, self.grid)
        return self.linear(F.pixel_unshuffle(maps, self.factor).flatten(2).transpose(1, 2))


class ResamplerConnector(Connector):
    """Learned queries read the grid by cross-attention: the Perceiver resampler of Flamingo (arXiv 2204.14198).

    In each layer the queries attend to the features and to themselves, and pass a feed-forward layer. As in Flamingo
    the grid gets no position embeddings: backbones carry positions in their features.

    Args:
        depth: layers; Idefics2 (arXiv 2405.02246) found 3 to be enough.
        num_heads: attention heads, by default the language model's.
    """

    def __init__(self, config, *, depth: int = 3, num_heads: int | None = None):
        super().__init__(config)
        num_heads = num_heads or config.text_config.num_attention_heads
        _check_heads(self.width, num_heads)
        self.linear = nn.Linear(self.feature_size, self.width)
        self.queries = nn.Embedding(self.num_tokens, self.width)
        self.layers = nn.ModuleList(_ResamplerLayer(self.width, num_heads) for _ in range(depth))

    @staticmethod
    def default_num_tokens(grid: list[int]) -> int:
        return 64

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        features = self.linear(features)
        queries = self.queries.weight.expand(features.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, features)
        return queries


class _ResamplerLayer(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.query_norm = nn.LayerNorm(width)
        self.feature_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        asking = self.query_norm(queries)
        seen = torch.cat([self.feature_norm(features), asking], dim=1)
        queries = queries + self.attention(asking, seen, seen, need_weights=False)[0]
        return queries + self.mlp(queries)


class ClipCapConnector(Connector):
    """What ClipCap's two mappers share: the one vector that they make of an image.

    That is the backbone's own summary of the image (`feature_layer="pooled"`); of any other features, their mean.
    ClipCap reads CLIP's embedding, which lies one linear layer, CLIP's projection, behind that summary: with
    `clip_size`, the layer is here, as towers end before it.

    Args:
        clip_size: numbers of CLIP's embedding; without it, the summary is read as it is.
        normalize: divide the vector by its length, as ClipCap's `--normalize_prefix` does.
    """

    feature_layer = "pooled"

    def __init__(self, config, clip_size: int | None, normalize: bool):
        super().__init__(config)
        self.projection = nn.Linear(self.feature_size, clip_size) if clip_size else None
        self.normalize = normalize
        self.summary_size = clip_size or self.feature_size

    @staticmethod
    def default_num_tokens(grid: list[int]) -> int:
        return 10

    def summarise(self, features: Tensor) -> Tensor:
        """(images, rows * columns, feature_size) to (images, summary_size)."""
        summary = features.mean(1)
        if self.projection is not None:
            summary = self.projection(summary)
        return F.normalize(summary, dim=-1) if self.normalize else summary


class ClipCapMLPConnector(ClipCapConnector):
    """ClipCap's MLP mapper (arXiv 2111.09734): the image's summary to all tokens at once, with a tanh between.

    Args:
        clip_size, normalize: see [`ClipCapConnector`].
    """

    def __init__(self, config, *, clip_size: int | None = None, normalize: bool = False):
        super().__init__(config, clip_size, normalize)
        outputs = self.num_tokens * self.width
        self.linear_1 = nn.Linear(self.summary_size, outputs // 2)
        self.linear_2 = nn.Linear(outputs // 2, outputs)

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        hidden = torch.tanh(self.linear_1(self.summarise(features)))
        return self.linear_2(hidden).unflatten(1, (self.num_tokens, self.width))


class ClipCapTransformerConnector(ClipCapConnector):
    """ClipCap's transformer mapper (arXiv 2111.09734): summary tokens and learned constants attend to each other.

    The image's summary becomes `clip_length` tokens; the outputs at the constants are the image tokens. The layers are
    torch's, with biases in the attention that ClipCap's published code does not have.

    Args:
        clip_length: tokens made of the summary.
        depth: layers.
        num_heads: attention heads.
        clip_size, normalize: see [`ClipCapConnector`].
    """

    def __init__(
        self,
        config,
        *,
        clip_length: int = 10,
        depth: int = 8,
        num_heads: int = 8,
        clip_size: int | None = None,
        normalize: bool = False,
    ):
        super().__init__(config, clip_size, normalize)
        _check_heads(self.width, num_heads)
        self.clip_length = clip_length
        self.linear = nn.Linear(self.summary_size, clip_length * self.width)
        self.constants = nn.Embedding(self.num_tokens, self.width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                self.width,
                num_heads,
                dim_feedforward=2 * self.width,
                dropout=0.0,
                activation="relu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        summary = self.linear(self.summarise(features)).unflatten(1, (self.clip_length, self.width))
        tokens = torch.cat([summary, self.constants.weight.expand(features.shape[0], -1, -1)], dim=1)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens[:, self.clip_length :]


def _check_heads(width: int, num_heads: int) -> None:
    if width % num_heads:
        raise ValueError(
            f"{num_heads} attention heads do not divide the language model's width of {width}: pass "
            "`connector_args={'num_heads': …}`."
        )


CONNECTORS: dict[str, type[Connector]] = {
    "linear": LinearConnector,
    "mlp": MLPConnector,
    "pool": PoolConnector,
    "attention_pool": AttentionPoolConnector,
    "pixel_shuffle": PixelShuffleConnector,
    "resampler": ResamplerConnector,
    "clipcap_mlp": ClipCapMLPConnector,
    "clipcap_transformer": ClipCapTransformerConnector,
}
