"""Options that are JSON say which of them is wrong, and how; recipes are options in a file."""

import json

import pytest
from transformers import HfArgumentParser

from imageprompt.data.arguments import DataArguments
from imageprompt.options import feature_layer, json_object, json_or_file, new_gpt2, spell_out_recipe


@pytest.mark.parametrize(("value", "expected"), [(None, {}), ('{"depth": 2}', {"depth": 2}), ({"a": 1}, {"a": 1})])
def test_objects(value, expected):
    assert json_object("--model_args", value) == expected


@pytest.mark.parametrize(("value", "message"), [("{depth", "is no JSON"), ("[1]", "is a JSON object"), ("3", "object")])
def test_what_is_no_object_is_refused_by_name(value, message):
    with pytest.raises(ValueError, match=rf"--model_args {message}|--model_args .*{message}"):
        json_object("--model_args", value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), ("pooled", "pooled"), ("tokens", "tokens"), ("-2", -2), ("[-2, -1]", [-2, -1])],
)
def test_layers(value, expected):
    assert feature_layer("--feature_layer", value) == expected
    with pytest.raises(ValueError, match="--feature_layer is no JSON: 'last'"):
        feature_layer("--feature_layer", "last")


def test_a_new_gpt2_takes_its_own_settings_only():
    assert new_gpt2("--text_config", '{"n_layer": 2, "hidden_size": 64}').n_embd == 64
    with pytest.raises(ValueError, match=r"--text_config: GPT-2 has no setting 'n_layers'. Did you mean 'n_layer'"):
        new_gpt2("--text_config", '{"n_layers": 2}')


def test_a_recipe_is_options_in_a_file_and_options_behind_it_win(tmp_path):
    recipe = {
        "dataset": "photos",
        "class_names": ["a cat", "dog"],
        "augment": True,
        "augment_args": {"scale": [0.5, 1]},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | {"max_length": 30, "prompt": ""}))
    argv = spell_out_recipe([str(tmp_path / "recipe.json"), "--dataset", "more photos", "--augment", "false"])
    (data,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(argv)
    assert (data.dataset, data.augment, data.max_length, data.prompt) == ("more photos", False, 30, "")
    assert data.class_names == ["a cat", "dog"]
    assert json_object("--augment_args", data.augment_args) == {"scale": [0.5, 1]}
    assert spell_out_recipe(["--dataset", "x"]) == ["--dataset", "x"] and spell_out_recipe([]) == []


def test_what_is_no_recipe_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'photos' is neither an option nor a recipe"):
        spell_out_recipe(["photos", "--augment"])
    (tmp_path / "recipe.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"recipe.json is a JSON object"):
        spell_out_recipe([str(tmp_path / "recipe.json")])


def test_json_may_stand_in_a_file(tmp_path):
    (tmp_path / "stages.json").write_text('[{"max_steps": 1}]')
    for value in (str(tmp_path / "stages.json"), '[{"max_steps": 1}]'):
        assert json_or_file("--stages", value) == [{"max_steps": 1}]
    (tmp_path / "broken.json").write_text("[")
    with pytest.raises(ValueError, match=r"--stages .*broken.json is no JSON"):
        json_or_file("--stages", str(tmp_path / "broken.json"))
    with pytest.raises(ValueError, match=r"--stages is no JSON: 'missing\.json'"):
        json_or_file("--stages", "missing.json")
