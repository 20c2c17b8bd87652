"""`transformers.Trainer` for the geometry backbone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .geometry_losses import MATCH_LAYERS, SceneGeometry, geometry_losses, match_loss
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
        # Only eager attention gives its weights away.
        matching = config._attn_implementation == "eager" and config.num_hidden_layers > max(MATCH_LAYERS)
        output = model(
            pixel_values,
            output_cameras=config.use_camera_head,
            output_depth=config.use_depth_head,
            output_points=config.use_point_head,
            output_attentions=matching,
        )
        geometry = SceneGeometry.from_metric(inputs["extrinsics"], inputs["intrinsics"], inputs["depth"])
        losses = geometry_losses(output, geometry, image_size_of(pixel_values))
        if matching:
            losses["match"] = match_loss(output.attentions, geometry, config.num_prefix_tokens, config.patch_size)
        self.add_losses(losses)
        loss = torch.stack(list(losses.values())).sum()
        return (loss, output) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        # The Trainer goes on from a checkpoint by the names of today; the library saves DINOv2 under those of old.
        is_checkpoint = folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, save_original_format=not is_checkpoint)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def score(self) -> dict[str, dict[str, dict[str, float]]]:
        """`evaluate_geometry` on each list of batches of `eval_dataset`."""
        with self.evaluated_model() as model:
            return {
                name: evaluate_geometry(model, map(self._prepare_inputs, batches))
                for name, batches in self.eval_dataset.items()
            }

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        numbers = {
            f"{name}_{key}": value for name, scores in self.score().items() for key, value in scores["model"].items()
        }
        return self.log_scores(numbers, metric_key_prefix)
