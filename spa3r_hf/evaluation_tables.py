"""Tables and a chart of benchmark scores, measured and published."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from .benchmarks_scores import NOT_MEANS
from .model_card import markdown_table
from .optional import require
from .visualization import figure_to_image


_MEANS = {"overall": "Avg.", "numerical": "Numerical", "multiple_choice": "Multiple choice"}
_VSI_BENCH_COLUMNS = {
    "object_counting": "Obj. Count",
    "object_abs_distance": "Abs. Dist.",
    "object_size_estimation": "Obj. Size",
    "room_size_estimation": "Room Size",
    "object_rel_distance": "Rel. Dist.",
    "object_rel_direction": "Rel. Dir.",
    "route_planning": "Route Plan",
    "obj_appearance_order": "Appr. Order",
    **_MEANS,
}
_LEVELS = "object_rel_direction."
TITLES = {
    "vsi_bench": "VSI-Bench",
    "cv_bench": "CV-Bench",
    "spar_bench": "SPAR-Bench",
    "viewspatial_bench": "ViewSpatial-Bench",
}
_BLUE, _ORANGE = "#0072B2", "#D55E00"


@dataclass(frozen=True)
class Published:
    """A row of a paper: scores 0-100 by their names in our summaries, on the whole benchmark."""

    name: str
    paper: str
    scores: Mapping[str, float]


_SPA3R = "arXiv 2602.21186"
# Of the paper's Table 1 only the averages, and those over numbers and choices, are certain here.
PUBLISHED: dict[str, tuple[Published, ...]] = {
    "vsi_bench": (
        Published(
            "GPT-4o",
            "arXiv 2412.14171",
            dict(zip(_VSI_BENCH_COLUMNS, (46.2, 5.3, 43.8, 38.2, 37.0, 41.3, 31.5, 28.5, 34.0), strict=False)),
        ),
        Published(
            "Gemini-1.5 Pro",
            "arXiv 2412.14171",
            dict(zip(_VSI_BENCH_COLUMNS, (56.2, 30.9, 64.1, 43.6, 51.3, 46.3, 36.0, 34.6, 45.4), strict=False)),
        ),
        Published("Spa3-VLM-4B", _SPA3R, {"overall": 58.6, "numerical": 60.4, "multiple_choice": 56.8}),
        Published("the same with VGGT's features", _SPA3R, dict(zip(_MEANS, (55.1, 60.5, 49.5), strict=True))),
        Published("the same without the scene", _SPA3R, dict(zip(_MEANS, (50.9, 58.4, 43.5), strict=True))),
    ),
    "cv_bench": (Published("Spa3-VLM-4B", _SPA3R, {"2D": 72.9, "3D": 78.3, "overall": 75.6}),),
    "spar_bench": (Published("Spa3-VLM-4B", _SPA3R, {"overall": 58.4}),),
    "viewspatial_bench": (Published("Spa3-VLM-4B", _SPA3R, {"overall": 43.9}),),
}


def columns(benchmark: str, summary: Mapping[str, float | int]) -> dict[str, str]:
    """The scores that a table shows, in its order: name in the summary -> heading."""
    if benchmark == "vsi_bench":
        return dict(_VSI_BENCH_COLUMNS)
    if benchmark == "cv_bench":
        return {"2D": "2D", "3D": "3D", "overall": "Avg."}
    if benchmark == "spar_bench":
        return {"low": "Low", "middle": "Middle", "high": "High", "overall": "Avg."}
    parts = [name for name in summary if name != "overall" and not name.startswith(NOT_MEANS)]
    return {**{name: name for name in sorted(parts)}, "overall": "Avg."}


def score_table(benchmark: str, name: str, summaries: Mapping[str, Mapping[str, float | int]]) -> str:
    """
    Measured scores, and below them published ones, as a Markdown table.

    Args:
        benchmark: "vsi_bench", ...
        name: What was measured.
        summaries: By the way numbers are read, the first in full.
    """
    main = next(iter(summaries.values()))
    shown = columns(benchmark, main)
    rows = []
    for parsing, summary in summaries.items():
        suffix = f", numbers as {parsing}" if len(summaries) > 1 else ""
        rows.append([f"{name} (measured{suffix})", *(_score(summary, key) for key in shown)])
    rows.insert(1, ["95 % interval", *(_interval(main, key) for key in shown)])
    rows.insert(2, ["questions", *(_count(main, key) for key in shown)])
    for row in PUBLISHED[benchmark]:
        scores = [f"{row.scores[key]:.1f}" if key in row.scores else "-" for key in shown]
        rows.append([f"{row.name} (published, {row.paper})", *scores])
    return markdown_table(["", *shown.values()], rows)


def _score(summary: Mapping[str, float | int], key: str) -> str:
    if key in summary:
        return f"{summary[key]:.1f}"
    if key == "object_rel_direction":  # a level has no questions: the others count as tasks of their own
        levels = [name for name in summary if name.startswith(_LEVELS)]
        if levels:
            return ", ".join(f"{summary[name]:.1f} ({name.removeprefix(_LEVELS)})" for name in levels)
    return "absent"


def _interval(summary: Mapping[str, float | int], key: str) -> str:
    if f"ci95_low.{key}" not in summary:
        return ""
    return f"{summary[f'ci95_low.{key}']:.1f} to {summary[f'ci95_high.{key}']:.1f}"


def _count(summary: Mapping[str, float | int], key: str) -> str:
    counts = {name.removeprefix("count."): int(n) for name, n in summary.items() if name.startswith("count.")}
    tasks = [name for name in _VSI_BENCH_COLUMNS if name not in _MEANS]
    groups = {"overall": list(counts), "numerical": tasks[:4], "multiple_choice": tasks[4:]}
    if key in groups:
        return str(sum(counts.get(name, 0) for name in groups[key]))
    return str(counts.get(key, 0 if key in tasks else ""))


def score_chart(benchmark: str, name: str, summary: Mapping[str, float | int], with_published: bool) -> Image.Image:
    """
    A bar for each task and mean, with its 95 % interval.

    Args:
        benchmark: "vsi_bench", ...
        name: What was measured.
        summary: Its scores.
        with_published: Whether what is published for Spa3-VLM is marked: on the same questions only.
    """
    shown = {key: heading for key, heading in columns(benchmark, summary).items() if key in summary}
    figure = require("matplotlib.figure", extra="eval").Figure(
        figsize=(max(6.0, 1.05 * len(shown) + 1.5), 4.5), dpi=150, layout="constrained"
    )
    axes = figure.subplots()
    places, heights = range(len(shown)), [summary[key] for key in shown]
    means = [key in _MEANS for key in shown]
    reach = [
        [summary[key] - summary[f"ci95_low.{key}"] for key in shown],
        [summary[f"ci95_high.{key}"] - summary[key] for key in shown],
    ]
    colours = [_ORANGE if is_mean else _BLUE for is_mean in means]
    axes.bar(places, heights, 0.7, color=colours, zorder=2)
    axes.errorbar(
        places,
        heights,
        [[max(0.0, x) for x in side] for side in reach],
        fmt="none",
        ecolor="black",
        elinewidth=1,
        capsize=3,
        zorder=3,
    )
    for place, key in enumerate(shown):
        axes.annotate(
            f"{summary[key]:.1f}",
            (place, summary[f"ci95_high.{key}"]),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    row: Any = next(row for row in PUBLISHED[benchmark] if row.name == "Spa3-VLM-4B")
    if with_published:
        marked = {place: row.scores[key] for place, key in enumerate(shown) if key in row.scores}
        axes.plot(
            list(marked),
            list(marked.values()),
            "D",
            color="black",
            markerfacecolor="white",
            zorder=4,
            label=f"{row.name}, published ({row.paper})",
        )
        axes.legend(frameon=False, loc="upper left")
    axes.set_xticks(places, [heading.replace(" ", "\n", 1) for heading in shown.values()], fontsize=9)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 100)
    axes.set_ylabel("score, with its 95 % interval")
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{TITLES[benchmark]}: {name}", loc="left")
    return figure_to_image(figure)


__all__ = ["columns", "score_chart", "score_table"]
