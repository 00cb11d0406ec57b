"""`SteadyTrainer`: transformers' Trainer for runs that nobody watches, of any model.

A loss that is not finite stops the run with its batch saved, a checkpoint is whole or not there, and early stopping
goes on counting in a resumed run.
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.training_args import ParallelMode
from transformers.utils import logging

from ..cpu import multiplies_bf16
from ..provenance import model_digests
from .checkpoints import find_checkpoint, move_model, whole_or_nothing
from .curves import read_curves, save_curves
from .nonfinite import save_batch, say_what_is_not_finite

logger = logging.get_logger(__name__)

# Scores of which less is better, as of losses; of all others more is better.
LOWER_IS_BETTER = {"nats_per_token", "perplexity"}


@dataclass
class SteadyTrainingArguments(TrainingArguments):
    """`TrainingArguments` with early stopping, and defaults under which every run can be looked at afterwards.

    Args:
        early_stopping_patience (`int`, *optional*):
            stop after so many evaluations without a new best value of `metric_for_best_model`, by default the loss.

    Raises:
        ValueError: for early stopping without evaluations, or fp16 on the CPU, where the library would ignore it.
    """

    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better one."}
    )
    # Of every run there is a picture, however short it is.
    logging_steps: float = field(default=10, metadata={"help": "Log the loss after so many steps."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the loss of the first step too."})
    # A loss that is not finite stops training, in one look at the device instead of the filter's two.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Has no effect: such a loss stops training."})

    def __post_init__(self):
        if self.early_stopping_patience is not None:
            self._require_evaluations("early_stopping_patience")
            if self.early_stopping_patience < 1:
                raise ValueError(f"--early_stopping_patience is at least 1, got {self.early_stopping_patience}.")
            self.metric_for_best_model = self.metric_for_best_model or "eval_loss"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            name = self.metric_for_best_model.removeprefix("eval_")
            self.greater_is_better = not (name in LOWER_IS_BETTER or name.endswith("loss"))
        super().__post_init__()
        if self.device.type == "cpu":
            if self.fp16:
                raise ValueError("--fp16 needs a GPU; on the CPU it would be ignored. Use --bf16, or leave it out.")
            if self.bf16 and not multiplies_bf16():
                logger.warning(
                    "--bf16: this CPU has no instructions for bfloat16, and without them every step takes many times "
                    "as long as in float32. Leave it out, or say `--bf16 false` behind a recipe that has it."
                )
            self.dataloader_pin_memory = False

    def _require_evaluations(self, name: str) -> None:
        if self.eval_strategy == "no":
            raise ValueError(f"--{name} is about evaluations: say when with --eval_strategy, such as epoch.")


class SteadyTrainer(Trainer):
    """`transformers.Trainer` with the promises of this file; takes [`SteadyTrainingArguments`].

    Raises:
        FloatingPointError: from `train`, when a loss is not finite.
        OSError: from `train` and `save_model`, when a checkpoint or the model cannot be written.
    """

    args: SteadyTrainingArguments

    def __init__(self, model=None, args=None, *others, **kwargs):
        super().__init__(model, args, *others, **kwargs)
        self.add_callback(EpochOfRows())
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStopping(self.args.early_stopping_patience))

    @property
    def plain_model(self) -> Any:
        """The model itself, without what distributed training and adapters wrap around it."""
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def training_step(self, model, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        """As the library's.

        Raises:
            FloatingPointError: if the loss is not finite; the batch is saved first.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):  # the one look at the device that the library's own filter would take
            step = self.state.global_step + 1
            rank = f"-process-{self.args.process_index}" if self.args.world_size > 1 else ""
            file = Path(self.args.output_dir) / f"nonfinite-step-{step}{rank}.safetensors"
            save_batch(file, inputs, self.processing_class, {"step": str(step), "loss": str(loss.item())})
            cause = say_what_is_not_finite(inputs, self.plain_model)
            raise FloatingPointError(
                f"The loss of step {step} is {loss.item()}. {cause} The batch is saved to {file}, with its texts in "
                "its metadata."
            )
        return loss

    def train(self, resume_from_checkpoint: str | bool | None = None, *others, **kwargs):
        """As the library's; `resume_from_checkpoint` is a checkpoint's folder, or `True` for the newest whole one.

        Raises:
            ValueError: if there is no whole checkpoint.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = str(find_checkpoint(self.args.output_dir, resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *others, **kwargs)

    def _run_epoch(self, *, epoch: int, train_dataloader, **kwargs) -> None:
        """As the library's, which in several processes does not tell the sampler in which epoch a run is resumed."""
        sampler = getattr(train_dataloader, "batch_sampler", None)
        while hasattr(sampler, "batch_sampler"):  # the processes' shares of it
            sampler = sampler.batch_sampler
        sampler = getattr(sampler, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        run, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with whole_or_nothing(run / name, name, run) if self.args.should_save else nullcontext():
            self.accelerator.wait_for_everyone()  # no process writes before an older one of that name is aside
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the library's; a model that is in the folder stays until all of the new one is written.

        Raises:
            OSError: if it cannot be written; nothing of it is left.
        """
        if _internal_call:  # into a checkpoint's folder
            return super().save_model(output_dir, _internal_call)
        self._write_model(Path(self.args.output_dir if output_dir is None else output_dir))
        self._push_saved_model()

    def _write_model(self, folder: Path) -> None:
        half = folder / "half-written"
        with (
            whole_or_nothing(half, "The model", Path(self.args.output_dir)) if self.args.should_save else nullcontext()
        ):
            super().save_model(str(half), _internal_call=True)
        if self.args.should_save:
            move_model(half, folder)

    def _push_saved_model(self) -> None:
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_run(self, result: TrainOutput, record: dict[str, Any] | None = None) -> None:
        """Write the model, and what `train` gave: its state, its metrics and a picture of its curves.

        Args:
            record: for `training.json`, which also says of which weights it is, and which a push puts on the card.
        """
        folder = Path(self.args.output_dir)
        self._write_model(folder)
        if record is not None and self.is_world_process_zero():
            content = json.dumps(record | {"model": model_digests(folder)}, indent=2)
            (folder / "training.json").write_text(content + "\n")
        self._push_saved_model()
        self.save_state()
        if self.is_world_process_zero() and read_curves(self.state.log_history):
            save_curves(self.state.log_history, Path(self.args.output_dir) / "curves.png")
        self.log_metrics("train", result.metrics)
        self.save_metrics("train", result.metrics)
        self.accelerator.wait_for_everyone()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.parallel_mode == ParallelMode.DISTRIBUTED:
            dist.barrier()  # trainer_state.json, which comes next, means that all processes have written theirs

    def _issue_warnings_after_load(self, load_result) -> None:
        """As the library's, which would name the head as missing that shares the weights of the embeddings."""
        tied = self.plain_model.all_tied_weights_keys
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)


class EpochOfRows(TrainerCallback):
    """Rows draw as in their epoch, also where the library forgets to tell them: in the rest of a resumed epoch."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if hasattr(train_dataloader.dataset, "set_epoch"):
            train_dataloader.dataset.set_epoch(int(state.epoch))


class EarlyStopping(EarlyStoppingCallback):
    """The library's; it goes on counting in a resumed run, begins anew in a new one, and minds its own metric only."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks[type(self).__name__]["attributes"] if state.global_step else {}
        self.early_stopping_patience_counter = saved.get("early_stopping_patience_counter", 0)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if f"eval_{args.metric_for_best_model.removeprefix('eval_')}" in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)
