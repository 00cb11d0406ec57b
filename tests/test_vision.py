"""Every timm layout becomes (images, rows * columns, width), row by row, without class or register tokens."""

import json
from functools import partial

import pytest
import timm
import torch
from conftest import BACKBONES, max_difference
from timm.models import save_for_hf
from transformers import AutoConfig

from imageprompt.vision import VisionTower, flatten_features, probe_features, read_features, resolve_backbone

# (timm name, timm keywords, layout, rows and columns, prefix tokens): one small model of each kind.
FAMILIES = [
    ("resnet10t", {}, "NCHW", (6, 6), 0),
    ("convnext_atto", {}, "NCHW", (7, 7), 0),
    ("efficientnet_b0", {}, "NCHW", (7, 7), 0),
    ("mobilevit_xxs", {}, "NCHW", (8, 8), 0),
    ("test_vit", {}, "NLC", (10, 10), 1),
    ("deit_tiny_distilled_patch16_224", {"depth": 1}, "NLC", (14, 14), 2),
    ("vit_small_patch14_reg4_dinov2", {"depth": 1, "img_size": 224}, "NLC", (16, 16), 5),
    ("volo_d1_224", {}, "NLC", (14, 14), 1),  # a class token that timm does not declare
    ("cait_xxs24_224", {"depth": 1}, "NLC", (14, 14), 1),
    ("mixer_s16_224", {}, "NLC", (14, 14), 0),
    ("levit_128s", {}, "NLC", (4, 4), 0),
    ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}, "NHWC", (7, 7), 0),
    ("mambaout_femto", {}, "NHWC", (7, 7), 0),
]


def input_size(name: str, model_args: dict) -> tuple[int, int, int]:
    edge = model_args.get("img_size", resolve_backbone(name).pretrained_cfg["input_size"][1])
    return 3, edge, edge


@pytest.mark.parametrize(("name", "model_args", "layout", "grid", "num_prefix"), FAMILIES)
@torch.no_grad()
def test_the_probe_agrees_with_a_real_forward_and_with_timms_own_map(name, model_args, layout, grid, num_prefix):
    size = input_size(name, model_args)
    shape = probe_features(name, model_args, size)
    assert (shape.layout, shape.grid, shape.num_prefix) == (layout, grid, num_prefix)

    model = timm.create_model(name, num_classes=0, **model_args).eval()
    images = torch.randn(1, *size)
    flat = flatten_features(model.forward_features(images), shape.layout, shape.num_prefix)
    assert flat.shape == (1, grid[0] * grid[1], shape.size)
    if name not in ("efficientnet_b0", "mobilevit_xxs"):  # timm's last map there comes before the last convolution
        maps = model.forward_intermediates(images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)
        assert max_difference(flat, maps[-1].flatten(2).mT) <= 1e-4


@pytest.mark.parametrize("layout", BACKBONES)
def test_features_are_flattened_row_by_row(layout):
    rows, columns, width = 2, 3, 5
    expected = torch.zeros(1, rows * columns, width)
    expected[0, 1 * columns + 2, 4] = 1  # a marker in row 1, column 2, channel 4
    features = {
        "NCHW": partial(torch.zeros, 1, width, rows, columns),
        "NHWC": partial(torch.zeros, 1, rows, columns, width),
        "NLC": partial(torch.full, (1, 2 + rows * columns, width), 7.0),
    }[layout]()
    if layout == "NLC":
        features[:, 2:] = 0
    features[{"NCHW": (0, 4, 1, 2), "NHWC": (0, 1, 2, 4), "NLC": (0, 2 + 1 * columns + 2, 4)}[layout]] = 1
    assert torch.equal(flatten_features(features, layout, 2 if layout == "NLC" else 0), expected)


@pytest.mark.parametrize(
    ("name", "model_args", "size", "grid"),
    [
        ("resnet10t", {}, (3, 64, 128), (2, 4)),
        ("test_vit", {"img_size": (64, 128)}, (3, 64, 128), (4, 8)),
        ("test_vit", {"dynamic_img_size": True}, (3, 128, 64), (8, 4)),
        ("xcit_nano_12_p8_224", {}, (3, 128, 64), (16, 8)),
    ],
)
def test_the_grid_of_an_image_that_is_no_square_keeps_rows_and_columns_apart(name, model_args, size, grid):
    assert probe_features(name, model_args, size).grid == grid


