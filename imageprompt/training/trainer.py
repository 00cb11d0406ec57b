"""`ImagePromptTrainer`: transformers' Trainer, with what training an image-prompt model needs besides.

Each part may have its own learning rate, batches may hold rows of like length, evaluations may score generated
answers, a loss that is not finite stops the run with its batch saved, and a checkpoint is whole or not there.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput
from transformers.training_args import ParallelMode

from ..modeling import ImagePromptForConditionalGeneration
from .arguments import ImagePromptTrainingArguments
from .checkpoints import find_checkpoint, move_model, whole_or_nothing
from .nonfinite import save_batch, say_what_is_not_finite
from .scoring import check_metric, score_answers

# What the library measures of an evaluation besides the model.
SPEED = {"runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}


class ImagePromptTrainer(Trainer):
    """`transformers.Trainer` for image-prompt models, also with LoRA adapters in them.

    Args:
        args (`ImagePromptTrainingArguments`): options, with those of `TrainingArguments`.
        others: as of `transformers.Trainer`. Rows for `train_sampling_strategy="group_by_length"` have `lengths()`,
            and rows for `metric_task` are [`Rows`], both as `read_rows` returns them.

    Raises:
        ValueError: for a learning rate of a part that does not learn.
        FloatingPointError: from `train`, when a loss is not finite.
        OSError: from `train` and `save_model`, when a checkpoint or the model cannot be written.
    """

    args: ImagePromptTrainingArguments

    def __init__(self, model=None, args=None, *others, **kwargs):
        if not isinstance(args, ImagePromptTrainingArguments):
            raise ValueError(f"ImagePromptTrainer takes ImagePromptTrainingArguments, not {type(args).__name__}.")
        super().__init__(model, args, *others, **kwargs)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStopping(args.early_stopping_patience))
        refuse_rates_of_frozen_parts(self.plain_model, args)

    @property
    def plain_model(self) -> ImagePromptForConditionalGeneration:
        """The model itself, without what distributed training and adapters wrap around it."""
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    # --- learning rates

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The library's optimizer, its groups (with and without weight decay) split by part."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer, rates = super().create_optimizer(model), self.args.part_learning_rates
        if len(set(rates.values())) > 1:
            owners = {
                id(parameter): part for part, parameters in self.plain_model._parts.items() for parameter in parameters
            }
            groups = list(optimizer.param_groups)
            optimizer.param_groups.clear()
            for group in groups:
                for part, rate in rates.items():
                    own = [parameter for parameter in group["params"] if owners[id(parameter)] == part]
                    if own:
                        optimizer.add_param_group({**group, "params": own, "lr": rate, "part": part})
        return optimizer

    def _get_learning_rate(self) -> float:
        """The first group's, as the library's; those of the parts are kept for the log."""
        self._logged_rates = {
            f"{group['part']}_learning_rate": group["lr"] for group in self.optimizer.param_groups if "part" in group
        }
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the library's, with the learning rate of each part where they differ."""
        if "learning_rate" in logs:
            logs |= self._logged_rates
        super().log(logs, start_time)

    # --- batches

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not self._groups_by_length(rows):
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return _SeededLengthSampler(batch_size, rows.lengths(), self._data_seed)

    def _get_eval_sampler(self, eval_dataset):
        if not self._groups_by_length(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        generator = torch.Generator().manual_seed(self._data_seed)
        return LengthGroupedSampler(self.args.eval_batch_size, lengths=eval_dataset.lengths(), generator=generator)

    def _groups_by_length(self, rows: Any) -> bool:
        return self.args.train_sampling_strategy == "group_by_length" and hasattr(rows, "lengths")

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    # --- losses that are not finite

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

    # --- generated metrics

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """As the library's; of several data sets, a metric that all have is also averaged, as `eval_<metric>`."""
        if self.args.parallel_mode == ParallelMode.DISTRIBUTED:
            for buffer in self.plain_model.buffers():  # batch-norm statistics: of the process whose model is saved
                dist.broadcast(buffer, 0)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        several = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(several, dict):
            averages = _averages(metrics, metric_key_prefix, list(several))
            self.log(averages)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, averages)
            metrics |= averages
        return metrics

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, *others, metric_key_prefix: str = "eval", **kwargs
    ) -> EvalLoopOutput:
        """As the library's, with the scores of generated answers among the metrics of an evaluation."""
        output = super().evaluation_loop(
            dataloader, description, *others, metric_key_prefix=metric_key_prefix, **kwargs
        )
        if self.args.metric_task is not None and description == "Evaluation":
            with self.compute_loss_context_manager():  # autocast, as for the loss
                scores = score_answers(self.plain_model, self.processing_class, dataloader.dataset, self.args)
            output.metrics.update({f"{metric_key_prefix}_{name}": score for name, score in scores.items()})
        return output

    # --- checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *others, **kwargs):
        """As the library's; `resume_from_checkpoint` is a checkpoint's folder, or `True` for the newest whole one.

        Raises:
            ValueError: if there is no whole checkpoint, or the rows or the model cannot give the metric asked for.
        """
        if self.args.metric_task is not None and self.model is not None:  # in a search, once
            several = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
            for rows in several.values():
                check_metric(self.plain_model, self.processing_class, rows, self.args)
        if resume_from_checkpoint:
            resume_from_checkpoint = str(find_checkpoint(self.args.output_dir, resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *others, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        run, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with whole_or_nothing(run / name, name, run) if self.args.should_save else nullcontext():
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the library's; a model that is in the folder stays until all of the new one is written.

        Raises:
            OSError: if it cannot be written; nothing of it is left.
        """
        if _internal_call:  # into a checkpoint's folder
            return super().save_model(output_dir, _internal_call)
        run = Path(self.args.output_dir)
        folder = run if output_dir is None else Path(output_dir)
        half = folder / "half-written"
        with whole_or_nothing(half, "The model", run) if self.args.should_save else nullcontext():
            super().save_model(str(half), _internal_call=True)
        if self.args.should_save:
            move_model(half, folder)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.parallel_mode == ParallelMode.DISTRIBUTED:
            dist.barrier()  # trainer_state.json, which comes next, means that all processes have written theirs

    def _issue_warnings_after_load(self, load_result) -> None:
        """As the library's, which would name the head as missing that shares the weights of the embeddings."""
        tied = self.plain_model.all_tied_weights_keys
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)


def refuse_rates_of_frozen_parts(model: Any, args: ImagePromptTrainingArguments) -> None:
    """Raise a ValueError if a learning rate is given for a part of which nothing learns."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    for part, parameters in model._parts.items():
        if getattr(args, f"{part}_learning_rate") is not None and not any(p.requires_grad for p in parameters):
            raise ValueError(f"--{part}_learning_rate is given, but nothing of the part {part!r} learns.")


class EarlyStopping(EarlyStoppingCallback):
    """The library's; it goes on counting in a resumed run, begins anew in a new one, and minds its own metric only."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks[type(self).__name__]["attributes"] if state.global_step else {}
        self.early_stopping_patience_counter = saved.get("early_stopping_patience_counter", 0)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if f"eval_{args.metric_for_best_model.removeprefix('eval_')}" in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)


class _SeededLengthSampler(LengthGroupedSampler):
    """The library's, whose order depends on seed and epoch alone: the same in every process and in a resumed run.

    The library draws it from the global generator, from which processes draw unequally often: rows would be seen twice
    or never.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


def _averages(metrics: dict[str, float], prefix: str, names: list[str]) -> dict[str, float]:
    """Means over data sets of the metrics that each of them has; how long evaluations took is none."""
    of_each = []
    for name in names:
        start = f"{prefix}_{name}_"
        of_each.append({key.removeprefix(start): value for key, value in metrics.items() if key.startswith(start)})
    shared = set.intersection(*map(set, of_each)) - SPEED
    return {f"{prefix}_{key}": sum(own[key] for own in of_each) / len(of_each) for key in sorted(shared)}
