"""The types of spatial questions about procedural rooms, as VSI-Bench words and defines them; routes are apart.

A question is asked only where a viewer of the walk can know the answer, and where no reading of it has another one:

- A thing is seen once it covers `SEEN_SHARE` of a view. What is named is seen, and it is the only one of its category.
- As in VSI-Bench, some questions name categories of several things. object_counting asks for those of two or more, and
  the options of object_rel_distance stand for the closest of their kind; every one of them is seen. In
  obj_appearance_order the first to be seen counts.
- The constants below say by which margin each answer holds.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, permutations
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .rooms import Room, RoomObject
from .rooms_questions_geometry import Sightings, closest_distance, footprint, turn_degrees


# 19 x 19 pixels of a view of 392 x 518: less than one patch of a vision model shows too little to name a thing by.
SEEN_SHARE = 0.002
# VSI-Bench's smallest distance; answers are whole decimetres, so that rounding costs at most an eighth.
MIN_DISTANCE = 0.4
# The nearest object beats the next by both: 0.2 m is what one can tell near by, 15 % what one can tell far off.
NEARER_BY, NEARER_FACTOR = 0.2, 1.15
# Degrees to the border of a sector: about what one misjudges a direction by from memory of a video.
SECTOR_MARGIN = 15.0
# Metres on the floor between middles: nearer, "standing by" and "facing" leave the direction open.
MIN_STANDING_DISTANCE, MIN_FACED_DISTANCE = 1.0, 0.6
# Views from one category seen clearly to the first trace of the next: no choice of `SEEN_SHARE` below it swaps them.
VIEWS_APART = 2

# The spines on a shelf are books as well, and part of it.
_CONFUSED_WITH = {"book": "bookshelf"}
# Not places to stand by or to walk to.
_NO_PLACE = ("rug", "ceiling light")

_COUNT = "How many {}(s) are in this room?"
_DISTANCE = (
    "Measuring from the closest point of each object, what is the distance between the {} and the {} (in meters)?"
)
_SIZE = "What is the length of the longest dimension (length, width, or height) of the {}, measured in centimeters?"
_ROOM_SIZE = (
    "What is the size of this room (in square meters)? \n"
    "If multiple rooms are shown, estimate the size of the combined space."
)
_CLOSEST = "Measuring from the closest point of each object, which of these objects ({}) is the closest to the {}?"
_STANDING = "If I am standing by the {} and facing the {}, is the {} "
_ORDER = "What will be the first-time appearance order of the following categories in the video: {}?"


Cues = dict[str, tuple[str, ...]]
_Item = TypeVar("_Item")


class Asked(NamedTuple):
    """A question's text, its answer, its cues and its form (see `rooms_questions.RoomQuestion`).

    The choices are the cues' keys; "" stands for a number. "{choices}" in the text stands for their list.
    """

    text: str
    answer: str
    cues: Cues
    form: str = ""


class Facts:
    """What can be known about a room from its views."""

    def __init__(self, room: Room, sightings: Sightings):
        self.room = room
        self.sightings = sightings
        self.instances: dict[str, list[RoomObject]] = defaultdict(list)
        for thing in room.objects:
            self.instances[thing.category].append(thing)
        for category, other in _CONFUSED_WITH.items():
            if other in self.instances:
                self.instances.pop(category, None)
        seen = sightings.shares.max(0) >= SEEN_SHARE
        self.categories = [
            name for name, things in self.instances.items() if all(seen[thing.instance_id - 1] for thing in things)
        ]
        self.single = [self.instances[name][0] for name in self.categories if len(self.instances[name]) == 1]
        self._distances: dict[tuple[int, int], float] = {}

    def distance(self, thing: RoomObject, category: str) -> float:
        """Metres from a thing to the closest instance of a category, both by their closest points."""
        return min(self._distance(thing.instance_id, other.instance_id) for other in self.instances[category])

    def _distance(self, first: int, second: int) -> float:
        key = (min(first, second), max(first, second))
        if key not in self._distances:
            self._distances[key] = closest_distance(*(self.room.object_triangles(number) for number in key))
        return self._distances[key]

    @cached_property
    def places(self) -> list[RoomObject]:
        """Single things that one can stand by and face."""
        return [thing for thing in self.single if thing.category not in _NO_PLACE]

    def appearances(self) -> dict[str, tuple[int, int]]:
        """Category -> the first view with a trace of it, and the first that shows it clearly; of those that have."""
        result = {}
        for name, things in self.instances.items():
            shares = self.sightings.shares[:, [thing.instance_id - 1 for thing in things]].max(1)
            if shares.max() >= SEEN_SHARE:
                result[name] = int((shares > 0).argmax()), int((shares >= SEEN_SHARE).argmax())
        return result


def shuffled(rng: np.random.Generator, items: Iterable[_Item]) -> Iterator[_Item]:
    listed = list(items)
    return (listed[index] for index in rng.permutation(len(listed)))


def answers_in_turn(
    rng: np.random.Generator, items: Iterable[_Item], answer: Callable[[_Item], Any]
) -> Iterator[_Item]:
    """Items in random order, but so that each answer comes up before one comes up again."""
    met: Counter[Any] = Counter()
    turns = []
    for item in shuffled(rng, items):
        turns.append((met[answer(item)], item))
        met[answer(item)] += 1
    return (item for _, item in sorted(turns, key=lambda turn: turn[0]))


# --- numbers


def object_counting(facts: Facts, rng: np.random.Generator) -> Iterator[Asked]:
    for name in shuffled(rng, facts.categories):
        count = len(facts.instances[name])
        if count > 1:
            yield Asked(_COUNT.format(name), str(count), {"": (name,)})


def object_abs_distance(facts: Facts, rng: np.random.Generator) -> Iterator[Asked]:
    for pair in shuffled(rng, combinations(facts.single, 2)):
        first, second = shuffled(rng, pair)
        distance = facts.distance(first, second.category)
        if distance >= MIN_DISTANCE:
            names = first.category, second.category
            yield Asked(_DISTANCE.format(*names), f"{distance:.1f}", {"": ("|".join(sorted(names)),)})


def object_size_estimation(facts: Facts, rng: np.random.Generator) -> Iterator[Asked]:
    for thing in shuffled(rng, facts.single):
        if facts.sightings.shows_whole_box(thing):
            yield Asked(_SIZE.format(thing.category), f"{100 * thing.size.max():.0f}", {"": (thing.category,)})


def room_size_estimation(facts: Facts, rng: np.random.Generator) -> Iterator[Asked]:
    if facts.sightings.shows_all_corners():
        yield Asked(_ROOM_SIZE, f"{facts.room.floor_area:.1f}", {"": ()})


# --- choices


def object_rel_distance(facts: Facts, rng: np.random.Generator) -> Iterator[Asked]:
    sets = [
        (anchor, names)
        for anchor in facts.single
        for names in combinations([name for name in facts.categories if name != anchor.category], 4)
    ]
    used: set[tuple[str, str]] = set()
    for anchor, names in shuffled(rng, sets):
        distances = [facts.distance(anchor, name) for name in names]
        order = np.argsort(distances)
        nearest, second = distances[order[0]], distances[order[1]]
        pair = anchor.category, names[order[0]]
        # What stands next to a thing is the closest in every set of four that it is in: one of them will do.
        if second >= max(nearest + NEARER_BY, nearest * NEARER_FACTOR) and pair not in used:
            used.add(pair)
            cues: Cues = {name: (name, f"{anchor.category}|{name}") for name in names}
            yield Asked(_CLOSEST.format("{choices}", anchor.category), pair[1], cues)


@dataclass(frozen=True)
class Compass:
    """The sectors of a direction question: `names[i]` lies between `borders[i - 1]` and `borders[i]` degrees.

    Angles are positive to the left of where one faces; sectors without a name are not asked about.
    """

    question: str
    borders: tuple[float, ...]
    names: tuple[str, ...]

    def sectors(self, degrees: np.ndarray) -> np.ndarray:
        """(...) index of each angle's sector; sectors of one name share one index."""
        return np.array([self.names.index(name) for name in self.names])[np.digitize(degrees, self.borders)]

    def off_borders(self, degrees: np.ndarray) -> np.ndarray:
        """(...) whether angles keep the margin from all borders."""
        return np.abs(degrees[..., None] - self.borders).min(-1) >= SECTOR_MARGIN