@pytest.mark.parametrize(
    ("name", "edge", "grid", "layer"),
    [
        ("crossvit_9_240", 240, (14, 14), [2, 5]),  # a list of two branches
        ("coat_tiny", 224, (7, 7), [1, 2, 3]),  # a list of three scales
        ("efficientvim_m1", 224, (4, 4), 2),  # a list of states and a map
        ("pit_ti_224", 224, (7, 7), 2),  # class tokens alone
    ],
)
@torch.no_grad()
def test_a_backbone_that_does_not_end_in_one_map_gives_its_last_blocks(name, edge, grid, layer):
    shape = probe_features(name, None, (3, edge, edge))
    assert (shape.layout, shape.grid, shape.layer) == ("NCHW", grid, layer)
    model, images = timm.create_model(name, num_classes=0).eval(), torch.randn(1, 3, edge, edge)
    maps = model.forward_intermediates(images, indices=layer if isinstance(layer, list) else [layer])[1]
    features = read_features(model, images, shape.layer)
    assert features.shape == (1, shape.size, *grid) and shape.size == sum(each.shape[1] for each in maps)
    assert torch.equal(features[:, -maps[-1].shape[1] :], maps[-1])


@pytest.mark.parametrize(("name", "grid"), [("qwen3_vit_88m_merge", (24, 24)), ("deepseek_vit_412m_align", (13, 13))])
def test_merged_tokens_keep_the_shape_of_the_image(name, grid):
    edge = resolve_backbone(name).pretrained_cfg["input_size"][1]
    shape = probe_features(name, None, (3, edge, edge))
    assert (shape.layout, shape.grid, shape.num_prefix) == ("NLC", grid, 0)


@torch.no_grad()
def test_merged_tokens_run_row_by_row():
    """Only what an image's lower left corner holds may change the first token of the last row most."""
    model_args = {"depth": 1, "img_size": 192}
    shape = probe_features("qwen3_vit_88m_merge", model_args, (3, 192, 192))
    model = timm.create_model("qwen3_vit_88m_merge", num_classes=0, **model_args).eval()
    images = torch.zeros(1, 3, 192, 192)
    changed = images.clone()
    changed[..., -32:, :32] = 1
    difference = (model.forward_features(changed) - model.forward_features(images)).norm(dim=-1)[0]
    assert difference.argmax() == (shape.grid[0] - 1) * shape.grid[1]


@pytest.mark.parametrize("layers", [-2, [1, -1], [2, 3, 4], 0], ids=str)
@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224"])
@torch.no_grad()
def test_earlier_blocks_are_joined_at_the_coarsest_grid(name, layers):
    model_args, size = ({}, 64) if name == "resnet10t" else ({"depths": (1, 1, 1, 1)}, 224)
    if name.startswith("swin") and layers == [2, 3, 4]:
        layers = [1, 2, 3]
    shape = probe_features(name, model_args, (3, size, size), layers)
    model, images = timm.create_model(name, num_classes=0, **model_args).eval(), torch.randn(2, 3, size, size)
    features = read_features(model, images, layers)
    assert features.shape == (2, shape.size, *shape.grid)
    everything = model.forward_intermediates(images, indices=None, output_fmt="NCHW", intermediates_only=True)
    chosen = sorted({layer % len(everything) for layer in ([layers] if isinstance(layers, int) else layers)})
    maps = [everything[layer] for layer in chosen]
    assert shape.grid == tuple(maps[-1].shape[2:])
    start = 0
    for each in maps:  # a coarse cell is the mean of the fine cells that it covers
        factor = each.shape[2] // shape.grid[0]
        expected = each.unflatten(3, (-1, factor)).unflatten(2, (-1, factor)).mean((3, 5))
        assert max_difference(features[:, start : start + each.shape[1]], expected) <= 1e-5
        start += each.shape[1]


@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "mobilenetv3_small_050", "crossvit_9_240", "pit_ti_224"])
@torch.no_grad()
def test_the_pooled_features_are_what_timms_classifier_reads(name):
    size = resolve_backbone(name).pretrained_cfg["input_size"]
    shape = probe_features(name, None, size, "pooled")
    model, images = timm.create_model(name).eval(), torch.randn(2, *size)
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    headless = timm.create_model(name, num_classes=0).eval()
    headless.load_state_dict(model.state_dict(), strict=False)
    pooled = read_features(headless, images, "pooled")
    assert torch.equal(pooled, expected) and pooled.shape == (2, shape.size)
    assert (shape.layout, shape.grid) == ("NC", (1, 1))


