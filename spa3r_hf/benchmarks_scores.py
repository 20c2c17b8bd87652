"""Official scores of the spatial benchmarks.

VSI-Bench's scoring lives in its `evaluate` metric, `hub_configs/vsi_bench`, which has to be complete without this
package; it is loaded from there, not repeated here.
"""

import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .optional import require


if TYPE_CHECKING:  # that module needs this one
    from .benchmarks_questions import Question

BENCHMARKS = ("vsi_bench", "cv_bench", "spar_bench", "viewspatial_bench")
# What keys of a summary begin with that are no scores.
NOT_MEANS = ("ci95_low.", "ci95_high.", "count.", "unparseable.")
CV_BENCH_SOURCES = {"2D": ("ADE20K", "COCO"), "3D": ("Omni3D",)}
SPAR_BENCH_NUMERICAL_TASKS = tuple(
    f"{quantity}_prediction_{objects}{views}"
    for quantity in ("depth", "distance")
    for objects in ("oc", "oo")
    for views in ("", "_mv")
)
SPAR_BENCH_LEVELS: dict[str, tuple[str, ...]] = {
    "low": SPAR_BENCH_NUMERICAL_TASKS,
    "middle": ("view_change_infer", "position_matching", "camera_motion_infer"),
    "high": (
        "obj_spatial_relation_oo",
        "obj_spatial_relation_oc_mv",
        "obj_spatial_relation_oo_mv",
        "spatial_imagination_oc",
        "spatial_imagination_oo",
        "spatial_imagination_oc_mv",
        "spatial_imagination_oo_mv",
        "distance_infer_center_oo",
        "distance_infer_center_oo_mv",
    ),
}
_VIEW_CHANGES = (
    ("move_right", "move_left"),
    ("move_up", "move_down"),
    ("move_forward", "move_backward"),
    ("rotate_right", "rotate_left"),
    ("rotate_up", "rotate_down"),
)


_Groups = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Scores:
    """
    Attributes:
        parsed: What each of the N answers was read as, None where it could not be read.
        scores: (N,) float64, 0-1.
        summary: The official score as `overall`, those it is made of, and `count.*` and `unparseable.*` by question
            type; scores 0-100. What no question belongs to is left out, also of means.
    """

    parsed: list[Any]
    scores: np.ndarray
    summary: dict[str, float | int]


