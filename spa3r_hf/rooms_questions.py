"""Spatial questions with exact answers about procedural rooms, in VSI-Bench's columns and wording."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from .rooms import Room
from .rooms_questions_geometry import Sightings
from .rooms_questions_routes import route_planning
from .rooms_questions_types import (
    COMPASSES,
    Asked,
    Facts,
    direction,
    obj_appearance_order,
    object_abs_distance,
    object_counting,
    object_rel_distance,
    object_size_estimation,
    room_size_estimation,
)


__all__ = ["QUESTION_TYPES", "RoomQuestion", "room_questions"]

_ASKERS: dict[str, Callable[[Facts, np.random.Generator], Iterator[Asked]]] = {
    "object_counting": object_counting,
    "object_abs_distance": object_abs_distance,
    "object_size_estimation": object_size_estimation,
    "room_size_estimation": room_size_estimation,
    "object_rel_distance": object_rel_distance,
    "object_rel_direction_easy": direction(COMPASSES["easy"]),
    "object_rel_direction_medium": direction(COMPASSES["medium"]),
    "object_rel_direction_hard": direction(COMPASSES["hard"]),
    "route_planning": route_planning,
    "obj_appearance_order": obj_appearance_order,
}
QUESTION_TYPES: tuple[str, ...] = tuple(_ASKERS)
_LETTERS = "ABCD"


@dataclass(frozen=True)
class RoomQuestion:
    """A question about a room, and its answer.

    Args:
        scene_name: Of the room, "room_000123" for seed 123.
        question_type: One of `QUESTION_TYPES`.
        text: The question; `{choices}` stands where it lists the choices.
        answer: The number as VSI-Bench writes it, or the right choice.
        choices: In their order; empty where the answer is a number.
        cues: What a question-only model could learn the answer from: for each choice ("" for a number), names of
            features that speak for or against it.
        form: Names what sets a question apart from others of its type that have other choices or other priors.
    """

    scene_name: str
    question_type: str
    text: str
    answer: str
    choices: tuple[str, ...]
    cues: dict[str, tuple[str, ...]]
    form: str = ""

    @property
    def question(self) -> str:
        return self.text.replace("{choices}", ", ".join(self.choices))

    @property
    def options(self) -> list[str] | None:
        """ "A. first choice" and so on; None where the answer is a number."""
        lines = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, self.choices, strict=False)]
        return lines or None

    @property
    def ground_truth(self) -> str:
        """The number, or the letter of the right option."""
        return _LETTERS[self.choices.index(self.answer)] if self.choices else self.answer

    def with_answer_at(self, position: int) -> "RoomQuestion":
        """The same question, with the right choice and the one at `position` in each other's place."""
        choices = list(self.choices)
        here = choices.index(self.answer)
        choices[here], choices[position] = choices[position], choices[here]
        return replace(self, choices=tuple(choices))

    def row(self, number: int) -> dict[str, Any]:
        """A row of VSI-Bench's table: `number` is its id."""
        return {
            "id": number,
            "dataset": "rooms",
            "scene_name": self.scene_name,
            "question_type": self.question_type,
            "question": self.question,
            "ground_truth": self.ground_truth,
            "options": self.options,
        }


def room_questions(
    room: Room,
    extrinsics: np.ndarray,
    seed: int = 0,
    most: int = 8,
    image_size: tuple[int, int] = (84, 111),
    horizontal_fov_degrees: float = 70.0,
) -> list[RoomQuestion]:
    """Questions about what a walk shows of a room; a pure function of its arguments.

    Single rooms leave priors (a lamp is closest to its nightstand): see `rooms_questions_balance.balanced_questions`.

    Args:
        room: The room.
        extrinsics: (V, 3, 4) camera <- world, OpenCV axes: the walk that is shown (`rooms_cameras.camera_walk`).
        seed: Of the choice among the possible questions.
        most: Questions of each type at most.
        image_size: (height, width) in pixels of the views rendered to see what can be seen; of the proportions of the
            views that are shown.
        horizontal_fov_degrees: Field of view of those that are shown.

    Raises:
        ValueError: `seed` is negative or `most` less than 1, or see `RoomRenderer.render`.
    """
    if seed < 0 or most < 1:
        raise ValueError(f"seed must be 0 or more and most 1 or more, got seed = {seed}, most = {most}")
    facts = Facts(room, Sightings(room, extrinsics, image_size, horizontal_fov_degrees))
    questions: list[RoomQuestion] = []
    for number, (question_type, ask) in enumerate(_ASKERS.items()):
        rng = np.random.default_rng((room.seed, seed, number))
        for text, answer, cues, form in islice(ask(facts, rng), most):
            choices = () if "" in cues else tuple(str(choice) for choice in rng.permutation(list(cues)))
            questions.append(RoomQuestion(f"room_{room.seed:06d}", question_type, text, answer, choices, cues, form))
    return questions
