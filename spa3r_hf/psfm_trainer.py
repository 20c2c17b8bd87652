"""`transformers.Trainer` for Predictive Spatial Field Modeling."""

import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from .checkpoint_spa3r import save_frozen, save_trained
from .psfm_data import collate_scenes
from .psfm_metrics import evaluate_psfm, mean_features


logger = logging.getLogger(__name__)


class PSFMTrainer(Trainer):
    """
    Trainer of [`Spa3RForPreTraining`].

    - batches come from a `batch_sampler` (see `PSFMBatchSampler`), or ready-made from a streaming data set;
    - the log shows each loss beside their sum;
    - `eval_dataset` is a list of batches with their `view_mask`, scored by `evaluate_psfm` on every process;
    - frozen weights are written once, to the output folder, checkpoints hold what is trained;
    - samples that could not be read (`on_bad_sample="skip"`) are named in `bad_samples` and left out.

    Args:
        mean_batches: Batches of training scenes whose mean feature is taken off for the centred cosine.
        batch_sampler: Batch sampler of the training set; None for a data set that yields batches.
    """

    def __init__(self, *args, mean_batches: list[dict[str, Any]], batch_sampler=None, **kwargs):
        super().__init__(*args, **kwargs)
        # The loss is a mean over the batch; it is the Trainer that divides it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.batch_sampler = batch_sampler
        self.mean_batches = mean_batches
        self.bad_samples: list[str] = []
        self._loss_sums: dict[str, float] = defaultdict(float)
        self._loss_count = 0
        self._means: dict[str, Tensor] | None = None

    def get_train_dataloader(self) -> DataLoader:
        batching: dict[str, Any] = {"batch_size": None}
        if self.batch_sampler is not None:
            batching = {"batch_sampler": self.batch_sampler, "collate_fn": collate_scenes}
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            self.train_dataset,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=workers > 0,
            **batching,
        )
        return self.accelerator.prepare(loader)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        # A run that goes on finds the frozen weights of the run that began: they are its own.
        if self.is_world_process_zero() and not resume_from_checkpoint:
            save_frozen(self.accelerator.unwrap_model(self.model), self.args.output_dir)
        self.accelerator.wait_for_everyone()
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.bad_samples = sorted(set(gather_object(self.bad_samples)))
        return result

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ):
        inputs = dict(inputs)
        for message in inputs.pop("bad_samples", ()):
            logger.warning("left out: %s", message)
            self.bad_samples.append(message)
        if "pixel_values" not in inputs:
            # Nothing of this batch could be read. Zero gradients keep the processes in step.
            return sum(0.0 * parameter.sum() for parameter in model.parameters() if parameter.requires_grad)
        output = model(**inputs)
        for name, loss in output.losses.items():
            self._loss_sums[name] += loss.detach()
        self._loss_count += 1
        return (output.loss, output) if return_outputs else output.loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._loss_count:
            # Of this process; "loss" is the mean over all of them.
            logs |= {name: float(total) / self._loss_count for name, total in self._loss_sums.items()}
            self._loss_sums.clear()
            self._loss_count = 0
        super().log(logs, *args, **kwargs)

    def _prepare_inputs(self, inputs: Any) -> Any:
        messages = inputs.pop("bad_samples", [])
        return super()._prepare_inputs(inputs) | ({"bad_samples": messages} if messages else {})

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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        save_trained(self.accelerator.unwrap_model(self.model), folder, frozen_folder=self.args.output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def create_model_card(self, *args, **kwargs) -> None:
        """The script writes the card, from the run's own numbers; `push_to_hub` sends it along."""
