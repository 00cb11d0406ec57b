"""Connectors keep one contract: (images, rows * columns, feature_size) to (images, num_image_tokens, text width)."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import max_difference

from imageprompt.connectors import (
    CONNECTORS,
    AveragingConnector,
    build_connector,
    pooled_grid,
    resolve_num_image_tokens,
)

FEATURES, WIDTH = 6, 8


def build(connector: str, grid=(4, 6), num_image_tokens: int | None = None, **connector_args):
    count = resolve_num_image_tokens(connector, list(grid), num_image_tokens)
    text_config = SimpleNamespace(hidden_size=WIDTH, num_attention_heads=2)
    config = SimpleNamespace(
        connector=connector,
        connector_args=connector_args,
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


class Bare(AveragingConnector):
    """Only the averaging."""

    def project(self, features):
        return features


def bare(grid, count: int) -> Bare:
    text_config = SimpleNamespace(hidden_size=WIDTH)
    sizes = {"feature_grid": list(grid), "feature_size": FEATURES, "num_image_tokens": count}
    return Bare(SimpleNamespace(**sizes, text_config=text_config))


DEFAULTS = {
    "linear": 24,
    "mlp": 24,
    "pool": 1,
    "attention_pool": 8,
    "pixel_shuffle": 6,
    "resampler": 64,
    "clipcap_mlp": 10,
    "clipcap_transformer": 10,
}


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("count", [None, 6, 24])
def test_every_connector_keeps_the_contract(connector, count):
    module = build(connector, num_image_tokens=count)
    tokens = module(torch.randn(3, 24, FEATURES))
    assert tokens.shape == (3, DEFAULTS[connector] if count is None else count, WIDTH)
    assert not torch.allclose(tokens[0], tokens[1])


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


def test_attention_pool_is_a_weighted_mean_over_the_grid():
    module, features = build("attention_pool", num_image_tokens=3), torch.randn(2, 24, FEATURES)
    normed = F.layer_norm(features, (FEATURES,)).double()
    for token in range(3):
        scores = normed @ module.scores.weight[token].double() + module.scores.bias[token].double()
        weights = scores.exp() / scores.exp().sum(1, keepdim=True)
        mean = (weights[..., None] * normed).sum(1)
        expected = mean @ module.linear.weight.double().T + module.linear.bias.double()
        assert max_difference(module(features)[:, token], expected) <= 1e-5


def test_pixel_shuffle_puts_squares_side_by_side():
    module, features = build("pixel_shuffle", grid=(4, 6)), torch.randn(2, 24, FEATURES)
    maps = features.view(2, 4, 6, FEATURES)
    squares = [
        maps[:, row : row + 2, column : column + 2].permute(0, 3, 1, 2).flatten(1)
        for row in (0, 2)
        for column in (0, 2, 4)
    ]
    expected = torch.stack(squares, 1).double() @ module.linear.weight.double().T + module.linear.bias.double()
    assert max_difference(module(features), expected) <= 1e-5


@pytest.mark.parametrize(("grid", "counts"), [((4, 6), [6, 24]), ((7, 7), [1, 49]), ((12, 6), [2, 8, 18, 72])])
def test_pixel_shuffle_refuses_what_its_squares_do_not_fill(grid, counts):
    assert CONNECTORS["pixel_shuffle"].possible_counts(list(grid)) == counts
    with pytest.raises(ValueError, match=rf"num_image_tokens=3; nearest possible: {counts[0]}, {counts[1]}"):
        build("pixel_shuffle", grid=grid, num_image_tokens=3)


def test_pixel_shuffle_has_no_default_for_an_odd_grid():
    with pytest.raises(ValueError, match=r"no default for a 7x7 feature map: pass `num_image_tokens`, one of 1, 49,"):
        build("pixel_shuffle", grid=(7, 7))
    assert build("pixel_shuffle", grid=(7, 7), num_image_tokens=1).factor == 7


def attention_by_hand(module: torch.nn.MultiheadAttention, query, key) -> torch.Tensor:
    """Multi-head attention in float64, head by head."""
    weights, biases = module.in_proj_weight.double().chunk(3), module.in_proj_bias.double().chunk(3)
    q, k, v = (
        (x.double() @ weight.T + bias).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for x, weight, bias in zip((query, key, key), weights, biases, strict=True)
    )
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    mixed = (scores @ v).transpose(1, 2).flatten(2)
    return mixed @ module.out_proj.weight.double().T + module.out_proj.bias.double()


def test_resampler_is_flamingos():
    """Figure 5 of arXiv 2204.14198: queries attend to features and queries, then a feed-forward layer, residually."""
    module, features = build("resampler", num_image_tokens=3, depth=2).double(), torch.randn(2, 24, FEATURES).double()
    x_f, x = module.linear(features), module.queries.weight.expand(2, -1, -1)
    for layer in module.layers:
        asking = F.layer_norm(x, (WIDTH,))
        x = x + attention_by_hand(layer.attention, asking, torch.cat([F.layer_norm(x_f, (WIDTH,)), asking], 1))
        _, first, _, second = layer.mlp
        x = x + second(F.gelu(first(F.layer_norm(x, (WIDTH,)))))
    assert max_difference(module(features), x) <= 1e-10


def test_clipcap_mlp_is_two_layers_with_a_tanh():
    module, summary = build("clipcap_mlp", grid=(1, 1), num_image_tokens=5), torch.randn(2, 1, FEATURES)
    assert module.linear_1.out_features == 5 * WIDTH // 2
    hidden = torch.tanh(summary[:, 0].double() @ module.linear_1.weight.double().T + module.linear_1.bias.double())
    expected = hidden @ module.linear_2.weight.double().T + module.linear_2.bias.double()
    assert max_difference(module(summary), expected.view(2, 5, WIDTH)) <= 1e-6


def test_clipcap_transformer_reads_its_constants():
    """Section 3.2 of arXiv 2111.09734, with the layer sizes of its published code: MLPs of twice the width, ReLU."""
    module = build("clipcap_transformer", grid=(1, 1), num_image_tokens=5, clip_length=3, depth=2, num_heads=2)
    module, summary = module.double().eval(), torch.randn(2, 1, FEATURES).double()
    x = torch.cat([module.linear(summary[:, 0]).view(2, 3, WIDTH), module.constants.weight.expand(2, -1, -1)], 1)
    for layer in module.layers:
        normed = F.layer_norm(x, (WIDTH,))
        x = x + attention_by_hand(layer.self_attn, normed, normed)
        assert layer.linear1.out_features == 2 * WIDTH
        x = x + layer.linear2(F.relu(layer.linear1(F.layer_norm(x, (WIDTH,)))))
    assert max_difference(module(summary), x[:, 3:]) <= 1e-10


@pytest.mark.parametrize(
    ("connector", "arguments", "message"),
    [
        ("mlp", {"depth": 2}, "'mlp' takes no depth in `connector_args`; it takes none"),
        ("resampler", {"dept": 2}, "takes no dept in `connector_args`; it takes depth, num_heads"),
        ("resampler", {"depth": 0}, r"`connector_args\['depth'\]` is a positive whole number, got 0"),
        ("resampler", {"num_heads": 3}, "3 attention heads do not divide the language model's width of 8"),
        ("clipcap_transformer", {"clip_length": 2.5}, "positive whole number, got 2.5"),
        ("clipcap_transformer", {"num_heads": 16}, "16 attention heads do not divide"),
        ("clipcap_mlp", {"normalize": 1}, "is True or False, got 1"),
        ("clipcap_mlp", {"clip_size": True}, "positive whole number, got True"),
    ],
)
def test_arguments_that_a_connector_cannot_use_are_refused(connector, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(connector, **arguments)


LINEAR = (FEATURES + 1) * WIDTH
ATTENTION = 4 * (WIDTH + 1) * WIDTH + 4 * WIDTH  # with the two norms around it


@pytest.mark.parametrize(
    ("connector", "parameters"),
    [
        ("linear", LINEAR),
        ("mlp", LINEAR + (WIDTH + 1) * WIDTH),
        ("pool", 2 * FEATURES + LINEAR),
        ("attention_pool", 2 * FEATURES + (FEATURES + 1) * 8 + LINEAR),
        ("pixel_shuffle", (4 * FEATURES + 1) * WIDTH),
        (
            "resampler",
            LINEAR + 64 * WIDTH + 3 * (ATTENTION + 2 * WIDTH + (WIDTH + 1) * 4 * WIDTH + (4 * WIDTH + 1) * WIDTH),
        ),
        ("clipcap_mlp", (FEATURES + 1) * 5 * WIDTH + (5 * WIDTH + 1) * 10 * WIDTH),
        (
            "clipcap_transformer",
            10 * LINEAR + 10 * WIDTH + 8 * (ATTENTION + (WIDTH + 1) * 2 * WIDTH + (2 * WIDTH + 1) * WIDTH),
        ),
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
        resolve_num_image_tokens("mlp", grid, count)


@pytest.mark.parametrize("connector", ["attention_pool", "resampler", "clipcap_mlp", "clipcap_transformer"])
@pytest.mark.parametrize(("count", "nearest"), [(0, "1, 2, 3"), (70_000, "65534, 65535, 65536")])
def test_learned_tokens_may_be_any_number_within_reason(connector, count, nearest):
    assert resolve_num_image_tokens(connector, [2, 2], 1023) == 1023
    with pytest.raises(ValueError, match=rf"num_image_tokens={count}; nearest possible: {nearest}\."):
        resolve_num_image_tokens(connector, [2, 2], count)


def test_an_unknown_connector_is_refused():
    with pytest.raises(ValueError, match="Unknown connector 'nope'; known: linear, mlp, pool"):
        resolve_num_image_tokens("nope", [2, 2], None)


def test_gradients_reach_every_parameter():
    for connector in CONNECTORS:
        module = build(connector, num_image_tokens=6)
        module(torch.randn(2, 24, FEATURES)).square().sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters()), connector
