"""`transformers.Trainer` for Predictive Spatial Field Modeling."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from .checkpoint_spa3r import save_frozen, save_trained
from .modeling_spa3r import Spa3RForPreTraining
from .psfm_data import PSFMBatchSampler, collate_scenes
from .psfm_metrics import evaluate_psfm, mean_features
from .scene_trainer import SceneTrainer


class PSFMTrainer(SceneTrainer):
    """
    Trainer of [`Spa3RForPreTraining`].

    - `eval_dataset` is a list of batches with their `view_mask`, scored by `evaluate_psfm` on every process;
    - frozen weights are written once, to the output folder, checkpoints hold what is trained;
    - a batch of samples none of which could be read (`on_bad_sample="skip"`) changes nothing.

    Args:
        mean_batches: Batches of training scenes whose mean feature is taken off for the centred cosine.
        args, batch_sampler: See `SceneTrainer`.
    """

    model: Spa3RForPreTraining

    def __init__(
        self,
        *,
        args: TrainingArguments,
        mean_batches: list[dict[str, Any]],
        batch_sampler: PSFMBatchSampler | None = None,
        **kwargs,
    ):
        super().__init__(args=args, batch_sampler=batch_sampler, collate_fn=collate_scenes, **kwargs)
        self.output_dir = Path(str(args.output_dir))
        self.mean_batches = mean_batches
        self._means: dict[str, Tensor] | None = None
        self._frozen_is_saved = False

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        # The frozen weights beside the checkpoint that a run goes on from are its own.
        if isinstance(resume_from_checkpoint, str):
            self._frozen_is_saved = Path(resume_from_checkpoint).resolve().parent == self.output_dir.resolve()
        else:
            self._frozen_is_saved = bool(resume_from_checkpoint)
        result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self.gather_bad_samples()
        return result

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ):
        inputs = dict(inputs)
        self.count_bad_samples(inputs.pop("bad_samples", ()))
        if "pixel_values" not in inputs:
            # Nothing of this batch could be read. Something must go through the model, or other processes wait for it.
            self._num_blank += 1
            output = model(**self._blank_scene())
            return (0.0 * output.loss, output) if return_outputs else 0.0 * output.loss
        output = model(**inputs)
        self.add_losses(output.losses)
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

    def score(self) -> dict[str, Any]:
        """`evaluate_psfm` on `eval_dataset`, with the mean feature of `mean_batches`."""
        with self.evaluated_model() as model, self.accelerator.autocast():
            if self._means is None:
                self._means = mean_features(model, map(self._prepare_inputs, self.mean_batches))
            return evaluate_psfm(model, map(self._prepare_inputs, self.eval_dataset), self._means)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        return self.log_scores(self.score(), metric_key_prefix)

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
