"""What training on scenes adds to `transformers.Trainer`, whatever is trained."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from .psfm_data import PSFMBatchSampler


class SceneTrainer(Trainer):
    """
    Trainer on batches of scenes.

    - batches come from a `batch_sampler` (see `PSFMBatchSampler`), or ready-made from a streaming data set;
    - the log shows each part of the loss beside their sum: `compute_loss` passes them to `add_losses`;
    - a run that was killed goes on exactly as if it had not been;
    - a loss that is not finite stops the run before the weights take harm.

    Args:
        batch_sampler: Batch sampler of the training set; None for a data set that yields batches.
        collate_fn: Makes a batch of the samples that the batch sampler names.
    """

    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        *,
        args: TrainingArguments,
        batch_sampler: PSFMBatchSampler | None,
        collate_fn: Callable[[list[dict[str, Any]]], dict[str, Any]],
        **kwargs,
    ):
        super().__init__(args=args, **kwargs)
        # The loss is a mean over the batch; it is the Trainer that divides it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.batch_sampler = batch_sampler
        self.collate_fn = collate_fn
        self._loss_sums: dict[str, float | Tensor] = defaultdict(float)
        self._loss_count = self._num_blank = 0
        self.add_callback(_ExactResume(batch_sampler))

    def get_train_dataloader(self) -> DataLoader:
        workers = self.args.dataloader_num_workers
        options: dict[str, Any] = {
            "num_workers": workers,
            "pin_memory": self.args.dataloader_pin_memory and torch.cuda.is_available(),
        }
        if self.batch_sampler is None:
            # Not prepared: the data set itself deals its batches out to the processes.
            return DataLoader(self.train_dataset, batch_size=None, **options)
        options |= {"batch_sampler": self.batch_sampler, "persistent_workers": workers > 0}
        return self.accelerator.prepare(DataLoader(self.train_dataset, collate_fn=self.collate_fn, **options))

    def add_losses(self, losses: dict[str, Tensor]) -> None:
        """Count the parts of a batch's loss into the next log."""
        for name, loss in losses.items():
            self._loss_sums[name] += loss.detach()
        self._loss_count += 1

    def training_step(self, *args, **kwargs) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not math.isfinite(loss):
            parts = {name: float(total) for name, total in self._loss_sums.items()}
            raise FloatingPointError(
                f"the loss is {float(loss)} at step {self.state.global_step + 1} (parts, summed since the last log: "
                f"{parts}); the checkpoints in {self.args.output_dir} are of earlier steps. Expected a finite loss: "
                "try a lower learning rate, or --resume_from_checkpoint last with one"
            )
        return loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        # It counts per_device_train_batch_size, which plays no part here.
        logs = {key: value for key, value in logs.items() if key != "train_samples_per_second"}
        if "loss" in logs:
            loss, count = logs.pop("loss"), self._loss_count
            if count:
                # The parts are of this process, "loss" is the mean over all, to which blank batches gave zeros.
                parts = {name: float(total) / count for name, total in self._loss_sums.items()}
                logs = {"loss": loss * (count + self._num_blank) / count, **logs, **parts}
            self._loss_sums.clear()
            self._loss_count = self._num_blank = 0
        super().log(logs, *args, **kwargs)

    def log_scores(self, scores: dict[str, Any], metric_key_prefix: str) -> dict[str, float]:
        """Log the numbers among `scores`, and tell the callbacks, as `evaluate` has to."""
        numbers = {f"{metric_key_prefix}_{key}": value for key, value in scores.items() if isinstance(value, float)}
        self.log(numbers)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, numbers)
        return numbers


class _ExactResume(TrainerCallback):
    """What a run that goes on from a checkpoint needs to see and log the same as one never interrupted."""

    def __init__(self, batch_sampler: PSFMBatchSampler | None):
        self.batch_sampler = batch_sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        # On several processes, the Trainer's own call is lost in the wrappers of a loader that skips batches.
        if self.batch_sampler is not None:
            self.batch_sampler.set_epoch(state.global_step // self.batch_sampler.steps_per_epoch)

    def on_step_end(self, args, state, control, **kwargs):
        # Losses are averaged from one log to the next, and a run that goes on starts at its checkpoint.
        control.should_log |= control.should_save or state.global_step >= state.max_steps

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save
