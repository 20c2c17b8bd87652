"""How well unseen views are predicted, next to three baselines computed on the same views."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .camera_spa3r import camera_distances
from .modeling_spa3r import Spa3RForPreTraining


KINDS = ("geometric", "semantic")


@torch.no_grad()
def mean_features(model: Spa3RForPreTraining, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean feature (width,) of each kind over all patches of all views of `batches`."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = defaultdict(int)
    for batch in batches:
        output = model(**batch)
        for kind in KINDS:
            target = getattr(output, f"{kind}_target")
            if target is not None:
                sums[kind] = sums.get(kind, 0) + target.double().flatten(0, -2).sum(0)
                counts[kind] += target.shape[:-1].numel()
    return {kind: (total / counts[kind]).float() for kind, total in sums.items()}


def nearest_context_view(extrinsics: Tensor, view_mask: Tensor) -> Tensor:
    """
    Index (B, V) of the context view whose camera is nearest to each view's.

    Near means a small distance between the centres plus a small angle, each over its mean in the scene.
    """
    distances, angles = camera_distances(extrinsics)
    distances, angles = (d / d.mean((-2, -1), keepdim=True).clamp_min(1e-8) for d in (distances, angles))
    apart = distances + angles
    return apart.masked_fill(view_mask[:, None, :], math.inf).argmin(-1)


@torch.no_grad()
def evaluate_psfm(
    model: Spa3RForPreTraining, batches: Iterable[Mapping[str, Tensor]], means: Mapping[str, Tensor]
) -> dict[str, Any]:
    """
    Score the predictions of target views.

    Args:
        model: In eval mode, on the device of the batches.
        batches: Inputs of `model.forward`, with `view_mask`. With more than one scene in a batch, the baseline
            `other_scene` decodes the latents of the scene before.
        means: The training set's mean feature (width,) for each kind, from `mean_features`.

    Returns:
        For each kind of feature that the model predicts, averaged over all patches of all target views:
        `{kind}_cosine`, `{kind}_centred_cosine` (after `means` is taken off both: the features share a large common
        part, which saturates the plain cosine) in [-1, 1], and `{kind}_l1` (smooth L1); `depth_abs_rel` where the
        depth probe is on; `loss`; the same for each of `baselines`: `mean`, `nearest_context` and `other_scene`;
        `camera_distance` between target and nearest context view, in scene units and degrees; `num_scenes`,
        `num_target_views`.
    """
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))

    def add(name: str, key: str, values: Tensor) -> None:
        totals[name][key] += values.double().sum().item()
        counts[name][key] += values.numel()

    apart: list[Tensor] = []
    turned: list[Tensor] = []
    num_scenes = 0
    for batch in batches:
        output = model(**batch)
        mask = output.view_mask
        num_scenes += len(mask)
        add("model", "loss", output.loss)
        nearest = nearest_context_view(output.extrinsics, mask)
        for collected, values in zip((apart, turned), camera_distances(output.extrinsics), strict=True):
            collected.append(values.gather(-1, nearest[..., None])[..., 0][mask])
        predictions: dict[str, Mapping[str, Tensor]] = {"model": output}
        if len(mask) > 1:
            height, width = batch["pixel_values"].shape[-2:]
            others = model.decode(output.latents.roll(1, 0), output.extrinsics, output.intrinsics, (height, width))
            predictions["other_scene"] = others

        for kind in KINDS:
            target = getattr(output, f"{kind}_target")
            if target is None:
                continue
            guesses = {name: prediction[f"{kind}_prediction"] for name, prediction in predictions.items()}
            guesses["mean"] = means[kind].expand_as(target)
            guesses["nearest_context"] = torch.take_along_dim(target, nearest[..., None, None], dim=1)
            truth = target[mask].float()
            for name, guess in guesses.items():
                guess = guess[mask].float()
                add(name, f"{kind}_cosine", F.cosine_similarity(guess, truth, dim=-1))
                add(name, f"{kind}_l1", F.smooth_l1_loss(guess, truth, reduction="none").mean(-1))
                if name != "mean":  # nothing of the mean is left once it is taken off
                    centred = F.cosine_similarity(guess - means[kind], truth - means[kind], dim=-1)
                    add(name, f"{kind}_centred_cosine", centred)
        if output.depth_prediction is not None:
            truth = output.depth_target[mask]
            add("model", "depth_abs_rel", (output.depth_prediction[mask] - truth).abs() / truth)

    averages = {
        name: {key: scores[key] / counts[name][key] for key in sorted(scores)} for name, scores in totals.items()
    }
    distance, angle = torch.cat(apart), torch.cat(turned).rad2deg()
    return {
        **averages.pop("model"),
        "baselines": averages,
        "camera_distance": {
            "units_mean": distance.mean().item(),
            "units_max": distance.max().item(),
            "degrees_mean": angle.mean().item(),
            "degrees_max": angle.max().item(),
        },
        "num_scenes": num_scenes,
        "num_target_views": len(distance),
    }


@torch.no_grad()
def unseen_depth(model: Spa3RForPreTraining, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """
    Depth of target views at a pixel of each patch against the truth, after median scaling of each scene's targets.

    Args:
        model: In eval mode, with a depth probe.
        batches: `pixel_values` (B, V, 3, H, W), `view_mask` (B, V) and true `depth` (B, V, H, W).

    Returns:
        `probe_abs_rel`: of the probe, which has not seen the views; `backbone_abs_rel`: of the backbone, which has.
    """
    errors: dict[str, list[Tensor]] = {"probe_abs_rel": [], "backbone_abs_rel": []}
    for batch in batches:
        output = model(batch["pixel_values"], view_mask=batch["view_mask"])
        patch_size = model.config.backbone_config.patch_size
        rows, columns = (side // patch_size for side in batch["depth"].shape[-2:])
        # The pixel that the model's own target is read at: the first one of the patch.
        true = F.interpolate(batch["depth"], size=(rows, columns), mode="nearest").flatten(2)
        for name, guess in zip(errors, (output.depth_prediction, output.depth_target), strict=True):
            for scene, mask in enumerate(batch["view_mask"]):
                predicted, truth = guess[scene, mask].flatten(), true[scene, mask].flatten()
                scaled = predicted * truth.median() / predicted.median()
                errors[name].append(((scaled - truth).abs() / truth).mean())
    return {name: torch.stack(values).mean().item() for name, values in errors.items()}