@pytest.mark.parametrize(("name", "count"), [("test_vit", 101), ("deit_tiny_distilled_patch16_224", 198)])
@torch.no_grad()
def test_the_tokens_are_all_that_the_backbone_ends_with(name, count):
    size = resolve_backbone(name).pretrained_cfg["input_size"]
    shape = probe_features(name, None, size, "tokens")
    assert (shape.layout, shape.grid, shape.num_prefix) == ("NLC", (1, count), 0)
    model, images = timm.create_model(name, num_classes=0).eval(), torch.randn(2, *size)
    tokens = flatten_features(read_features(model, images, "tokens"), shape.layout, shape.num_prefix)
    assert torch.equal(tokens, model.forward_features(images)) and tokens.shape == (2, count, shape.size)


def test_convolutions_have_no_row_of_tokens():
    with pytest.raises(ValueError, match="resnet10t gives no row of tokens"):
        probe_features("resnet10t", None, (3, 64, 64), "tokens")


def test_layers_that_are_not_read_count_as_unused():
    early = probe_features("vit_tiny_patch16_224", None, (3, 224, 224), 3).unused_parameters
    assert "blocks.4.attn.qkv.weight" in early and "norm.weight" in early and "blocks.3.attn.qkv.weight" not in early
    assert probe_features("mobilenetv3_small_050", None, (3, 224, 224), "pooled").unused_parameters == []


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (44, r"with feature_layer=44: feature index 44 is out of range"),
        ([11, -1], "each once, in the order of the network"),
        ([3, 1], "each once, in the order of the network"),
        ([], "at least one block"),
        ("last", "feature_layer='last'"),
    ],
)
def test_a_layer_that_is_not_there_is_refused(layer, message):
    with pytest.raises(ValueError, match=message):
        probe_features("vit_tiny_patch16_224", None, (3, 224, 224), layer)


def test_dropping_patches_is_refused():
    with pytest.raises(ValueError, match=r"'patch_drop_rate': 0.5.*changes the grid in training"):
        probe_features("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, (3, 224, 224))


def test_a_backbone_that_pools_nothing_has_no_summary():
    with pytest.raises(ValueError, match="gives no summary"):
        probe_features("vit_tiny_patch16_224", {"global_pool": ""}, (3, 224, 224), "pooled")


@pytest.mark.parametrize(
    ("model_args", "size"), [({}, (3, 50, 50)), ({"dept": 2}, (3, 160, 160)), ({"features_only": True}, (3, 160, 160))]
)
def test_what_a_backbone_cannot_run_is_refused_by_name(model_args, size):
    with pytest.raises(ValueError, match=r"test_vit with model_args=.* does not run on"):
        probe_features("test_vit", model_args, size)


@pytest.mark.parametrize("layout", BACKBONES)
def test_pain_16_the_tower_keeps_timms_own_initialisation(layout):
    name, model_args, size = BACKBONES[layout]
    backbone = resolve_backbone(name, model_args=model_args, preprocessing={"input_size": size})
    config = AutoConfig.for_model("timm_wrapper", architecture=name, model_args=backbone.model_args, do_pooling=False)
    torch.manual_seed(3)
    tower = VisionTower._from_config(config)
    torch.manual_seed(3)
    expected = timm.create_model(name, num_classes=0, **backbone.model_args).state_dict()
    state = tower.timm_model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    "name",
    ["resnet18.a1_in1k", "timm/resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k", "resnet18", "timm/resnet18"],
)
def test_names_in_timms_registry_need_no_network(name, monkeypatch):
    monkeypatch.setattr("timm.models.load_model_config_from_hf", lambda *_: pytest.fail("asked the Hub"))
    backbone = resolve_backbone(name)
    assert backbone.architecture == "resnet18"
    assert (backbone.pretrained_cfg["crop_pct"], backbone.pretrained_cfg["input_size"]) == (0.95, [3, 224, 224])
    assert timm.models.is_model_pretrained(backbone.weights)


