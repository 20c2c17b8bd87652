"""What the answers of an evaluation score, with bootstrap intervals, for any of the benchmarks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .benchmarks_questions import Question
from .benchmarks_scores import Scores, official_means, score_benchmark, vsi_bench_metric
from .evaluation_store import Answer


_NUM_RESAMPLES, _SEED = 5000, 0


@dataclass(frozen=True)
class Evaluation:
    """
    Attributes:
        benchmark: "vsi_bench", ...
        questions: The N questions.
        answers: Their answers, in the same order.
        scores: By the way numbers are read: VSI-Bench has "lmms_eval" and "original", the others have "official". The
            first is the one that tables show.
    """

    benchmark: str
    questions: Sequence[Question]
    answers: Sequence[Answer]
    scores: Mapping[str, Scores]

    @property
    def main(self) -> Scores:
        return next(iter(self.scores.values()))

    @property
    def failed(self) -> list[Answer]:
        """Those of questions that could not be asked; they score 0."""
        return [answer for answer in self.answers if answer.error is not None]

    def rows(self) -> list[dict[str, Any]]:
        """One for each question, as `predictions.jsonl` has them; scores 0-1."""
        original = self.scores.get("original")
        rows = []
        for index, (question, answer) in enumerate(zip(self.questions, self.answers, strict=True)):
            row = {
                "id": question.id,
                "scene": question.scene,
                "source": question.source,
                "question_type": question.question_type,
                "prompt": question.prompt,
                "ground_truth": question.ground_truth,
                "output": answer.output,
                "parsed": _plain(self.main.parsed[index]),
                "score": float(self.main.scores[index]),
                "num_frames": answer.num_frames,
            }
            if original is not None:
                row["score_original_parsing"] = float(original.scores[index])
            if answer.error is not None:
                row["error"] = answer.error
            rows.append(row)
        return rows


def evaluate_answers(benchmark: str, questions: Sequence[Question], answers: Mapping[str, Answer]) -> Evaluation:
    """
    Score the answers to some questions of a benchmark; scores as `score_benchmark`, all with 95 % intervals.

    Raises:
        KeyError: A question has no answer.
    """
    given = [answers[question.id] for question in questions]
    outputs = [answer.output for answer in given]
    if benchmark == "vsi_bench":
        parsings = vsi_bench_metric().NUMBER_PARSINGS
        scores = {parsing: score_benchmark(benchmark, questions, outputs, parsing) for parsing in parsings}
    else:
        official = score_benchmark(benchmark, questions, outputs)
        types, sources = ([getattr(question, name) for question in questions] for name in ("question_type", "source"))
        official.summary.update(intervals(resampled(benchmark, official.scores, types, sources)))
        scores = {"official": official}
    return Evaluation(benchmark, questions, given, scores)


def intervals(resamples: Mapping[str, np.ndarray]) -> dict[str, float]:
    """`ci95_low.*` and `ci95_high.*` of what `resampled` gives."""
    shares = {"ci95_low": 2.5, "ci95_high": 97.5}
    return {
        f"{side}.{name}": float(np.percentile(values[1:], share))
        for side, share in shares.items()
        for name, values in resamples.items()
    }


def resampled(
    benchmark: str, values: np.ndarray, question_types: Sequence[str], sources: Sequence[str]
) -> dict[str, np.ndarray]:
    """
    The official scores, 0-100, of N questions' scores, or differences of scores, and of 5000 resamples of them.

    Questions are drawn within each type (and source, where the official score goes by sources), with a fixed seed;
    those about one scene are taken to be independent.

    Args:
        benchmark: See `official_means`.
        values: (N,), scores in 0-1, or differences of two such.
        question_types, sources: Of each question.

    Returns:
        Name of the score -> (1 + R,): its value, and those of R resamples.
    """
    totals: dict[str, np.ndarray] = {}
    for number, (places, weights) in enumerate(_strata(benchmark, question_types, sources)):
        means = _resampled_means(values[places], number)
        for name, weight in weights.items():
            totals[name] = totals.get(name, 0.0) + weight * means
    return totals


def questions_behind(benchmark: str, question_types: Sequence[str], sources: Sequence[str]) -> dict[str, int]:
    """Name of an official score -> how many of N questions it depends on."""
    counts: dict[str, int] = {}
    for places, weights in _strata(benchmark, question_types, sources):
        for name, weight in weights.items():
            counts[name] = counts.get(name, 0) + (len(places) if weight else 0)
    return counts


def _strata(
    benchmark: str, question_types: Sequence[str], sources: Sequence[str]
) -> list[tuple[list[int], dict[str, float]]]:
    """
    Groups of questions that count alike: their places, and how much each official score gains, 0-100, if the mean of
    their scores grows by 1. These scores are linear.
    """
    keys = question_types if benchmark == "vsi_bench" else list(zip(question_types, sources, strict=True))
    groups: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    strata = []
    for key in sorted(groups):
        indicator = np.zeros(len(keys))
        indicator[groups[key]] = 1
        strata.append((groups[key], official_means(benchmark, indicator, question_types, sources)))
    return strata


def _resampled_means(values: np.ndarray, number: int) -> np.ndarray:
    """The mean of values and those of R resamples, (1 + R,)."""
    distinct, counts = np.unique(values, return_counts=True)
    # How often each of the few distinct values comes up: the same as drawing the values, and fast.
    draws = np.random.default_rng((_SEED, number)).multinomial(len(values), counts / len(values), size=_NUM_RESAMPLES)
    return np.append(values.mean(), draws @ distinct / len(values))


def _plain(value: Any) -> Any:
    """What JSON can hold: a number that is not finite becomes text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["Evaluation", "evaluate_answers", "questions_behind", "resampled"]
