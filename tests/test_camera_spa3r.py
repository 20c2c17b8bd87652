import math

import pytest
import torch
from tiny_models import some_cameras

from spa3r_hf.camera_spa3r import (
    camera_rays,
    cameras_to_pose_encoding,
    check_cameras,
    invert_rigid,
    plucker_rays,
    pose_encoding_to_cameras,
    projection_matrices,
    quaternion_to_rotation,
    relative_to_first_view,
    to_homogeneous,
    unproject,
)


def close(left, right, tolerance=1e-5):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def test_quaternions_turn_as_they_should():
    half = math.sqrt(0.5)
    about_z = quaternion_to_rotation(torch.tensor([0.0, 0.0, half, half]))  # x y z w: a quarter turn about z
    close(about_z @ torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]))
    about_x = quaternion_to_rotation(torch.tensor([3.0, 0.0, 0.0, 3.0]))  # the length does not matter
    close(about_x @ torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0]))
    random = quaternion_to_rotation(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)))
    close(random @ random.mT, torch.eye(3).expand(50, 3, 3))
    close(torch.linalg.det(random), torch.ones(50))


def test_pose_encoding_decodes_to_pixels():
    pose = torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 2.0, math.pi / 2, math.pi / 3]])
    extrinsics, intrinsics = pose_encoding_to_cameras(pose, (28, 42))
    close(extrinsics[0], torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 2], [0, 0, 1, 3]]))
    expected = torch.tensor([[21 / math.tan(math.pi / 6), 0, 21], [0, 14.0, 14], [0, 0, 1]])
    close(intrinsics[0], expected)


def test_an_untrained_head_gives_usable_cameras():
    pose = torch.tensor([[0.0, 0, 0, 0, 0, 0, 1, 0, 9]])
    _, intrinsics = pose_encoding_to_cameras(pose, (28, 42))
    assert intrinsics.isfinite().all() and intrinsics[0, 0, 0] > 0 and intrinsics[0, 1, 1] > 0


def test_inverse_and_relative_extrinsics():
    extrinsics, _ = some_cameras()
    homogeneous = to_homogeneous(extrinsics)
    assert homogeneous.shape == (2, 4, 4, 4) and torch.equal(to_homogeneous(homogeneous), homogeneous)
    close(invert_rigid(homogeneous), torch.linalg.inv(homogeneous), 1e-4)
    relative = relative_to_first_view(extrinsics)
    close(relative[:, 0], torch.eye(4)[:3].expand(2, 3, 4))
    # A point is seen at the same place by each camera, whichever frame it is given in.
    point = torch.tensor([0.3, -0.2, 2.0, 1.0])
    seen = homogeneous @ point
    close((to_homogeneous(relative) @ seen[:, :1, :, None])[..., 0], seen, 1e-4)


def test_rays_pass_through_patch_centres():
    _, intrinsics = some_cameras(1, 2)
    rays = camera_rays(intrinsics, (2, 3), 14)
    assert rays.shape == (1, 2, 6, 3)
    close(rays.norm(dim=-1), torch.ones(1, 2, 6))
    pixels = rays @ intrinsics.mT
    pixels = pixels[..., :2] / pixels[..., 2:]
    centres = torch.tensor([[7.0 + 14 * column, 7.0 + 14 * row] for row in range(2) for column in range(3)])
    close(pixels, centres.expand(1, 2, 6, 2), 1e-4)


def test_plucker_rays_meet_their_camera_centre_and_their_patch():
    extrinsics, intrinsics = some_cameras(1, 3)
    moments, directions = plucker_rays(extrinsics, intrinsics, (2, 3), 14).split(3, dim=-1)
    close(directions.norm(dim=-1), torch.ones(1, 3, 6))
    centres = invert_rigid(to_homogeneous(extrinsics))[..., None, :3, 3].expand_as(directions)
    close(torch.linalg.cross(centres, directions), moments)
    further = centres + 2.5 * directions
    close(torch.linalg.cross(further, directions), moments, 1e-4)
    in_camera = (further @ extrinsics[..., :3].mT) + extrinsics[..., None, :, 3]
    close(in_camera, 2.5 * camera_rays(intrinsics, (2, 3), 14), 1e-4)


