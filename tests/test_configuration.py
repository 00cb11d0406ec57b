"""The configuration refuses what cannot work, measures what is not given, and survives a save unchanged."""

import copy
import json
import pickle

import pytest
import torch
from conftest import tiny_gpt2
from transformers import AutoConfig, GPT2Config, set_seed

from imageprompt import ImagePromptConfig


def small(**settings) -> ImagePromptConfig:
    return ImagePromptConfig.from_backbones(
        "resnet10t", tiny_gpt2(), preprocessing={"input_size": (3, 64, 64)}, **settings
    )


def reloaded(config: ImagePromptConfig, folder) -> ImagePromptConfig:
    config.save_pretrained(folder)
    return ImagePromptConfig.from_pretrained(folder)


def test_the_default_is_vit_small_and_gpt2():
    config = ImagePromptConfig()
    assert config.vision_config.architecture == "vit_small_patch16_224"
    assert (config.feature_size, config.feature_grid, config.feature_layout) == (384, [14, 14], "NLC")
    assert (config.num_prefix_tokens, config.num_image_tokens, config.connector) == (1, 196, "mlp")
    assert isinstance(config.text_config, GPT2Config)


def test_an_unknown_keyword_is_refused_with_the_close_field():
    with pytest.raises(ValueError, match=r"no field `conector`. Did you mean `connector`"):
        small(conector="mlp")


@pytest.mark.parametrize("name", ["max_new_tokens", "temperature", "num_beams"])
def test_a_generation_parameter_is_refused_with_its_place(name):
    with pytest.raises(ValueError, match=rf"`{name}` steers generation: set it on `model.generation_config`"):
        small(**{name: 1})


@pytest.mark.parametrize(
    "settings",
    [
        {"num_image_tokens": "4"},
        {"num_image_tokens": 4.0},
        {"num_image_tokens": True},
        {"connector": None},
        {"trainable": {"vision": "no"}},
        {"feature_layout": "CHW"},
    ],
)
def test_a_wrong_type_is_refused(settings):
    with pytest.raises(Exception, match=rf"'{next(iter(settings))}'"):
        small(**settings)


@pytest.mark.parametrize(("count", "nearest"), [(0, "1, 2, 3"), (-3, "1, 2, 3"), (5, "3, 4, 6"), (999, "4, 6, 9")])
def test_an_impossible_number_of_image_tokens_is_refused_with_the_nearest(count, nearest):
    with pytest.raises(ValueError, match=rf"3x3 feature map cannot .*={count}; nearest possible: {nearest}\."):
        ImagePromptConfig.from_backbones(
            "resnet10t", tiny_gpt2(), preprocessing={"input_size": (3, 96, 96)}, num_image_tokens=count
        )


def test_pain_05_image_tokens_over_the_position_budget_are_refused_with_a_count_that_works():
    # A quarter of 52 positions is 13, which no 7x8 map can be averaged to.
    def configure(**settings):
        preprocessing = {"input_size": (3, 224, 256)}
        return ImagePromptConfig.from_backbones(
            "resnet10t", tiny_gpt2(n_positions=52), preprocessing=preprocessing, **settings
        )

    with pytest.raises(ValueError, match=r"56 tokens, but .* only 52 positions.* for example 12\."):
        configure()
    assert configure(num_image_tokens=12).num_image_tokens == 12


@pytest.mark.parametrize("token_id", [-1, 400, 50257])
def test_a_placeholder_outside_the_vocabulary_is_refused(token_id):
    with pytest.raises(ValueError, match=f"`image_token_id={token_id}` lies outside the vocabulary of 400"):
        small(image_token_id=token_id)


def test_the_placeholder_gets_a_row_of_its_own_and_the_callers_configuration_stays():
    text_config = tiny_gpt2()
    config = ImagePromptConfig.from_backbones("resnet10t", text_config)
    assert (config.image_token_id, config.vocab_size, text_config.vocab_size) == (400, 401, 400)


def test_a_misspelt_part_is_refused():
    with pytest.raises(ValueError, match=r"keys vision, connector, text; unknown or missing: vison"):
        small(trainable={"vison": False})


def test_unnamed_parts_learn():
    assert small(trainable={"vision": False}).trainable == {"vision": False, "connector": True, "text": True}


