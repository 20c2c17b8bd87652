"""Spatial questions about procedural rooms: their answers, wording, margins, balance."""

import cmath
import math
import re
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest


pytest.importorskip("embreex")

from spa3r_hf.rooms import CATEGORIES, Room, RoomObject, generate_room  # noqa: E402
from spa3r_hf.rooms_cameras import camera_walk, pinhole_intrinsics  # noqa: E402
from spa3r_hf.rooms_layout import distance_inside  # noqa: E402
from spa3r_hf.rooms_questions import QUESTION_TYPES, RoomQuestion, room_questions  # noqa: E402
from spa3r_hf.rooms_questions_balance import (  # noqa: E402
    QuestionOnlyPredictor,
    balanced_questions,
    balanced_room_questions,
    best_constant,
    guessing_scores,
    question_rows,
)
from spa3r_hf.rooms_questions_geometry import Floor, closest_distance, turn_degrees  # noqa: E402
from spa3r_hf.rooms_rendering import RoomRenderer  # noqa: E402


SIZE = (42, 56)
SEEN = 0.002
ROOMS = range(40)
CHECKED = range(6)
# Questions of the real data set, letter for letter.
REAL = {
    "object_counting": ["How many table(s) are in this room?", "How many power strip(s) are in this room?"],
    "object_abs_distance": [
        "Measuring from the closest point of each object, what is the distance between the sofa and the tv (in "
        "meters)?",
        "Measuring from the closest point of each object, what is the distance between the trash bin and the mirror "
        "(in meters)?",
    ],
    "object_size_estimation": [
        "What is the length of the longest dimension (length, width, or height) of the bed, measured in centimeters?",
        "What is the length of the longest dimension (length, width, or height) of the table lamp, measured in "
        "centimeters?",
    ],
    "room_size_estimation": [
        "What is the size of this room (in square meters)? \nIf multiple rooms are shown, estimate the size of the "
        "combined space.",
    ],
    "object_rel_distance": [
        "Measuring from the closest point of each object, which of these objects (table, tv, refrigerator, stool) is "
        "the closest to the stove?",
        "Measuring from the closest point of each object, which of these objects (kettle, tv, keyboard, refrigerator) "
        "is the closest to the heater?",
    ],
    "object_rel_direction_easy": [
        "If I am standing by the window and facing the door, is the tv to the left or the right of the door?",
        "If I am standing by the pillow and facing the telephone, is the fan to the left or the right of the "
        "telephone?",
    ],
    "object_rel_direction_medium": [
        "If I am standing by the tv and facing the sofa, is the nightstand to my left, right, or back?\nAn object is "
        "to my back if I would have to turn at least 135 degrees in order to face it.",
        "If I am standing by the nightstand and facing the microwave, is the trash bin to my left, right, or back?\n"
        "An object is to my back if I would have to turn at least 135 degrees in order to face it.",
    ],
    "object_rel_direction_hard": [
        "If I am standing by the bed and facing the tv, is the stool to my front-left, front-right, back-left, or "
        "back-right?\nThe directions refer to the quadrants of a Cartesian plane (if I am standing at the origin and "
        "facing along the positive y-axis).",
    ],
    "route_planning": [
        "You are a robot beginning at the door and facing the toilet. You want to navigate to the bathtub. You will "
        "perform the following actions (Note: for each [please fill in], choose either 'turn back,' 'turn left,' or "
        "'turn right.'): 1. Go forward until the toilet 2. [please fill in] 3. Go forward until the bathtub. You have "
        "reached the final destination.",
        "You are a robot beginning at the microwave and facing the table. You want to navigate to the sofa. You will "
        "perform the following actions (Note: for each [please fill in], choose either 'turn back,' 'turn left,' or "
        "'turn right.'): 1. [please fill in] 2. Go forward until the sofa. You have reached the final destination.",
        "You are a robot beginning at the sink and facing the sink. You want to navigate to the washer. You will "
        "perform the following actions (Note: for each [please fill in], choose either 'turn back,' 'turn left,' or "
        "'turn right.'): 1. [please fill in] 2. Go forward until the toilet 3. [please fill in] 4. Go forward until "
        "the washer. You have reached the final destination.",
    ],
    "obj_appearance_order": [
        "What will be the first-time appearance order of the following categories in the video: table, door, window, "
        "sofa?",
        "What will be the first-time appearance order of the following categories in the video: keyboard, clock, "
        "window, door?",
    ],
}
REAL_OPTIONS = {
    "object_rel_distance": ["A. table", "B. tv", "C. refrigerator", "D. stool"],
    "object_rel_direction_easy": ["A. right", "B. left"],
    "object_rel_direction_medium": ["A. right", "B. left", "C. back"],
    "object_rel_direction_hard": ["A. back-right", "B. front-left", "C. front-right", "D. back-left"],
    "route_planning": ["A. Turn Left", "B. Turn Back", "C. Turn Right"],
    "obj_appearance_order": [
        "A. sofa, window, door, table",
        "B. window, table, door, sofa",
        "C. table, door, window, sofa",
        "D. sofa, table, door, window",
    ],
}
_OTHER_NAMES = ("power strip", "table lamp", "kettle", "keyboard", "pillow", "telephone", "fan")
_NAME = "|".join(sorted((*CATEGORIES, *_OTHER_NAMES), key=len, reverse=True))


