"""`transformers.Trainer` for Predictive Spatial Field Modeling."""

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import HubStrategy

from .checkpoint_spa3r import save_frozen, save_trained
from .modeling_spa3r import Spa3RForPreTraining
from .psfm_data import PSFMBatchSampler, collate_scenes
from .psfm_metrics import evaluate_psfm, mean_features


logger = logging.getLogger(__name__)


class PSFMTrainer(Trainer):
    """
    Trainer of [`Spa3RForPreTraining`].

    - batches come from a `batch_sampler` (see `PSFMBatchSampler`), or ready-made from a streaming data set;
    - the log shows each loss beside their sum;
    - `eval_dataset` is a list of batches with their `view_mask`, scored by `evaluate_psfm` on every process;
    - frozen weights are written once, to the output folder, checkpoints hold what is trained;
    - samples that could not be read (`on_bad_sample="skip"`) are left out, and counted in `bad_samples` by message;
    - nothing goes to the Hub before `push_to_hub`.

    Args:
        args: With `push_to_hub`, `hub_strategy` has to be "end".
        mean_batches: Batches of training scenes whose mean feature is taken off for the centred cosine.
        batch_sampler: Batch sampler of the training set; None for a data set that yields batches.

    Raises:
        ValueError: Another `hub_strategy`.
    """

    model: Spa3RForPreTraining
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        *,
        args: TrainingArguments,
        mean_batches: list[dict[str, Any]],
        batch_sampler: PSFMBatchSampler | None = None,
        **kwargs,
    ):
        if args.push_to_hub and args.hub_strategy != "end":
            # The Trainer would copy the index of a checkpoint, which does not fit the folder above it.
            strategy = HubStrategy(args.hub_strategy).value
            raise ValueError(f"hub_strategy = {strategy}; expected end: checkpoints share their frozen weights")
        super().__init__(args=args, **kwargs)
        # The loss is a mean over the batch; it is the Trainer that divides it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.output_dir = Path(str(args.output_dir))
        self.batch_sampler = batch_sampler
        self.mean_batches = mean_batches
        self.bad_samples: Counter[str] = Counter()
        self._loss_sums: dict[str, float] = defaultdict(float)
        self._loss_count = self._num_blank = 0
        self._means: dict[str, Tensor] | None = None
        self._frozen_is_saved = False
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
        return self.accelerator.prepare(DataLoader(self.train_dataset, collate_fn=collate_scenes, **options))

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        # The frozen weights beside the checkpoint that a run goes on from are its own.
        if isinstance(resume_from_checkpoint, str):
            self._frozen_is_saved = Path(resume_from_checkpoint).resolve().parent == self.output_dir.resolve()
        else:
            self._frozen_is_saved = bool(resume_from_checkpoint)
        result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self.bad_samples = sum(gather_object([self.bad_samples]), Counter())
        return result

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ):
        inputs = dict(inputs)
        for message in inputs.pop("bad_samples", ()):
            if message not in self.bad_samples:
                logger.warning("left out: %s", message)
            self.bad_samples[message] += 1
        if "pixel_values" not in inputs:
            # Nothing of this batch could be read. Something must go through the model, or other processes wait for it.
            self._num_blank += 1
            output = model(**self._blank_scene())
            return (0.0 * output.loss, output) if return_outputs else 0.0 * output.loss
        output = model(**inputs)
        for name, loss in output.losses.items():
            self._loss_sums[name] += loss.detach()
        self._loss_count += 1
        return (output.loss, output) if return_outputs else output.loss

    def _blank_scene(self) -> dict[str, Tensor]:
        size = 2 * self.model.config.backbone_config.patch_size
        intrinsics = torch.tensor([[size, 0, size / 2], [0, size, size / 2], [0, 0, 1]])
        scene = {
            "pixel_values": torch.zeros(1, 2, 3, size, size),
            "view_mask": torch.tensor([[False, True]]),
            "extrinsics": torch.eye(3, 4).expand(1, 2, 3, 4),
            "intrinsics": intrinsics.expand(1, 2, 3, 3),
        }
        return self._prepare_inputs(scene)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        # It counts per_device_train_batch_size, which plays no part here.
        logs = {key: value for key, value in logs.items() if key != "train_samples_per_second"}
        if "loss" in logs:
            loss, count = logs.pop("loss"), self._loss_count
            if count:
                # The parts are of this process, "loss" is the mean over all, to which blank scenes gave zeros.
                parts = {name: float(total) / count for name, total in self._loss_sums.items()}
                logs = {"loss": loss * (count + self._num_blank) / count, **logs, **parts}
            self._loss_sums.clear()
            self._loss_count = self._num_blank = 0
        super().log(logs, *args, **kwargs)

    def score(self) -> dict[str, Any]:
        """`evaluate_psfm` on `eval_dataset`, with the mean feature of `mean_batches`."""
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        with self.accelerator.autocast():
            if self._means is None:
                self._means = mean_features(model, map(self._prepare_inputs, self.mean_batches))
            scores = evaluate_psfm(model, map(self._prepare_inputs, self.eval_dataset), self._means)
        model.train(was_training)
        return scores

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        scores = self.score()
        numbers = {f"{metric_key_prefix}_{key}": value for key, value in scores.items() if isinstance(value, float)}
        self.log(numbers)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, numbers)
        return numbers

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # The Trainer would push here, before there is a card.
        super().save_model(output_dir, _internal_call=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        if not self._frozen_is_saved:
            save_frozen(model, self.output_dir)
            self._frozen_is_saved = True
        save_trained(model, folder, frozen_folder=self.output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def create_model_card(self, *args, **kwargs) -> None:
        """The script writes the card, from the run's own numbers; `push_to_hub` sends it along."""


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
