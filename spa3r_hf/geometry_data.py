"""Procedural rooms with exact geometry, to train and to evaluate a geometry backbone on."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from .psfm_data import PSFMBatchSampler, sample_view_mask, sample_views
from .rooms_walks import RoomWalks
from .scenes import check_frame_step


# First seeds of the splits. No split reaches the next one.
SPLITS = {"train": 0, "validation": 10**6, "test": 2 * 10**6}


def split_walks(split: str, num_rooms: int, image_size: tuple[int, int], cache_dir: Path | None = None) -> RoomWalks:
    """
    Walks through the first `num_rooms` rooms of a split; see `RoomWalks`.

    Raises:
        ValueError: There is no such split, or there are too many or too few rooms.
    """
    if split not in SPLITS:
        raise ValueError(f"split = {split}; expected one of {', '.join(SPLITS)}")
    if not 1 <= num_rooms <= 10**6:
        raise ValueError(f"{num_rooms} rooms of the {split} split; expected 1 to a million")
    return RoomWalks(range(SPLITS[split], SPLITS[split] + num_rooms), image_size=image_size, cache_dir=cache_dir)


class RoomGeometryDataset(Dataset[dict[str, Any]]):
    """
    Views of procedural rooms for each key (epoch, index, num_views); the room is index % len(walks).

    A sample holds `pixel_values` (V, 3, H, W) float32 in [0, 1], `extrinsics` (V, 3, 4), camera <- world in metres,
    OpenCV axes, `intrinsics` (V, 3, 3) in pixels, `depth` (V, H, W) in metres along the optical axis, and `categories`
    (V, H, W) uint8, indices into `PIXEL_CATEGORIES`. Views are evenly spaced along the walk, in random order.

    Args:
        walks: The rooms.
        seed: Of all draws.
        frame_step: Lowest and highest distance between the views of a sample, in views of the walk.

    Raises:
        ValueError: `frame_step` is out of range.
    """

    def __init__(self, walks: RoomWalks, seed: int = 0, frame_step: tuple[int, int] = (1, 4)):
        check_frame_step(frame_step, "rooms")
        self.walks = walks
        self.seed = seed
        self.frame_step = frame_step

    def __len__(self) -> int:
        return len(self.walks)

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Any]:
        epoch, index, num_views = key
        walk = self.walks[index % len(self.walks)]
        rng = np.random.default_rng((self.seed, epoch, index))
        views = rng.permutation(sample_views(self.walks.num_views, num_views, self.frame_step, rng))
        return {
            "pixel_values": torch.from_numpy(walk.rgb[views]).movedim(-1, 1).float() / 255,
            "depth": torch.from_numpy(walk.depth[views]).float(),
            "categories": torch.from_numpy(walk.categories[views]),
            "extrinsics": torch.from_numpy(walk.extrinsics[views]),
            "intrinsics": torch.from_numpy(walk.intrinsics).expand(num_views, 3, 3).clone(),
        }

    def batches(self, num_views: int, size: int = 4) -> list[dict[str, Any]]:
        """One sample of each room, in batches of at most `size`, the same whenever asked."""
        indices = range(len(self))
        return [
            default_collate([self[0, index, num_views] for index in indices[start : start + size]])
            for start in indices[::size]
        ]


def room_batch_sampler(
    dataset: RoomGeometryDataset, images_per_batch: int, views: tuple[int, int], batches_per_step: int
) -> PSFMBatchSampler:
    """
    Batches of all rooms of a data set, with its seed; see `PSFMBatchSampler`.

    Raises:
        ValueError: A number is out of range; a sample has no more views than a walk.
    """
    if views[1] > dataset.walks.num_views:
        raise ValueError(f"views is {views}; expected at most {dataset.walks.num_views}, the views of a walk")
    return PSFMBatchSampler(len(dataset), images_per_batch, views, batches_per_step, dataset.seed)


def room_batches(dataset: RoomGeometryDataset, num_views: int, mask_ratio: float = 0.5) -> list[dict[str, Any]]:
    """One sample of each room with a `view_mask`, in batches of four, the same whenever asked."""
    batches = []
    for index, batch in enumerate(dataset.batches(num_views)):
        rng = np.random.default_rng((index, 2))
        masks = np.stack([sample_view_mask(num_views, mask_ratio, rng) for _ in batch["depth"]])
        batches.append(batch | {"view_mask": torch.from_numpy(masks)})
    return batches
