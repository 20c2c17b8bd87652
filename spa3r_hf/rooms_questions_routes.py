"""Route planning questions about procedural rooms: straight walks over the free floor, with a turn before most."""

from collections.abc import Iterator
from itertools import islice, permutations
from typing import NamedTuple

import numpy as np

from .rooms import RoomObject
from .rooms_questions_geometry import Floor, footprint, turn_degrees
from .rooms_questions_types import COMPASSES, MIN_STANDING_DISTANCE, Asked, Cues, Facts, answers_in_turn, shuffled


# Degrees that a robot turns at least: less is going on. Left, right and back are those of the medium directions.
MIN_TURN = 40.0
# Metres that "go forward" goes at least.
MIN_WALK = 0.5

_ROUTE = (
    "You are a robot beginning at the {} and facing the {}. You want to navigate to the {}. "
    "You will perform the following actions (Note: for each [please fill in], choose either 'turn back,' 'turn left,' "
    "or 'turn right.'): {}. You have reached the final destination."
)
_ROUTE_TRIES = 1000  # candidates looked at in a room, of each of the three shapes a route has


class _Route(NamedTuple):
    """Where a robot stands, what it faces, what it goes to one by one, and how it turns on the way."""

    start: RoomObject
    faced: RoomObject
    stops: tuple[RoomObject, ...]
    turns: tuple[str, ...]

    @property
    def form(self) -> str:
        """Routes of one form have their turns in the same places, and offer the same ones."""
        faces = (
            "its place" if self.faced is self.start else "the first stop" if self.faced in self.stops else "elsewhere"
        )
        return f"{len(self.stops)} stops, facing {faces}"


def route_planning(facts: Facts, rng: np.random.Generator) -> Iterator[Asked]:
    """Routes of straight walks over the free floor: turn and go; go, turn, go; turn, go, turn, go."""
    floor = Floor(facts.room)
    things = [thing for thing in facts.places if thing.support_id == 0]
    poses = list(_poses(floor, things))
    routes = []
    for shape in ("turn, go", "go, turn, go", "turn, go, turn, go"):
        tries = (
            (pose, (pose[1], *stops) if shape == "go, turn, go" else stops)
            for pose in poses
            if shape != "go, turn, go" or pose[0] is not pose[1]
            for stops in permutations(
                [thing for thing in things if thing not in pose[:2]], 2 if shape == "turn, go, turn, go" else 1
            )
        )
        for (start, faced, points, heading), stops in islice(shuffled(rng, tries), _ROUTE_TRIES):
            turns = _turns_on_the_way(floor, points, heading, faced, stops)
            if turns is not None and ", ".join(turns) in _choices(len(turns), faced is start):
                routes.append(_Route(start, faced, stops, turns))
    for route in answers_in_turn(rng, routes, lambda route: (route.form, route.turns)):
        yield _route_question(route)


def _poses(floor: Floor, things: list[RoomObject]) -> Iterator[tuple[RoomObject, RoomObject, np.ndarray, np.ndarray]]:
    """Where a robot may begin: (at what, facing what, points (P, 2), headings (P, 2) there).

    It begins at the first point. The others are where it would be for whom "at the bed" means any corner of it: the
    turns must have the same names there.
    """
    for start in things:
        point, front = floor.standing_point(start), floor.in_front(start)
        if point is not None:
            points = np.concatenate([[point], footprint(start)])
            for faced in things:
                heading = faced.center[:2] - points
                if faced is not start and np.linalg.norm(heading[0]) >= MIN_STANDING_DISTANCE:
                    yield start, faced, points, heading
        if front is not None:
            yield start, start, front, np.tile(-start.rotation[:2, 0], (len(front), 1))


def _turns_on_the_way(
    floor: Floor, points: np.ndarray, heading: np.ndarray, faced: RoomObject, stops: tuple[RoomObject, ...]
) -> tuple[str, ...] | None:
    """The turns before each walk (none before one to what is faced already); None where a turn or way is not clear."""
    turns = []
    for stop in stops:
        ahead = stop.center[:2] - points
        if np.linalg.norm(ahead[0]) < MIN_STANDING_DISTANCE:
            return None
        if stop is not faced:
            turn = _turn_name(turn_degrees(heading, ahead))
            if turn is None:
                return None
            turns.append(turn)
        end = floor.walk(points[0], stop)
        if end is None or np.linalg.norm(end - points[0]) < MIN_WALK:
            return None
        heading, points = ahead, end[None]
    return tuple(turns)


def _turn_name(degrees: np.ndarray) -> str | None:
    """The turn by the first of (P,) angles, if it is clear and the others have the same name."""
    compass = COMPASSES["medium"]
    sectors = compass.sectors(degrees)
    if abs(degrees[0]) < MIN_TURN or not compass.off_borders(degrees[0]) or (sectors != sectors[0]).any():
        return None
    return f"Turn {compass.names[sectors[0]].title()}"


def _choices(turns: int, faces_its_place: bool) -> tuple[str, ...]:
    """The turns that a route of this form may well have.

    Who faces what it stands at has its back to the room, and cannot go along the wall and then through it. Others
    seldom turn back to where they have to turn again.
    """
    if turns == 1:
        return "Turn Back", "Turn Left", "Turn Right"
    same_way = "Turn Left, Turn Left", "Turn Right, Turn Right"
    if faces_its_place:
        return *same_way, "Turn Back, Turn Left", "Turn Back, Turn Right"
    return *same_way, "Turn Left, Turn Right", "Turn Right, Turn Left"


def _route_question(route: _Route) -> Asked:
    steps = []
    for stop in route.stops:
        steps += ["[please fill in]"] * (stop is not route.faced) + [f"Go forward until the {stop.category}"]
    listed = " ".join(f"{number}. {step}" for number, step in enumerate(steps, 1))
    answer = ", ".join(route.turns)
    start, faced, goal = route.start.category, route.faced.category, route.stops[-1].category
    cues: Cues = {
        choice: (f"{route.form}: {choice}", f"{choice}: {start}>{faced}", f"{choice}: {faced}>{goal}")
        for choice in _choices(len(route.turns), route.faced is route.start)
    }
    return Asked(_ROUTE.format(start, faced, goal, listed), answer, cues, route.form)
