"""Procedural rooms: geometry, layout, cameras and rendering."""

import hashlib
import os
import subprocess
import sys
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest


pytest.importorskip("embreex")

from spa3r_hf.rooms import CATEGORIES, Room, generate_room  # noqa: E402
from spa3r_hf.rooms_cameras import camera_walk, pinhole_intrinsics  # noqa: E402
from spa3r_hf.rooms_layout import distance_inside  # noqa: E402
from spa3r_hf.rooms_rendering import RoomRenderer, RoomViews, render_views  # noqa: E402


SIZE = (72, 96)
HANGING = ("door", "window", "ceiling light", "picture", "mirror", "clock")
CHECKED = range(20)


@cache
def room_of(seed: int) -> Room:
    return generate_room(seed)


@cache
def rendered(seed: int) -> tuple[np.ndarray, np.ndarray, RoomViews]:
    extrinsics = camera_walk(room_of(seed), 8, seed=1)
    intrinsics = pinhole_intrinsics(SIZE, 70.0)
    return extrinsics, intrinsics, render_views(room_of(seed), extrinsics, intrinsics, SIZE)


def fingerprint(seed: int) -> str:
    room = generate_room(seed)
    views = render_views(room, camera_walk(room, 2, 0), pinhole_intrinsics((32, 40), 70.0), (32, 40))
    digest = hashlib.sha256()
    for array in (room.vertices, room.faces, room.face_instances, views.rgb, views.depth, views.instance_ids):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def camera_positions(extrinsics: np.ndarray) -> np.ndarray:
    extrinsics = extrinsics.astype(np.float64)
    return -np.einsum("vij,vi->vj", extrinsics[:, :, :3], extrinsics[:, :, 3])


def back_project(extrinsics: np.ndarray, intrinsics: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """(H, W, 3) world points of one view's pixel centres."""
    height, width = depth.shape
    y, x = np.mgrid[:height, :width] + 0.5
    rays = np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(intrinsics.astype(np.float64)).T
    points = rays * depth[..., None]
    rotation, translation = extrinsics[:, :3].astype(np.float64), extrinsics[:, 3].astype(np.float64)
    return (points - translation) @ rotation


def in_object_frame(thing, points: np.ndarray) -> np.ndarray:
    return (points - thing.center) @ thing.rotation


def boxes_overlap(first, second, tolerance: float = 1e-5) -> bool:
    """Separating axes of two upright boxes, from their corners."""
    corners = first.box_corners(), second.box_corners()
    axes = np.concatenate([first.rotation.T[:2], second.rotation.T[:2], [[0, 0, 1]]])
    for axis in axes:
        a, b = corners[0] @ axis, corners[1] @ axis
        if a.max() <= b.min() + tolerance or b.max() <= a.min() + tolerance:
            return False
    return True


def test_same_seed_same_pixels_in_a_fresh_process():
    here = fingerprint(3)
    assert fingerprint(3) == here
    assert fingerprint(4) != here
    code = "import test_rooms; print(test_rooms.fingerprint(3))"
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}", "PYTHONHASHSEED": "7"}
    fresh = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == here


@pytest.mark.parametrize("seed", CHECKED)
def test_things_touch_but_never_overlap(seed):
    room = room_of(seed)
    for first, second in combinations(room.objects, 2):
        assert not boxes_overlap(first, second), (first.category, second.category)


@pytest.mark.parametrize("seed", CHECKED)
def test_things_are_in_the_room_and_rest_on_something(seed):
    room = room_of(seed)
    assert [thing.instance_id for thing in room.objects] == list(range(1, len(room.objects) + 1))
    for thing in room.objects:
        assert thing.category in CATEGORIES
        corners = thing.box_corners()
        assert distance_inside(corners[:, :2], room.outline).min() > -1e-5
        low, high = corners[:, 2].min(), corners[:, 2].max()
        assert low > -1e-6 and high < room.height + 1e-6
        if thing.support_id:
            support = room.objects[thing.support_id - 1]
            assert low == pytest.approx(support.center[2] + support.size[2] / 2, abs=1e-6)
            local = in_object_frame(support, corners)
            assert (np.abs(local[:, :2]) <= support.size[:2] / 2 + 1e-6).all()
        elif thing.category == "ceiling light":
            assert high == pytest.approx(room.height)
        elif thing.category not in HANGING:
            assert low == pytest.approx(0)


@pytest.mark.parametrize("seed", range(4))
def test_boxes_are_tight_around_the_exact_triangles(seed):
    room = room_of(seed)
    for thing in room.objects:
        local = in_object_frame(thing, room.object_vertices(thing.instance_id))
        np.testing.assert_allclose(local.max(0), thing.size / 2, atol=1e-9)
        np.testing.assert_allclose(local.min(0), -thing.size / 2, atol=1e-9)
        assert room.object_triangles(thing.instance_id).shape[1:] == (3, 3)
    with pytest.raises(KeyError, match="999"):
        room.object_triangles(999)


