"""What training on scenes adds to `transformers.Trainer`, whatever is trained."""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import HubStrategy


logger = logging.getLogger(__name__)


class EpochBatchSampler(Protocol):
    """Batches of keys of a data set, drawn anew every epoch; for `accelerate` it has `batch_size` and `drop_last`."""

    batch_size: None
    drop_last: bool
    steps_per_epoch: int

    def set_epoch(self, epoch: int) -> None: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[Any]]: ...


class SceneTrainer(Trainer):
    """
    Trainer on batches of scenes.

    - batches come from a `batch_sampler`, or ready-made from a streaming data set;
    - the log shows each part of the loss beside their sum: `compute_loss` passes them to `add_losses`;
    - samples that could not be read are counted in `bad_samples` by message: `compute_loss` passes their messages to
      `count_bad_samples`;
    - a run that was killed goes on exactly as if it had not been;
    - a loss that is not finite stops the run before the weights take harm;
    - nothing goes to the Hub before `push_to_hub`: before the end there is no model card.

    Args:
        args: With `push_to_hub`, `hub_strategy` has to be "end".
        batch_sampler: Batch sampler of the training set, such as `PSFMBatchSampler`; None for a data set that yields
            batches.
        collate_fn: Makes a batch of the samples that the batch sampler names.

    Raises:
        ValueError: Another `hub_strategy`.
    """

    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        *,
        args: TrainingArguments,
        batch_sampler: EpochBatchSampler | None,
        collate_fn: Callable[[list[Any]], dict[str, Any]],
        **kwargs,
    ):
        if args.push_to_hub and args.hub_strategy != HubStrategy.END:
            strategy = HubStrategy(args.hub_strategy).value
            raise ValueError(f"hub_strategy = {strategy}; expected end: before it there is no model card")
        super().__init__(args=args, **kwargs)
        # The loss is a mean over the batch; it is the Trainer that divides it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.batch_sampler = batch_sampler
        self.collate_fn = collate_fn
        self.bad_samples: Counter[str] = Counter()
        self._loss_sums: dict[str, float | Tensor] = defaultdict(float)
        self._loss_count = self._num_blank = 0
        self.add_callback(_ExactResume(batch_sampler))

    def get_train_dataloader(self) -> DataLoader:
        workers = self.args.dataloader_num_workers
        options: dict[str, Any] = {
            "num_workers": workers,
            "pin_memory": self.args.dataloader_pin_memory and torch.cuda.is_available(),
            # Else every iterator, and there are more of them after a stop, draws a seed for its workers from the
            # stream that the model's own draws come from.
            "generator": torch.Generator().manual_seed(self.args.seed),
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

    def count_bad_samples(self, messages: Iterable[str]) -> None:
        """Count the bad samples of a batch; each message is logged when it first comes."""
        for message in messages:
            if message not in self.bad_samples:
                logger.warning("left out: %s", message)
            self.bad_samples[message] += 1

    def gather_bad_samples(self) -> None:
        """Make `bad_samples` those of all processes; to be called once, on each of them."""
        self.bad_samples = sum(gather_object([self.bad_samples]), Counter())

    @contextmanager
    def evaluated_model(self) -> Iterator[Any]:
        """The model itself, in eval mode while it is scored."""
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        try:
            yield model
        finally:
            model.train(was_training)

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # The Trainer would push here, before there is a card.
        super().save_model(output_dir, _internal_call=True)

    def create_model_card(self, *args, **kwargs) -> None:
        """The script writes the card, from the run's own numbers; `push_to_hub` sends it along."""


class _ExactResume(TrainerCallback):
    """What a run that goes on from a checkpoint needs to see and log the same as one never interrupted."""

    def __init__(self, batch_sampler: EpochBatchSampler | None):
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
