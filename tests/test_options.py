"""Options that are JSON say which of them is wrong, and how."""

import pytest

from imageprompt.options import feature_layer, json_object, new_gpt2


@pytest.mark.parametrize(("value", "expected"), [(None, {}), ('{"depth": 2}', {"depth": 2}), ({"a": 1}, {"a": 1})])
def test_objects(value, expected):
    assert json_object("--model_args", value) == expected


@pytest.mark.parametrize(("value", "message"), [("{depth", "is no JSON"), ("[1]", "is a JSON object"), ("3", "object")])
def test_what_is_no_object_is_refused_by_name(value, message):
    with pytest.raises(ValueError, match=rf"--model_args {message}|--model_args .*{message}"):
        json_object("--model_args", value)


@pytest.mark.parametrize(
    ("value", "expected"), [(None, None), ("pooled", "pooled"), ("-2", -2), ("[-2, -1]", [-2, -1])]
)
def test_layers(value, expected):
    assert feature_layer("--feature_layer", value) == expected
    with pytest.raises(ValueError, match="--feature_layer is no JSON: 'last'"):
        feature_layer("--feature_layer", "last")


def test_a_new_gpt2_takes_its_own_settings_only():
    assert new_gpt2("--text_config", '{"n_layer": 2, "hidden_size": 64}').n_embd == 64
    with pytest.raises(ValueError, match=r"--text_config: GPT-2 has no setting 'n_layers'. Did you mean 'n_layer'"):
        new_gpt2("--text_config", '{"n_layers": 2}')
