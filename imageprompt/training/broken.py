"""Broken rows of a run: counted over all of its processes, and also when it is broken off and resumed."""

from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..data.rows import Rows, parts_of


class BrokenRows(TrainerCallback, ExportableState):
    """Keeps in a checkpoint which rows were found broken, and leaves them out from the start when it is resumed.

    Args:
        rows: those to train on. Of a stream, rows have no numbers: nothing is kept.
    """

    def __init__(self, rows: Any):
        self.parts = [part for part in parts_of(rows) if isinstance(part, Rows)]

    def share(self) -> None:
        """Let every process know what each of them found; all have to call it."""
        for part in self.parts:
            part.leave_out(gather_object(part.left_out))

    def state(self) -> dict[str, dict[str, Any]]:
        return {"args": {}, "attributes": {"left_out": [part.left_out for part in self.parts]}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks[type(self).__name__]["attributes"]["left_out"] if state.global_step else []
        for part, left_out in zip(self.parts, saved, strict=bool(saved)):
            part.leave_out(left_out)
