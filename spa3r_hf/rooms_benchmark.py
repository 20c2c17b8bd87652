"""A benchmark laid out as VSI-Bench: videos of procedural rooms, and questions of all its types about them."""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from .geometry_data import SPLITS
from .optional import require
from .rooms import generate_room
from .rooms_cameras import camera_walk, pinhole_intrinsics
from .rooms_instructions import FIELD_OF_VIEW, _question, vsi_bench_score
from .rooms_questions import QUESTION_TYPES, RoomQuestion, room_questions
from .rooms_questions_balance import balanced_questions, question_rows
from .rooms_rendering import RoomRenderer
from .spa3_vlm_comparison import pick_evenly


DATASET = "rooms"
_VIEWS_PER_WALK = 24
_VIEW_SECONDS = 0.5  # from one view of the walk to the next
_FRAMES_PER_VIEW = 2


def room_benchmark(
    folder: str | Path,
    num_rooms: int = 12,
    num_questions: int = 240,
    image_size: tuple[int, int] = (480, 640),
    seed: int = 0,
    num_workers: int = 2,
) -> Path:
    """
    Videos `rooms/room_2000000.mp4`, ... and `test.jsonl` with VSI-Bench's columns, about rooms of the test split.

    Each video is a walk of 11.5 seconds at 4 frames a second, 640 x 480 by default. What was made once is found again.

    Args:
        folder: Where benchmarks are kept, each in a folder of its own; about 1 MB a room.
        num_rooms: 2 or more; few rooms may not give questions of all ten types.
        num_questions: At most, about as many of each type as there are.
        image_size: (height, width) in pixels, even numbers.
        seed: Of the choice among possible questions.
        num_workers: Processes.

    Returns:
        The folder of this benchmark: `load_benchmark("vsi_bench", folder)`, and its media folder.

    Raises:
        ValueError: A number is out of its range.
    """
    height, width = image_size
    if num_rooms < 2 or num_questions < len(QUESTION_TYPES) or height % 2 or width % 2:
        raise ValueError(
            f"num_rooms = {num_rooms}, num_questions = {num_questions}, image_size = {image_size}; expected at least "
            f"2 rooms, at least {len(QUESTION_TYPES)} questions, and even numbers of pixels"
        )
    # All that the benchmark depends on is in its name.
    target = Path(folder) / f"{width}x{height}_{num_rooms}_{num_questions}_{seed}"
    table = target / "test.jsonl"
    if table.exists():
        return target
    make = partial(_make_room, target, image_size, seed)
    seeds = range(SPLITS["test"], SPLITS["test"] + num_rooms)
    if num_workers > 1:
        with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
            of_rooms = list(pool.map(make, seeds))
    else:
        of_rooms = list(map(make, seeds))
    balanced = balanced_questions([question for room in of_rooms for question in room], vsi_bench_score, seed=seed)
    rows = question_rows(_in_order(pick_evenly(balanced, num_questions)))
    part = table.with_name(f".{table.name}.{os.getpid()}")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(table)
    return target


def _in_order(questions: Sequence[RoomQuestion]) -> list[RoomQuestion]:
    return sorted(questions, key=lambda question: (question.scene_name, QUESTION_TYPES.index(question.question_type)))


def _make_room(target: Path, image_size: tuple[int, int], seed: int, room_seed: int) -> list[RoomQuestion]:
    """Questions about a room, and its video."""
    name = f"room_{room_seed:06d}"
    video, questions_file = target / DATASET / f"{name}.mp4", target / "questions" / f"{name}.json"
    if not (video.exists() and questions_file.exists()):
        room = generate_room(room_seed)
        walk = camera_walk(room, _VIEWS_PER_WALK, room_seed)
        questions = room_questions(room, walk, seed, horizontal_fov_degrees=FIELD_OF_VIEW)
        cameras = interpolate_cameras(walk, _FRAMES_PER_VIEW)
        views = RoomRenderer(room).render(cameras, pinhole_intrinsics(image_size, FIELD_OF_VIEW), image_size)
        for path in (video, questions_file):
            path.parent.mkdir(parents=True, exist_ok=True)
        # Under their names only once they are whole.
        part = video.with_name(f".{os.getpid()}.{video.name}")
        write_video(part, views.rgb, Fraction(_FRAMES_PER_VIEW) / Fraction(_VIEW_SECONDS))
        part.replace(video)
        part = questions_file.with_name(f".{os.getpid()}.{questions_file.name}")
        part.write_text(json.dumps([asdict(question) for question in questions]))
        part.replace(questions_file)
    return [_question(settings) for settings in json.loads(questions_file.read_text())]


def interpolate_cameras(extrinsics: np.ndarray, frames_per_view: int) -> np.ndarray:
    """
    Cameras between those of a walk, moving and turning evenly.

    Args:
        extrinsics: (V, 3, 4), camera <- world.
        frames_per_view: Steps from one to the next; those that are given are kept.

    Returns:
        ((V - 1) * frames_per_view + 1, 3, 4) float32.
    """
    transform = require("scipy.spatial.transform", extra="rooms")
    given = np.arange(len(extrinsics))
    wanted = np.linspace(0, len(extrinsics) - 1, (len(extrinsics) - 1) * frames_per_view + 1)
    turns = transform.Rotation.from_matrix(extrinsics[:, :, :3])
    rotations = transform.Slerp(given, turns)(wanted).as_matrix()
    positions = -np.einsum("vji,vj->vi", extrinsics[:, :, :3], extrinsics[:, :, 3])
    positions = np.stack([np.interp(wanted, given, positions[:, axis]) for axis in range(3)], axis=1)
    translations = -np.einsum("vij,vj->vi", rotations, positions)
    return np.concatenate([rotations, translations[..., None]], axis=2).astype(np.float32)


def write_video(path: Path, frames: np.ndarray, frames_per_second: Fraction) -> None:
    """Write (V, H, W, 3) uint8 frames as H.264 in mp4, a key frame every second; H and W are even."""
    av = require("av", extra="video")
    with av.open(str(path), "w", format="mp4") as container:
        options = {"crf": "18", "preset": "veryfast", "g": str(max(1, round(frames_per_second)))}
        stream = container.add_stream("libx264", rate=frames_per_second, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())


__all__ = ["room_benchmark"]