def test_projection_matrices_and_their_inverses():
    extrinsics, intrinsics = some_cameras()
    projection, inverse = projection_matrices(extrinsics, intrinsics, (28, 42))
    close(projection @ inverse, torch.eye(4).expand(2, 4, 4, 4), 1e-4)
    lifted = torch.zeros(2, 4, 4, 4)
    lifted[..., 0, 0], lifted[..., 1, 1] = intrinsics[..., 0, 0] / 42, intrinsics[..., 1, 1] / 28
    lifted[..., 0, 2], lifted[..., 1, 2] = intrinsics[..., 0, 2] / 42 - 0.5, intrinsics[..., 1, 2] / 28 - 0.5
    lifted[..., 2, 2] = lifted[..., 3, 3] = 1
    close(projection, lifted @ to_homogeneous(extrinsics))


def test_functions_leave_their_arguments_alone():
    extrinsics, intrinsics = some_cameras()
    copies = extrinsics.clone(), intrinsics.clone()
    relative_to_first_view(extrinsics)
    projection_matrices(extrinsics, intrinsics, (28, 42))
    plucker_rays(extrinsics, intrinsics, (2, 3), 14)
    check_cameras(extrinsics, intrinsics, (2, 4))
    assert torch.equal(extrinsics, copies[0]) and torch.equal(intrinsics, copies[1])


@pytest.mark.parametrize("where", ["extrinsics", "intrinsics"])
def test_numbers_that_are_not_finite_name_the_view(where):
    cameras = dict(zip(("extrinsics", "intrinsics"), some_cameras(), strict=True))
    cameras[where][1, 2, 0, 2] = torch.nan
    with pytest.raises(ValueError, match="camera of scene 1, view 2 has numbers that are not finite.*expected"):
        check_cameras(**cameras, views=(2, 4))
    with pytest.raises(ValueError, match="^the camera of view 2 has numbers that are not finite"):
        check_cameras(cameras["extrinsics"][1], cameras["intrinsics"][1], views=(4,))


def test_checks_leave_room_for_rounding_and_for_no_more():
    extrinsics, intrinsics = some_cameras()
    check_cameras(extrinsics.bfloat16(), intrinsics.bfloat16(), (2, 4))
    with pytest.raises(ValueError, match="scene 0, view 0 has a rotation that is not orthonormal"):
        check_cameras(1.006 * extrinsics, intrinsics, (2, 4))
    with pytest.raises(ValueError, match="scene 0, view 0 has a rotation that is not orthonormal"):
        check_cameras(1.002 * extrinsics, intrinsics, (2, 4), tolerance=1e-3)
    intrinsics[0, 3, 2, 0] = 0.1
    with pytest.raises(ValueError, match="scene 0, view 3 has a last row of the intrinsics that is not 0, 0, 1"):
        check_cameras(extrinsics, intrinsics, (2, 4))


def test_pose_encodings_come_back():
    generator = torch.Generator().manual_seed(0)
    quaternion = torch.nn.functional.normalize(torch.randn(200, 4, generator=generator), dim=-1)
    # Half turns, where the usual formula divides by zero.
    half_turns = torch.eye(4)
    quaternion = torch.cat((quaternion, half_turns))
    encoding = torch.cat(
        (torch.randn(204, 3, generator=generator), quaternion, 0.5 + torch.rand(204, 2, generator=generator)), dim=-1
    )
    extrinsics, intrinsics = pose_encoding_to_cameras(encoding, (28, 42))
    again = cameras_to_pose_encoding(extrinsics, intrinsics, (28, 42))
    assert (again[:, 6] >= 0).all()
    close(pose_encoding_to_cameras(again, (28, 42))[0], extrinsics, 1e-5)
    close(again[:, 7:], encoding[:, 7:], 1e-5)


def test_unprojected_points_are_seen_where_they_came_from():
    extrinsics, intrinsics = some_cameras()
    depth = 1 + torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    points = unproject(depth, extrinsics, intrinsics)
    assert points.shape == (2, 4, 5, 6, 3)
    in_camera = points.flatten(2, 3) @ extrinsics[..., :3].mT + extrinsics[..., None, :, 3]
    close(in_camera[..., 2], depth.flatten(2), 1e-4)
    pixels = in_camera @ intrinsics.mT
    pixels = (pixels[..., :2] / pixels[..., 2:]).unflatten(2, (5, 6))
    close(pixels[..., 0], (torch.arange(6) + 0.5).expand(2, 4, 5, 6), 1e-3)
    close(pixels[..., 1], (torch.arange(5) + 0.5)[:, None].expand(2, 4, 5, 6), 1e-3)
