"""`ImagePromptTrainer`: transformers' Trainer, with what training an image-prompt model needs besides.

Each part may have its own learning rate, batches may hold rows of like length, and evaluations may score generated
answers.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import HfApi
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, HubStrategy
from transformers.training_args import ParallelMode
from transformers.utils import logging

from ..cards import CardFacts
from ..data import ImagePromptCollator
from ..modeling import ImagePromptForConditionalGeneration
from ..pushing import push_folder
from ..sharing import refuse_other_visibility
from .arguments import ImagePromptTrainingArguments
from .broken import BrokenRows
from .curves import SPEED
from .scoring import check_metric, score_answers
from .steady import SteadyTrainer

logger = logging.get_logger(__name__)


class ImagePromptTrainer(SteadyTrainer):
    """`transformers.Trainer` for image-prompt models, also with LoRA adapters in them; steady, see [`SteadyTrainer`].

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
    plain_model: ImagePromptForConditionalGeneration

    def __init__(self, model=None, args=None, *others, **kwargs):
        if not isinstance(args, ImagePromptTrainingArguments):
            raise ValueError(f"ImagePromptTrainer takes ImagePromptTrainingArguments, not {type(args).__name__}.")
        super().__init__(model, args, *others, **kwargs)
        refuse_rates_of_frozen_parts(self.plain_model, args)
        self.broken_rows = BrokenRows(self.train_dataset)
        self.add_callback(self.broken_rows)

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

    # --- the Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As the library's, which pushes to an open repository even where a private one is asked for.

        Raises:
            ValueError: if the repository is there already, and others may see it against the wish.
        """
        super().init_hf_repo(token, private)
        if self.is_world_process_zero():
            wish = self.args.hub_private_repo if private is None else private
            refuse_other_visibility(HfApi(token=token or self.args.hub_token), self.hub_model_id, wish)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **facts,
    ) -> Any:
        """As the library's, with the card of [`imageprompt.pushing.push_folder`], and nothing of the training's files.

        Args:
            facts: of [`imageprompt.cards.CardFacts`]: `license`, `language`, `datasets`, `tags`, …

        Returns:
            The commit, or with `blocking=False` a future of it; `None` in all processes but the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        push = partial(
            push_folder,
            self.args.output_dir,
            self.hub_model_id,
            CardFacts(**facts),
            commit_message=commit_message,
            token=token,
            revision=self.args.hub_revision if revision is None else revision,
            private=private,
        )
        return push() if blocking else HfApi().run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the library's; of `hub_strategy="every_save"` only the model, and the next step waits for it.

        A Hub that cannot be reached does not stop the training.
        """
        if self.args.hub_strategy != HubStrategy.EVERY_SAVE:
            return super()._push_from_checkpoint(checkpoint_folder)
        if not self.is_world_process_zero():
            return None
        try:
            push_folder(
                checkpoint_folder,
                self.hub_model_id,
                commit_message=f"Training in progress, step {self.state.global_step}",
                token=self.args.hub_token,
                revision=self.args.hub_revision,
            )
        except (OSError, ValueError) as error:
            logger.warning(f"Step {self.state.global_step} is not on the Hub: {error}")

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

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """As the library's. Rows are packed in training only: evaluations average over rows."""
        collator = self.data_collator
        if isinstance(collator, ImagePromptCollator):
            self.data_collator = replace(collator, pack_length=None)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def _save_checkpoint(self, model, trial) -> None:
        self.broken_rows.share()
        super()._save_checkpoint(model, trial)

    # --- generated metrics

    def train(self, resume_from_checkpoint: str | bool | None = None, *others, **kwargs):
        """As of [`SteadyTrainer`].

        Raises:
            ValueError: before the first step, if the rows or the model cannot give the metric asked for.
        """
        if self.model is not None:  # in a search, once
            check_metric(self.plain_model, self.processing_class, self.eval_dataset, self.args)
        return super().train(resume_from_checkpoint, *others, **kwargs)

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


def refuse_rates_of_frozen_parts(model: Any, args: ImagePromptTrainingArguments) -> None:
    """Raise a ValueError if a learning rate is given for a part of which nothing learns."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    for part, parameters in model._parts.items():
        if getattr(args, f"{part}_learning_rate") is not None and not any(p.requires_grad for p in parameters):
            raise ValueError(f"--{part}_learning_rate is given, but nothing of the part {part!r} learns.")


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
