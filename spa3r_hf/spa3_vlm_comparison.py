"""Does the scene help? Answers of Spa3-VLMs to spatial questions, VSI-Bench's scores of them, and tables."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .benchmarks_scores import vsi_bench_metric
from .model_card import markdown_table
from .rooms_instructions import vsi_bench_score
from .rooms_questions import RoomQuestion
from .rooms_questions_balance import guessing_scores


VARIANTS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "vggt": {"spatial_features": "backbone", "integration": "cross_attention"},
    "append": {"spatial_features": "latents", "integration": "append"},
    "cross_attention": {"spatial_features": "latents", "integration": "cross_attention"},
}
"""What is compared (the paper's Tables 3 and 5): no scene, or how it is given."""

_LABELS = {
    "untrained": "base, as it is",
    "base": "base, trained alone",
    "vggt": "with VGGT's features",
    "append": "with latents, appended",
    "cross_attention": "with latents, cross-attention",
    "constant": "(best constant)",
    "question_only": "(question alone)",
}
_COLUMNS = {
    "overall": "all",
    "numerical": "numbers",
    "multiple_choice": "choices",
    "object_counting": "count",
    "object_abs_distance": "distance",
    "object_size_estimation": "size",
    "room_size_estimation": "room",
    "object_rel_distance": "closest",
    "object_rel_direction": "direction",
    "route_planning": "route",
    "obj_appearance_order": "order",
}


def pick_evenly(questions: Sequence[RoomQuestion], most: int) -> list[RoomQuestion]:
    """At most so many questions, as evenly many of each type as there are, from rooms far apart."""
    of_type: dict[str, list[RoomQuestion]] = defaultdict(list)
    for question in questions:
        of_type[question.question_type].append(question)
    share = max(1, most // len(of_type))
    picked = []
    for group in of_type.values():
        places = np.linspace(0, len(group) - 1, min(share, len(group))).round().astype(int)
        picked += [group[place] for place in places]
    return picked


def score_answers(questions: Sequence[RoomQuestion], answers: Sequence[str]) -> dict[str, float | int]:
    """VSI-Bench's scores, 0-100."""
    truths, types = ([getattr(question, name) for question in questions] for name in ("ground_truth", "question_type"))
    return vsi_bench_metric().score(answers, truths, types)[2]


def score_guessing(train: Sequence[RoomQuestion], held_out: Sequence[RoomQuestion]) -> dict[str, dict[str, float]]:
    """VSI-Bench's scores, 0-100, of what can be guessed without looking: `constant` and `question_only`."""
    of_types = guessing_scores(train, held_out, vsi_bench_score)
    result = {}
    for name in ("constant", "question_only"):
        # One question of each type, with the type's mean, has the type's mean.
        scores = np.array([of_type[name] for of_type in of_types.values()])
        result[name] = vsi_bench_metric().summarise(scores, np.ones(len(scores), dtype=bool), list(of_types))
    return result


def comparison_table(results: Mapping[str, Mapping[str, float | int]]) -> str:
    """Scores of some of `VARIANTS`, "untrained", "constant" and "question_only" as a Markdown table."""
    columns = [key for key in _COLUMNS if any(key in scores for scores in results.values())]
    rows = [
        [_LABELS[name], *(f"{scores[key]:.1f}" if key in scores else "-" for key in columns)]
        for name, scores in results.items()
    ]
    return markdown_table(["", *(_COLUMNS[key] for key in columns)], rows)


__all__ = [
    "VARIANTS",
    "comparison_table",
    "pick_evenly",
    "score_answers",
    "score_guessing",
]
