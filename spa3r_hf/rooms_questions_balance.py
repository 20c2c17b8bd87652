"""Questions about many rooms, balanced so that little can be guessed; and what guessing still scores."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np

from .rooms import generate_room
from .rooms_cameras import camera_walk
from .rooms_questions import QUESTION_TYPES, RoomQuestion, room_questions


Score = Callable[[str, str, str], float]
"""(prediction, reference, question type) -> [0, 1]: accuracy of a letter, mean relative accuracy of a number."""

_FIXED_CHOICES = (
    "object_rel_direction_easy",
    "object_rel_direction_medium",
    "object_rel_direction_hard",
    "route_planning",
)
_FOLDS = 5
_ROUNDS = 12
_FEW = 3  # questions with a cue, fewer than which do not outvote all questions of the type
_SMOOTHING = 0.5  # right answers by chance that each cue starts from
_CONSTANTS = 40  # numbers tried as an answer
# What guessing a number may score: about what the best constant does for distances, which have no typical value.
_NUMBER_CHANCE = 0.4


def question_rows(questions: Iterable[RoomQuestion], first_id: int = 0) -> list[dict[str, Any]]:
    """Rows with VSI-Bench's columns, for `datasets.Dataset.from_list`; ids count up from `first_id`."""
    return [question.row(number) for number, question in enumerate(questions, first_id)]


def balanced_room_questions(
    seeds: Iterable[int], score: Score, num_views: int = 24, most: int = 8, seed: int = 0
) -> list[RoomQuestion]:
    """Balanced questions about the rooms of `seeds`, each seen along the walk that `scenes_rooms.RoomScenes` shows.

    Give training and held-out rooms in one call, and part the questions by `scene_name`: a few rooms by themselves do
    not show the priors that many share.

    Args:
        seeds: Of the rooms and their walks.
        score: See `Score`.
        num_views: Views along a walk.
        most: Questions of each type and room at most, before balancing.
        seed: Of the choice among possible questions, and of the balancing.
    """
    questions: list[RoomQuestion] = []
    for room_seed in seeds:
        room = generate_room(room_seed)
        questions += room_questions(room, camera_walk(room, num_views, room_seed), seed, most)
    return balanced_questions(questions, score, seed=seed)


def balanced_questions(
    questions: Sequence[RoomQuestion], score: Score, min_kept: float = 0.4, seed: int = 0
) -> list[RoomQuestion]:
    """Leave out questions until a question-only predictor does no better than chance, and deal out the right letters.

    In each type (and form, see `RoomQuestion`): left, right and so on are each right equally often. Then, in rounds,
    `QuestionOnlyPredictor` learns from four fifths of the rooms and answers the rest, five times over; of the
    questions that it answers better than chance (for numbers: better than a score of 0.4), those that it is surest of
    are left out, as many as make up half of its lead. Last, the right options are moved so that each letter is right
    equally often (to within one).

    Args:
        questions: Of many rooms: some hundred make a difference, one does not.
        score: See `Score`.
        min_kept: Share of the questions of a type to which those rounds cut it down at most, in (0, 1]: sizes follow
            from names too closely to be balanced away.
        seed: Of the split into fifths, of which questions go where several would do, and of the letters.

    Returns:
        The questions kept, in their order.

    Raises:
        ValueError: `min_kept` is out of range.
    """
    if not 0 < min_kept <= 1:
        raise ValueError(f"min_kept must be in (0, 1], got {min_kept}")
    score = cache(score)
    groups: dict[tuple[str, str], list[RoomQuestion]] = defaultdict(list)
    for question in questions:
        groups[question.question_type, question.form].append(question)
    place = {id(question): index for index, question in enumerate(questions)}
    kept: dict[int, RoomQuestion] = {}
    for number, form in enumerate(sorted(groups)):
        rng = np.random.default_rng((seed, number))
        group = _answers_evened(groups[form], rng)
        fewest = math.ceil(min_kept * len(group))
        for _ in range(_ROUNDS):
            surplus = _best_guessed(group, score, rng)[: len(group) - fewest]
            if not surplus:
                break
            group = [question for index, question in enumerate(group) if index not in surplus]
        group = _answers_evened(group, rng)
        for turn, index in enumerate(rng.permutation(len(group))):
            question = group[index]
            moved = question.with_answer_at(turn % len(question.choices)) if question.choices else question
            kept[place[id(question)]] = moved
    return [kept[index] for index in sorted(kept)]


