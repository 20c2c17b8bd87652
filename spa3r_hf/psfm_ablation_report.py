"""Tables and a chart of the PSFM ablations, from the runs' own JSON."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .model_card import markdown_table
from .optional import require
from .psfm_ablation import ABLATIONS, Ablation, variant_id
from .visualization import figure_to_image


COLUMNS = {
    "geometric_cosine": "geometric cosine",
    "geometric_centred_cosine": "geometric, centred",
    "semantic_cosine": "semantic cosine",
    "semantic_centred_cosine": "semantic, centred",
    "depth probe_abs_rel": "depth AbsRel",
    "probe object count": "count R²",
    "probe distance": "distance R²",
    "probe room size": "size R²",
    "invariance retrieval": "retrieval",
    "invariance cka": "CKA",
}
# What stands for the paper's downstream score: how much of a room's layout can be read off the latents.
SPATIAL = ("probe object count", "probe distance", "probe room size")

Results = dict[str, list[dict[str, Any]]]


def read_results(folder: Path) -> tuple[Results, dict[str, Any]]:
    """Runs of each variant, and the backbone's measurements, of those that are done."""
    results: Results = {}
    for path in sorted(folder.glob("*_seed*.json")):
        run = json.loads(path.read_text())
        results.setdefault(variant_id(run["changes"]), []).append(run)
    return results, json.loads((folder / "backbone.json").read_text())


def spatial_score(scores: Mapping[str, float]) -> float:
    """Mean R squared of the spatial probes."""
    return float(np.mean([scores[key] for key in SPATIAL if key in scores]))


def _mean_and_deviation(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def ablation_table(ablation: Ablation, results: Results, backbone: Mapping[str, Any]) -> str:
    """A row for each variant, mean ± standard deviation over seeds, and one for pooled backbone features."""
    rows = []
    for label, changes in ablation.variants.items():
        runs = results.get(variant_id(changes), [])
        row = [label, str(len(runs))]
        for key in COLUMNS:
            values = [run["scores"][key] for run in runs if key in run["scores"]]
            row.append(_mean_and_deviation(values) if values else "-")
        row.append(f"{ablation.published[label]:.1f}" if label in ablation.published else "-")
        rows.append(row)
    scores = backbone["scores"]
    rows.append(["pooled backbone", "", *(f"{scores[key]:.3f}" if key in scores else "-" for key in COLUMNS), "-"])
    return markdown_table(["", "seeds", *COLUMNS.values(), "paper: VSI-Bench"], rows)


def verdict(ablation: Ablation, results: Results) -> str:
    """In words: does the mean spatial probe order the variants as the paper's downstream score does?"""
    if not ablation.published:
        return "The paper gives no downstream score for this question."
    spatial = {
        label: [spatial_score(run["scores"]) for run in results.get(variant_id(changes), [])]
        for label, changes in ablation.variants.items()
        if label in ablation.published
    }
    if any(len(values) < 2 for values in spatial.values()):
        return "Too few seeds are done to compare with the paper."
    best = max(ablation.published, key=lambda label: ablation.published[label])
    sentences = []
    for label, values in spatial.items():
        if label == best:
            continue
        gap = float(np.mean(spatial[best]) - np.mean(values))
        noise = float(np.hypot(*(np.std(v, ddof=1) / np.sqrt(len(v)) for v in (spatial[best], values))))
        found = "agrees" if gap > 2 * noise else "differs" if gap < -2 * noise else "cannot be told apart here"
        sentences.append(
            f"{best} over {label}: paper {ablation.published[best] - ablation.published[label]:+.1f}, here {gap:+.3f} "
            f"± {noise:.3f}: {found}"
        )
    return "Mean of the three spatial probes. " + "; ".join(sentences) + "."


def ablation_report(folder: Path) -> str:
    """Markdown: a table and a verdict for each question, and how the runs were made."""
    results, backbone = read_results(folder)
    parts = []
    for name, ablation in ABLATIONS.items():
        table = ablation_table(ablation, results, backbone)
        parts.append(f"### {name}\n\n{table}\n\n{verdict(ablation, results)}\n")
    runs = [run for of_variant in results.values() for run in of_variant]
    if runs:
        minutes = sum(run["seconds"] for run in runs) / 60
        parts.append(
            f"{len(runs)} runs of {runs[0]['steps']} steps, {minutes:.0f} minutes of one process in all. Cosines: "
            "features of unseen views; depth: AbsRel of unseen views against the truth, the backbone, which sees "
            f"them, has {np.mean([run['scores']['depth backbone_abs_rel'] for run in runs]):.3f}. R²: ridge probes of "
            "the latents (all of them, flattened) of one set of views of each room. Retrieval, CKA: latents of a room "
            "from disjoint sets of views; chance retrieval is "
            f"{1 / backbone['num_test_rooms']:.3f}. Of the semantic target alone, and of the geometric alone, the "
            "other is not predicted.\n"
        )
    return "\n".join(parts)


def ablation_chart(folder: Path) -> Image.Image:
    """The mean spatial probe and the centred geometric cosine of every variant: seeds as dots, means as lines."""
    results, backbone = read_results(folder)
    figure = require("matplotlib.figure", extra="train").Figure(figsize=(11, 6), dpi=130, layout="constrained")
    panels: tuple[tuple[str, Callable[[Mapping[str, float]], float], float | None], ...] = (
        ("mean R² of the spatial probes", spatial_score, spatial_score(backbone["scores"])),
        ("centred geometric cosine of unseen views", lambda s: s.get("geometric_centred_cosine", np.nan), None),
    )
    for axes, (title, score, reference) in zip(figure.subplots(2, 1), panels, strict=True):
        labels, place = [], 0.0
        for name, ablation in ABLATIONS.items():
            for label, changes in ablation.variants.items():
                values = [score(run["scores"]) for run in results.get(variant_id(changes), [])]
                axes.plot([place] * len(values), values, "o", color="#0072B2", alpha=0.5, markersize=5)
                if values:
                    axes.plot([place - 0.25, place + 0.25], [np.mean(values)] * 2, color="black", linewidth=1.5)
                labels.append((place, f"{label}\n{name}"))
                place += 1
            place += 0.6
        if reference is not None:
            axes.axhline(reference, color="#D55E00", linestyle="--", label="pooled backbone features")
            axes.legend(frameon=False)
        axes.set_xticks([x for x, _ in labels], [text for _, text in labels], fontsize=8)
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E4E4E4")
    return figure_to_image(figure)
