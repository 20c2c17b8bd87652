"""Model cards, filled from what a run measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData


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


def write_psfm_card(folder: Path, scores: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """
    Write `README.md`, the card of a pre-trained Spa3R.

    Args:
        folder: Where the model is.
        scores: What `evaluate_psfm` measured.
        run: Facts of the run, as `run_psfm.py` writes them to `run.json`.
    """
    dataset = run["data"]
    results = [
        EvalResult(
            task_type="image-feature-extraction",
            dataset_type="custom",
            dataset_name=f"{dataset}, held out",
            metric_type=key,
            metric_value=round(scores[key], 4),
        )
        for key in _METRICS
        if key in scores
    ]
    data = ModelCardData(
        license="mit",
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["spa3r", "spatial-intelligence", "3d", "vggt"],
        model_name=run["name"],
        eval_results=results,
    )
    notes = "".join(f"\n> {note}\n" for note in run["notes"])
    bad_samples = "".join(f"\n- left out {times} times: {message}" for message, times in run["bad_samples"].items())
    facts = {
        "data": dataset,
        "scenes (training / held out)": f"{run['num_train_scenes']} / {scores['num_scenes']}",
        "cameras": run["cameras"],
        "steps": str(run["steps"]),
        "seed": str(run["seed"]),
        "trained parameters": f"{run['trained_parameters'] / 1e6:.2f} M of {run['parameters'] / 1e6:.2f} M",
        "minutes": f"{run['seconds'] / 60:.1f}",
        "hardware": run["hardware"],
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        "command": f"`{run['command']}`",
    }
    apart = scores["camera_distance"]
    text = f"""---
{data.to_yaml()}
---

# {run["name"]}

A Spa3R model ([arXiv 2602.21186](https://arxiv.org/abs/2602.21186)), pre-trained by Predictive Spatial Field Modeling:
from the latents of a few context views it predicts the feature maps of views it has not seen.
{notes}
## Use

```python
from transformers import AutoImageProcessor, AutoModel

import spa3r_hf  # or trust_remote_code=True

model = AutoModel.from_pretrained("{run["name"]}")
processor = AutoImageProcessor.from_pretrained("{run["name"]}")
latents = model(**processor(pictures_of_one_scene, return_tensors="pt")).latents
```

## Results

On {scores["num_target_views"]} target views of {scores["num_scenes"]} {run["held_out"]}. A target camera is
{apart["units_mean"]:.2f} units (at most {apart["units_max"]:.2f}) and {apart["degrees_mean"]:.0f} degrees (at most
{apart["degrees_max"]:.0f}) from the nearest context camera, by the cameras named below. *Centred* takes the training
set's mean feature off first.

{psfm_table(scores)}

![predictions](pictures/scene_0.png)

## Training

{markdown_table(["", "this run"], [[key, value] for key, value in facts.items()])}
{bad_samples}

## Licence

The code and the weights trained here are MIT. Frozen parts made from VGGT or DINOv3 weights keep the licences of those
models, which restrict use.

## Citation

```bibtex
{CITATION}
```
"""
    ModelCard(text).save(folder / "README.md")