def masked(text: str) -> str:
    return re.sub(rf"\b({_NAME})\b", "X", text)


def score(prediction: str, reference: str, question_type: str) -> float:
    """Exact match, or mean relative accuracy."""
    if reference in "ABCD":
        return float(prediction == reference)
    error = abs(float(prediction) - float(reference)) / float(reference)
    return sum(error <= 1 - threshold for threshold in np.linspace(0.5, 0.95, 10)) / 10


@cache
def room_of(seed: int) -> Room:
    return generate_room(seed)


@cache
def questions_of(seed: int) -> list[RoomQuestion]:
    return room_questions(room_of(seed), camera_walk(room_of(seed), 24, seed), image_size=SIZE)


@cache
def shares_of(seed: int) -> np.ndarray:
    """(V, N + 1) share of each view's pixels, by instance."""
    room = room_of(seed)
    views = RoomRenderer(room).render(camera_walk(room, 24, seed), pinhole_intrinsics(SIZE), SIZE)
    return np.array(
        [[(view == number).mean() for number in range(len(room.objects) + 1)] for view in views.instance_ids]
    )


@pytest.fixture(scope="module")
def pool() -> list[RoomQuestion]:
    return [question for seed in ROOMS for question in questions_of(seed)]


def of_type(questions, *kinds: str):
    return [question for question in questions if question.question_type in kinds]


def seed_of(question: RoomQuestion) -> int:
    return int(question.scene_name.removeprefix("room_"))


def named(question: RoomQuestion, category: str) -> list[RoomObject]:
    return [thing for thing in room_of(seed_of(question)).objects if thing.category == category]


def only(question: RoomQuestion, category: str) -> RoomObject:
    (thing,) = named(question, category)
    return thing


def triangles(question: RoomQuestion, thing: RoomObject) -> np.ndarray:
    return room_of(seed_of(question)).object_triangles(thing.instance_id)


def samples(faces: np.ndarray, steps: int) -> np.ndarray:
    """Points on (T, 3, 3) triangles, at most their longest edge / steps from any other point of them."""
    a, b = (grid.ravel() / steps for grid in np.meshgrid(np.arange(steps + 1), np.arange(steps + 1)))
    weights = np.stack([a, b, 1 - a - b], 1)[a + b <= 1 + 1e-9]
    return np.einsum("sc,tcx->tsx", weights, faces).reshape(-1, 3)


def least_distance(first: np.ndarray, second: np.ndarray) -> float:
    return min(np.linalg.norm(second - point, axis=1).min() for point in first)


def box(low: tuple[float, ...], high: tuple[float, ...]) -> np.ndarray:
    """(12, 3, 3) triangles of an axis-aligned box."""
    corners = np.array([[(low, high)[bit >> axis & 1][axis] for axis in range(3)] for bit in range(8)], float)
    quads = [(0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5)]
    return np.array([corners[[a, b, c]] for q in quads for a, b, c in ((q[0], q[1], q[2]), (q[0], q[2], q[3]))])


# --- closest points


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        ((2.5, 0.2, 0.2), (3, 0.4, 0.4), 1.5),  # face to face
        ((2, 3, 0), (3, 4, 1), math.hypot(1, 2)),  # edge to parallel edge
        ((2, 3, 5), (3, 4, 6), math.hypot(1, 2, 4)),  # corner to corner
        ((1, 0.2, 0), (2, 0.8, 1), 0.0),  # touching
        ((0.5, -1, 0.3), (3, 2, 0.6), 0.0),  # crossing
    ],
)
def test_distance_of_boxes(low, high, expected):
    assert closest_distance(box((0, 0, 0), (1, 1, 1)), box(low, high)) == pytest.approx(expected, abs=1e-12)


