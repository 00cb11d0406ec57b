"""imageprompt: an image is a prompt.

Any timm vision backbone, projected into a GPT-2 language model, behind transformers' own `from_pretrained`,
`generate`, `Trainer` and `push_to_hub`. Importing the package registers its classes with the library's Auto classes,
and lets their `push_to_hub` bring a card.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .composing import compose as compose
    from .configuration import ImagePromptConfig as ImagePromptConfig
    from .data import ImagePromptCollator as ImagePromptCollator
    from .image_processing import ImagePromptImageProcessor as ImagePromptImageProcessor
    from .modeling import ImagePromptForConditionalGeneration as ImagePromptForConditionalGeneration
    from .modeling import ImagePromptModel as ImagePromptModel
    from .processing import ImagePromptProcessor as ImagePromptProcessor

__version__ = version("imageprompt")

_HOMES = {
    "compose": ".composing",
    "ImagePromptConfig": ".configuration",
    "ImagePromptModel": ".modeling",
    "ImagePromptForConditionalGeneration": ".modeling",
    "ImagePromptImageProcessor": ".image_processing",
    "ImagePromptProcessor": ".processing",
    "ImagePromptCollator": ".data",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def _register() -> None:
    """Let transformers' Auto classes find imageprompt's, for checkpoints opened without `trust_remote_code`."""
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    from .configuration import ImagePromptConfig
    from .image_processing import ImagePromptImageProcessor
    from .modeling import ImagePromptForConditionalGeneration, ImagePromptModel
    from .processing import ImagePromptProcessor

    AutoConfig.register(ImagePromptConfig.model_type, ImagePromptConfig)
    AutoModel.register(ImagePromptConfig, ImagePromptModel)
    AutoModelForImageTextToText.register(ImagePromptConfig, ImagePromptForConditionalGeneration)
    AutoModelForMultimodalLM.register(ImagePromptConfig, ImagePromptForConditionalGeneration)
    # One implementation serves every backend: timm's transform works on PIL images.
    backends = {"pil": ImagePromptImageProcessor, "torchvision": ImagePromptImageProcessor}
    AutoImageProcessor.register(ImagePromptConfig, image_processor_classes=backends)
    AutoProcessor.register(ImagePromptConfig, ImagePromptProcessor)
    # What writes a card does not travel with a model: one that came with its own code pushes as the library does.
    for kind, push in ((ImagePromptForConditionalGeneration, "push_model"), (ImagePromptProcessor, "push_processor")):
        setattr(kind, "push_to_hub", _of_sharing(push))  # noqa: B010 - a method of the library's, for the type checker


def _of_sharing(name: str):
    """A function of [`imageprompt.sharing`], which is imported when it is called."""

    def push_to_hub(self, repo_id: str, **details):
        """As the library's; see [`imageprompt.sharing.push_model`] and [`imageprompt.sharing.push_processor`]."""
        return getattr(import_module(".sharing", __name__), name)(self, repo_id, **details)

    return push_to_hub


_register()
