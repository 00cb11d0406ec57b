"""The package's face: its public names, its version, and its place in the library's Auto classes."""

import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

import imageprompt


@pytest.mark.parametrize("name", imageprompt.__all__)
def test_public_names_exist_and_are_documented(name):
    assert getattr(imageprompt, name).__doc__
    assert name in dir(imageprompt)


def test_the_public_names_are_those_of_the_documentation():
    assert set(imageprompt.__all__) == {
        "ImagePromptCollator",
        "ImagePromptConfig",
        "ImagePromptForConditionalGeneration",
        "ImagePromptImageProcessor",
        "ImagePromptModel",
        "ImagePromptProcessor",
        "compose",
    }


def test_unknown_names_raise_attribute_errors():
    with pytest.raises(AttributeError, match="nothing"):
        imageprompt.nothing  # noqa: B018


def test_the_version_is_the_distributions():
    assert imageprompt.__version__ == version("imageprompt")


def test_auto_classes_build_the_models_from_a_configuration(tokenizer):
    config = AutoConfig.for_model(
        "imageprompt", vision_config={"model_type": "timm_wrapper", "architecture": "resnet10t"}
    )
    assert type(config) is imageprompt.ImagePromptConfig
    with torch.device("meta"):
        assert type(AutoModel.from_config(config)) is imageprompt.ImagePromptModel
        for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
            assert type(auto_class.from_config(config)) is imageprompt.ImagePromptForConditionalGeneration


def test_importing_prints_nothing_and_leaves_heavy_extras_alone():
    code = (
        "import sys, imageprompt; "
        "print(sorted({'datasets', 'matplotlib', 'pycocoevalcap', 'sklearn', 'typer', 'peft'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Where torchao is installed, transformers imports it, and torch comments on that.
    printed = [line for line in run.stderr.splitlines() if "torch/utils/_pytree.py" not in line]
    assert (run.stdout.strip(), printed) == ("[]", [])
