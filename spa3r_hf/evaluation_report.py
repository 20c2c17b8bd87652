"""What an evaluation leaves: predictions.jsonl, results.json, table.md and chart.png."""

import hashlib
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .benchmarks_questions import Question
from .evaluation_scores import Evaluation
from .evaluation_store import write_json_lines, write_whole
from .evaluation_tables import PUBLISHED, TITLES, score_chart, score_table


PREDICTIONS_NAME, RESULTS_NAME, TABLE_NAME, CHART_NAME = "predictions.jsonl", "results.json", "table.md", "chart.png"
_LIBRARIES = (
    *("spa3r_hf", "torch", "transformers", "tokenizers", "peft", "datasets", "evaluate", "numpy", "pillow", "av"),
    *("torchvision", "flash_attn"),
)


def hash_of_prompts(questions: Sequence[Question]) -> str:
    """Of the ids and prompts of questions, whatever their order."""
    rows = sorted([question.id, question.prompt] for question in questions)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Of Python and of the libraries that scores may depend on, as far as they are installed."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def machine(device: torch.device) -> dict[str, Any]:
    """What the evaluation runs on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cpu": platform.processor() or platform.machine(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def results_of(evaluation: Evaluation, facts: Mapping[str, Any]) -> dict[str, Any]:
    """
    Everything that is known of an evaluation, but for single answers.

    Args:
        evaluation: The scores.
        facts: How they came about.
    """
    failures: dict[str, list[str]] = {}
    for answer in evaluation.failed:
        failures.setdefault(str(answer.error), []).append(answer.id)
    seen = [answer.num_frames for answer in evaluation.answers if answer.num_frames is not None]
    return {
        "benchmark": evaluation.benchmark,
        "overall": evaluation.main.summary.get("overall"),
        "scores": {parsing: scores.summary for parsing, scores in evaluation.scores.items()},
        "questions": len(evaluation.questions),
        "scenes": len({question.scene for question in evaluation.questions}),
        "failed": len(evaluation.failed),
        "failures": [{"reason": reason, "ids": ids} for reason, ids in failures.items()],
        "frames_seen": {"fewest": min(seen), "most": max(seen)} if seen else None,
        **facts,
    }


def table_text(evaluation: Evaluation, name: str, data: str, are_rooms: bool) -> str:
    """
    The Markdown of `table.md`.

    Args:
        evaluation: The scores.
        name: What was evaluated.
        data: Where the questions come from.
        are_rooms: Whether they are about generated rooms, not the benchmark's own.
    """
    title = TITLES[evaluation.benchmark]
    summaries = {parsing: scores.summary for parsing, scores in evaluation.scores.items()}
    unparseable = sum(int(count) for key, count in evaluation.main.summary.items() if key.startswith("unparseable."))
    failed = f"; {len(evaluation.failed)} could not be asked and count as wrong" if evaluation.failed else ""
    lines = [
        f"# {title}: {name}",
        "",
        score_table(evaluation.benchmark, name, summaries),
        "",
        f"Measured: {len(evaluation.questions)} questions of {data}, {unparseable} answers without a number or letter"
        f"{failed}. Intervals: bootstrap over the questions of each type. *absent*: no questions of that kind.",
    ]
    if PUBLISHED[evaluation.benchmark]:
        lines += [
            "",
            f"Published: what papers report for all of {title}; not measured here. -: not known here.",
        ]
    if are_rooms:
        lines += ["", f"The questions are about generated rooms, not {title}'s: the published rows are no comparison."]
    return "\n".join(lines) + "\n"


def write_report(
    folder: Path, evaluation: Evaluation, facts: Mapping[str, Any], name: str, data: str, are_rooms: bool = False
) -> dict[str, Any]:
    """
    Write all four files, each whole or not at all.

    Args:
        folder: Where to.
        evaluation: The scores.
        facts: For `results.json`: how they came about.
        name, data, are_rooms: See `table_text`.

    Returns:
        What stands in `results.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = results_of(evaluation, {"name": name, "data": data, **facts})
    write_json_lines(folder / PREDICTIONS_NAME, evaluation.rows())
    write_whole(folder / TABLE_NAME, table_text(evaluation, name, data, are_rooms))
    picture = io.BytesIO()
    score_chart(evaluation.benchmark, name, evaluation.main.summary, not are_rooms).save(picture, "PNG")
    write_whole(folder / CHART_NAME, picture.getvalue())
    write_whole(folder / RESULTS_NAME, json.dumps(results, indent=2, allow_nan=False) + "\n")
    return results


__all__ = ["hash_of_prompts", "library_versions", "machine", "write_report"]
