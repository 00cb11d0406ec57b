"""Connectors: from the backbone's feature map to the language model's input embeddings.

One registry, one contract: `connector(features)` takes (images, rows * columns, feature_size) and returns
(images, num_image_tokens, text width). Every connector first averages the grid down to `num_image_tokens`, which
changes nothing when the counts are equal; they differ in what follows.

| name   | after averaging                        | tokens by default   | source                                |
|--------|----------------------------------------|---------------------|---------------------------------------|
| linear | one linear layer                       | the whole grid      | LLaVA (arXiv 2304.08485)              |
| mlp    | linear, GELU, linear                   | the whole grid      | LLaVA-1.5 (arXiv 2310.03744)          |
| pool   | layer norm, one linear layer           | one (global average)| global average pooling (arXiv 1312.4400) |
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn


def resolve_num_image_tokens(connector: str, grid: list[int], requested: int | None) -> int:
    """Tokens per image that a connector makes of a feature grid: the one place where this number is decided.

    Args:
        connector: name in `CONNECTORS`.
        grid: (rows, columns) of the feature map.
        requested: what the user asks for, or `None` for the connector's default.

    Raises:
        ValueError: if the connector is unknown, or the grid cannot be averaged to that count.
    """
    if connector not in CONNECTORS:
        raise ValueError(f"Unknown connector {connector!r}; known: {', '.join(CONNECTORS)}.")
    count = CONNECTORS[connector].default_num_tokens(grid) if requested is None else requested
    pooled_grid(grid, count)
    return count


def pooled_grid(grid: list[int], count: int) -> tuple[int, int]:
    """The (rows, columns) with rows * columns = count that keep closest to the shape of `grid`.

    Raises:
        ValueError: if no such pair fits inside the grid; the nearest counts that do are named.
    """
    pairs = _pairs_inside(grid, count)
    if not pairs:
        possible = [n for n in range(1, math.prod(grid) + 1) if _pairs_inside(grid, n)]
        near = sorted(sorted(possible, key=lambda n: abs(n - count))[:3])
        raise ValueError(
            f"A {grid[0]}x{grid[1]} feature map cannot be averaged to num_image_tokens={count}; "
            f"nearest possible: {', '.join(map(str, near))}."
        )
    return min(pairs, key=lambda pair: abs(math.log(pair[0] / pair[1] / (grid[0] / grid[1]))))


def _pairs_inside(grid: list[int], count: int) -> list[tuple[int, int]]:
    return [
        (rows, count // rows)
        for rows in range(1, min(grid[0], count) + 1)
        if count % rows == 0 and count // rows <= grid[1]
    ]


class Connector(nn.Module):
    """Averages the grid to `num_image_tokens`, then calls `project`. Subclasses define `project`."""

    def __init__(self, config):
        super().__init__()
        self.grid = tuple(config.feature_grid)
        self.pooled_grid = pooled_grid(config.feature_grid, config.num_image_tokens)

    @staticmethod
    def default_num_tokens(grid: list[int]) -> int:
        """Tokens per image when the user names no count."""
        return math.prod(grid)

    def forward(self, features: Tensor) -> Tensor:
        """(images, rows * columns, feature_size) to (images, num_image_tokens, text width)."""
        if self.pooled_grid != self.grid:
            maps = features.transpose(1, 2).unflatten(2, self.grid)
            features = F.adaptive_avg_pool2d(maps, self.pooled_grid).flatten(2).transpose(1, 2)
        return self.project(features)

    def project(self, features: Tensor) -> Tensor:
        """(images, num_image_tokens, feature_size) to (images, num_image_tokens, text width)."""
        raise NotImplementedError(f"{type(self).__name__} defines no projection.")


class LinearConnector(Connector):
    """One linear layer for every token, as in LLaVA (arXiv 2304.08485)."""

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(config.feature_size, config.text_config.hidden_size)

    def project(self, features: Tensor) -> Tensor:
        return self.linear(features)


class MLPConnector(Connector):
    """Two linear layers with a GELU between, as in LLaVA-1.5 (arXiv 2310.03744)."""

    def __init__(self, config):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.feature_size, width)
        self.linear_2 = nn.Linear(width, width)

    def project(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


class PoolConnector(Connector):
    """Few averaged tokens, normalised, then one linear layer: the cheapest prefix.

    The mean of many positive activations shrinks with the backbone's sparsity; the norm removes that scale.
    """

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.LayerNorm(config.feature_size)
        self.linear = nn.Linear(config.feature_size, config.text_config.hidden_size)

    @staticmethod
    def default_num_tokens(grid: list[int]) -> int:
        return 1

    def project(self, features: Tensor) -> Tensor:
        return self.linear(self.norm(features))


CONNECTORS: dict[str, type[Connector]] = {
    "linear": LinearConnector,
    "mlp": MLPConnector,
    "pool": PoolConnector,
}


def build_connector(config) -> Connector:
    """The connector that `config.connector` names, sized for `config`."""
    return CONNECTORS[config.connector](config)
