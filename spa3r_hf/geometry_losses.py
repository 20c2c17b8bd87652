"""The losses that a VGGT is trained with (arXiv 2503.11651): cameras, depth and points; and one for matching."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .camera_spa3r import cameras_to_pose_encoding, relative_to_first_view, unproject
from .modeling_spa3r_vggt import Spa3RVGGTOutput


# An earlier refinement iteration of the camera head counts this much less than the one after it.
ITERATION_DISCOUNT = 0.6
# Translation, quaternion and fields of view in a pose encoding, and their weights as in VGGT's training code.
CAMERA_PARTS = ((1.0, slice(0, 3)), (1.0, slice(3, 7)), (0.5, slice(7, 9)))
# Errors beyond this (scene units; quaternion entries; radians) pull no harder than it.
HUBER_DELTA = 0.05
# Global layers whose first two heads are taught to match, the weight, and how much farther than the surface that
# is seen a point may be (a share of depth) before it counts as hidden.
MATCH_LAYERS, MATCH_WEIGHT, OCCLUSION_MARGIN = (2, 3), 0.1, 0.05
# Weight of the camera loss, and of the log confidence that keeps confidences from shrinking.
CAMERA_WEIGHT, CONFIDENCE_WEIGHT = 5.0, 0.2


@dataclass(frozen=True)
class SceneGeometry:
    """
    True geometry of B scenes in the frames of their first cameras; the unit is the points' mean distance from there.

    Attributes:
        extrinsics: (B, V, 3, 4), camera <- world.
        intrinsics: (B, V, 3, 3), pixels.
        depth: (B, V, H, W), along the optical axis.
        points: (B, V, H, W, 3).
    """

    extrinsics: Tensor
    intrinsics: Tensor
    depth: Tensor
    points: Tensor

    @classmethod
    def from_metric(cls, extrinsics: Tensor, intrinsics: Tensor, depth: Tensor) -> "SceneGeometry":
        """Extrinsics (B, V, 3, 4) in any world frame and depth (B, V, H, W) in the same units, such as metres."""
        extrinsics = relative_to_first_view(extrinsics)
        points = unproject(depth, extrinsics, intrinsics)
        scale = points.norm(dim=-1).mean((1, 2, 3))[:, None, None, None]
        translation = extrinsics[..., 3:] / scale
        return cls(
            torch.cat((extrinsics[..., :3], translation), dim=-1), intrinsics, depth / scale, points / scale[..., None]
        )


def camera_loss(pose_encodings: tuple[Tensor, ...], geometry: SceneGeometry, image_size: tuple[int, int]) -> Tensor:
    """Huber loss on translation, quaternion and fields of view, of every iteration, the later the heavier."""
    target = cameras_to_pose_encoding(geometry.extrinsics, geometry.intrinsics, image_size)
    total = target.new_zeros(())
    for age, pose in enumerate(reversed(pose_encodings)):
        for weight, part in CAMERA_PARTS:
            error = F.huber_loss(pose[..., part], target[..., part], delta=HUBER_DELTA) / HUBER_DELTA
            total = total + ITERATION_DISCOUNT**age * weight * error
    return CAMERA_WEIGHT * total / len(pose_encodings)


def dense_loss(prediction: Tensor, confidence: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """
    Confidence-weighted error of maps (B, V, H, W, C), confidence (B, V, H, W) >= 1, and the same of their gradients.

    Returns:
        Both losses; the first includes the reward for confidence.
    """
    error = (prediction - target).norm(dim=-1)
    difference = prediction - target
    gradient = (difference[..., 1:, :, :] - difference[..., :-1, :, :]).norm(dim=-1) * confidence[..., 1:, :]
    sideways = (difference[..., :, 1:, :] - difference[..., :, :-1, :]).norm(dim=-1) * confidence[..., :, 1:]
    value = (error * confidence - CONFIDENCE_WEIGHT * confidence.log()).mean()
    return value, gradient.mean() + sideways.mean()


def patch_matches(geometry: SceneGeometry, patch_size: int, others: Tensor) -> tuple[Tensor, Tensor]:
    """
    Where the middle of each patch of a view is seen in another view.

    Args:
        others: (V,), the other view of each.

    Returns:
        The patch (B, V, N) that it falls in, row by row, and whether it is seen there (B, V, N): inside the picture
        and not behind something nearer.
    """
    height, width = geometry.depth.shape[-2:]
    middle = slice(patch_size // 2, None, patch_size)
    points = geometry.points[:, :, middle, middle].flatten(2, 3)
    extrinsics = geometry.extrinsics[:, others]
    in_camera = points @ extrinsics[..., :3].mT + extrinsics[..., None, :, 3]
    depth = in_camera[..., 2]
    pixels = in_camera @ geometry.intrinsics[:, others].mT
    x, y = (pixels[..., :2] / depth.clamp_min(1e-6)[..., None]).unbind(-1)
    inside = (depth > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = (torch.where(inside, axis, 0).long() for axis in (x, y))
    surface = geometry.depth[:, others].flatten(2).gather(2, y * width + x)
    seen = inside & ((depth - surface).abs() < OCCLUSION_MARGIN * surface)
    return y // patch_size * (width // patch_size) + x // patch_size, seen


def match_loss(attentions: tuple[Tensor, ...], geometry: SceneGeometry, num_prefix: int, patch_size: int) -> Tensor:
    """
    -log of how much a patch attends to where its middle is seen in another view.

    It stands for VGGT's tracking loss, at no extra parameters: matching is what takes longest to emerge from cameras
    and points alone. Of the layers in `MATCH_LAYERS`, the first head is taught to look into the first view, whose
    camera is the world, and the second into all other views alike.

    Args:
        attentions: Of the global layers, (B, heads, V * P, V * P) each.
        num_prefix: Tokens of a view ahead of its patches.
    """
    num_views = geometry.depth.shape[1]
    views = torch.arange(num_views, device=geometry.depth.device)
    wanted = [(0, torch.zeros_like(views))] + [(1, (views + step) % num_views) for step in range(1, num_views)]
    losses: dict[int, list[Tensor]] = {0: [], 1: []}
    for head, others in wanted:
        matches, seen = patch_matches(geometry, patch_size, others)
        seen = seen & (others != views)[:, None]
        for layer in MATCH_LAYERS:
            weights = attentions[layer][:, head].unflatten(2, (num_views, -1)).unflatten(1, (num_views, -1))
            # (B, V, N, N): from the patches of each view to those of its other view.
            to_other = weights.transpose(2, 3)[:, views, others][:, :, num_prefix:, num_prefix:].float()
            likelihood = to_other.gather(-1, matches[..., None])[..., 0]
            losses[head].append(-likelihood.clamp_min(1e-6).log()[seen])
    means = [torch.cat(of_head).mean() for of_head in losses.values()]
    return MATCH_WEIGHT * torch.stack(means).mean().nan_to_num()


def geometry_losses(
    output: Spa3RVGGTOutput, geometry: SceneGeometry, image_size: tuple[int, int]
) -> dict[str, Tensor]:
    """`camera`, `depth`, `depth_gradient`, `points` and `points_gradient`, as far as the output has their maps."""
    losses = {}
    if output.pose_encodings is not None:
        losses["camera"] = camera_loss(output.pose_encodings, geometry, image_size)
    if output.depth is not None and output.depth_confidence is not None:
        losses["depth"], losses["depth_gradient"] = dense_loss(
            output.depth, output.depth_confidence, geometry.depth[..., None]
        )
    if output.points is not None and output.points_confidence is not None:
        losses["points"], losses["points_gradient"] = dense_loss(
            output.points, output.points_confidence, geometry.points
        )
    return losses