def test_distance_of_crossed_edges_and_of_a_corner_above_a_face():
    bar = np.array([[[-1, 0, 0], [1, 0, 0], [0, 0, -3.0]]])
    across = np.array([[[0.1, -1, 0.25], [0.1, 1, 0.25], [0.1, 0, 3.0]]])
    assert closest_distance(bar, across) == pytest.approx(0.25)
    floor, tip = np.array([[[0, 0, 0], [4, 0, 0], [0, 4, 0.0]]]), np.array([[[1, 1, 0.5], [2, 1, 3], [1, 2, 3.0]]])
    assert closest_distance(floor, tip) == pytest.approx(0.5)
    pierced = tip - [0, 0, 1.0]
    assert closest_distance(floor, pierced) == 0.0


def test_distance_of_random_triangles_agrees_with_dense_samples():
    rng = np.random.default_rng(0)
    steps = 24
    for _ in range(60):
        first, second = rng.normal(size=(2, 3, 3, 3)) + rng.normal(size=(2, 1, 1, 3)) * 2
        exact = closest_distance(first, second)
        assert exact == pytest.approx(closest_distance(second, first), abs=1e-12)
        sampled = least_distance(samples(first, steps), samples(second, steps))
        spacing = max(np.linalg.norm(np.roll(t, 1, 1) - t, axis=-1).max() for t in (first, second)) / steps
        assert exact - 1e-12 <= sampled <= exact + 2 * spacing


def test_distance_in_a_room_agrees_with_all_pairs_of_triangles():
    room = room_of(1)
    few = [thing for thing in room.objects if len(room.object_triangles(thing.instance_id)) <= 40]
    for first, second in list(combinations(few, 2))[::7]:
        a, b = room.object_triangles(first.instance_id), room.object_triangles(second.instance_id)
        one_by_one = min(closest_distance(face[None], other[None]) for face in a for other in b)
        assert closest_distance(a, b) == pytest.approx(one_by_one, abs=1e-12)


def test_distance_wants_triangles():
    with pytest.raises(ValueError, match="second must be"):
        closest_distance(np.zeros((1, 3, 3)), np.zeros((0, 3, 3)))


def test_turns_are_positive_to_the_left():
    north, west = np.array([0.0, 2.0]), np.array([-3.0, 0.0])
    assert turn_degrees(north, west) == pytest.approx(90)
    assert turn_degrees(west, north) == pytest.approx(-90)
    assert abs(turn_degrees(north, -north)) == pytest.approx(180)


# --- the questions


def test_all_types_occur_and_repeat_exactly(pool):
    assert {question.question_type for question in pool} == set(QUESTION_TYPES) == set(REAL)
    room = generate_room(3)
    assert room_questions(room, camera_walk(room, 24, 3), image_size=SIZE) == questions_of(3)
    other = room_questions(room, camera_walk(room, 24, 3), seed=1, image_size=SIZE)
    assert {question.question for question in other} != {question.question for question in questions_of(3)}


def test_wording_is_that_of_vsi_bench(pool):
    for kind in QUESTION_TYPES:
        ours = {masked(question.question) for question in of_type(pool, kind)}
        assert ours == {masked(question) for question in REAL[kind]}, kind
        for question in of_type(pool, kind):
            if kind not in REAL_OPTIONS:
                assert question.options is None
                continue
            assert [option[:3] for option in question.options] == ["A. ", "B. ", "C. ", "D. "][: len(question.options)]
            if "direction" in kind:
                assert {option[3:] for option in question.options} == {option[3:] for option in REAL_OPTIONS[kind]}
            elif kind != "route_planning":
                assert {masked(option) for option in question.options} == {masked(o) for o in REAL_OPTIONS[kind]}
    for question in of_type(pool, "route_planning"):
        blanks = question.question.count("[please fill in]") - 1
        assert len(question.options) == {1: 3, 2: 4}[blanks]
        for option in question.options:
            assert re.fullmatch(r"[ABCD]\. Turn (Left|Right|Back)(, Turn (Left|Right))?", option)
            assert option.count("Turn") == blanks


