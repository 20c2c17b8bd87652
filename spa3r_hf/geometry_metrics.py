"""How well a geometry backbone tells cameras, depth and points, next to trivial baselines."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from .camera_spa3r import invert_rigid, to_homogeneous, unproject
from .modeling_spa3r_vggt import Spa3RVGGTModel


THRESHOLDS = (5, 15, 30)
# Pairs of views nearer than this (metres) have no direction of translation to speak of.
MIN_BASELINE = 0.3


def relative_pose_errors(extrinsics: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    Errors of the relative poses of all pairs of views, for extrinsics and target (B, V, 3, 4).

    Returns:
        For the V (V - 1) / 2 pairs of each scene: angle of the rotation error (B, pairs) in degrees, angle between the
        directions of translation (B, pairs) in degrees, and the true baseline (B, pairs) in the target's units.
    """
    first, second = torch.triu_indices(extrinsics.shape[1], extrinsics.shape[1], offset=1)

    def relative(cameras: Tensor) -> Tensor:
        cameras = to_homogeneous(cameras)
        return cameras[:, second] @ invert_rigid(cameras[:, first])

    guess, truth = relative(extrinsics), relative(target)
    rotation = guess[..., :3, :3] @ truth[..., :3, :3].mT
    cosine = (rotation.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
    direction = F.cosine_similarity(guess[..., :3, 3], truth[..., :3, 3], dim=-1)
    baseline = truth[..., :3, 3].norm(dim=-1)
    return cosine.clamp(-1, 1).acos().rad2deg(), direction.clamp(-1, 1).acos().rad2deg(), baseline


def area_under_curve(errors: Tensor, limit: int = 30) -> float:
    """Mean over the thresholds 1, 2, ..., `limit` degrees of the share of errors below them."""
    return sum((errors < threshold).double().mean().item() for threshold in range(1, limit + 1)) / limit


@torch.no_grad()
def evaluate_geometry(model: Spa3RVGGTModel, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, dict[str, float]]:
    """
    Score a backbone on posed scenes with depth.

    Args:
        model: In eval mode, on the device of the batches.
        batches: `pixel_values` (B, V, 3, H, W), `extrinsics` (B, V, 3, 4), `intrinsics` (B, V, 3, 3) and `depth`
            (B, V, H, W), in metres; equally many views each.

    Returns:
        Scores of the `model` and of the `baseline` (every pose the identity, every depth the mean of all):
        `rotation_acc_{5,15,30}` in [0, 1] and `rotation_median` in degrees, over all pairs of views;
        `translation_acc_{5,15,30}` and `auc_30` (of the larger of the two angles) in [0, 1], over those more than
        `MIN_BASELINE` apart; `depth_abs_rel` and `depth_delta_1.25` after median scaling of each scene; `point_error`
        in metres, of the points in the first camera's frame, after scaling their median distance from it.
    """
    collected: dict[str, dict[str, list[Tensor]]] = {"model": defaultdict(list), "baseline": defaultdict(list)}
    for batch in batches:
        pixel_values, depth = batch["pixel_values"], batch["depth"]
        output = model(
            pixel_values,
            output_cameras=True,
            output_depth=model.config.use_depth_head,
            output_points=model.config.use_point_head,
        )
        true_cameras = to_homogeneous(batch["extrinsics"])
        true_cameras = (true_cameras @ invert_rigid(true_cameras[:, :1]))[..., :3, :]
        true_points = unproject(depth, true_cameras, batch["intrinsics"])
        identity = torch.eye(4, device=depth.device)[:3].expand_as(true_cameras)
        flat = torch.ones_like(depth)
        guesses = {
            "model": (output.extrinsics, output.depth, output.points),
            "baseline": (identity, flat[..., None], unproject(flat, identity, batch["intrinsics"])),
        }
        for name, (cameras, depths, points) in guesses.items():
            scores = collected[name]
            rotation, translation, baseline = relative_pose_errors(cameras, true_cameras)
            far = baseline > MIN_BASELINE
            scores["rotation"].append(rotation.flatten())
            scores["translation"].append(translation[far])
            scores["pose"].append(torch.maximum(rotation, translation)[far])
            if depths is not None:
                depths = depths[..., 0]
                depths = depths * (depth.flatten(1).median(1)[0] / depths.flatten(1).median(1)[0])[:, None, None, None]
                ratio = torch.maximum(depths / depth, depth / depths)
                scores["depth_abs_rel"].append(((depths - depth).abs() / depth).flatten())
                scores["depth_delta_1.25"].append((ratio < 1.25).float().flatten())
            if points is not None:
                scale = true_points.norm(dim=-1).flatten(1).median(1)[0] / points.norm(dim=-1).flatten(1).median(1)[0]
                error = (points * scale[:, None, None, None, None] - true_points).norm(dim=-1)
                scores["point_error"].append(error.flatten())

    def summary(scores: dict[str, list[Tensor]]) -> dict[str, float]:
        errors = {key: torch.cat(values) for key, values in scores.items()}
        result = {"rotation_median": errors["rotation"].median().item(), "auc_30": area_under_curve(errors["pose"])}
        for kind in ("rotation", "translation"):
            for threshold in THRESHOLDS:
                result[f"{kind}_acc_{threshold}"] = (errors[kind] < threshold).double().mean().item()
        for key in ("depth_abs_rel", "depth_delta_1.25", "point_error"):
            if key in errors:
                result[key] = errors[key].double().mean().item()
        return result

    return {name: summary(scores) for name, scores in collected.items()}
