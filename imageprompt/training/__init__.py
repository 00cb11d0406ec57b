"""Training: `ImagePromptTrainer`, and the commands `imageprompt train`, `pretrain` and `quickstart`."""

from .arguments import ImagePromptTrainingArguments
from .trainer import ImagePromptTrainer

__all__ = ["ImagePromptTrainer", "ImagePromptTrainingArguments"]