def test_rows_have_the_columns_of_vsi_bench(pool):
    rows = question_rows(pool, first_id=100)
    assert [row["id"] for row in rows] == list(range(100, 100 + len(pool)))
    assert {row["dataset"] for row in rows} == {"rooms"}
    assert list(rows[0]) == ["id", "dataset", "scene_name", "question_type", "question", "ground_truth", "options"]
    for row in rows:
        assert re.fullmatch(r"room_\d{6}", row["scene_name"])
        if row["options"] is None:
            digits = 1 if row["question_type"] in ("object_abs_distance", "room_size_estimation") else 0
            assert row["ground_truth"] == f"{float(row['ground_truth']):.{digits}f}"
        else:
            assert row["ground_truth"] in "ABCD"[: len(row["options"])]
    ids = {(row["scene_name"], row["question"], tuple(row["options"] or ())) for row in rows}
    assert len(ids) == len(rows)


def test_counts(pool):
    for question in of_type(pool, "object_counting"):
        (category,) = re.findall(r"How many (.*)\(s\)", question.question)
        assert int(question.ground_truth) == len(named(question, category)) >= 2


@pytest.mark.parametrize("seed", CHECKED)
def test_what_is_named_is_seen_and_single(seed):
    seen = shares_of(seed).max(0) >= SEEN
    categories = [thing.category for thing in room_of(seed).objects]
    for question in questions_of(seed):
        kind = question.question_type
        several = question.choices if kind == "object_rel_distance" else ()
        for category in set(re.findall(rf"\b({_NAME})\b", question.question)):
            instances = [number for number, name in enumerate(categories, 1) if name == category]
            enough = any if kind == "obj_appearance_order" else all
            assert enough(seen[instances]), question.question
            if kind not in ("object_counting", "obj_appearance_order") and category not in several:
                assert len(instances) == 1, question.question


def test_books_are_not_asked_about_beside_a_shelf_of_them(pool):
    for question in pool:
        if re.search(r"\bbook\b", question.question):
            assert not named(question, "bookshelf")


def test_distances_are_those_of_the_closest_points(pool):
    for question in of_type(pool, "object_abs_distance")[::40]:
        first, second = (
            only(question, name)
            for name in re.search(r"between the (.+) and the (.+) \(in", question.question).groups()
        )
        faces = triangles(question, first), triangles(question, second)
        truth = float(question.ground_truth)
        assert truth >= 0.4
        sampled = least_distance(samples(faces[0], 6), samples(faces[1], 6))
        longest = max(np.linalg.norm(np.roll(t, 1, 1) - t, axis=-1).max() for t in faces)
        assert truth - 0.05 - 1e-9 <= sampled <= truth + 0.05 + longest / 3


def test_sizes_are_those_of_the_tight_box(pool):
    for question in of_type(pool, "object_size_estimation"):
        thing = only(question, re.search(r"height\) of the (.+), measured", question.question).group(1))
        cos, sin = math.cos(thing.yaw), math.sin(thing.yaw)
        x, y, z = room_of(seed_of(question)).object_vertices(thing.instance_id).T
        longest = max(np.ptp(cos * x + sin * y), np.ptp(cos * y - sin * x), np.ptp(z))
        assert float(question.ground_truth) == pytest.approx(100 * longest, abs=0.5 + 1e-6)


def test_room_sizes_are_floor_areas(pool):
    asked = of_type(pool, "room_size_estimation")
    assert len(asked) > len(ROOMS) / 2
    for question in asked[:10]:
        outline = room_of(seed_of(question)).outline
        low, high = outline.min(0), outline.max(0)
        grid = np.stack(np.meshgrid(*(np.arange(a, b, 0.05) + 0.025 for a, b in zip(low, high, strict=True))), -1)
        area = (distance_inside(grid, outline) > 0).sum() * 0.05**2
        assert float(question.ground_truth) == pytest.approx(area, rel=0.02)


def test_the_closest_beats_the_others_by_the_margin(pool):
    for question in of_type(pool, "object_rel_distance")[::6]:
        anchor = only(question, re.search(r"closest to the (.+)\?", question.question).group(1))
        assert f"({', '.join(question.choices)})" in question.question
        distances = {
            name: min(
                closest_distance(triangles(question, anchor), triangles(question, thing))
                for thing in named(question, name)
            )
            for name in question.choices
        }
        nearest, second = sorted(distances.values())[:2]
        assert distances[question.answer] == nearest
        assert second >= nearest + 0.2 and second >= 1.15 * nearest


def bearing(question: RoomQuestion, standing: complex, facing: complex, queried: complex) -> float:
    return math.degrees(cmath.phase((queried - standing) / (facing - standing)))