def test_an_unknown_connector_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown connector 'mpl'; known: linear, mlp, pool"):
        small(connector="mpl")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", r"knows no model 'resnet19'\. Close: resnet18"),
        ("resnet18.nonsense", r"no weights 'nonsense' for 'resnet18'; it has a1_in1k"),
        ("timm/resnet18.nonsense", r"no weights 'nonsense' for 'resnet18'"),
    ],
)
def test_an_unknown_timm_name_is_refused_with_the_close_ones(name, message):
    with pytest.raises(ValueError, match=message):
        ImagePromptConfig.from_backbones(name)


def test_a_foreign_vision_config_is_refused():
    with pytest.raises(ValueError, match="must be a timm_wrapper configuration, not 'vit'"):
        ImagePromptConfig(vision_config={"model_type": "vit"})


def test_features_that_contradict_the_backbone_are_refused():
    with pytest.raises(ValueError, match="`feature_size=3`, but resnet10t has 512"):
        small(feature_size=3)


def test_a_hand_written_vision_config_is_completed():
    cfg = {"input_size": [3, 96, 64], "mean": [0.5, 0.5, 0.5]}
    config = ImagePromptConfig(
        vision_config={"model_type": "timm_wrapper", "architecture": "resnet10t", "pretrained_cfg": cfg}
    )
    expected = ImagePromptConfig.from_backbones("resnet10t", preprocessing=cfg)
    assert config.vision_config.pretrained_cfg == expected.vision_config.pretrained_cfg
    assert (config.image_size, config.feature_grid) == ((96, 64), [3, 2])


def test_a_hand_written_architecture_is_never_a_folder(tmp_path, monkeypatch):
    (tmp_path / "resnet10t").mkdir()
    monkeypatch.chdir(tmp_path)
    assert (
        ImagePromptConfig(vision_config={"model_type": "timm_wrapper", "architecture": "resnet10t"}).feature_size == 512
    )


@pytest.mark.parametrize(("size", "grid"), [((3, 64, 96), [2, 3]), ((1, 64, 64), [2, 2]), ((3, 224, 32), [7, 1])])
def test_any_input_size_and_number_of_channels(size, grid):
    config = ImagePromptConfig.from_backbones("resnet10t", tiny_gpt2(), preprocessing={"input_size": size})
    assert (config.num_channels, *config.image_size) == size
    assert config.feature_grid == grid
    assert len(config.vision_config.pretrained_cfg["mean"]) == size[0]


@pytest.mark.parametrize(
    "make",
    [
        small,
        lambda: ImagePromptConfig(),
        lambda: small(connector="pool", num_image_tokens=2, trainable={"vision": False}, image_token_id=7),
        lambda: ImagePromptConfig.from_backbones(
            "swin_tiny_patch4_window7_224", tiny_gpt2(), model_args={"depths": (1, 1, 1, 1)}
        ),
        lambda: ImagePromptConfig.from_backbones("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", tiny_gpt2()),
    ],
    ids=["small", "default", "settings", "tuples", "tagged"],
)
def test_json_round_trips_are_equal_and_carry_no_labels(make, tmp_path):
    config = make()
    first = reloaded(config, tmp_path / "first")
    second = reloaded(first, tmp_path / "second")
    saved_by = {"transformers_version": first.transformers_version}
    assert first.to_dict() == config.to_dict() | saved_by
    assert second.to_dict() == first.to_dict()
    written = (tmp_path / "first/config.json").read_text()
    assert written == (tmp_path / "second/config.json").read_text()
    vision = json.loads(written)["vision_config"]
    assert not vision.keys() & {"label_names", "num_classes", "id2label", "label2id", "num_labels"}
    assert len(written) < 5000


def test_it_loads_through_autoconfig(tmp_path):
    small().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), ImagePromptConfig)


def test_a_reload_probes_nothing(tmp_path, monkeypatch):
    small().save_pretrained(tmp_path)
    monkeypatch.setattr("timm.create_model", lambda *args, **kwargs: pytest.fail("probed again"))
    assert ImagePromptConfig.from_pretrained(tmp_path).feature_grid == [2, 2]


def test_model_arguments_that_json_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="cannot be saved"):
        small(model_args={"act_layer": torch.nn.GELU})


