"""Depth maps as points: joined with their neighbours, drawn from elsewhere, written for 3-D viewers."""

import json
import struct

import numpy as np
import pytest
import torch

from spa3r_hf.camera_spa3r import unproject
from spa3r_hf.visualization_cloud import draw_cloud, grid_faces, save_glb


HERE = np.eye(3, 4)
LENS = np.array([[10.0, 0, 10], [0, 10.0, 10], [0, 0, 1]])
RED, BLUE = np.array([255, 0, 0], np.uint8), np.array([0, 0, 255], np.uint8)


def test_neighbours_are_joined_but_not_across_an_edge():
    depth = np.full((1, 4, 6), 2.0)
    faces = grid_faces(depth, 0.05)
    assert faces.shape == (2 * 3 * 5, 3) and set(faces.ravel()) == set(range(24))
    depth[:, :, 3:] = 3.0
    faces = grid_faces(depth, 0.05)
    assert faces.shape == (2 * 3 * 4, 3)
    sides = faces % 6 >= 3
    assert (sides.all(1) | ~sides.any(1)).all()
    # 5 % is relative: 2.0 and 2.09 hang together, 2.0 and 2.12 do not.
    for far, count in ((2.09, 30), (2.12, 24)):
        assert len(grid_faces(np.where(depth > 2, far, depth), 0.05)) == count


def test_views_are_not_joined_with_each_other():
    faces = grid_faces(np.ones((3, 2, 2)), 0.1)
    assert faces.tolist() == [[v * 4 + i for i in face] for v in range(3) for face in ([0, 1, 3], [0, 3, 2])]


def read_glb(path):
    """The JSON of a GLB file, and its three arrays."""
    data = path.read_bytes()
    magic, version, size = struct.unpack_from("<4sII", data)
    assert (magic, version, size) == (b"glTF", 2, len(data))
    length, kind = struct.unpack_from("<I4s", data, 12)
    assert kind == b"JSON" and length % 4 == 0
    gltf = json.loads(data[20 : 20 + length])
    binary_length, kind = struct.unpack_from("<I4s", data, 20 + length)
    assert kind == b"BIN\0" and binary_length == gltf["buffers"][0]["byteLength"] == len(data) - 28 - length
    binary, arrays = data[28 + length :], []
    for accessor in gltf["accessors"]:
        view = gltf["bufferViews"][accessor["bufferView"]]
        dtype = {5126: "<f4", 5125: "<u4", 5123: "<u2"}[accessor["componentType"]]
        width = {"VEC3": 3, "VEC4": 4, "SCALAR": 1}[accessor["type"]]
        array = np.frombuffer(binary, dtype, accessor["count"] * width, view["byteOffset"])
        assert array.nbytes == view["byteLength"]
        arrays.append(array.reshape(-1, width))
    return gltf, arrays


def test_a_glb_file_holds_the_surface_as_the_camera_sees_it(tmp_path):
    depth = torch.full((1, 5, 7), 2.0)
    points = unproject(depth, torch.eye(3, 4)[None], torch.tensor(LENS).float()[None]).reshape(-1, 3).numpy()
    colours = np.random.default_rng(0).integers(0, 256, points.shape).astype(np.uint8)
    save_glb(tmp_path / "cloud.glb", points, colours, grid_faces(depth.numpy(), 0.1))
    gltf, (positions, shades, indices) = read_glb(tmp_path / "cloud.glb")
    np.testing.assert_array_equal(positions, points * [1, -1, -1])  # y up, z towards the viewer
    accessor = gltf["accessors"][0]
    np.testing.assert_allclose([accessor["min"], accessor["max"]], [positions.min(0), positions.max(0)])
    # Light, which viewers turn into sRGB again.
    light = shades[:, :3] / 65535
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(255 * srgb, colours, atol=0.1)
    assert (shades[:, 3] == 65535).all() and gltf["accessors"][1]["normalized"]
    # Fronts are counter-clockwise: their normals point to the camera, which is at the origin.
    a, b, c = (positions[indices[i::3, 0]] for i in range(3))
    assert len(a) == 2 * 4 * 6 and (np.cross(b - a, c - a) * -a).sum(1).min() > 0
    assert gltf["materials"][0]["extensions"] == {"KHR_materials_unlit": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": np.zeros((3, 2))}, r"points are \(3, 2\)"),
        ({"colours": np.zeros((2, 3), np.uint8)}, r"colours \(2, 3\)"),
        ({"faces": np.zeros((0, 3), int)}, r"faces are \(0, 3\)"),
        ({"faces": np.array([[0, 1, 3]])}, "indices 0 to 3; expected 0 to 2"),
        ({"faces": np.array([[0, 1, -1]])}, "indices -1 to 1"),
        ({"points": np.array([[0, 0, np.nan]] * 3)}, "NaN"),
    ],
)
def test_what_is_no_surface_is_refused(tmp_path, change, message):
    good = {"points": np.eye(3), "colours": np.zeros((3, 3), np.uint8), "faces": np.array([[0, 1, 2]])}
    with pytest.raises(ValueError, match=message):
        save_glb(tmp_path / "cloud.glb", **(good | change))
    assert not (tmp_path / "cloud.glb").exists()


def test_a_point_is_drawn_where_the_camera_sees_it():
    point = np.array([[0.55, -0.25, 1.0]]), RED[None], np.array([0.01])
    picture = np.asarray(draw_cloud(*point, HERE, LENS, (20, 20)))
    rows, columns = np.nonzero((picture == RED).all(-1))
    assert (rows.tolist(), columns.tolist()) == ([7], [15])
    # The camera goes to the right: the point is now at its left.
    moved = np.array([[1.0, 0, 0, -0.75], [0, 1, 0, 0], [0, 0, 1, 0]])
    picture = np.asarray(
        draw_cloud(np.array([[0.55, -0.25, 1.0]]), RED[None], np.array([0.01]), moved, LENS, (20, 20))
    )
    assert np.argwhere((picture == RED).all(-1)).tolist() == [[7, 7]]


def test_what_is_nearer_hides_what_is_farther_and_is_larger():
    points, sides = np.array([[0, 0, 1.0], [0, 0, 2.0], [0, 0, -1.0]]), np.full(3, 0.6)
    green = np.array([0, 255, 0], np.uint8)
    for order in ([0, 1, 2], [2, 1, 0]):
        colours = np.stack([RED, BLUE, green])[order]
        picture = np.asarray(draw_cloud(points[order], colours, sides, HERE, LENS, (20, 20)))
        assert (picture == RED).all(-1).sum() == 36
        assert not (picture == BLUE).all(-1).any() and not (picture == green).all(-1).any()  # hidden; behind
    picture = np.asarray(draw_cloud(points[1:2], BLUE[None], sides[:1], HERE, LENS, (20, 20)))
    assert (picture == BLUE).all(-1).sum() == 9


def test_drawing_stays_within_the_picture():
    points = np.random.default_rng(0).normal(size=(2000, 3))
    points[0] = [1e9, 0, 1]
    picture = draw_cloud(points, np.tile(RED, (2000, 1)), np.full(2000, 0.1), HERE, LENS, (20, 30))
    assert picture.size == (30, 20)
    empty = np.asarray(draw_cloud(points[:0], np.zeros((0, 3), np.uint8), np.zeros(0), HERE, LENS, (20, 30)))
    assert len(np.unique(empty.reshape(-1, 3), axis=0)) == 1
