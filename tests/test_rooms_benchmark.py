"""Generated rooms as a benchmark in VSI-Bench's layout: real videos, its columns, all its types."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from spa3r_hf.benchmarks import load_benchmark, with_media
from spa3r_hf.geometry_data import SPLITS
from spa3r_hf.rooms import generate_room
from spa3r_hf.rooms_benchmark import interpolate_cameras, room_benchmark, write_video
from spa3r_hf.rooms_cameras import camera_walk, pinhole_intrinsics
from spa3r_hf.rooms_questions import QUESTION_TYPES
from spa3r_hf.rooms_rendering import RoomRenderer
from spa3r_hf.video import VideoFrames


for package in ("av", "embreex", "scipy", "evaluate"):
    pytest.importorskip(package)
SIZE = (72, 96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return room_benchmark(tmp_path_factory.mktemp("rooms"), 5, 60, SIZE, num_workers=1)


def test_layout_and_schema(folder):
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(len(rows))) and 30 < len(rows) <= 60
    columns = {"id", "dataset", "scene_name", "question_type", "question", "ground_truth", "options"}
    assert all(row.keys() == columns for row in rows)
    names = {f"room_{SPLITS['test'] + index:06d}" for index in range(5)}
    assert {row["scene_name"] for row in rows} == names and {row["dataset"] for row in rows} == {"rooms"}
    assert {path.name for path in (folder / "rooms").iterdir()} == {f"{name}.mp4" for name in names}
    counts = Counter(row["question_type"] for row in rows)
    assert counts.keys() == set(QUESTION_TYPES) and max(counts.values()) <= 6
    scenes = [row["scene_name"] for row in rows]
    assert scenes == sorted(scenes)
    questions = with_media(load_benchmark("vsi_bench", folder), folder)
    assert len(questions) == len(rows) and all(question.video.is_file() for question in questions)


def test_videos_show_the_rooms(folder):
    seed = SPLITS["test"] + 2
    video = VideoFrames(folder / "rooms" / f"room_{seed:06d}.mp4")
    assert len(video) == 47 and video[0].size == (96, 72)
    np.testing.assert_allclose(video.seconds, np.arange(47) / 4, atol=1e-6)
    room = generate_room(seed)
    walk = camera_walk(room, 24, seed)
    views = RoomRenderer(room).render(walk[[0, 10, 23]], pinhole_intrinsics(SIZE, 70.0), SIZE).rgb
    for view, frame in zip(views, (0, 20, 46), strict=True):  # the walk that the questions are about
        error = np.abs(view.astype(float) - np.asarray(video[frame]))
        others = [np.abs(view.astype(float) - np.asarray(video[index])).mean() for index in (5, 15, 30, 40)]
        assert error.mean() < 8 and error.mean() < 0.6 * min(others)


def test_what_was_made_is_found_again(folder, monkeypatch):
    root = folder.parent
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert room_benchmark(root, 5, 60, SIZE, num_workers=1) == folder
    # A run that was stopped before the end goes on from the rooms that it has.
    table = (folder / "test.jsonl").read_text()
    (folder / "test.jsonl").unlink()
    lost = sorted((folder / "rooms").iterdir())[1]
    lost.unlink()
    made = []
    render = RoomRenderer.render
    monkeypatch.setattr(RoomRenderer, "render", lambda *args: made.append(len(args[1])) or render(*args))
    room_benchmark(root, 5, 60, SIZE, num_workers=1)
    assert (folder / "test.jsonl").read_text() == table and made.count(47) == 1 and lost.is_file()
    after = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    changed = {path.name for path in after if after[path] != before[path]}
    assert changed == {"test.jsonl", lost.name, lost.with_suffix(".json").name}


def test_bad_sizes(tmp_path):
    for arguments in ((1, 60, SIZE), (4, 9, SIZE), (4, 60, (71, 96))):
        with pytest.raises(ValueError, match="expected at least 2 rooms, at least 10 questions, and even numbers"):
            room_benchmark(tmp_path, *arguments)
    assert not list(tmp_path.iterdir())


def test_cameras_between_those_of_a_walk():
    walk = camera_walk(generate_room(3), 6, 3)
    cameras = interpolate_cameras(walk, 3)
    assert cameras.shape == (16, 3, 4)
    np.testing.assert_allclose(cameras[::3], walk, atol=1e-5)
    rotations, positions = cameras[:, :, :3], -np.einsum("vji,vj->vi", cameras[:, :, :3], cameras[:, :, 3])
    np.testing.assert_allclose(rotations @ rotations.swapaxes(1, 2), np.tile(np.eye(3), (16, 1, 1)), atol=1e-5)
    np.testing.assert_allclose(positions[1] - positions[0], positions[2] - positions[1], atol=1e-5)
    angles = [np.arccos((np.trace(b @ a.T) - 1) / 2) for a, b in zip(rotations, rotations[1:], strict=False)]
    np.testing.assert_allclose(angles[0], angles[1], atol=1e-3)


def test_written_videos_are_what_was_written(tmp_path):
    frames = np.zeros((9, 32, 48, 3), np.uint8)
    frames[..., 0] = np.arange(9)[:, None, None] * 25
    write_video(tmp_path / "x.mp4", frames, 3)
    video = VideoFrames(tmp_path / "x.mp4")
    assert len(video) == 9 and video.seconds[-1] == pytest.approx(8 / 3)
    reds = [np.asarray(video[index])[..., 0].mean() for index in range(9)]
    np.testing.assert_allclose(reds, np.arange(9) * 25, atol=6)