def test_rooms_vary():
    rooms = [room_of(seed) for seed in range(30)]
    assert {len(room.outline) for room in rooms} == {4, 6}
    furniture = {thing.category for room in rooms for thing in room.objects} - set(HANGING)
    assert len(furniture) >= 20
    assert {"door", "window", "ceiling light"} <= {thing.category for room in rooms for thing in room.objects}
    assert len({room.kind for room in rooms}) == 5
    for room in rooms:
        sides = np.ptp(room.outline, axis=0)
        assert (sides >= 3).all() and (sides <= 7).all() and 2.4 <= room.height <= 3.0
        assert sum(thing.category not in HANGING for thing in room.objects) >= 4


def test_floor_area_is_exact():
    for seed in range(30):
        room = room_of(seed)
        width, depth = np.ptp(room.outline, axis=0)
        expected = width * depth
        if len(room.outline) == 6:  # the bounding rectangle less the corner that is cut out
            cuts = [np.unique(room.outline[:, axis]) for axis in range(2)]
            centre_of = [(c[:-1] + c[1:]) / 2 for c in cuts]
            cells = np.stack(np.meshgrid(*centre_of, indexing="ij"), -1)
            areas = np.outer(*(np.diff(c) for c in cuts))
            expected = areas[distance_inside(cells, room.outline) > 0].sum()
            assert expected < width * depth
        assert room.floor_area == pytest.approx(expected)
        floor = room.object_triangles(0)
        floor = floor[(floor[..., 2] == 0).all(1)][..., :2]
        one, two = floor[:, 1] - floor[:, 0], floor[:, 2] - floor[:, 0]
        assert (one[:, 0] * two[:, 1] - one[:, 1] * two[:, 0]).sum() / 2 == pytest.approx(room.floor_area)


@pytest.mark.parametrize("seed", range(12))
def test_cameras_walk_through_free_space(seed):
    room = room_of(seed)
    extrinsics = camera_walk(room, 32, seed=5)
    assert extrinsics.shape == (32, 3, 4) and extrinsics.dtype == np.float32
    rotation = extrinsics[:, :, :3].astype(np.float64)
    np.testing.assert_allclose(rotation @ rotation.transpose(0, 2, 1), np.tile(np.eye(3), (32, 1, 1)), atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-5)
    position = camera_positions(extrinsics)
    assert distance_inside(position[:, :2], room.outline).min() > 0.3
    assert position[:, 2].min() > 1.2 and position[:, 2].max() < 1.7
    for thing in room.objects:
        if thing.category not in ("rug", "ceiling light"):
            local = np.abs(in_object_frame(thing, position))[:, :2] - thing.size[:2] / 2
            assert local.max(1).min() > 0.1, thing.category
    assert np.linalg.norm(np.diff(position, axis=0), axis=1).max() < 0.4
    cosine = (rotation[1:, 2] * rotation[:-1, 2]).sum(1)
    assert np.degrees(np.arccos(cosine.clip(-1, 1))).max() < 28
    assert (rotation[:, 1, 2] < -0.8).all()  # the picture's down is the world's down
    np.testing.assert_array_equal(extrinsics, camera_walk(room, 32, seed=5))
    assert not np.array_equal(extrinsics, camera_walk(room, 32, seed=6))


def test_a_walk_sees_the_room():
    seen = total = 0
    for seed in range(4):
        room = room_of(seed)
        views = render_views(room, camera_walk(room, 32, 0), pinhole_intrinsics((56, 56), 70.0), (56, 56))
        seen += len(set(np.unique(views.instance_ids)) - {0})
        total += len(room.objects)
    assert seen / total > 0.85


@pytest.mark.parametrize("seed", range(3))
def test_depth_and_instances_agree_with_the_geometry(seed):
    room = room_of(seed)
    extrinsics, intrinsics, views = rendered(seed)
    assert views.rgb.shape == (8, *SIZE, 3) and views.rgb.dtype == np.uint8
    assert views.depth.shape == (8, *SIZE) and views.depth.dtype == np.float32
    assert views.normals.dtype == np.float32 and views.instance_ids.dtype == np.int32
    for view in range(8):
        points = back_project(extrinsics[view], intrinsics, views.depth[view])
        for instance in np.unique(views.instance_ids[view]):
            mine = points[views.instance_ids[view] == instance]
            if instance:
                thing = room.objects[instance - 1]
                assert (np.abs(in_object_frame(thing, mine)) <= thing.size / 2 + 2e-4).all()
            else:
                wall = np.abs(distance_inside(mine[:, :2], room.outline))
                assert np.minimum(np.minimum(np.abs(mine[:, 2]), np.abs(mine[:, 2] - room.height)), wall).max() < 2e-4
        # The point lies on a triangle of the instance it is said to show.
        for row, column in ((10, 10), (36, 48), (60, 80)):
            triangles = room.object_triangles(views.instance_ids[view, row, column])
            assert distance_to_triangles(points[row, column], triangles) < 2e-4


