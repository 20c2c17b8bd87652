"""Procedural rooms with exact geometry, to train and to evaluate a geometry backbone on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .psfm_data import sample_views
from .rooms import generate_room
from .rooms_cameras import camera_walk, pinhole_intrinsics
from .rooms_rendering import RoomRenderer


class RoomGeometryDataset(Dataset[dict[str, Any]]):
    """
    Views of procedural rooms for each key (epoch, index, num_views); the room is index % len(seeds).

    A sample holds `pixel_values` (V, 3, H, W) float32 in [0, 1], `extrinsics` (V, 3, 4), camera <- world in metres,
    OpenCV axes, `intrinsics` (V, 3, 3) in pixels and `depth` (V, H, W) in metres along the optical axis. Views come
    from one camera walk, evenly spaced and in random order. The field of view is drawn for each room. The walk of a
    room is rendered once and kept: about 3 MB each at 112 x 112 and 40 views.

    Args:
        seeds: Seeds of the rooms.
        image_size: (height, width) in pixels.
        seed: Of all draws.
        walk_length: Views of a walk.
        frame_step: Lowest and highest distance between the views of a sample, in views of the walk.
        fields_of_view: Lowest and highest horizontal field of view, in degrees.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        image_size: tuple[int, int] = (112, 112),
        seed: int = 0,
        walk_length: int = 40,
        frame_step: tuple[int, int] = (1, 5),
        fields_of_view: tuple[float, float] = (60.0, 80.0),
    ):
        if not len(seeds):
            raise ValueError("there are 0 rooms; expected at least 1")
        self.seeds = seeds
        self.image_size = image_size
        self.seed = seed
        self.walk_length = walk_length
        self.frame_step = frame_step
        self.fields_of_view = fields_of_view
        self._walks: dict[int, dict[str, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Any]:
        epoch, index, num_views = key
        walk = self._walk(self.seeds[index % len(self.seeds)])
        rng = np.random.default_rng((self.seed, epoch, index))
        views = rng.permutation(sample_views(self.walk_length, num_views, self.frame_step, rng))
        return {
            "pixel_values": torch.from_numpy(walk["rgb"][views]).movedim(-1, 1).float() / 255,
            "depth": torch.from_numpy(walk["depth"][views]).float(),
            "extrinsics": torch.from_numpy(walk["extrinsics"][views]),
            "intrinsics": torch.from_numpy(walk["intrinsics"]).expand(num_views, 3, 3).clone(),
        }

    def _walk(self, seed: int) -> dict[str, np.ndarray]:
        if seed not in self._walks:
            field_of_view = np.random.default_rng((self.seed, seed)).uniform(*self.fields_of_view)
            intrinsics = pinhole_intrinsics(self.image_size, field_of_view)
            room = generate_room(seed)
            extrinsics = camera_walk(room, self.walk_length, seed)
            views = RoomRenderer(room).render(extrinsics, intrinsics, self.image_size)
            self._walks[seed] = {
                "rgb": views.rgb,
                "depth": views.depth.astype(np.float16),
                "extrinsics": extrinsics,
                "intrinsics": intrinsics,
            }
        return self._walks[seed]