def test_directions(pool):
    found = Counter()
    for question in of_type(pool, *(kind for kind in QUESTION_TYPES if "direction" in kind)):
        names = re.match(r"If I am standing by the (.+) and facing the (.+), is the (.+?) to ", question.question)
        places = [complex(*only(question, name).center[:2]) for name in names.groups()]
        assert min(abs(places[0] - places[1]), abs(places[0] - places[2])) >= 1.0
        assert abs(places[1] - places[2]) >= 0.6
        angle = bearing(question, *places)
        side = "left" if angle > 0 else "right"
        level = question.question_type.rsplit("_", 1)[1]
        if level == "easy":
            expected, borders = side, (0, 135)
            assert abs(angle) < 135
        elif level == "medium":
            expected, borders = "back" if abs(angle) > 135 else side, (0, 135)
            borders = (135,) if expected == "back" else borders
        else:
            expected, borders = ("front-" if abs(angle) < 90 else "back-") + side, (0, 90, 180)
        assert question.answer == expected
        assert min(abs(abs(angle) - border) for border in borders) >= 15 - 1e-6
        found[level, expected] += 1
    assert len(found) == 2 + 3 + 4


@pytest.mark.parametrize("seed", CHECKED)
def test_appearance_orders(seed):
    shares, room = shares_of(seed), room_of(seed)
    for question in of_type(questions_of(seed), "obj_appearance_order"):
        order = question.answer.split(", ")
        category = {
            name: shares[:, [o.instance_id for o in room.objects if o.category == name]].max(1) for name in order
        }
        clear = [int((category[name] >= SEEN).argmax()) for name in order]
        trace = [int((category[name] > 0).argmax()) for name in order]
        assert all(later - earlier >= 2 for earlier, later in zip(clear[:-1], trace[1:], strict=True))
        assert all(sorted(choice.split(", ")) == sorted(order) for choice in question.choices)
        assert len(set(question.choices)) == 4


def test_the_order_in_the_question_tells_nothing(pool):
    asked = of_type(pool, "obj_appearance_order")
    listed = [re.search(r"video: (.+)\?", question.question).group(1) for question in asked]
    assert all(order in question.choices for order, question in zip(listed, asked, strict=True))
    right = np.mean([order == question.answer for order, question in zip(listed, asked, strict=True)])
    assert abs(right - 0.25) < 0.08


def test_routes_can_be_walked_and_turn_as_they_say(pool):
    shapes = Counter()
    for question in of_type(pool, "route_planning"):
        floor = Floor(room_of(seed_of(question)))
        head = re.match(
            r".*beginning at the (.+) and facing the (.+)\. You want to navigate to the (.+?)\. You", question.question
        )
        start, faced, goal = (only(question, name) for name in head.groups())
        steps = re.findall(r"\d\. (\[please fill in\]|Go forward until the [a-z ]+?)(?= \d|\. You)", question.question)
        turns = iter(question.answer.split(", "))
        here, ahead = floor.standing_point(start), faced.center[:2]
        if start is faced:  # standing before it
            here = start.center[:2] + (start.size[0] / 2 + 0.5) * start.rotation[:2, 0]
        for step in steps:
            if step == "[please fill in]":
                turn = next(turns)
                continue
            stop = only(question, step.removeprefix("Go forward until the "))
            if stop is not faced:
                angle = bearing(question, complex(*here), complex(*ahead), complex(*stop.center[:2]))
                expected = "Turn Back" if abs(angle) >= 150 else "Turn Left" if angle > 0 else "Turn Right"
                assert turn == expected and 40 <= abs(angle) and not 120 < abs(angle) < 150
            end = floor.walk(here, stop)
            assert end is not None and np.linalg.norm(end - here) >= 0.5
            way = here + np.linspace(0, 1, 7)[:, None] * (end - here)
            assert distance_inside(way, room_of(seed_of(question)).outline).min() > 0.3
            here, ahead = end, end + (stop.center[:2] - here)
        assert stop is goal
        shapes[len(steps), start is faced] += 1
    assert set(shapes) == {(2, False), (2, True), (3, False), (4, False), (4, True)}


def test_a_single_view_is_asked_little_about():
    room = room_of(3)
    few = room_questions(room, camera_walk(room, 24, 3)[:1], image_size=SIZE)
    assert not of_type(few, "room_size_estimation", "obj_appearance_order")
    assert len(few) < len(questions_of(3)) / 2


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"most": 0}])
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match="must be"):
        room_questions(room_of(0), camera_walk(room_of(0), 2, 0), **wrong)


