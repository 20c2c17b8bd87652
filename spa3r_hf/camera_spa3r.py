"""
Cameras: pose encodings, rays and projection matrices, as pure functions on tensors.

Conventions, here and wherever a camera is passed:
- `extrinsics` (..., 3, 4) = [R | t], camera <- world, OpenCV axes (x right, y down, z forward);
  the world frame of a scene is the frame of its first camera.
- `intrinsics` (..., 3, 3) in pixels; pixel (0, 0) covers [0, 1) x [0, 1), its centre is (0.5, 0.5).
- `image_size` = (height, width) in pixels.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


# Radians; fields of view are kept this far from 0 and from pi.
MIN_FIELD_OF_VIEW = 0.01


def check_cameras(extrinsics: Tensor, intrinsics: Tensor, views: tuple[int, ...], tolerance: float = 1e-2) -> None:
    """
    Check given cameras before they are computed with.

    Args:
        extrinsics: (*views, 3, 4) or (*views, 4, 4), camera <- world.
        intrinsics: (*views, 3, 3), pixels.
        views: The leading shape that is expected: (B, V), or (V,) for one scene.
        tolerance: How far R @ R^T may be from the identity. The default leaves room for bfloat16.

    Raises:
        ValueError: A shape is another one, a number is not finite, a rotation is not orthonormal with determinant 1, a
            focal length is not above 0, or the last row of the intrinsics is not 0, 0, 1. The message names the scene
            (of several) and the view.
    """
    if extrinsics.shape not in ((*views, 3, 4), (*views, 4, 4)):
        raise ValueError(f"extrinsics have shape {tuple(extrinsics.shape)}; expected {(*views, 3, 4)}")
    if intrinsics.shape != (*views, 3, 3):
        raise ValueError(f"intrinsics have shape {tuple(intrinsics.shape)}; expected {(*views, 3, 3)}")
    rotations = extrinsics[..., :3, :3].float()
    identity = torch.eye(3, device=rotations.device)
    skew = (rotations @ rotations.transpose(-1, -2) - identity).abs().amax((-1, -2))
    focal = intrinsics[..., (0, 1), (0, 1)].amin(-1)
    last_row = intrinsics[..., 2, :] - intrinsics.new_tensor([0, 0, 1])
    findings = {
        "has numbers that are not finite": ~(
            extrinsics.isfinite().flatten(-2).all(-1) & intrinsics.isfinite().flatten(-2).all(-1)
        ),
        "has a rotation that is not orthonormal with determinant 1": (skew > tolerance)
        | (torch.linalg.det(rotations) < 0),
        "has a focal length that is not above 0": focal <= 0,
        "has a last row of the intrinsics that is not 0, 0, 1": last_row.abs().amax(-1) > 1e-5,
    }
    for finding, where in findings.items():
        if where.any():
            index = tuple(where.nonzero()[0].tolist())
            names = ("scene", "view")[-len(index) :]
            place = ", ".join(f"{name} {number}" for name, number in zip(names, index, strict=True))
            raise ValueError(
                f"the camera of {place} {finding}: extrinsics {extrinsics[index].tolist()}, "
                f"intrinsics {intrinsics[index].tolist()}; expected camera <- world and pixels"
            )


def quaternion_to_rotation(quaternion: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4) in the order x y z w, of any length above 0."""
    x, y, z, w = quaternion.unbind(-1)
    scale = 2.0 / (quaternion * quaternion).sum(-1)
    rows = (
        *(1 - scale * (y * y + z * z), scale * (x * y - z * w), scale * (x * z + y * w)),
        *(scale * (x * y + z * w), 1 - scale * (x * x + z * z), scale * (y * z - x * w)),
        *(scale * (x * z - y * w), scale * (y * z + x * w), 1 - scale * (x * x + y * y)),
    )
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def pose_encoding_to_cameras(pose_encoding: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """
    Decode the nine numbers of VGGT's camera head.

    Args:
        pose_encoding: (..., 9): translation (3), quaternion x y z w (4), vertical and horizontal field of view (rad).

    Returns:
        Extrinsics (..., 3, 4) and intrinsics (..., 3, 3), with the principal point in the middle of the image.
    """
    height, width = image_size
    # The ReLU of an untrained head answers 0, at which there is no focal length; trained ones stay far from the ends.
    fields_of_view = pose_encoding[..., 7:].clamp(MIN_FIELD_OF_VIEW, math.pi - MIN_FIELD_OF_VIEW)
    rotation = quaternion_to_rotation(pose_encoding[..., 3:7])
    extrinsics = torch.cat((rotation, pose_encoding[..., :3, None]), dim=-1)
    focal_y = height / 2 / torch.tan(fields_of_view[..., 0] / 2)
    focal_x = width / 2 / torch.tan(fields_of_view[..., 1] / 2)
    zero, one = torch.zeros_like(focal_x), torch.ones_like(focal_x)
    rows = (focal_x, zero, zero + width / 2, zero, focal_y, zero + height / 2, zero, zero, one)
    return extrinsics, torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def to_homogeneous(extrinsics: Tensor) -> Tensor:
    """(..., 3, 4) or (..., 4, 4) -> (..., 4, 4) with the last row 0 0 0 1."""
    last = extrinsics.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*extrinsics.shape[:-2], 1, 4)
    return torch.cat((extrinsics[..., :3, :], last), dim=-2)


