"""VSI-Bench's scores as an `evaluate` metric, equal to those of lmms-eval and of the benchmark's authors.

The scoring lives in this file only: it is a Hub repo of its own, loaded by `evaluate` where spa3r_hf is absent, and
spa3r_hf loads its functions from here.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from numbers import Real
from typing import Any

import datasets
import evaluate
import numpy as np


NUMERICAL_TYPES = ("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation")
_LEVELS = tuple(f"object_rel_direction_{level}" for level in ("easy", "medium", "hard"))
MULTIPLE_CHOICE_TYPES = ("object_rel_distance", *_LEVELS, "route_planning", "obj_appearance_order")
QUESTION_TYPES = NUMERICAL_TYPES + MULTIPLE_CHOICE_TYPES
NUMBER_PARSINGS = ("lmms_eval", "original")

# The eight tasks in the order of the benchmark's tables, with the question types each is the mean of.
NUMERICAL_TASKS = {name: (name,) for name in NUMERICAL_TYPES}
MULTIPLE_CHOICE_TASKS = {
    "object_rel_distance": ("object_rel_distance",),
    "object_rel_direction": _LEVELS,
    "route_planning": ("route_planning",),
    "obj_appearance_order": ("obj_appearance_order",),
}
TASKS = NUMERICAL_TASKS | MULTIPLE_CHOICE_TASKS

_LARGEST_ERRORS = 1 - np.linspace(0.5, 0.95, 10)
_NUM_RESAMPLES, _SEED = 5000, 0

_DIGITS = re.compile(r"-?\d+(?:\.\d+)?")
_WORD = re.compile("[a-z]+")
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBER_WORDS = {word: float(value) for value, word in enumerate(_UNITS.split())}
_NUMBER_WORDS |= {word: 10.0 * value for value, word in enumerate(_TENS.split(), start=2)}
_NUMBER_WORDS |= {"hundred": 100.0, "thousand": 1000.0}


def parse_answer(prediction: Any, question_type: str, number_parsing: str = "lmms_eval") -> float | str | None:
    """
    What the answer says.

    Args:
        prediction: What the model wrote; anything may come, only text and numbers can be understood.
        question_type: One of `QUESTION_TYPES`.
        number_parsing: "lmms_eval" (since 2026-07): the first decimal number or English number word in the answer.
            "original": the first word, without dots at its end, as Python's `float` reads it; text only.

    Returns:
        A finite number for numerical types, a capital letter for multiple choice, or None where there is none.
    """
    answer = _plain(prediction)
    if question_type not in NUMERICAL_TYPES:
        return _letter(answer) if isinstance(answer, str) else None
    if number_parsing == "original":
        number = _first_word_as_number(answer) if isinstance(answer, str) else None
    else:
        number = _first_number(answer) if isinstance(answer, str) else answer
    return number if number is not None and math.isfinite(number) else None


def score_answers(
    predictions: Sequence[Any],
    references: Sequence[Any],
    question_types: Sequence[str],
    number_parsing: str = "lmms_eval",
) -> tuple[list[float | str | None], np.ndarray]:
    """
    Score N answers. The references have passed `check_references`.

    Returns:
        The parsed answers, see `parse_answer`, and their scores, (N,) float64 in 0-1: the mean relative accuracy of
        numbers, 1 or 0 for letters, and 0 where nothing was parsed.

    Raises:
        ValueError: Lengths differ, or there is no such `number_parsing`.
    """
    check_number_parsing(number_parsing)
    rows = list(zip(predictions, references, question_types, strict=True))
    parsed = [parse_answer(prediction, question_type, number_parsing) for prediction, _, question_type in rows]
    scores = np.zeros(len(rows))
    is_number = np.array([question_type in NUMERICAL_TYPES for question_type in question_types], dtype=bool)
    numbers, truths = [], []
    for index, (answer, (_, reference, _)) in enumerate(zip(parsed, rows, strict=True)):
        if is_number[index]:
            numbers.append(math.nan if answer is None else answer)
            truths.append(_ground_truth(reference))
        else:
            scores[index] = answer == str(reference).upper()
    with np.errstate(all="ignore"):  # no relative error to a ground truth of zero: scores 0
        scores[is_number] = mean_relative_accuracy(np.abs(np.subtract(numbers, truths)) / truths)
    return parsed, scores


def score(
    predictions: Sequence[Any],
    references: Sequence[Any],
    question_types: Sequence[str],
    number_parsing: str = "lmms_eval",
) -> tuple[list[float | str | None], np.ndarray, dict[str, float | int]]:
    """What `score_answers` and `summarise` return, at once."""
    parsed, scores = score_answers(predictions, references, question_types, number_parsing)
    scorable = [
        isinstance(answer, str) or (answer is not None and _ground_truth(reference) > 0)
        for answer, reference in zip(parsed, references, strict=True)
    ]
    return parsed, scores, summarise(scores, np.array(scorable, dtype=bool), question_types)


def mean_relative_accuracy(relative_errors: np.ndarray) -> np.ndarray:
    """The share of the thresholds 0.50, 0.55, ..., 0.95 that each error (N,) meets: error <= 1 - threshold."""
    return (np.asarray(relative_errors)[:, None] <= _LARGEST_ERRORS).mean(1)


def check_number_parsing(number_parsing: str) -> None:
    """
    Raises:
        ValueError: There is no such way to read numbers.
    """
    if number_parsing not in NUMBER_PARSINGS:
        raise ValueError(f"number_parsing = {number_parsing!r}; expected one of {NUMBER_PARSINGS}")


def check_references(references: Sequence[Any], question_types: Sequence[str], names: Sequence[Any]) -> None:
    """
    Refuse references that allow no score. Empty and zero ground truths of numerical types pass: as in both reference
    implementations their score is 0, whatever the answer.

    Args:
        names: What each row is called in messages.

    Raises:
        ValueError: A row has an unknown question type, or a ground truth that is no number or no option's letter.
    """
    for name, reference, question_type in zip(names, references, question_types, strict=True):
        if question_type not in QUESTION_TYPES:
            raise ValueError(f"{name}: question type {question_type!r}; expected one of {QUESTION_TYPES}")
        if question_type not in NUMERICAL_TYPES:
            if not (isinstance(reference, str) and _letter(reference) == reference.upper()):
                raise ValueError(f"{name} ({question_type}): ground truth {reference!r}; expected an option's letter")
        elif reference != "":
            value = _ground_truth(reference)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} ({question_type}): ground truth {reference!r}; expected a number from 0 up")


def summarise(scores: np.ndarray, scorable: np.ndarray, question_types: Sequence[str]) -> dict[str, float | int]:
    """
    Aggregate scores (N,) in 0-1; `scorable` (N,) bool tells where an answer was parsed and could be compared.

    Returns:
        The dict of the metric, see its description, scores in 0-100.
    """
    types = np.asarray(question_types)
    # First the mean itself, then those of the resamples: (1 + R,) each.
    of_type = {name: _resampled_means(scores[types == name], name) for name in QUESTION_TYPES if name in types}
    numerical = {name: of_type[name] for name in NUMERICAL_TYPES if name in of_type}
    multiple_choice: dict[str, np.ndarray] = {}
    for task, names in MULTIPLE_CHOICE_TASKS.items():
        present = {_key(name): of_type[name] for name in names if name in of_type}
        # As the original: where a level of direction has no questions, the others count as tasks of their own.
        multiple_choice |= {task: np.mean(list(present.values()), axis=0)} if len(present) == len(names) else present

    groups = {"overall": numerical | multiple_choice, "numerical": numerical, "multiple_choice": multiple_choice}
    means = {name: np.mean(list(tasks.values()), axis=0) for name, tasks in groups.items() if tasks}
    means |= numerical | multiple_choice | {_key(name): mean for name, mean in of_type.items()}
    rows = {task: np.isin(types, names) for task, names in TASKS.items()}
    rows = {task: of_task for task, of_task in rows.items() if of_task.any()}
    return (
        {name: float(mean[0]) for name, mean in means.items()}
        | {f"ci95_low.{name}": float(np.percentile(mean[1:], 2.5)) for name, mean in means.items()}
        | {f"ci95_high.{name}": float(np.percentile(mean[1:], 97.5)) for name, mean in means.items()}
        | {f"count.{task}": int(of_task.sum()) for task, of_task in rows.items()}
        | {f"unparseable.{task}": int((of_task & ~scorable).sum()) for task, of_task in rows.items()}
    )


def _resampled_means(scores: np.ndarray, question_type: str) -> np.ndarray:
    """The mean of scores and those of R resamples, in percent: (1 + R,). The order of the scores does not matter."""
    values, counts = np.unique(scores, return_counts=True)
    # Drawing how often each of the few values comes up is drawing the scores themselves, at a fraction of the time.
    generator = np.random.default_rng((_SEED, QUESTION_TYPES.index(question_type)))
    draws = generator.multinomial(len(scores), counts / len(scores), size=_NUM_RESAMPLES)
    return 100 * np.append(scores.mean(), draws @ values / len(scores))


def _key(question_type: str) -> str:
    """The levels of direction are no tasks: object_rel_direction.easy."""
    return question_type.replace("object_rel_direction_", "object_rel_direction.")


def _plain(prediction: Any) -> str | float | None:
    if isinstance(prediction, str):
        return str(prediction)
    if not isinstance(prediction, Real) or isinstance(prediction, bool):
        return None
    try:
        return float(prediction)
    except OverflowError:
        return None


def _first_word(text: str) -> str:
    return text.split(" ")[0].rstrip(".").strip()


def _letter(text: str) -> str | None:
    word = _first_word(text)
    return word.upper() if len(word) == 1 and word.isascii() and word.isalpha() else None


def _first_word_as_number(text: str) -> float | None:
    try:
        return float(_first_word(text))
    except ValueError:
        return None


def _first_number(text: str) -> float | None:
    text = text.lower()
    digits = _DIGITS.search(text)
    words = list(_WORD.finditer(text))
    start = next((index for index, word in enumerate(words) if word.group() in _NUMBER_WORDS), None)
    if digits and (start is None or digits.start() < words[start].start()):
        return float(digits.group())
    if start is None:
        return None
    said = takewhile(lambda word: word == "and" or word in _NUMBER_WORDS, (word.group() for word in words[start:]))
    thousands = below = 0.0  # not integers, which a long answer would let grow past all bounds
    for value in (_NUMBER_WORDS[word] for word in said if word != "and"):
        if value == 100:
            below = max(below, 1) * value
        elif value == 1000:
            thousands, below = thousands + max(below, 1) * value, 0.0
        else:
            below += value
    return thousands + below


def _ground_truth(reference: Any) -> float:
    try:
        return float(reference)
    except (TypeError, ValueError):
        return math.nan


_DESCRIPTION = """\
VSI-Bench (Thinking in Space, https://huggingface.co/papers/2412.14171): mean relative accuracy of numerical answers,
exact match of option letters, averaged per task and over the eight tasks.
"""

_CITATION = """\
@inproceedings{yang2025thinking,
    title = {Thinking in Space: How Multimodal Large Language Models See, Remember, and Recall Spaces},
    author = {Yang, Jihan and Yang, Shusheng and Gupta, Anjali W. and Han, Rilyn and Fei-Fei, Li and Xie, Saining},
    booktitle = {CVPR},
    year = {2025}
}
"""

_INPUTS = """
Args:
    predictions: What the model wrote, one string a question. What is no text (None, NaN, ...) counts as unparseable.
    references: The column ground_truth: a number (also as a string), or an option's letter.
    question_types: The column question_type.
    number_parsing: "lmms_eval" (default): the first decimal number or English number word in the answer, as lmms-eval
        since 2026-07. "original": the first word read as a number, as the benchmark's authors.

Returns:
    A flat dict, scores from 0 to 100; tasks that no question belongs to are left out, also of the means.
    overall: mean of the tasks; numerical, multiple_choice: mean of the tasks of one kind.
    object_counting, object_abs_distance, object_size_estimation, room_size_estimation, object_rel_distance,
        object_rel_direction, route_planning, obj_appearance_order.
    object_rel_direction.easy, .medium, .hard: the levels that object_rel_direction is the mean of. Where one of them
        has no questions, object_rel_direction is left out and the others count as tasks in the means, as in the
        authors' code.
    ci95_low.*, ci95_high.*: 95 % bootstrap interval of each score above (5000 resamples of the questions within each
        type, fixed seed; questions about one scene are taken to be independent).
    count.*: questions of each task.
    unparseable.*: of these, questions that score 0 because the answer holds no number or letter, or because the ground
        truth is zero or empty and allows no relative error.

Examples:
    >>> vsi_bench = evaluate.load("hub_configs/vsi_bench")
    >>> results = vsi_bench.compute(
    ...     predictions=["three", "A."],
    ...     references=["4", "B"],
    ...     question_types=["object_counting", "route_planning"],
    ... )
    >>> round(results["object_counting"], 6), results["route_planning"], round(results["overall"], 6)
    (60.0, 0.0, 30.0)
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class VSIBench(evaluate.Metric):
    """References are checked when they are added, so that a bad row is named before it can spoil a whole run."""

    def _info(self) -> evaluate.MetricInfo:
        columns = ("predictions", "references", "question_types")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({column: datasets.Value("string") for column in columns}),
            homepage="https://huggingface.co/datasets/nyu-visionx/VSI-Bench",
        )

    def compute(self, *, predictions=None, references=None, number_parsing="lmms_eval", **kwargs):
        """Score what was added and what is given here; see the description of the inputs."""
        check_number_parsing(number_parsing)  # before anything is stored
        return super().compute(predictions=predictions, references=references, number_parsing=number_parsing, **kwargs)

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Add questions; see the description of the inputs."""
        columns = {"predictions": predictions, "references": references} | kwargs
        super().add_batch(**_checked(columns, first_row=len(self)))

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Add one question: prediction, reference and question_types, each one value."""
        columns = {"predictions": [prediction], "references": [reference]}
        columns |= {name: [value] for name, value in kwargs.items()}
        super().add_batch(**_checked(columns, first_row=len(self)))

    def _compute(self, predictions, references, question_types, number_parsing):
        return score([json.loads(answer) for answer in predictions], references, question_types, number_parsing)[2]


def _checked(columns: Mapping[str, Any], first_row: int) -> dict[str, list[str]]:
    """The columns as `evaluate` stores them; predictions as JSON: a number stays one, and any text can be stored."""
    missing = [name for name in ("predictions", "references", "question_types") if columns.get(name) is None]
    if missing:
        raise ValueError(f"{missing} missing; expected predictions, references and question_types")
    rows = {name: list(column) for name, column in columns.items()}
    lengths = {name: len(column) for name, column in rows.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"columns of {lengths} rows; expected equally many: row {min(lengths.values())} is incomplete"
        )
    names = [f"row {first_row + index}" for index in range(lengths["predictions"])]
    check_references(rows["references"], rows["question_types"], names)
    rows["predictions"] = [json.dumps(_plain(prediction)) for prediction in rows["predictions"]]
    rows["references"] = [str(reference) for reference in rows["references"]]
    return rows