def distance_to_triangles(point: np.ndarray, triangles: np.ndarray) -> float:
    """Metres from a point to the nearest triangle whose prism it lies in."""
    a, b, c = triangles[:, 0], triangles[:, 1], triangles[:, 2]
    normal = np.cross(b - a, c - a)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    inside = np.ones(len(triangles), bool)
    for start, end in ((a, b), (b, c), (c, a)):
        outward = np.cross(end - start, normal)
        outward /= np.linalg.norm(outward, axis=1, keepdims=True)
        inside &= ((point - start) * outward).sum(1) < 1e-4
    height = np.abs(((point - a) * normal).sum(1))
    return float(np.where(inside, height, np.inf).min())


def test_floor_depth_and_normals_are_analytic():
    extrinsics, intrinsics, views = rendered(0)
    checked = 0
    for view in range(8):
        rotation = extrinsics[view, :, :3].astype(np.float64)
        y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
        rays = np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(intrinsics.astype(np.float64)).T @ rotation
        normals = views.normals[view].astype(np.float64)
        np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-5)
        assert ((normals * rays).sum(-1) < 0).all()
        floor = (views.instance_ids[view] == 0) & (normals[..., 2] > 0.999)
        eye = camera_positions(extrinsics[view : view + 1])[0, 2]
        np.testing.assert_allclose(views.depth[view][floor], -eye / rays[floor][:, 2], rtol=2e-4)
        checked += floor.sum()
    assert checked > 1000


@pytest.mark.parametrize("seed", (1, 5))
def test_neighbouring_views_see_the_same_surfaces(seed):
    extrinsics, intrinsics, views = rendered(seed)
    for view in range(7):
        points = back_project(extrinsics[view], intrinsics, views.depth[view]).reshape(-1, 3)
        camera = points @ extrinsics[view + 1, :, :3].T.astype(np.float64) + extrinsics[view + 1, :, 3]
        pixel = camera @ intrinsics.T.astype(np.float64)
        column, row = (pixel[:, :2] / pixel[:, 2:]).T
        inside = (camera[:, 2] > 0.1) & (column > 0) & (column < SIZE[1]) & (row > 0) & (row < SIZE[0])
        assert inside.mean() > 0.4
        column, row = column[inside].astype(int), row[inside].astype(int)
        other_depth = views.depth[view + 1][row, column]
        same = views.instance_ids[view + 1][row, column] == views.instance_ids[view].reshape(-1)[inside]
        close = np.abs(other_depth - camera[inside, 2]) < 0.1 * camera[inside, 2]
        assert (close & same).mean() > 0.75
        # Nothing is seen through: where the other view sees farther, only by a pixel's slant or at an edge.
        assert (other_depth > camera[inside, 2] * 1.2).mean() < 0.06


def test_pictures_are_lit_and_textured():
    for seed in range(3):
        rgb = rendered(seed)[2].rgb.astype(float)
        assert 60 < rgb.mean() < 210
        assert rgb.std(axis=(1, 2)).mean() > 15
        assert (rgb.min(-1) == 255).mean() < 0.05


def test_a_renderer_draws_each_view_alike_alone_and_in_a_batch():
    extrinsics, intrinsics, views = rendered(2)
    renderer = RoomRenderer(room_of(2))
    alone = renderer.render(extrinsics[3:4], np.stack([intrinsics]), SIZE)
    np.testing.assert_array_equal(alone.rgb[0], views.rgb[3])
    np.testing.assert_array_equal(alone.depth[0], views.depth[3])


def test_bad_input_is_named():
    room = room_of(0)
    extrinsics, intrinsics = camera_walk(room, 2, 0), pinhole_intrinsics(SIZE, 70.0)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        generate_room(-1)
    with pytest.raises(ValueError, match="num_views must be 1 or more, got 0"):
        camera_walk(room, 0, 0)
    with pytest.raises(ValueError, match="image_size"):
        pinhole_intrinsics((0, 10), 70.0)
    with pytest.raises(ValueError, match="horizontal_fov_degrees"):
        pinhole_intrinsics(SIZE, 180.0)
    with pytest.raises(ValueError, match=r"image_size must be .* got \(4,\)"):
        render_views(room, extrinsics, intrinsics, (4,))
    with pytest.raises(ValueError, match=r"extrinsics must have shape \(V, 3, 4\).*\(3, 4\)"):
        render_views(room, extrinsics[0], intrinsics, SIZE)
    with pytest.raises(ValueError, match=r"intrinsics must have shape .*\(3, 3, 3\)"):
        render_views(room, extrinsics, np.stack([intrinsics] * 3), SIZE)
    outside = extrinsics.copy()
    outside[:, :, 3] = outside[:, :, 3] - 50
    with pytest.raises(ValueError, match="outside the room"):
        render_views(room, outside, intrinsics, SIZE)
