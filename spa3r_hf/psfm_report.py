"""What a PSFM run leaves for people: scores, pictures, curves and a model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .camera_spa3r import camera_distances
from .model_card import write_psfm_card
from .modeling_spa3r import Spa3RForPreTraining
from .psfm_metrics import nearest_context_view
from .visualization import feature_basis, loss_curve, metrics_chart, prediction_sheet, save_gif
from .visualization_geometry import picture_grid


_ORBIT = "unseen view, its true features, predicted features"


@torch.no_grad()
def draw_predictions(
    model: Spa3RForPreTraining, batch: Mapping[str, torch.Tensor], folder: Path, first: int = 0
) -> list[Path]:
    """
    One picture for each scene of a batch, `scene_{first}.png` and on: context views, and for each target view its true
    and predicted features, in colours that mean the same in all scenes of the batch, and the error.
    """
    output = model(**batch)
    height, width = (side // model.config.backbone_config.patch_size for side in batch["pixel_values"].shape[-2:])
    distances, angles = camera_distances(output.extrinsics)
    nearest = nearest_context_view(output.extrinsics, output.view_mask)[..., None]
    apart = torch.cat((distances.gather(-1, nearest), angles.rad2deg().gather(-1, nearest)), dim=-1)
    kinds = [kind for kind in ("geometric", "semantic") if getattr(output, f"{kind}_target") is not None]

    def maps(name: str, scene: int) -> dict[str, Any]:
        return {
            kind: output[f"{kind}_{name}"][scene].float().unflatten(1, (height, width)).cpu().numpy() for kind in kinds
        }

    truth = {kind: output[f"{kind}_target"].float().flatten(0, 1).cpu().numpy() for kind in kinds}
    bases = {kind: feature_basis(features) for kind, features in truth.items()}
    paths = []
    for scene, view_mask in enumerate(output.view_mask):
        sheet = prediction_sheet(
            batch["pixel_values"][scene].cpu().numpy(),
            view_mask.cpu().numpy(),
            maps("target", scene),
            maps("prediction", scene),
            bases=bases,
            distances=[tuple(pair) for pair in apart[scene][view_mask].tolist()],
        )
        paths.append(folder / f"scene_{first + scene}.png")
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(paths[-1])
    return paths


@torch.no_grad()
def draw_orbit(model: Spa3RForPreTraining, pictures: torch.Tensor, folder: Path, num_context: int = 4) -> None:
    """
    `orbit.gif` and `orbit.png`: a camera moves on between the context views; what it sees, its true features and those
    predicted from the context alone. Cameras are the backbone's.

    Args:
        model: In eval mode.
        pictures: (V, 3, H, W) in [0, 1], neighbouring views of one scene; `num_context` of them, evenly spaced, are
            context.
        folder: Where the pictures go.
    """
    context = torch.linspace(0, len(pictures) - 1, num_context).round().long().tolist()
    unseen = [view for view in range(len(pictures)) if view not in context]
    patch_size = model.config.backbone_config.patch_size
    grid_size = tuple(side // patch_size for side in pictures.shape[-2:])
    kinds = list(model.config.targets)
    maps: dict[str, list[torch.Tensor]] = {f"{kind}_{what}": [] for kind in kinds for what in ("target", "prediction")}
    for start in range(0, len(unseen), num_context):
        views = context + unseen[start : start + num_context]
        view_mask = torch.arange(len(views), device=pictures.device)[None] >= num_context
        output = model(pictures[None, views], view_mask=view_mask)
        for name, found in maps.items():
            found.append(output[name][view_mask].float().unflatten(1, grid_size).cpu())
    rgb = (255 * pictures[unseen]).round().byte().movedim(1, -1).cpu().numpy()
    colours = {}
    for kind in kinds:
        true, predicted = (torch.cat(maps[f"{kind}_{what}"]).numpy() for what in ("target", "prediction"))
        basis = feature_basis(true)
        colours[kind] = [[basis.to_rgb(features) for features in features_of] for features_of in (true, predicted)]
    folder.mkdir(parents=True, exist_ok=True)
    frames = [
        picture_grid({kind: [rgb[view], colours[kind][0][view], colours[kind][1][view]] for kind in kinds}, _ORBIT)
        for view in range(len(unseen))
    ]
    save_gif(frames, folder / "orbit.gif", milliseconds=300)
    shown = range(0, len(unseen), max(1, len(unseen) // 6))[:6]
    rows = {"unseen view": [rgb[view] for view in shown]}
    for kind in kinds:
        for what, of_views in zip(("true", "predicted"), colours[kind], strict=True):
            rows[f"{what} {kind}"] = [of_views[view] for view in shown]
    picture_grid(rows, f"between {num_context} context views; colours: principal components").save(
        folder / "orbit.png"
    )


def write_psfm_report(
    folder: Path,
    model: Spa3RForPreTraining,
    batches: Sequence[Mapping[str, torch.Tensor]],
    scores: Mapping[str, Any],
    log_history: Sequence[Mapping[str, Any]],
    run: Mapping[str, Any],
) -> None:
    """Write `eval.json`, `run.json`, the model card and `pictures/` (scenes, loss curve, chart) to `folder`."""
    for name, content in (("eval.json", scores), ("run.json", run)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    write_psfm_card(folder, scores, run)
    pictures = folder / "pictures"
    for old in pictures.glob("scene_*.png"):
        old.unlink()
    drawn = 0
    for batch in batches[:2]:
        drawn += len(draw_predictions(model, batch, pictures, first=drawn))
    loss_curve(log_history).save(pictures / "loss.png")
    metrics_chart(scores).save(pictures / "scores.png")
