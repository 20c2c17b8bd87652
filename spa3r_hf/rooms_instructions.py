"""Questions about procedural rooms as instruction data: generated, balanced, with the frames that show the rooms."""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from .benchmarks_scores import vsi_bench_metric
from .geometry_data import SPLITS
from .instruction_data import question_records
from .rooms import generate_room
from .rooms_cameras import camera_walk, pinhole_intrinsics
from .rooms_questions import RoomQuestion, room_questions
from .rooms_questions_balance import balanced_questions, question_rows
from .rooms_rendering import RoomRenderer


FIELD_OF_VIEW = 70.0  # degrees, across the width
_VIEWS_PER_WALK = 24


@dataclass(frozen=True)
class RoomInstructions:
    """
    Questions about rooms.

    Attributes:
        train: To learn from.
        held_out: About rooms that nothing was trained on.
        frames: The folder that has a folder of frames for each room, by its `scene_name`.
    """

    train: list[RoomQuestion]
    held_out: list[RoomQuestion]
    frames: Path

    def records(self, questions: Sequence[RoomQuestion], per_conversation: int = 1, seed: int = 0) -> list[dict]:
        """
        Some of the questions as instruction records, with their answers.

        Args:
            questions: Of `train` or `held_out`.
            per_conversation: So many questions about a room follow each other: its frames are then seen but once.
            seed: Of which ones do.
        """
        order = np.random.default_rng(seed).permutation(len(questions)) if per_conversation > 1 else None
        chosen = questions if order is None else [questions[index] for index in order]
        records = question_records(question_rows(chosen), lambda scene: self.frames / scene)
        if order is None:
            return records
        of_rooms: dict[str, list[dict]] = defaultdict(list)
        for record in records:
            of_rooms[record["video"]].append(record)
        return [
            _join(of_room[start : start + per_conversation])
            for of_room in of_rooms.values()
            for start in range(0, len(of_room), per_conversation)
        ]


def room_instructions(
    folder: Path,
    num_rooms: int,
    num_eval_rooms: int,
    image_size: int = 112,
    num_frames: int = 12,
    most: int = 8,
    seed: int = 0,
    num_workers: int = 1,
) -> RoomInstructions:
    """
    Balanced questions of all ten types about rooms of the training and the test split, and the frames that show them.

    What was made once is read from the folder the next time, whatever the number of rooms.

    Args:
        folder: Where questions and frames are kept, about 0.3 MB a room.
        num_rooms, num_eval_rooms: Of the training and the test split.
        image_size: Side of the frames in pixels.
        num_frames: Of a room, evenly spaced along a walk of 24 views; what they do not show is not asked.
        most: Questions of each type and room, before balancing.
        seed: Of the choice among possible questions, and of the balancing.
        num_workers: Processes.
    """
    name = f"{image_size}x{image_size}_{num_frames}_{most}_{seed}"
    make = partial(_make_room, folder / name, image_size, num_frames, most, seed)
    seeds = [
        SPLITS[split] + index
        for split, count in (("train", num_rooms), ("test", num_eval_rooms))
        for index in range(count)
    ]
    if num_workers > 1:
        with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
            of_rooms = list(pool.map(make, seeds, chunksize=4))
    else:
        of_rooms = list(map(make, seeds))
    # In one call: a few rooms by themselves do not show the priors that many share.
    balanced = balanced_questions([question for room in of_rooms for question in room], vsi_bench_score, seed=seed)
    held_out = {f"room_{room_seed:06d}" for room_seed in seeds[num_rooms:]}
    return RoomInstructions(
        [question for question in balanced if question.scene_name not in held_out],
        [question for question in balanced if question.scene_name in held_out],
        folder / name,
    )


def vsi_bench_score(prediction: str, reference: str, question_type: str) -> float:
    """VSI-Bench's score of one answer, in [0, 1]."""
    return float(vsi_bench_metric().score_answers([prediction], [reference], [question_type])[1][0])


def _join(records: list[dict]) -> dict:
    """One conversation of several about one video."""
    first, *others = records
    turns = [
        {**turn, "value": turn["value"].removeprefix("<video>")} for other in others for turn in other["conversations"]
    ]
    joined = {**first, "conversations": first["conversations"] + turns}
    del joined["question_type"]  # there may be several
    return joined


def _make_room(
    folder: Path, image_size: int, num_frames: int, most: int, seed: int, room_seed: int
) -> list[RoomQuestion]:
    """Questions about a room; its frames are written beside them."""
    target = folder / f"room_{room_seed:06d}"
    file = target / "questions.json"
    if not file.exists():
        room = generate_room(room_seed)
        walk = camera_walk(room, _VIEWS_PER_WALK, room_seed)
        shown = walk[np.linspace(0, len(walk) - 1, num_frames).round().astype(int)]
        questions = room_questions(room, shown, seed, most, (image_size, image_size), FIELD_OF_VIEW)
        intrinsics = pinhole_intrinsics((image_size, image_size), FIELD_OF_VIEW)
        views = RoomRenderer(room).render(shown, intrinsics, (image_size, image_size))
        # Other processes see a whole folder or none.
        part = folder / f".{target.name}.{os.getpid()}"
        part.mkdir(parents=True, exist_ok=True)
        for number, pixels in enumerate(views.rgb):
            Image.fromarray(pixels).save(part / f"{number:02d}.png")
        (part / file.name).write_text(json.dumps([asdict(question) for question in questions]))
        shutil.rmtree(target, ignore_errors=True)
        part.replace(target)
    return [_question(settings) for settings in json.loads(file.read_text())]


def _question(settings: dict) -> RoomQuestion:
    cues = {choice: tuple(names) for choice, names in settings["cues"].items()}
    return RoomQuestion(**{**settings, "choices": tuple(settings["choices"]), "cues": cues})


__all__ = ["RoomInstructions", "room_instructions", "vsi_bench_score"]
