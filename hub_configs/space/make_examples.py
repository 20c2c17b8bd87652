"""
Make the example scenes of the Space: views of procedural rooms, and a question of each type about them.

    python hub_configs/space/make_examples.py            # writes examples/ beside this file, half a minute

The rooms are of the test split, so that no model of the nano family has seen them. Of the first 160, they were chosen
by eye among those that have questions of all ten types and whose cameras the nano backbone gets nearly right.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from spa3r_hf.benchmarks_questions import vsi_bench_question
from spa3r_hf.geometry_data import SPLITS
from spa3r_hf.rooms import generate_room
from spa3r_hf.rooms_cameras import camera_walk, pinhole_intrinsics
from spa3r_hf.rooms_questions import room_questions
from spa3r_hf.rooms_rendering import RoomRenderer


logger = logging.getLogger("make_examples")
ROOMS = (64, 149, 4, 61)  # of the test split
IMAGE_SIZE = 336
FIELD_OF_VIEW = 70.0  # degrees
NUM_VIEWS, VIEWS_PER_WALK = 12, 24  # near enough for neighbours to overlap
QUALITY = 80


def make_example(number: int, folder: Path) -> dict:
    """
    Write the views of a room of the test split.

    Returns:
        Its entry in `examples.json`: `name`, `title`, `seed`, and `questions`, each with `type`, `text` (the question
        and its options), `prompt` (what a model is asked) and `answer`.
    """
    seed = SPLITS["test"] + number
    room = generate_room(seed)
    walk = camera_walk(room, VIEWS_PER_WALK, seed)
    shown = walk[np.linspace(0, len(walk) - 1, NUM_VIEWS).round().astype(int)]
    intrinsics = pinhole_intrinsics((IMAGE_SIZE, IMAGE_SIZE), FIELD_OF_VIEW)
    views = RoomRenderer(room).render(shown, intrinsics, (IMAGE_SIZE, IMAGE_SIZE)).rgb
    name = room.kind.replace(" ", "_")
    (folder / name).mkdir(parents=True, exist_ok=True)
    for view, pixels in enumerate(views):
        Image.fromarray(pixels).save(folder / name / f"{view:02d}.jpg", quality=QUALITY, optimize=True)
    questions = []
    for index, question in enumerate(room_questions(room, shown, most=1)):
        asked = vsi_bench_question(question.row(index), index)
        options = dict(zip("ABCD", asked.options, strict=False))
        answer = options.get(asked.ground_truth, asked.ground_truth)
        text = "\n".join([asked.question, *asked.options])
        questions.append({"type": question.question_type, "text": text, "prompt": asked.prompt, "answer": answer})
    return {"name": name, "title": room.kind.capitalize(), "seed": seed, "questions": questions}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "examples")
    parser.add_argument("--rooms", type=int, nargs="+", default=ROOMS, help="Their numbers in the test split.")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    examples = [make_example(number, args.output_dir) for number in args.rooms]
    (args.output_dir / "examples.json").write_text(json.dumps(examples, indent=1) + "\n")
    size = sum(path.stat().st_size for path in args.output_dir.rglob("*") if path.is_file())
    logger.info("%d scenes, %.2f MB, are in %s", len(examples), size / 1e6, args.output_dir)


if __name__ == "__main__":
    main()
