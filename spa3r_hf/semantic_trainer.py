"""A small semantic teacher, trained on procedural rooms to say what each patch shows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate
from transformers import DINOv3ViTConfig, DINOv3ViTModel, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .model_card import markdown_table
from .modeling_spa3r_vggt import normalize_pixels
from .probes import classification_probe
from .psfm_data import PSFMBatchSampler
from .rooms_walks import PIXEL_CATEGORIES
from .scene_trainer import SceneTrainer


# A patch is of the category that most of its pixels show; patches of more mixed content are left out of the probe.
MIN_SHARE = 0.6
# Patches that the probes learn from, evenly spaced over those there are.
NUM_PROBE_PATCHES = 12_000


def patch_category_shares(categories: Tensor, patch_size: int) -> Tensor:
    """Categories (..., H, W) of pixels -> the share of each category in each patch (..., N, K), row by row."""
    num_categories = len(PIXEL_CATEGORIES)
    maps = categories.flatten(0, -3)
    rows, columns = (side // patch_size for side in maps.shape[-2:])
    patches = maps.unflatten(1, (rows, patch_size)).unflatten(3, (columns, patch_size)).transpose(2, 3)
    patches = patches.reshape(-1, patch_size**2).long()
    shares = torch.zeros(len(patches), num_categories, device=maps.device)
    shares.scatter_add_(1, patches, torch.full(patches.shape, 1 / patch_size**2, device=maps.device))
    return shares.view(*categories.shape[:-2], rows * columns, num_categories)


class PatchCategoryModel(nn.Module):
    """A DINOv3-shaped ViT and a linear layer that predicts the shares of categories of each patch."""

    def __init__(self, config: DINOv3ViTConfig):
        super().__init__()
        self.config = config
        self.patch_size: int = config.patch_size  # type: ignore[assignment]  # the library allows (height, width) too
        self.vit = DINOv3ViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, len(PIXEL_CATEGORIES))

    def features(self, pixel_values: Tensor) -> Tensor:
        """Patch features (..., N, C) of images (..., 3, H, W) in [0, 1], as `Spa3RForPreTraining` reads them."""
        tokens = self.vit(normalize_pixels(pixel_values).flatten(0, -4)).last_hidden_state
        return tokens[:, 1 + self.config.num_register_tokens :].view(*pixel_values.shape[:-3], -1, tokens.shape[-1])

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits (..., N, K)."""
        return self.classifier(self.features(pixel_values))


class SemanticTrainer(SceneTrainer):
    """
    Trainer of [`PatchCategoryModel`] on views of rooms (see `RoomGeometryDataset`): cross entropy with the shares of
    categories in each patch.

    `eval_dataset` is a list of batches; `probe_batches` are those that linear probes learn from.
    """

    model: PatchCategoryModel

    def __init__(
        self,
        *,
        args: TrainingArguments,
        batch_sampler: PSFMBatchSampler,
        probe_batches: list[dict[str, Any]],
        **kwargs,
    ):
        super().__init__(args=args, batch_sampler=batch_sampler, collate_fn=default_collate, **kwargs)
        self.probe_batches = probe_batches

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ):
        logits = model(inputs["pixel_values"])
        shares = patch_category_shares(inputs["categories"], self.model.patch_size)
        loss = F.cross_entropy(logits.flatten(0, -2).float(), shares.flatten(0, -2))
        return (loss, logits) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:  # what others use is the ViT
            self.accelerator.unwrap_model(self.model).vit.save_pretrained(folder)

    def score(self) -> dict[str, dict[str, float]]:
        """`probe_categories` of the ViT's features, on `eval_dataset`."""
        parts = (self.probe_batches, self.eval_dataset)
        with self.evaluated_model() as model:
            return probe_categories(model, [[self._prepare_inputs(batch) for batch in part] for part in parts])

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        scores = self.score()
        return self.log_scores({f"probe_{key}": value for key, value in scores["model"].items()}, metric_key_prefix)


@torch.no_grad()
def probe_categories(
    model: PatchCategoryModel, parts: Sequence[Sequence[Mapping[str, Tensor]]]
) -> dict[str, dict[str, float]]:
    """
    Linear probes of patch categories.

    Args:
        model: In eval mode.
        parts: Batches to learn from, and batches to score, with `pixel_values` (B, V, 3, H, W) and `categories`
            (B, V, H, W).

    Returns:
        `accuracy` over patches and `mean_class_accuracy` over the categories that occur, in [0, 1], of probes on the
        `model`'s features and on raw `pixels`, and of the commonest `constant` category.
    """
    size = model.patch_size
    features: dict[str, list[Tensor]] = {"model": [], "pixels": []}
    labels = []
    for index, batches in enumerate(parts):
        collected: dict[str, list[Tensor]] = {"model": [], "pixels": [], "labels": []}
        for batch in batches:
            pixels = batch["pixel_values"]
            share, label = patch_category_shares(batch["categories"], size).flatten(0, -2).max(-1)
            clear = share >= MIN_SHARE
            raw = F.unfold(pixels.flatten(0, 1), size, stride=size).mT
            collected["model"].append(model.features(pixels).flatten(0, -2)[clear].float().cpu())
            collected["pixels"].append(raw.flatten(0, 1)[clear].cpu())
            collected["labels"].append(label[clear].cpu())
        everything = {name: torch.cat(values) for name, values in collected.items()}
        if index == 0:
            step = max(1, len(everything["labels"]) // NUM_PROBE_PATCHES)
            everything = {name: values[::step] for name, values in everything.items()}
        labels.append(everything.pop("labels"))
        for name, values in everything.items():
            features[name].append(values)

    train_labels, true = labels
    scores = {}
    guesses = {"constant": train_labels.mode().values.expand_as(true)}
    for name, (train, test) in features.items():
        with torch.enable_grad():
            guesses[name] = classification_probe(train, train_labels, test, len(PIXEL_CATEGORIES))
    for name in ("model", "pixels", "constant"):
        right = (guesses[name] == true).double()
        of_class = [right[true == category].mean().item() for category in true.unique()]
        scores[name] = {"accuracy": right.mean().item(), "mean_class_accuracy": sum(of_class) / len(of_class)}
    return scores


def probe_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """The scores of `probe_categories` as a Markdown table."""
    labels = {"model": "linear probe on its features", "pixels": "linear probe on raw pixels"}
    rows = [
        [labels.get(name, "commonest category"), *(f"{value:.3f}" for value in values.values())]
        for name, values in scores.items()
    ]
    return markdown_table(["categories of patches", "accuracy", "mean over categories"], rows)
