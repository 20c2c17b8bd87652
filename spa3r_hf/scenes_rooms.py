"""Procedural rooms as scenes, with exact cameras."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from .rooms import generate_room
from .rooms_cameras import camera_walk, pinhole_intrinsics
from .rooms_rendering import RoomRenderer
from .scenes import Scene


@dataclass(frozen=True)
class RoomScenes(Sequence[Scene]):
    """One procedural room for each seed, seen along a walk through it.

    A walk is rendered when its first view is asked for, and kept while there is room (512 MiB a process).

    Args:
        seeds: Seeds of the rooms (and of the walks).
        num_views: Views along a walk, V.
        image_size: (height, width) in pixels.
        horizontal_fov_degrees: Field of view across the width, in (0, 180).
        frame_step: See `Scene`; neighbouring views are at most 0.35 m and about 25 degrees apart.
        use_cameras: Whether the scenes have cameras.
    """

    seeds: Sequence[int]
    num_views: int = 24
    image_size: tuple[int, int] = (392, 518)
    horizontal_fov_degrees: float = 70.0
    frame_step: tuple[int, int] = (2, 4)
    use_cameras: bool = True

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> Scene:  # type: ignore[override]  # no slices
        seed = self.seeds[index]
        intrinsics = pinhole_intrinsics(self.image_size, self.horizontal_fov_degrees)
        extrinsics = _walk_cameras(seed, self.num_views)
        images = _RoomImages(seed, extrinsics, intrinsics, self.image_size)
        if not self.use_cameras:
            return Scene(f"room {seed}", images, self.frame_step)
        cameras = extrinsics.astype(np.float64), np.tile(intrinsics.astype(np.float64), (self.num_views, 1, 1))
        return Scene(f"room {seed}", images, self.frame_step, *cameras)


@dataclass(frozen=True, eq=False)
class _RoomImages(Sequence[Image.Image]):
    seed: int
    extrinsics: np.ndarray
    intrinsics: np.ndarray
    image_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.extrinsics)

    def __getitem__(self, index: int) -> Image.Image:  # type: ignore[override]  # no slices
        return Image.fromarray(_walks.get(self)[index])


class _WalkCache:
    """The walks rendered last, in each process: training meets a room again and again."""

    max_bytes = 2**29

    def __init__(self) -> None:
        self.walks: OrderedDict[tuple[Any, ...], np.ndarray] = OrderedDict()

    def get(self, images: _RoomImages) -> np.ndarray:
        """(V, H, W, 3) uint8."""
        key = (images.seed, len(images), images.image_size, images.intrinsics.tobytes())
        if key not in self.walks:
            room = RoomRenderer(generate_room(images.seed))
            self.walks[key] = room.render(images.extrinsics, images.intrinsics, images.image_size).rgb
            while sum(walk.nbytes for walk in self.walks.values()) > self.max_bytes and len(self.walks) > 1:
                self.walks.popitem(last=False)
        self.walks.move_to_end(key)
        return self.walks[key]


_walks = _WalkCache()


@lru_cache(maxsize=1024)
def _walk_cameras(seed: int, num_views: int) -> np.ndarray:
    return camera_walk(generate_room(seed), num_views, seed)
