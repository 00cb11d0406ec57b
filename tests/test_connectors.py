"""Connectors keep one contract: (images, rows * columns, feature_size) to (images, num_image_tokens, text width)."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import max_difference

from imageprompt.connectors import CONNECTORS, Connector, build_connector, pooled_grid, resolve_num_image_tokens

FEATURES, WIDTH = 6, 8


def build(connector: str, grid=(4, 6), num_image_tokens: int | None = None):
    count = resolve_num_image_tokens(connector, list(grid), num_image_tokens)
    text_config = SimpleNamespace(hidden_size=WIDTH)
    config = SimpleNamespace(
        connector=connector,
        feature_grid=list(grid),
        feature_size=FEATURES,
        num_image_tokens=count,
        text_config=text_config,
    )
    return build_connector(config)


def averaged_by_hand(features: torch.Tensor, grid, pooled) -> torch.Tensor:
    """Mean over the cells that each pooled cell overlaps, in float64: rows floor(i*R/r) to ceil((i+1)*R/r)."""
    maps = features.double().view(len(features), *grid, -1)
    cells = []
    for i in range(pooled[0]):
        for j in range(pooled[1]):
            rows = slice(i * grid[0] // pooled[0], math.ceil((i + 1) * grid[0] / pooled[0]))
            columns = slice(j * grid[1] // pooled[1], math.ceil((j + 1) * grid[1] / pooled[1]))
            cells.append(maps[:, rows, columns].mean((1, 2)))
    return torch.stack(cells, 1)


class Bare(Connector):
    """Only the averaging."""

    def project(self, features):
        return features


def bare(grid, count: int) -> Bare:
    return Bare(SimpleNamespace(feature_grid=list(grid), num_image_tokens=count))


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("count", [None, 1, 4, 24])
def test_every_connector_keeps_the_contract(connector, count):
    module = build(connector, num_image_tokens=count)
    tokens = module(torch.randn(3, 24, FEATURES))
    expected = {"pool": 1}.get(connector, 24) if count is None else count
    assert tokens.shape == (3, expected, WIDTH)


@pytest.mark.parametrize(("grid", "count", "pooled"), [((4, 6), 6, (2, 3)), ((7, 7), 16, (4, 4)), ((5, 3), 4, (2, 2))])
def test_averaging_equals_a_mean_over_cells_by_hand(grid, count, pooled):
    features = torch.randn(2, math.prod(grid), FEATURES)
    assert max_difference(bare(grid, count)(features), averaged_by_hand(features, grid, pooled)) <= 1e-6


def test_equal_counts_leave_the_features_as_they_are():
    features = torch.randn(2, 24, FEATURES)
    assert bare((4, 6), 24)(features) is features


def test_linear_is_one_matrix():
    module, features = build("linear"), torch.randn(2, 24, FEATURES)
    expected = features.double() @ module.linear.weight.double().T + module.linear.bias.double()
    assert max_difference(module(features), expected) <= 1e-6


def test_mlp_is_llavas_two_matrices_with_an_exact_gelu_between():
    module, features = build("mlp"), torch.randn(2, 24, FEATURES)
    hidden = features.double() @ module.linear_1.weight.double().T + module.linear_1.bias.double()
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    expected = hidden @ module.linear_2.weight.double().T + module.linear_2.bias.double()
    assert max_difference(module(features), expected) <= 1e-6


def test_pool_removes_the_scale_of_the_backbone():
    module, features = build("pool"), torch.randn(2, 24, FEATURES) + 3
    assert max_difference(module(features), module(features * 100)) <= 1e-3
    expected = F.linear(
        F.layer_norm(features.mean(1, keepdim=True), (FEATURES,)), module.linear.weight, module.linear.bias
    )
    assert max_difference(module(features), expected) <= 1e-6


@pytest.mark.parametrize(
    ("connector", "parameters"),
    [
        ("linear", (FEATURES + 1) * WIDTH),
        ("mlp", (FEATURES + 1) * WIDTH + (WIDTH + 1) * WIDTH),
        ("pool", 2 * FEATURES + (FEATURES + 1) * WIDTH),
    ],
)
def test_the_number_of_parameters(connector, parameters):
    assert sum(parameter.numel() for parameter in build(connector).parameters()) == parameters


@pytest.mark.parametrize(
    ("grid", "count", "pooled"),
    [
        ([14, 14], 49, (7, 7)),
        ([14, 14], 36, (6, 6)),
        ([14, 14], 12, (3, 4)),
        ([4, 8], 8, (2, 4)),
        ([8, 4], 8, (4, 2)),
        ([1, 10], 5, (1, 5)),
        ([7, 7], 1, (1, 1)),
        ([7, 7], 5, (1, 5)),
    ],
)
def test_the_pooled_grid_keeps_the_shape_of_the_map(grid, count, pooled):
    assert pooled_grid(grid, count) == pooled


@pytest.mark.parametrize(
    ("grid", "count", "nearest"), [([7, 7], 13, "12, 14, 15"), ([2, 2], 3, "1, 2, 4"), ([2, 2], 0, "1, 2, 4")]
)
def test_a_count_that_does_not_fit_is_refused_with_the_nearest(grid, count, nearest):
    with pytest.raises(ValueError, match=rf"num_image_tokens={count}; nearest possible: {nearest}\."):
        pooled_grid(grid, count)


def test_an_unknown_connector_is_refused():
    with pytest.raises(ValueError, match="Unknown connector 'nope'; known: linear, mlp, pool"):
        resolve_num_image_tokens("nope", [2, 2], None)


def test_gradients_reach_every_parameter():
    for connector in CONNECTORS:
        module = build(connector, num_image_tokens=4)
        module(torch.randn(2, 24, FEATURES)).square().sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters()), connector
