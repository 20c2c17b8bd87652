"""`transformers.Trainer` for the geometry backbone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate
from transformers import TrainingArguments

from .geometry_losses import SceneGeometry, geometry_losses
from .geometry_metrics import evaluate_geometry
from .modeling_spa3r_vggt import Spa3RVGGTModel, image_size_of
from .psfm_data import PSFMBatchSampler
from .scene_trainer import SceneTrainer


class GeometryTrainer(SceneTrainer):
    """
    Trainer of [`Spa3RVGGTModel`] on scenes with cameras and depth (see `RoomGeometryDataset`), with VGGT's losses.

    `eval_dataset` maps a name, such as "4_views", to a list of batches, scored by `evaluate_geometry`.
    """

    model: Spa3RVGGTModel

    def __init__(self, *, args: TrainingArguments, batch_sampler: PSFMBatchSampler, **kwargs):
        super().__init__(args=args, batch_sampler=batch_sampler, collate_fn=default_collate, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ):
        config, pixel_values = self.model.config, inputs["pixel_values"]
        output = model(
            pixel_values,
            output_cameras=config.use_camera_head,
            output_depth=config.use_depth_head,
            output_points=config.use_point_head,
        )
        geometry = SceneGeometry.from_metric(inputs["extrinsics"], inputs["intrinsics"], inputs["depth"])
        losses = geometry_losses(output, geometry, image_size_of(pixel_values))
        self.add_losses(losses)
        loss = torch.stack(list(losses.values())).sum()
        return (loss, output) if return_outputs else loss

    def score(self) -> dict[str, dict[str, dict[str, float]]]:
        """`evaluate_geometry` on each list of batches of `eval_dataset`."""
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        scores = {
            name: evaluate_geometry(model, map(self._prepare_inputs, batches))
            for name, batches in self.eval_dataset.items()
        }
        model.train(was_training)
        return scores

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        numbers = {
            f"{name}_{key}": value for name, scores in self.score().items() for key, value in scores["model"].items()
        }
        return self.log_scores(numbers, metric_key_prefix)