# --- balance


def test_answers_are_balanced(pool):
    balanced = balanced_questions(pool, score)
    assert balanced == balanced_questions(pool, score)
    assert set(QUESTION_TYPES) == {question.question_type for question in balanced}
    for kind in REAL_OPTIONS:
        letters = defaultdict(Counter)
        for question in of_type(balanced, kind):
            letters[question.form, len(question.options)][question.ground_truth] += 1
            assert question.choices.index(question.answer) == "ABCD".index(question.ground_truth)
        for (_, count), found in letters.items():
            assert set(found) <= set("ABCD"[:count]) and max(found.values()) - min(found.values()) <= 1
    for kind in REAL_OPTIONS:
        if "direction" in kind or kind == "route_planning":
            answers = defaultdict(Counter)
            for question in of_type(balanced, kind):
                answers[question.form][question.answer] += 1
            assert all(len(set(found.values())) == 1 for found in answers.values())
    # Options are moved, questions are not rewritten otherwise.
    before = {(question.scene_name, frozenset(question.choices), masked(question.question)) for question in pool}
    assert {(q.scene_name, frozenset(q.choices), masked(q.question)) for q in balanced} <= before


def test_balance_takes_from_guessing(pool):
    def parts(questions):
        return [question for question in questions if seed_of(question) % 3], [
            question for question in questions if seed_of(question) % 3 == 0
        ]

    raw = guessing_scores(*parts(pool), score)
    balanced = guessing_scores(*parts(balanced_questions(pool, score)), score)
    for kind in ("object_counting", "object_size_estimation", "object_rel_distance"):
        assert balanced[kind]["question_only"] < raw[kind]["question_only"] - 0.05
    for kind in REAL_OPTIONS:
        chance = np.mean([1 / len(question.choices) for question in of_type(pool, kind)])
        assert balanced[kind]["question_only"] < chance + 0.12
        assert balanced[kind]["constant"] < chance + 0.1


def biased(scene: int, answer: str) -> RoomQuestion:
    cues = {choice: (choice, f"{choice}: bed>door") for choice in ("left", "right")}
    kind = "object_rel_direction_easy"
    return RoomQuestion(f"room_{scene:06d}", kind, "Is it left or right?", answer, ("left", "right"), cues)


def test_a_prior_is_learned_and_balanced_away():
    asked = [biased(scene, "left" if scene % 5 else "right") for scene in range(100)]
    assert QuestionOnlyPredictor(asked, score).guess(asked[0])[0] == "left"
    train, held_out = asked[:70], asked[70:]
    assert guessing_scores(train, held_out, score)["object_rel_direction_easy"] == {
        "constant": pytest.approx(0.8),
        "question_only": pytest.approx(0.8),
    }
    even = balanced_questions(asked, score)
    assert Counter(question.answer for question in even) == {"left": 20, "right": 20}
    assert Counter(question.ground_truth for question in even) == {"A": 20, "B": 20}


def test_numbers_are_guessed_by_name():
    def sizes(scenes, name: str, centimetres: int) -> list[RoomQuestion]:
        cues = {"": (name,)}
        one = RoomQuestion("", "object_size_estimation", f"How long is the {name}?", str(centimetres), (), cues)
        return [replace(one, scene_name=f"room_{scene:06d}") for scene in scenes]

    train = sizes(range(10), "bed", 200) + sizes(range(10), "cup", 10) + sizes(range(3), "tv", 150)
    predictor = QuestionOnlyPredictor(train, score)
    assert [predictor.guess(question)[0] for question in (train[0], train[10])] == ["200", "10"]
    unknown = sizes([50], "rug", 150)[0]
    assert predictor.guess(unknown)[0] == best_constant([question.answer for question in train], "", score) == "200"
    held_out = sizes(range(20, 24), "bed", 200) + sizes(range(20, 24), "cup", 10)
    assert guessing_scores(train, held_out, score)["object_size_estimation"] == {"constant": 0.5, "question_only": 1.0}


def test_min_kept_is_checked():
    with pytest.raises(ValueError, match="min_kept must be in"):
        balanced_questions([], score, min_kept=0)


def test_questions_about_many_rooms():
    questions = balanced_room_questions([0, 1], score, num_views=8, most=2)
    assert {question.scene_name for question in questions} == {"room_000000", "room_000001"}
    assert all(count <= 4 for count in Counter(question.question_type for question in questions).values())
