"""What an import of a whole model hands out."""

from dataclasses import dataclass, field

from ..comparing import Difference
from ..modeling import ImagePromptForConditionalGeneration
from ..processing import ImagePromptProcessor


@dataclass
class Conversion:
    """An imported model that has been compared with its original.

    Args:
        model: in eval mode, in fp32.
        processor: that belongs to it.
        differences: of the logits, in "float64", where they are at most 1e-5, and in "float32".
        assumed: sentences on what the checkpoint does not say and could not be checked.
    """

    model: ImagePromptForConditionalGeneration
    processor: ImagePromptProcessor
    differences: dict[str, Difference]
    assumed: list[str] = field(default_factory=list)
