"""Model cards, filled from what a run measured."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index

from .benchmarks_scores import NOT_MEANS
from .licences import describe_sources, licence_metadata, licence_section
from .shown_names import shown_text


CITATION = """@article{jiang2026spa3r,
  title   = {Spa3R: Predictive Spatial Field Modeling for 3D Visual Reasoning},
  author  = {Jiang, Haoyi and Liu, Liu and Wang, Xinjie and He, Yonghao and Sui, Wei and Su, Zhizhong and Liu, Wenyu
             and Wang, Xinggang},
  journal = {arXiv preprint arXiv:2602.21186},
  year    = {2026}
}"""

_METRICS = {
    "geometric_cosine": "geometric cosine",
    "geometric_centred_cosine": "geometric, centred",
    "semantic_cosine": "semantic cosine",
    "semantic_centred_cosine": "semantic, centred",
    "geometric_l1": "geometric smooth L1",
    "semantic_l1": "semantic smooth L1",
}
_ROWS = {"nearest_context": "nearest context view", "mean": "mean feature", "other_scene": "another scene's latents"}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join((first, *others))} |"

    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    return "\n".join((line(header), rule, *map(line, rows)))


def paragraph(text: str) -> str:
    """Words in lines of one width."""
    return textwrap.fill(text, 119, break_long_words=False, break_on_hyphens=False)


def psfm_table(scores: Mapping[str, Any]) -> str:
    """The scores of `evaluate_psfm` as a Markdown table: a row for the model and one for each baseline."""
    columns = [key for key in _METRICS if key in scores]
    named = {"Spa3R": scores} | {
        label: scores["baselines"][name] for name, label in _ROWS.items() if name in scores["baselines"]
    }
    rows = [
        [label, *(f"{values[key]:.3f}" if key in values else "-" for key in columns)]
        for label, values in named.items()
    ]
    return markdown_table(["features of unseen views", *(_METRICS[key] for key in columns)], rows)


def run_rows(run: Mapping[str, Any]) -> dict[str, str]:
    """How a run was made, from its `run_facts`: the rows of a card's table."""
    hardware = run["hardware"] + (f", {run['processes']} processes" if run["processes"] > 1 else "")
    return {
        "steps": str(run["steps"]),
        "seed": str(run["seed"]),
        "trained parameters": f"{run['trained_parameters'] / 1e6:.2f} M of {run['parameters'] / 1e6:.2f} M",
        "minutes": f"{run['seconds'] / 60:.1f}",
        "hardware": hardware,
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    }


def measured(
    scores: Mapping[str, Any], metrics: Mapping[str, str], *, task: str, data: str, config: str | None = None
) -> list[EvalResult]:
    """
    Scores for a card's `model-index`.

    Args:
        scores: What stands in the JSON file beside the card.
        metrics: Where in it a number is ("4_views.model.depth_abs_rel"; a key may hold dots itself) -> the metric's
            name. Each result says its place, as `args.path`; those that are not there are left out.
        task: The Hub's name of the task.
        data: What it was measured on.
        config: Which part of the data.
    """
    results = []
    for path, name in metrics.items():
        found = _find(scores, path)
        if found is not None:
            key, value = found
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type="custom",
                    dataset_name=data,
                    dataset_config=config,
                    metric_type=key,
                    metric_name=name,
                    metric_value=round(value, 4),
                    metric_args={"path": path},
                )
            )
    return results


def at(scores: Any, path: str) -> Any:
    """What stands at "a.b.c" in nested mappings, keys with dots included; None, if nothing does."""
    found = _find(scores, path)
    return None if found is None else found[1]


def _find(scores: Any, path: str) -> tuple[str, Any] | None:
    """The last key on the way along a path, and its value."""
    if not isinstance(scores, Mapping):
        return None
    if path in scores:
        return path, scores[path]
    places = [index for index, character in enumerate(path) if character == "."]
    found = (_find(scores[path[:place]], path[place + 1 :]) for place in places if path[:place] in scores)
    return next((pair for pair in found if pair is not None), None)


def hub_ids(names: Sequence[str | None]) -> list[str]:
    """Those names that can be ids of Hub repos: "owner/name", and no folder here."""
    return [
        name
        for name in dict.fromkeys(names)
        if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    ]


def write_card(
    folder: Path,
    run: Mapping[str, Any],
    *,
    summary: str,
    use: str,
    tags: Sequence[str],
    pipeline_tag: str,
    results: str = "",
    eval_results: Sequence[EvalResult] = (),
    rows: Mapping[str, str] | None = None,
    after_training: str = "",
    library_name: str = "transformers",
    base_models: Sequence[str | None] = (),
    base_model_relation: str | None = None,
    datasets: Sequence[str | None] = (),
) -> None:
    """
    Write `README.md`, the card of a model that was trained here.

    Args:
        folder: Where the model is.
        run: Its `run_facts`, and its `name`; `sources`, see `describe_sources`: what it was made of.
        summary: Markdown: what it is.
        use: Python that runs it.
        tags, pipeline_tag, library_name, base_model_relation: For the Hub.
        results: Markdown: what was measured, and how.
        eval_results: The same for machines, see `measured`.
        rows: What the table of the run begins with.
        after_training: Markdown below that table.
        base_models, datasets: Names; those that are Hub ids stand in the metadata.
    """
    sources = run["sources"]
    metadata: dict[str, Any] = {**licence_metadata(sources)}
    if base_model_relation and hub_ids(base_models):
        metadata["base_model_relation"] = base_model_relation
    data = ModelCardData(
        library_name=library_name,
        pipeline_tag=pipeline_tag,
        tags=["spa3r", *tags],
        base_model=hub_ids(base_models) or None,
        datasets=hub_ids(datasets) or None,
        model_name=run["name"] if eval_results else None,
        eval_results=list(eval_results) or None,
        **metadata,
    )
    rows_table = markdown_table(["", "this run"], [list(row) for row in {**(rows or {}), **run_rows(run)}.items()])
    command = "```bash\n" + run["command"].replace("; ", "\n") + "\n```"
    sections = {
        "Use": f"```python\n{use}\n```",
        "Results": results,
        "Training": "\n\n".join(part.strip() for part in (rows_table, command, after_training) if part.strip()),
        "Licence": licence_section(sources),
        "Citation": f"```bibtex\n{CITATION}\n```",
    }
    body = "\n\n".join(f"## {title}\n\n{text.strip()}" for title, text in sections.items() if text.strip())
    text = f"---\n{data.to_yaml()}\n---\n\n# {run['name']}\n\n{summary.strip()}\n\n{body}\n"
    ModelCard(shown_text(text)).save(folder / "README.md")