def invert_rigid(extrinsics: Tensor) -> Tensor:
    """Inverse (..., 4, 4) of rigid transforms (..., 4, 4), by transposing the rotation."""
    rotation = extrinsics[..., :3, :3].transpose(-1, -2)
    return to_homogeneous(torch.cat((rotation, -rotation @ extrinsics[..., :3, 3:]), dim=-1))


def relative_to_first_view(extrinsics: Tensor) -> Tensor:
    """Extrinsics (B, V, 3, 4) in any world frame -> (B, V, 3, 4) with each scene's first camera as the world frame."""
    extrinsics = to_homogeneous(extrinsics)
    return (extrinsics @ invert_rigid(extrinsics[:, :1]))[..., :3, :]


def camera_rays(intrinsics: Tensor, grid_size: tuple[int, int], patch_size: int) -> Tensor:
    """
    Unit rays (..., h * w, 3) through the patch centres, in camera axes, row by row.

    Args:
        intrinsics: (..., 3, 3), pixels.
        grid_size: (h, w) patches.
        patch_size: Side of a patch in pixels.
    """
    rows, columns = grid_size
    intrinsics = intrinsics / patch_size
    y = torch.arange(rows, device=intrinsics.device, dtype=intrinsics.dtype) + 0.5
    x = torch.arange(columns, device=intrinsics.device, dtype=intrinsics.dtype) + 0.5
    x = (x - intrinsics[..., 0, 2, None]) / intrinsics[..., 0, 0, None]
    y = (y - intrinsics[..., 1, 2, None]) / intrinsics[..., 1, 1, None]
    x = x[..., None, :].expand(*x.shape[:-1], rows, columns)
    y = y[..., :, None].expand(*y.shape[:-1], rows, columns)
    return F.normalize(torch.stack((x, y, torch.ones_like(x)), dim=-1), dim=-1).flatten(-3, -2)


def plucker_rays(extrinsics: Tensor, intrinsics: Tensor, grid_size: tuple[int, int], patch_size: int) -> Tensor:
    """Plücker coordinates (..., h * w, 6) = (o x d, d) of the rays through the patch centres, in the world frame."""
    world_from_camera = invert_rigid(to_homogeneous(extrinsics))
    rays = camera_rays(intrinsics, grid_size, patch_size)
    directions = rays @ world_from_camera[..., :3, :3].transpose(-1, -2)
    origins = world_from_camera[..., None, :3, 3].expand_as(directions)
    return torch.cat((torch.linalg.cross(origins, directions), directions), dim=-1)


