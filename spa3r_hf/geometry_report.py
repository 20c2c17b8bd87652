"""What the training of a geometry backbone leaves for people: scores, pictures, a point cloud and a model card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .geometry_metrics import MIN_BASELINE
from .model_card import markdown_table, measured, paragraph, write_teacher_card
from .modeling_spa3r_vggt import Spa3RVGGTModel
from .visualization_geometry import depth_sheet, draw_points, save_ply


# Points less certain than this share of a scene's points are not drawn.
_UNCERTAIN = 0.3


def geometry_table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The scores of `evaluate_geometry` for each number of views, next to its baseline, as a Markdown table."""
    columns = [(views, name) for views in scores for name in ("model", "baseline")]
    keys = next(iter(scores.values()))["model"]
    rows = [[key, *(f"{scores[views][name][key]:.3f}" for views, name in columns)] for key in keys]
    return markdown_table(["", *(f"{views.replace('_', ' ')}, {name}" for views, name in columns)], rows)


@torch.no_grad()
def draw_geometry(model: Spa3RVGGTModel, batch: Mapping[str, torch.Tensor], folder: Path) -> None:
    """`depth.png`, `points.png` and `points.ply` of the first scene of a batch; unit: metres, after median scaling."""
    output = model(batch["pixel_values"][:1], output_cameras=True, output_depth=True, output_points=True)
    depth, true = output.depth[0, ..., 0], batch["depth"][0]
    scale = true.median() / depth.median()
    rgb = (255 * batch["pixel_values"][0]).round().byte().movedim(1, -1).cpu().numpy()
    folder.mkdir(parents=True, exist_ok=True)
    depth_sheet(rgb, true.cpu().numpy(), (scale * depth).cpu().numpy()).save(folder / "depth.png")
    confidence = output.points_confidence[0]
    sure = (confidence >= confidence.quantile(_UNCERTAIN)).cpu().numpy()
    points, colours = (scale * output.points[0]).cpu().numpy()[sure], rgb[sure]
    draw_points(points, colours).save(folder / "points.png")
    save_ply(folder / "points.ply", points, colours)


def write_geometry_report(
    folder: Path,
    model: Spa3RVGGTModel,
    batch: Mapping[str, torch.Tensor],
    scores: Mapping[str, Any],
    run: Mapping[str, Any],
) -> None:
    """Write `eval.json`, `run.json`, pictures of the batch's first scene, and the card to `folder`."""
    if model.config.use_depth_head and model.config.use_point_head:
        draw_geometry(model, batch, folder / "pictures")
    write_geometry_card(folder, scores, run)


def write_geometry_card(folder: Path, scores: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Write `eval.json`, `run.json` and the card to `folder`; it shows the pictures that are there."""
    for name, content in (("eval.json", scores), ("run.json", run)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    pictures = ""
    metrics: dict[str, str] = {}
    if (folder / "pictures" / "points.ply").exists():
        pictures = (
            "\n![depth of a held-out room](pictures/depth.png)\n\n![its points](pictures/points.png)\n\n"
            "The points are in [pictures/points.ply](pictures/points.ply) too.\n"
        )
    for views, of_views in scores.items():
        metrics |= {f"{views}.model.{key}": f"{key}, {views.replace('_', ' ')}" for key in of_views["model"]}
    write_teacher_card(
        folder,
        run,
        summary=paragraph(
            "A small VGGT ([arXiv 2503.11651](https://arxiv.org/abs/2503.11651)): cameras, depth and points from a "
            "few pictures of a room. It was trained on procedural rooms from scratch, and knows nothing else."
        ),
        use=f"""from transformers import AutoImageProcessor, AutoModel

import spa3r_hf

model = AutoModel.from_pretrained("{run["name"]}")
processor = AutoImageProcessor.from_pretrained("{run["name"]}")
scene = model(**processor(pictures, return_tensors="pt"), output_cameras=True, output_depth=True)
scene.extrinsics, scene.intrinsics, scene.depth  # camera <- world = first camera; pixels; scene units""",
        results=paragraph(
            f"On {run['held_out']}. Angles of pairs of views in degrees; directions of translation of pairs over "
            f"{MIN_BASELINE} m apart; depth and points after median scaling, points in metres. The baseline takes "
            "every pose for the identity and every depth for the mean."
        )
        + f"\n\n{geometry_table(scores)}\n{pictures}",
        eval_results=measured(scores, metrics, task="depth-estimation", data=f"procedural rooms, {run['held_out']}"),
        tags=["vggt", "3d", "depth-estimation", "camera-pose-estimation"],
        pipeline_tag="depth-estimation",
    )
