"""Two evaluations side by side, question by question."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .benchmarks_scores import official_means
from .evaluation_report import PREDICTIONS_NAME, RESULTS_NAME
from .evaluation_scores import intervals, questions_behind, resampled
from .evaluation_store import flat, read_json_lines
from .evaluation_tables import TITLES, columns
from .model_card import markdown_table


@dataclass(frozen=True)
class Difference:
    """
    One score of two evaluations, 0-100, over the questions that both have.

    Attributes:
        first, second: The two.
        difference: The second less the first.
        low, high: Ends of its 95 % interval.
        num_questions: How many it depends on.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    num_questions: int


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        benchmark: Of both.
        names: Of the two.
        num_questions: How many each has, and how many both have.
        scores: By their names in summaries.
        differing: Settings that are not the same, with their two values.
    """

    benchmark: str
    names: tuple[str, str]
    num_questions: tuple[int, int, int]
    scores: dict[str, Difference]
    differing: dict[str, tuple[Any, Any]]


def compare(first: str | Path, second: str | Path) -> Comparison:
    """
    Compare two evaluations on the questions that both have: paired, so that what makes a question hard drops out.

    Args:
        first, second: Folders that `write_report` has filled, or one of their files.

    Raises:
        FileNotFoundError: There is no evaluation.
        ValueError: They are of different benchmarks, have no questions in common, or questions of one id that differ.
    """
    results, rows = zip(*(_read(Path(path)) for path in (first, second)), strict=True)
    benchmarks = [result["benchmark"] for result in results]
    if benchmarks[0] != benchmarks[1]:
        raise ValueError(f"{first} is of {benchmarks[0]}, {second} of {benchmarks[1]}; expected one benchmark")
    common = [key for key in rows[0] if key in rows[1]]
    if not common:
        raise ValueError(f"{first} and {second} have no questions in common; expected some")
    for key in common:
        ours, theirs = ({name: of[key][name] for name in ("question_type", "ground_truth")} for of in rows)
        if ours != theirs:
            raise ValueError(
                f"id {key} is {ours} in {first}, but {theirs} in {second}; expected evaluations on the same data"
            )
    types, sources = ([rows[0][key][name] for key in common] for name in ("question_type", "source"))
    scores = [np.array([of[key]["score"] for key in common], dtype=float) for of in rows]
    means = [official_means(benchmarks[0], values, types, sources) for values in scores]
    differences = resampled(benchmarks[0], scores[1] - scores[0], types, sources)
    ends, counts = intervals(differences), questions_behind(benchmarks[0], types, sources)
    settings = [flat(result.get("settings", {})) for result in results]
    return Comparison(
        benchmark=benchmarks[0],
        names=(results[0]["name"], results[1]["name"]),
        num_questions=(len(rows[0]), len(rows[1]), len(common)),
        scores={
            name: Difference(
                first=means[0][name],
                second=means[1][name],
                difference=float(values[0]),
                low=ends[f"ci95_low.{name}"],
                high=ends[f"ci95_high.{name}"],
                num_questions=counts[name],
            )
            for name, values in differences.items()
        },
        differing={
            name: (settings[0].get(name), settings[1].get(name))
            for name in dict.fromkeys((*settings[0], *settings[1]))
            if settings[0].get(name) != settings[1].get(name)
        },
    )


def comparison_text(comparison: Comparison) -> str:
    """Markdown: a row for each score, and what else is to be known."""
    one, other = comparison.names
    if one == other:
        one, other = f"{one} (first)", f"{other} (second)"
    summary = {name: score.first for name, score in comparison.scores.items()}
    headings = columns(comparison.benchmark, summary)
    headings |= {name: name for name in sorted(summary) if name not in headings}
    rows = [
        [
            heading,
            f"{score.first:.1f}",
            f"{score.second:.1f}",
            f"{score.difference:+.1f}",
            f"{score.low:+.1f} to {score.high:+.1f}",
            str(score.num_questions),
        ]
        for heading, score in ((headings[name], comparison.scores.get(name)) for name in headings)
        if score is not None
    ]
    ours, theirs, both = comparison.num_questions
    lines = [
        f"# {TITLES[comparison.benchmark]}: {one} and {other}",
        "",
        markdown_table(["", one, other, "difference", "95 % interval", "questions"], rows),
        "",
        f"Over the {both} questions that both have (of {ours} and {theirs}). Difference: the second less the first; "
        "interval: paired bootstrap, questions drawn within each type.",
    ]
    if comparison.differing:
        lines += ["", "Settings that differ:", ""]
        lines += [f"- {name}: {first} and {second}" for name, (first, second) in comparison.differing.items()]
    return "\n".join(lines) + "\n"


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    folder = path if path.is_dir() else path.parent
    missing = [name for name in (RESULTS_NAME, PREDICTIONS_NAME) if not (folder / name).is_file()]
    if not path.exists() or missing:
        raise FileNotFoundError(f"{path} holds no {missing or 'results'}; expected the folder of an evaluation")
    rows = {row["id"]: row for _, row in read_json_lines(folder / PREDICTIONS_NAME)}
    return json.loads((folder / RESULTS_NAME).read_text()), rows


__all__ = ["Comparison", "Difference", "compare", "comparison_text"]