@lru_cache(maxsize=1)
def vsi_bench_metric() -> Any:
    """
    The module of the VSI-Bench metric: `parse_answer`, `score_answers`, `check_references`, `TASKS`, ...

    Raises:
        ImportError: `evaluate` is not installed.
    """
    require("evaluate", extra="eval")
    package = Path(__file__).parent
    places = (package / "vsi_bench", package.parent / "hub_configs" / "vsi_bench")  # installed; beside the package
    file = next((place / "vsi_bench.py" for place in places if (place / "vsi_bench.py").is_file()), None)
    spec = importlib.util.spec_from_file_location("spa3r_hf_vsi_bench_metric", file) if file else None
    if spec is None or spec.loader is None:
        raise ImportError(f"vsi_bench.py is in neither of {[str(place) for place in places]}; expected with spa3r_hf")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def score_benchmark(
    benchmark: str,
    questions: Sequence["Question"],
    predictions: Sequence[Any],
    number_parsing: str = "lmms_eval",
) -> Scores:
    """
    The official scores of answers to N questions of a benchmark.

    VSI-Bench: see `hub_configs/vsi_bench`.
    CV-Bench: by its data card, half the mean of the accuracies on ADE20K and on COCO, half that on Omni3D. How answers
    are matched the card leaves open; here an answer is an option's letter, also as "(A)" or "A.", alone or before the
    text of that option, and nothing else.
    SPAR-Bench: by the authors' code, as in lmms-eval 0.7.3: mean over the tasks; mean relative accuracy of the first
    number of the answer (with several views, the last); the option's letter as the first letter of the answer; for
    view changes the mean relative accuracy over five axes, relative to the answer rather than to the truth.
    Three departures from lmms-eval: there a missing import makes every numerical task 0, an empty answer to a choice
    scores 1, and `middle` loses view_change_infer by its name.
    ViewSpatial-Bench: as the authors' evaluate.py, accuracy over all questions; the answer is the first A, B, C or D
    that stands alone in its last line, so the article "a" counts, too.

    Args:
        benchmark: "vsi_bench", "cv_bench", "spar_bench" or "viewspatial_bench".
        questions: Some or all questions, as `load_benchmark` gives them.
        predictions: What the model wrote, (N,); what is no text is unparseable (a number may answer in VSI-Bench).
        number_parsing: Of VSI-Bench.

    Raises:
        ValueError: An unknown benchmark, or not as many predictions as questions.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark = {benchmark!r}; expected one of {BENCHMARKS}")
    if len(questions) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(questions)} questions; expected one for each")
    if benchmark == "vsi_bench":
        truths = [question.ground_truth for question in questions]
        types = [question.question_type for question in questions]
        return Scores(*vsi_bench_metric().score(predictions, truths, types, number_parsing))

    score_answer = _SCORERS[benchmark][0]
    answers = [prediction.strip() if isinstance(prediction, str) else "" for prediction in predictions]
    rows = [score_answer(answer, question) for answer, question in zip(answers, questions, strict=True)]
    scores = np.array([score for _, score in rows], dtype=float)
    types, sources = ([getattr(question, name) for question in questions] for name in ("question_type", "source"))
    summary: dict[str, float | int] = dict(official_means(benchmark, scores, types, sources))
    of_type = _places(types)
    summary |= {f"count.{name}": len(indices) for name, indices in of_type.items()}
    summary |= {f"unparseable.{name}": sum(rows[i][0] is None for i in indices) for name, indices in of_type.items()}
    return Scores([answer for answer, _ in rows], scores, summary)


def official_means(
    benchmark: str, scores: np.ndarray, question_types: Sequence[str], sources: Sequence[str]
) -> dict[str, float]:
    """
    What the official score, `overall`, and those it is made of are for scores (N,) of single questions, in 0-1.

    Each of them, 0-100, is linear in the scores; what no question belongs to is left out. This is the `summary` of
    `score_benchmark` without counts and intervals.
    """
    if benchmark == "vsi_bench":
        summary = vsi_bench_metric().summarise(scores, np.ones(len(scores), dtype=bool), question_types)
        return {name: score for name, score in summary.items() if not name.startswith(NOT_MEANS)}
    return _SCORERS[benchmark][1](scores, _places(question_types), _places(sources))


def _places(names: Sequence[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        places.setdefault(name, []).append(index)
    return places


def _score_cv_bench(answer: str, question: "Question") -> tuple[str | None, float]:
    match = re.fullmatch(r"\(?([A-Z])\)?[.:]?(?:\s+(.+?))?\.?", answer, re.IGNORECASE | re.DOTALL)
    if match is None:
        return None, 0.0
    letter, text = match[1].upper(), match[2]
    index = ord(letter) - ord("A")
    if text is not None and text.lower() not in (option.lower() for option in question.options[index : index + 1]):
        return None, 0.0
    return letter, float(letter == question.ground_truth)


def _score_viewspatial_bench(answer: str, question: "Question") -> tuple[str | None, float]:
    match = re.search(r"\b[A-D]\b", answer.split("\n")[-1], re.IGNORECASE)
    letter = match[0].upper() if match else None
    return letter, float(letter == question.ground_truth)


def _score_spar_bench(answer: str, question: "Question") -> tuple[Any, float]:
    task, truth = question.question_type, question.ground_truth
    if task == "view_change_infer":
        return _score_view_change(answer, truth)
    if task not in SPAR_BENCH_NUMERICAL_TASKS:
        answer, truth = answer.lower(), truth.lower()
        return answer[:1] or None, float(answer != "" and (answer in truth or answer[0] == truth))
    numbers = re.findall(r"(?<!\^)\d+\.\d+|(?<!\^)\d+", answer)
    if not numbers:
        return None, 0.0
    number = float(numbers[-1 if task.endswith("_mv") else 0])
    return number, _mean_relative_accuracy([number], [float(truth)])


def _score_view_change(answer: str, truth: str) -> tuple[dict[str, float] | None, float]:
    try:
        moves = parse_view_change(answer)
    except ValueError:
        return None, 0.0
    return moves, _mean_relative_accuracy(_along_axes(parse_view_change(truth)), _along_axes(moves))


def parse_view_change(text: str) -> dict[str, float]:
    """
    SPAR-Bench's "move_right:0.3,rotate_up:10" as numbers.

    Raises:
        ValueError: It is not made of names and numbers.
    """
    moves = [item.split(":") for item in text.split(",")]
    if any(len(move) != 2 for move in moves):
        raise ValueError(f"view change {text!r}; expected moves and amounts, as in 'move_right:0.3,rotate_up:10'")
    return {name: float(amount) for name, amount in moves}


def _along_axes(moves: dict[str, float]) -> list[float]:
    return [moves.get(forth, 0.0) - moves.get(back, 0.0) for forth, back in _VIEW_CHANGES]


def _mean_relative_accuracy(values: Sequence[float], truths: Sequence[float]) -> float:
    """SPAR-Bench's: where the truth is zero the error counts as it is."""
    truth = np.asarray(truths)
    with np.errstate(all="ignore"):  # answers may be infinite
        errors = np.abs(np.subtract(values, truth) / np.where(truth == 0, 1.0, truth))
    return float(vsi_bench_metric().mean_relative_accuracy(errors).mean())


def _means(scores: np.ndarray, groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Mean score in percent of each group of questions."""
    return {name: 100 * float(scores[indices].mean()) for name, indices in groups.items()}


def _means_of(means: Mapping[str, float], groups: Mapping[str, Iterable[str]]) -> dict[str, float]:
    """The mean of those of a group that are there, for each group of which there are some."""
    present = {group: [means[name] for name in names if name in means] for group, names in groups.items()}
    return {group: float(np.mean(values)) for group, values in present.items() if values}


def _summarise_cv_bench(scores: np.ndarray, of_type: _Groups, of_source: _Groups) -> dict[str, float]:
    sources = _means(scores, of_source)
    dimensions = _means_of(sources, CV_BENCH_SOURCES)
    return _means_of(dimensions, {"overall": dimensions}) | dimensions | sources | _means(scores, of_type)


def _summarise_spar_bench(scores: np.ndarray, of_type: _Groups, of_source: _Groups) -> dict[str, float]:
    tasks = _means(scores, of_type)
    return _means_of(tasks, {"overall": tuple(tasks), **SPAR_BENCH_LEVELS}) | tasks


def _summarise_viewspatial_bench(scores: np.ndarray, of_type: _Groups, of_source: _Groups) -> dict[str, float]:
    everything = {"overall": range(len(scores))} if len(scores) else {}
    return _means(scores, {**everything, **of_type})


_SCORERS: dict[str, tuple[Callable[[str, "Question"], tuple[Any, float]], Callable[..., dict[str, float]]]] = {
    "cv_bench": (_score_cv_bench, _summarise_cv_bench),
    "spar_bench": (_score_spar_bench, _summarise_spar_bench),
    "viewspatial_bench": (_score_viewspatial_bench, _summarise_viewspatial_bench),
}