def _answers_evened(questions: list[RoomQuestion], rng: np.random.Generator) -> list[RoomQuestion]:
    """Of questions that offer the same few choices, as many for each right one; any others as they are."""
    if questions[0].question_type not in _FIXED_CHOICES:
        return questions
    by_answer: dict[str, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        by_answer[question.answer].append(index)
    least = min(len(places) for places in by_answer.values())
    even = {int(index) for places in by_answer.values() for index in rng.permutation(places)[:least]}
    return [question for index, question in enumerate(questions) if index in even]


def _best_guessed(questions: list[RoomQuestion], score: Score, rng: np.random.Generator) -> list[int]:
    """Indices of the questions to leave out next, the most guessable first; none where guessing does not pay."""
    scenes = sorted({question.scene_name for question in questions})
    fold_of = dict(zip(scenes, rng.permutation(len(scenes)) % _FOLDS, strict=True))
    lead, sureness = np.zeros(len(questions)), np.zeros(len(questions))
    for fold in range(min(_FOLDS, len(scenes)) if len(scenes) > 1 else 0):
        held_out = [index for index, question in enumerate(questions) if fold_of[question.scene_name] == fold]
        predictor = QuestionOnlyPredictor(
            (question for question in questions if fold_of[question.scene_name] != fold), score
        )
        for index in held_out:
            question = questions[index]
            answer, sureness[index] = predictor.guess(question)
            lead[index] = _score_of(question, answer, score)
            lead[index] -= 1 / len(question.choices) if question.choices else _NUMBER_CHANCE
    if lead.mean() <= lead.std() / math.sqrt(len(lead)):  # a lead within one standard error may be luck
        return []
    count = math.ceil(lead.sum() / lead.max() / 2)
    order = np.lexsort((rng.random(len(lead)), -lead, -sureness, lead <= 0))
    return [int(index) for index in order[:count]]


def _score_of(question: RoomQuestion, answer: str, score: Score) -> float:
    """The score of answering with a choice, or a number."""
    if question.choices:
        return float(answer == question.answer)
    return score(answer, question.answer, question.question_type)


# --- what guessing scores


class QuestionOnlyPredictor:
    """Answers from the words of a question alone, by how often its cues went with which answer.

    For choices, each cue of a choice speaks for or against it by the log ratio of how often choices with this cue were
    right to chance; for numbers, the answer is the best constant for the cue.

    Args:
        questions: To learn from.
        score: See `Score`.
    """

    def __init__(self, questions: Iterable[RoomQuestion], score: Score):
        right: dict[tuple[str, str], float] = defaultdict(float)
        by_chance: dict[tuple[str, str], float] = defaultdict(float)
        numbers: dict[tuple[str, str], list[str]] = defaultdict(list)
        for question in questions:
            kind = question.question_type
            for choice in question.choices:
                for cue in question.cues[choice]:
                    right[kind, cue] += choice == question.answer
                    by_chance[kind, cue] += 1 / len(question.choices)
            if not question.choices:
                for cue in ("", *question.cues[""]):
                    numbers[kind, cue].append(question.answer)
        self._weights = {
            key: math.log((right[key] + _SMOOTHING) / (expected + _SMOOTHING)) for key, expected in by_chance.items()
        }
        self._constants = {
            (kind, cue): best_constant(answers, kind, score)
            for (kind, cue), answers in numbers.items()
            if not cue or len(answers) >= _FEW
        }

    def guess(self, question: RoomQuestion) -> tuple[str, float]:
        """The answer (a number, or a choice; "" for a type it knows nothing about), and how sure it is."""
        kind = question.question_type
        if not question.choices:
            known = [(kind, cue) for cue in (*question.cues[""], "") if (kind, cue) in self._constants]
            return (self._constants[known[0]] if known else ""), 0.0
        votes = [
            sum(self._weights.get((kind, cue), 0.0) for cue in question.cues[choice]) for choice in question.choices
        ]
        second, first = np.argsort(votes, kind="stable")[-2:]
        return question.choices[first], votes[first] - votes[second]


def best_constant(answers: Sequence[str], question_type: str, score: Score) -> str:
    """Of the answers (thinned out to some dozens, if they are numbers), the one that scores best for all of them."""
    counts = Counter(answers)
    candidates = sorted(counts, key=lambda answer: (len(answer), answer))
    if len(candidates) > _CONSTANTS:
        ranked = sorted(answers, key=float)
        candidates = [ranked[round(place)] for place in np.linspace(0, len(ranked) - 1, _CONSTANTS)]
    return max(
        candidates,
        key=lambda candidate: sum(count * score(candidate, answer, question_type) for answer, count in counts.items()),
    )


def guessing_scores(
    train: Sequence[RoomQuestion], held_out: Sequence[RoomQuestion], score: Score
) -> dict[str, dict[str, float]]:
    """What is scored without looking, by question type: the baselines to report beside a model.

    Args:
        train: What the baselines learn from.
        held_out: Questions of other rooms.
        score: See `Score`.

    Returns:
        For each type in both: `constant`, the mean score in [0, 1] of the one answer (a number, a letter, or always
        the same choice) that is best on `train`, and `question_only`, that of `QuestionOnlyPredictor`.
    """
    score = cache(score)
    predictor = QuestionOnlyPredictor(train, score)
    result = {}
    for kind in QUESTION_TYPES:
        known = [question for question in train if question.question_type == kind]
        asked = [question for question in held_out if question.question_type == kind]
        if not known or not asked:
            continue
        letter_or_number = best_constant([question.ground_truth for question in known], kind, score)
        choice = Counter(question.answer for question in known).most_common(1)[0][0]

        def constant(questions: list[RoomQuestion], answer: str = letter_or_number, kind: str = kind) -> float:
            return float(np.mean([score(answer, question.ground_truth, kind) for question in questions]))

        def same_choice(questions: list[RoomQuestion], answer: str = choice) -> float:
            return float(np.mean([_score_of(question, answer, score) for question in questions]))

        better = max((constant, same_choice), key=lambda guess: guess(known))
        guesses = [_score_of(question, predictor.guess(question)[0], score) for question in asked]
        result[kind] = {"constant": better(asked), "question_only": float(np.mean(guesses))}
    return result