@pytest.mark.parametrize("error", [OSError("404"), ValueError("not a repository name"), KeyError("architecture")])
def test_a_hub_id_without_a_timm_model_is_refused_with_close_names(error, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setattr("timm.models.load_model_config_from_hf", fail)
    with pytest.raises(ValueError, match=r"knows no model 'timm/resnet19\.a1_in1k'\. Close: resnet18"):
        resolve_backbone("timm/resnet19.a1_in1k")


def test_a_model_on_the_hub_is_read_through_its_configuration(monkeypatch):
    cfg = {"input_size": (3, 96, 96), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    monkeypatch.setattr("timm.models.load_model_config_from_hf", lambda _: (cfg, "resnet10t", {"stem_width": 16}))
    backbone = resolve_backbone("someone/my-resnet", model_args={"drop_path_rate": 0.1})
    assert (backbone.architecture, backbone.weights) == ("resnet10t", "hf-hub:someone/my-resnet")
    assert backbone.model_args == {"stem_width": 16, "drop_path_rate": 0.1}
    assert backbone.pretrained_cfg["input_size"] == [3, 96, 96]


def test_a_local_folder_in_timms_layout_brings_preprocessing_arguments_and_weights(tmp_path):
    model = timm.create_model("test_vit", num_classes=0, depth=2)
    save_for_hf(model, tmp_path, model_args={"depth": 2}, safe_serialization=True)
    written = json.loads((tmp_path / "config.json").read_text())
    written["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "crop_pct": 0.7}
    (tmp_path / "config.json").write_text(json.dumps(written))

    backbone = resolve_backbone(tmp_path)
    assert (backbone.architecture, backbone.model_args["depth"]) == ("test_vit", 2)
    assert probe_features("test_vit", backbone.model_args, (3, 160, 160)).grid == (10, 10)
    assert (backbone.pretrained_cfg["mean"], backbone.pretrained_cfg["crop_pct"]) == ([0.1, 0.2, 0.3], 0.7)
    loaded = timm.create_model(backbone.weights, pretrained=True, num_classes=0, **backbone.model_args).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_the_input_size_of_a_local_folder_can_be_changed(tmp_path):
    save_for_hf(timm.create_model("test_vit", num_classes=0), tmp_path, safe_serialization=True)
    backbone = resolve_backbone(tmp_path, preprocessing={"input_size": (1, 96, 64)})
    assert probe_features("test_vit", backbone.model_args, (1, 96, 64)).grid == (6, 4)


@pytest.mark.parametrize("content", [None, {"model_type": "gpt2"}])
def test_a_folder_that_is_no_timm_checkpoint_is_refused(content, tmp_path):
    if content:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"no timm checkpoint: it needs a config.json with `architecture`"):
        resolve_backbone(tmp_path)


@pytest.mark.parametrize(
    ("preprocessing", "message"),
    [
        ({"img_size": 64}, r"Unknown preprocessing \['img_size'\]; known: input_size"),
        ({"input_size": 64}, "`input_size` is"),
        ({"mean": (0.5, 0.5)}, "one value per channel"),
    ],
)
def test_impossible_preprocessing_is_refused(preprocessing, message):
    with pytest.raises(ValueError, match=message):
        resolve_backbone("resnet10t", preprocessing=preprocessing)


def test_greyscale_input_reaches_timm_with_averaged_statistics():
    backbone = resolve_backbone("resnet18", preprocessing={"input_size": (1, 64, 64)})
    assert backbone.model_args == {"in_chans": 1}
    assert backbone.pretrained_cfg["mean"] == pytest.approx([(0.485 + 0.456 + 0.406) / 3])


def test_every_timm_name_resolves():
    for name in timm.list_models():
        assert resolve_backbone(name).pretrained_cfg.keys() >= {"input_size", "mean", "std"}


@pytest.mark.slow  # 1,371 architectures, about ten minutes on one idle core
def test_every_timm_name_gives_features():
    for name in timm.list_models():
        backbone = resolve_backbone(name)
        shape = probe_features(name, backbone.model_args, backbone.pretrained_cfg["input_size"])
        assert shape.size > 0 and min(shape.grid) > 0


@pytest.mark.parametrize(
    ("name", "unused"),
    [
        ("resnet18", set()),
        ("vit_tiny_patch16_224", set()),
        ("convnext_atto", {"head.norm.weight", "head.norm.bias"}),
        ("mobilenetv3_small_050", {"conv_head.weight", "conv_head.bias"}),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_pain_07_parameters_behind_the_features_are_found(name, unused, mode):
    with mode():
        assert set(probe_features(name, None, [3, 224, 224]).unused_parameters) == unused