def write_teacher_card(
    folder: Path,
    run: Mapping[str, Any],
    *,
    summary: str,
    use: str,
    results: str,
    tags: list[str],
    pipeline_tag: str,
    eval_results: Sequence[EvalResult] = (),
) -> None:
    """The card of a model trained here on procedural rooms, from nothing; arguments as for `write_card`."""
    write_card(
        folder,
        {"sources": describe_sources([run["data"]]), **run},
        summary=summary,
        use=use,
        results=results,
        eval_results=eval_results,
        tags=tags,
        pipeline_tag=pipeline_tag,
        rows={"data": run["data"]},
        after_training="The rooms are generated by the code of the same repository.",
    )


def write_psfm_card(folder: Path, scores: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """
    The card of a pre-trained Spa3R.

    Args:
        folder: Where the model is.
        scores: What `evaluate_psfm` measured, as it stands in `eval.json`.
        run: Facts of the run, as `run_psfm.py` writes them to `run.json`.
    """
    notes = "".join(f"\n> {note}\n" for note in run["notes"])
    bad_samples = "".join(f"- left out {times} times: {message}\n" for message, times in run["bad_samples"].items())
    apart = scores["camera_distance"]
    depth = ""
    if "unseen_depth" in scores:
        probe, backbone = (scores["unseen_depth"][f"{name}_abs_rel"] for name in ("probe", "backbone"))
        depth = paragraph(
            f"True depth of unseen views, read off the decoder's tokens by the depth probe: AbsRel {probe:.3f}, "
            f"{probe / backbone:.2f} times that of the backbone, which sees the views ({backbone:.3f})."
        )
        depth += "\n\n"
    task, data = "image-feature-extraction", f"{run['data']}, held out"
    write_card(
        folder,
        {"sources": describe_sources([run["data"]]), **run},
        summary=paragraph(
            "A Spa3R model ([arXiv 2602.21186](https://arxiv.org/abs/2602.21186)), pre-trained by Predictive Spatial "
            "Field Modeling: from the latents of a few context views it predicts the feature maps of views it has not "
            "seen."
        )
        + f"\n{notes}",
        use=f"""from transformers import AutoImageProcessor, AutoModel

import spa3r_hf  # or trust_remote_code=True

model = AutoModel.from_pretrained("{run["name"]}")
processor = AutoImageProcessor.from_pretrained("{run["name"]}")
latents = model(**processor(pictures_of_one_scene, return_tensors="pt")).latents""",
        results=paragraph(
            f"On {scores['num_target_views']} target views of {scores['num_scenes']} {run['held_out']}. A target "
            f"camera is {apart['units_mean']:.2f} units (at most {apart['units_max']:.2f}) and "
            f"{apart['degrees_mean']:.0f} degrees (at most {apart['degrees_max']:.0f}) from the nearest context "
            "camera, by the cameras named below. *Centred* takes the training set's mean feature off first."
        )
        + f"\n\n{psfm_table(scores)}\n\n{depth}![predictions](pictures/scene_0.png)",
        eval_results=measured(scores, _METRICS, task=task, data=data)
        + measured(scores, {"unseen_depth.probe_abs_rel": "AbsRel of unseen views' depth"}, task=task, data=data),
        tags=["spatial-intelligence", "3d", "vggt"],
        pipeline_tag=task,
        rows={
            "data": run["data"],
            "scenes (training / held out)": f"{run['num_train_scenes']} / {scores['num_scenes']}",
            "cameras": run["cameras"],
        },
        after_training=bad_samples,
        base_models=run.get("teachers", ()),
        datasets=[run["data"]],
    )


def benchmark_metrics(summary: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The means among a benchmark's scores, for `measured`: place in the JSON file, below `prefix` -> name."""
    return {f"{prefix}{key}": key.replace("_", " ") for key in summary if not key.startswith(NOT_MEANS)}


def evaluation_index(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    """
    A benchmark's scores as `model-index` metadata of the model that was evaluated.

    Args:
        results: `results.json` of `run_vsi_bench.py`.
        name: Of the model, as the index calls it.
    """
    parsing, summary = next(iter(results["scores"].items()))
    found = measured(
        results,
        benchmark_metrics(summary, prefix=f"scores.{parsing}."),
        task="visual-question-answering",
        data=f"{results['benchmark']}: {results['data']}",
    )
    return {"model-index": eval_results_to_model_index(name, found)}
