"""What the shipped nano models can do, measured on a few rooms that none of them has seen, in well under a minute."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from .geometry_data import RoomGeometryDataset, room_batches, split_walks
from .geometry_metrics import evaluate_geometry
from .modeling_spa3r import Spa3RForPreTraining
from .psfm_metrics import evaluate_psfm, mean_features, unseen_depth
from .semantic_trainer import PatchCategoryModel, probe_categories


NUM_ROOMS, NUM_VIEWS = 8, 8


@torch.no_grad()
def measure_nano(folder: Path) -> dict[str, Any]:
    """
    Scores of vggt-nano, dinov3-rooms-nano and spa3r-nano in `folder`, on the first rooms of the test split.

    Returns:
        `geometry` (see `evaluate_geometry`, four views), `semantic` (see `probe_categories`; probes learn from as many
        training rooms), and `psfm` (see `evaluate_psfm`, cameras from the backbone) with `unseen_depth`.
    """
    size = (112, 112)
    train, test = (
        RoomGeometryDataset(split_walks(split, NUM_ROOMS, size), frame_step=(2, 4)) for split in ("train", "test")
    )
    train_batches, test_batches = room_batches(train, NUM_VIEWS), room_batches(test, NUM_VIEWS)
    backbone = AutoModel.from_pretrained(folder / "vggt-nano", dtype="float32").eval()

    teacher = AutoModel.from_pretrained(folder / "dinov3-rooms-nano", dtype="float32").eval()
    with_probe = PatchCategoryModel(teacher.config).eval()
    with_probe.vit = teacher

    model = Spa3RForPreTraining.from_pretrained(folder / "spa3r-nano", dtype="float32").eval()
    inputs = [
        [{key: batch[key] for key in ("pixel_values", "view_mask")} for batch in batches]
        for batches in (train_batches, test_batches)
    ]
    return {
        "geometry": evaluate_geometry(backbone, RoomGeometryDataset(test.walks).batches(4)),
        "semantic": probe_categories(with_probe, [train_batches, test_batches]),
        "psfm": evaluate_psfm(model, inputs[1], mean_features(model, inputs[0])),
        "unseen_depth": unseen_depth(model, test_batches),
    }


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models have the same parameters and buffers, bit for bit."""
    theirs = second.state_dict()
    mine = first.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
