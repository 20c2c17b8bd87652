"""Pictures of depth and points, and the files that 3-D viewers open."""

import numpy as np
import pytest

from spa3r_hf.visualization_geometry import depth_sheet, depth_to_rgb, draw_points, save_ply


def test_near_is_bright_and_far_is_dark():
    colours = depth_to_rgb(np.array([0.5, 1.0, 2.0, 3.0, 9.0]), near=1.0, far=3.0)
    assert (colours[0] == colours[1]).all() and (colours[3] == colours[4]).all()
    brightness = colours[1:4].astype(int).sum(1)
    assert brightness[0] > brightness[1] > brightness[2]


def test_the_sheet_has_a_row_each_for_views_truth_and_prediction():
    rgb = np.zeros((3, 4, 4, 3), np.uint8)
    depth = np.linspace(1, 4, 48).reshape(3, 4, 4)
    same, other = np.asarray(depth_sheet(rgb, depth, depth)), np.asarray(depth_sheet(rgb, depth, depth[::-1]))
    third = same.shape[0] // 3
    assert same.shape == other.shape
    assert (same[: 2 * third - 20] == other[: 2 * third - 20]).all() and (same != other).any()


def test_points_are_drawn_where_they_are():
    line = np.linspace(-1, 1, 100)
    points = np.concatenate([np.stack([line, 0 * line, 0 * line], 1), [[0, 0, 0.5]] * 9])
    red, blue = np.array([255, 0, 0], np.uint8), np.array([0, 0, 255], np.uint8)
    picture = np.asarray(draw_points(points, np.concatenate([[red] * 100, [blue] * 9]), size=101, yaw=0))
    is_red = (picture == red).all(-1)
    columns = np.nonzero(is_red.any(0))[0]
    assert columns[-1] - columns[0] > 80 and is_red.any(1).sum() < 10
    rows_of_blue = np.nonzero((picture == blue).all(-1).any(1))[0]
    assert rows_of_blue.max() < np.nonzero(is_red.any(1))[0].min()  # what is farther away is drawn higher up


def test_a_ply_file_holds_the_points(tmp_path):
    points = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    colours = np.arange(21, dtype=np.uint8).reshape(7, 3)
    save_ply(tmp_path / "cloud.ply", points, colours)
    header, body = (tmp_path / "cloud.ply").read_bytes().split(b"end_header\n")
    assert header.startswith(b"ply\nformat binary_little_endian 1.0\nelement vertex 7\nproperty float x\n")
    assert len(body) == 7 * 15
    read = np.frombuffer(body, np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)]))
    assert (read["xyz"] == points).all() and (read["rgb"] == colours).all()


@pytest.mark.parametrize(
    "points, colours, message",
    [
        (np.zeros((4, 2)), np.zeros((4, 3)), r"points are \(4, 2\)"),
        (np.zeros((4, 3)), np.zeros((5, 3)), r"colours \(5, 3\)"),
        (np.full((4, 3), np.nan), np.zeros((4, 3)), "NaN or infinite"),
    ],
)
def test_points_that_no_viewer_could_show_are_refused(tmp_path, points, colours, message):
    with pytest.raises(ValueError, match=message):
        save_ply(tmp_path / "cloud.ply", points, colours)