def test_pain_25_common_fields_are_mirrored_from_the_text_config():
    config = small()
    mirrored = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    assert [getattr(config, name) for name in mirrored] == [32, 2, 2, 256]
    config.use_cache = False
    assert config.text_config.use_cache is False


@pytest.mark.parametrize("tied", [True, False])
def test_ties_are_those_of_the_text_config(tied):
    config = ImagePromptConfig.from_backbones("resnet10t", tiny_gpt2(tie_word_embeddings=tied))
    assert config.tie_word_embeddings is tied


def test_copies_are_equal_and_independent():
    config = small()
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other.to_dict() == config.to_dict()
        other.text_config.use_cache = False
    assert config.text_config.use_cache


def test_the_difference_to_the_default_restores_the_configuration():
    config = small(connector="pool")
    assert ImagePromptConfig.from_dict(config.to_diff_dict()).to_dict() == config.to_dict()


def test_pain_16_configuring_makes_no_weights_and_leaves_the_random_state(monkeypatch):
    set_seed(1)
    before = torch.get_rng_state()
    made = []
    register = torch.nn.Module.register_parameter

    def note(module, name, parameter):
        made.append(parameter is not None and not parameter.is_meta)
        register(module, name, parameter)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", note)
    ImagePromptConfig.from_backbones("vit_giant_patch14_dinov2.lvd142m", connector="pool")  # a billion parameters
    assert made and not any(made)
    assert torch.equal(torch.get_rng_state(), before)


def test_pain_13_keys_of_others_are_kept_with_a_warning(tmp_path, caplog):
    config = ImagePromptConfig.from_backbones("resnet10t", tiny_gpt2())
    config.pad_token_id = 0
    config.my_note = "for the record"
    config.save_pretrained(tmp_path)
    reloaded = ImagePromptConfig.from_pretrained(tmp_path)
    assert (reloaded.pad_token_id, reloaded.my_note) == (0, "for the record")
    assert reloaded.to_dict() == config.to_dict()
    again, unused = ImagePromptConfig.from_dict(config.to_dict(), return_unused_kwargs=True, use_cache=False, other=1)
    assert (again.my_note, again.use_cache, unused) == ("for the record", False, {"other": 1})


def test_a_fusion_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"Unknown `fusion='crossattention'`; known: prefix, cross_attention"):
        ImagePromptConfig.from_backbones("resnet10t", tiny_gpt2(), fusion="crossattention")


def test_pain_13_keys_that_would_pass_for_ours_are_dropped(tmp_path):
    config = ImagePromptConfig.from_backbones("resnet10t", tiny_gpt2())
    foreign = {"image_size": 7, "vocab_size": 5, "use_cache": False, "to_dict": 1, "max_length": 50, "num_beams": 4}
    loaded = ImagePromptConfig.from_dict(config.to_dict() | foreign)
    assert loaded.to_dict() == config.to_dict()
    loaded.save_pretrained(tmp_path)


def test_the_configuration_of_another_model_is_refused():
    with pytest.raises(ValueError, match="a 'gpt2' checkpoint"):
        ImagePromptConfig.from_dict(tiny_gpt2().to_dict())


def test_a_grid_may_be_a_tuple():
    config = ImagePromptConfig.from_backbones("resnet10t", tiny_gpt2())
    shape = {"feature_size": config.feature_size, "feature_grid": tuple(config.feature_grid)}
    again = ImagePromptConfig(vision_config=config.vision_config, text_config=tiny_gpt2(), **shape)
    assert again.feature_grid == config.feature_grid


@pytest.mark.parametrize("change", [{"feature_layer": 0}, {"connector": "clipcap_mlp", "num_image_tokens": 3}], ids=str)
def test_features_measured_for_another_layer_are_refused(change):
    config = ImagePromptConfig.from_backbones("test_vit", tiny_gpt2(), preprocessing={"input_size": (3, 160, 160)})
    with pytest.raises(ValueError, match="was measured for other features: compose the model anew"):
        ImagePromptConfig.from_dict(config.to_dict() | change)


def test_layers_may_be_a_tuple(tmp_path):
    config = small(feature_layer=(-2, -1))
    assert config.feature_layer == [-2, -1]
    assert reloaded(config, tmp_path).to_dict()["feature_layer"] == [-2, -1]