def projection_matrices(extrinsics: Tensor, intrinsics: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """
    PRoPE's P = lift(K) @ [R | t] (..., 4, 4) and its inverse (arXiv 2507.10496), with normalised intrinsics:
    f_x / W, f_y / H, c_x / W - 0.5, c_y / H - 0.5. The inverse is taken in closed form.
    """
    height, width = image_size
    size = intrinsics.new_tensor([width, height])
    focal = intrinsics[..., (0, 1), (0, 1)] / size
    centre = intrinsics[..., :2, 2] / size - 0.5
    lifted = torch.eye(4, device=intrinsics.device, dtype=intrinsics.dtype).repeat(*intrinsics.shape[:-2], 1, 1)
    lifted_inverse = lifted.clone()
    lifted[..., (0, 1), (0, 1)] = focal
    lifted[..., :2, 2] = centre
    lifted_inverse[..., (0, 1), (0, 1)] = 1 / focal
    lifted_inverse[..., :2, 2] = -centre / focal
    extrinsics = to_homogeneous(extrinsics)
    return lifted @ extrinsics, invert_rigid(extrinsics) @ lifted_inverse


def camera_distances(extrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """
    How far the cameras of a scene are apart: centres (..., V, V) in scene units, and the angles (..., V, V) in radians
    of the rotations between them, for extrinsics (..., V, 3, 4).
    """
    world_from_camera = invert_rigid(to_homogeneous(extrinsics))
    centres, rotations = world_from_camera[..., :3, 3], world_from_camera[..., :3, :3]
    relative = rotations.unsqueeze(-3).mT @ rotations.unsqueeze(-4)
    cosines = (relative.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
    return torch.cdist(centres, centres), cosines.clamp(-1, 1).acos()


def rotation_to_quaternion(rotation: Tensor) -> Tensor:
    """Unit quaternions (..., 4) in the order x y z w, with w >= 0, of rotation matrices (..., 3, 3)."""
    r = rotation
    trace = r.diagonal(dim1=-2, dim2=-1)
    # Of the four ways to read a quaternion off a matrix, the one with the largest component is never a division by 0.
    squares = torch.stack(
        (
            1 + trace[..., 0] - trace[..., 1] - trace[..., 2],
            1 - trace[..., 0] + trace[..., 1] - trace[..., 2],
            1 - trace[..., 0] - trace[..., 1] + trace[..., 2],
            1 + trace.sum(-1),
        ),
        dim=-1,
    )
    xy, xz, yz = r[..., 0, 1] + r[..., 1, 0], r[..., 0, 2] + r[..., 2, 0], r[..., 1, 2] + r[..., 2, 1]
    xw, yw, zw = r[..., 2, 1] - r[..., 1, 2], r[..., 0, 2] - r[..., 2, 0], r[..., 1, 0] - r[..., 0, 1]
    x2, y2, z2, w2 = squares.unbind(-1)
    rows = (x2, xy, xz, xw, xy, y2, yz, yw, xz, yz, z2, zw, xw, yw, zw, w2)
    candidates = torch.stack(rows, dim=-1).unflatten(-1, (4, 4))
    best = squares.argmax(-1)[..., None, None]
    quaternion = F.normalize(torch.take_along_dim(candidates, best, dim=-2)[..., 0, :], dim=-1)
    return torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def cameras_to_pose_encoding(extrinsics: Tensor, intrinsics: Tensor, image_size: tuple[int, int]) -> Tensor:
    """
    The inverse of `pose_encoding_to_cameras`: extrinsics (..., 3, 4) and intrinsics (..., 3, 3) -> (..., 9). The
    principal point is taken to be in the middle of the image.
    """
    height, width = image_size
    size = intrinsics.new_tensor([height, width])
    focal = intrinsics[..., (1, 0), (1, 0)]
    fields_of_view = 2 * torch.atan(size / (2 * focal))
    quaternion = rotation_to_quaternion(extrinsics[..., :3, :3])
    return torch.cat((extrinsics[..., :3, 3], quaternion, fields_of_view), dim=-1)


def unproject(depth: Tensor, extrinsics: Tensor, intrinsics: Tensor) -> Tensor:
    """
    Points (..., H, W, 3) in the world frame of pixels with depth (..., H, W) along the optical axis, for extrinsics
    (..., 3, 4) and intrinsics (..., 3, 3).
    """
    height, width = depth.shape[-2:]
    rays = camera_rays(intrinsics, (height, width), patch_size=1).unflatten(-2, (height, width))
    points = rays / rays[..., 2:] * depth[..., None]
    world_from_camera = invert_rigid(to_homogeneous(extrinsics))
    rotation, translation = world_from_camera[..., :3, :3], world_from_camera[..., :3, 3]
    return points @ rotation.mT[..., None, :, :] + translation[..., None, None, :]
