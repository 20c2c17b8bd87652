"""The rows of each benchmark's data as questions, with the prompts its scores are published for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .benchmarks_scores import (
    CV_BENCH_SOURCES,
    SPAR_BENCH_LEVELS,
    SPAR_BENCH_NUMERICAL_TASKS,
    parse_view_change,
    vsi_bench_metric,
)


# Of tables whose pictures come with their rows.
IMAGE_COLUMN = "image"
_WORD_PROMPT = "Please answer the question using a single word or phrase."
_LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
_BOX_PROMPT = (
    "The values represent the bounding box coordinates normalized to a 0-1000 scale, with the top-left corner as the "
    "origin of the image."
)


@dataclass(frozen=True)
class Question:
    """
    Attributes:
        id: Unique in its benchmark.
        scene: Questions with the same one are about the same video or pictures.
        source: Data set the scene comes from.
        question_type: As the benchmark names it (its task, where it has no types).
        question: As in the data.
        prompt: What a model is asked.
        options: The choices in order, as in the data; empty for open questions, and where the question lists them.
        ground_truth: A number as text, the capital letter of an option, or SPAR-Bench's view change.
        media: Names of the files it is about, relative to a media folder; empty where its pictures came with the data.
        video: The video file, once `with_media` has found it.
        images: The pictures, upright RGB, opened when asked for; of files once `with_media` has found them.
    """

    id: str
    scene: str
    source: str
    question_type: str
    question: str
    prompt: str
    options: tuple[str, ...]
    ground_truth: str
    media: tuple[str, ...] = ()
    video: Path | None = None
    images: Sequence[Image.Image] = ()


def vsi_bench_question(row: Mapping[str, Any], index: int) -> Question:
    metric = vsi_bench_metric()
    name = f"id {row['id']}"
    question_type, truth = row["question_type"], str(row["ground_truth"])
    metric.check_references([truth], [question_type], [name])
    lines = ["These are frames of a video.", row["question"]]
    options = tuple(row.get("options") or ())
    if question_type in metric.NUMERICAL_TYPES:
        _check_number(truth, name)
        lines.append(_WORD_PROMPT)
    else:
        _check_letter(truth, options, name)
        lines += ["Options:", *options, _LETTER_PROMPT]
    return Question(
        id=str(row["id"]),
        scene=f"{row['dataset']}/{row['scene_name']}",
        source=row["dataset"],
        question_type=question_type,
        question=row["question"],
        prompt="\n".join(lines),
        options=options,
        ground_truth=truth,
        media=(f"{row['dataset']}/{row['scene_name']}.mp4",),
    )


def cv_bench_question(row: Mapping[str, Any], index: int) -> Question:
    """The card gives the prompt with its options; the sentence after it is the one of the other benchmarks."""
    name = f"idx {row['idx']}"
    sources = [source for of in CV_BENCH_SOURCES.values() for source in of]
    if row["source"] not in sources:
        raise ValueError(f"{name}: source {row['source']!r}; expected one of {sources}")
    truth, options = str(row["answer"]).strip().strip("()").upper(), tuple(row["choices"] or ())
    _check_letter(truth, options, name)
    return Question(
        id=str(row["idx"]),
        scene=str(row.get("filename") or row["idx"]),
        source=row["source"],
        question_type=row["task"],
        question=row["question"],
        prompt=f"{row['prompt']}\n{_LETTER_PROMPT}",
        options=options,
        ground_truth=truth,
        media=() if IMAGE_COLUMN in row else (f"img/{row['filename']}",),
        images=row.get(IMAGE_COLUMN, ()),
    )


def spar_bench_question(row: Mapping[str, Any], index: int) -> Question:
    """Prompts as the authors' fork of lmms-eval, empty lines included. Its ids are not known to be unique."""
    name = f"row {index} (id {row['id']})"
    task, truth = row["task"], str(row["answer"])
    if task in SPAR_BENCH_NUMERICAL_TASKS:
        _check_number(truth, name, zero=True)
        prompt = f"\n{row['question']}\n{_WORD_PROMPT}"
    elif task == "view_change_infer":
        try:
            parse_view_change(truth)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        prompt = f"\n{row['question']}\n\n"
    elif task in (known for level in SPAR_BENCH_LEVELS.values() for known in level):
        if not truth.strip():
            raise ValueError(f"{name}: answer {truth!r}; expected an option's letter")
        box_prompt = _BOX_PROMPT if task in ("position_matching", "camera_motion_infer") else ""
        prompt = f"\n{row['question']}\n{box_prompt}\n{_LETTER_PROMPT}"
    else:
        raise ValueError(f"{name}: task {task!r}; expected one of {SPAR_BENCH_LEVELS}")
    images = row[IMAGE_COLUMN]
    are_names = isinstance(images, list)  # of a JSONL file
    return Question(
        id=str(index),
        scene="|".join(images) if are_names else str(index),
        source=row["source"],
        question_type=task,
        question=row["question"],
        prompt=prompt,
        options=(),
        ground_truth=truth,
        media=tuple(images) if are_names else (),
        images=() if are_names else images,
    )


def viewspatial_bench_question(row: Mapping[str, Any], index: int) -> Question:
    """Prompt of the paper, as lmms-eval has it: that of the authors' evaluate.py does not show the choices."""
    name = f"row {index}"
    options = tuple(row["choices"].split("\n"))
    truth = row["answer"].split(".")[0].strip().upper()
    _check_letter(truth, options, name)
    media = tuple(path.removeprefix("ViewSpatial-Bench/") for path in row["image_path"])
    return Question(
        id=str(index),
        scene="|".join(media),
        source=media[0].split("/")[0],
        question_type=row["question_type"],
        question=row["question"],
        prompt="\n".join(
            [
                f"Question: {row['question']}",
                f"Choices: {row['choices']}",
                "Reply only to the corresponding option.",
                "Answer:",
            ]
        ),
        options=options,
        ground_truth=truth,
        media=media,
    )


def _check_number(truth: str, name: str, zero: bool = False) -> None:
    try:
        number = float(truth)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(f"{name}: ground truth {truth!r}; expected a {'number' if zero else 'positive number'}")


def _check_letter(truth: str, options: Sequence[str], name: str) -> None:
    if not options:
        raise ValueError(f"{name}: a multiple-choice question without options; expected a list of them")
    letters = [chr(ord("A") + index) for index in range(len(options))]
    if truth.upper() not in letters:
        raise ValueError(f"{name}: ground truth {truth!r}; expected the letter of one of its options, {letters}")