# In VSI-Bench, things that the medium level calls "back" are not asked about at the easy level either.
COMPASSES = {
    "easy": Compass("to the left or the right of the {}?", (-135, 0, 135), ("", "right", "left", "")),
    "medium": Compass(
        "to my left, right, or back?\n"
        "An object is to my back if I would have to turn at least 135 degrees in order to face it.",
        (-135, 0, 135),
        ("back", "right", "left", "back"),
    ),
    "hard": Compass(
        "to my front-left, front-right, back-left, or back-right?\nThe directions refer to the quadrants of a "
        "Cartesian plane (if I am standing at the origin and facing along the positive y-axis).",
        (-180, -90, 0, 90, 180),
        ("", "back-right", "front-right", "front-left", "back-left", ""),
    ),
}


def direction(compass: Compass) -> Callable[[Facts, np.random.Generator], Iterator[Asked]]:
    choices = sorted(set(compass.names) - {""})

    def ask(facts: Facts, rng: np.random.Generator) -> Iterator[Asked]:
        found = _clear_directions(facts.places, compass)
        for triple, sector in answers_in_turn(rng, found, lambda direction: direction[1]):
            names = [thing.category for thing in triple]
            pairs = [">".join(pair) for pair in combinations(names, 2)]
            cues = {choice: (choice, *(f"{choice}: {pair}" for pair in pairs)) for choice in choices}
            yield Asked(_STANDING.format(*names) + compass.question.format(names[1]), sector, cues)

    return ask


def _clear_directions(places: list[RoomObject], compass: Compass) -> list[tuple[tuple[RoomObject, ...], str]]:
    """Triples (standing, facing, queried) of things with a clear answer, and the answers.

    Middle to middle, the angle keeps off the borders by the margin; and it falls in the same sector from every corner
    of what one stands by to every corner of what is asked for.
    """
    if not places:
        return []
    points = np.stack([footprint(thing) for thing in places])  # (N, 5, 2)
    middle = points[:, 0]
    standing = points[:, :, None, None, None]
    heading, towards = middle[:, None, None] - standing, points - standing
    angles = turn_degrees(heading, towards)  # (standing, its 5 points, facing, queried, its 5 points)
    sectors = compass.sectors(angles)
    sector = sectors[:, 0, :, :, 0]
    clear = (sectors == sector[:, None, :, :, None]).all((1, 4)) & (np.array(compass.names)[sector] != "")
    clear &= compass.off_borders(angles[:, 0, :, :, 0])
    apart = np.linalg.norm(middle[:, None] - middle, axis=-1)
    far = apart >= MIN_STANDING_DISTANCE
    clear &= far[:, :, None] & far[:, None, :] & (apart >= MIN_FACED_DISTANCE)
    return [
        (tuple(places[index] for index in triple), compass.names[sector[tuple(triple)]])
        for triple in np.argwhere(clear)
    ]


def obj_appearance_order(facts: Facts, rng: np.random.Generator) -> Iterator[Asked]:
    views = sorted((clear, trace, name) for name, (trace, clear) in facts.appearances().items())
    for four in shuffled(rng, combinations(views, 4)):
        if all(later[1] - earlier[0] >= VIEWS_APART for earlier, later in zip(four[:-1], four[1:], strict=True)):
            names = [name for _, _, name in four]
            orders = list(permutations(names))
            # Any three others: nothing tells the right one among them, nor does the order in the question.
            picked = [orders[0], *(orders[index] for index in 1 + rng.choice(len(orders) - 1, 3, replace=False))]
            listed = ", ".join(picked[rng.integers(4)])
            cues = {", ".join(order): tuple("<".join(pair) for pair in combinations(order, 2)) for order in picked}
            yield Asked(_ORDER.format(listed), ", ".join(names), cues)
