"""Camera walks through procedural rooms with all that is known of every pixel, rendered once and kept."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .rooms import CATEGORIES, Room, generate_room
from .rooms_cameras import camera_walk, pinhole_intrinsics
from .rooms_rendering import RoomRenderer


# What a pixel can show: the room itself, in three parts, or an object.
PIXEL_CATEGORIES = ("floor", "wall", "ceiling", *CATEGORIES)


@dataclass(frozen=True, eq=False)
class RoomWalk:
    """
    Views of a room along a walk.

    Attributes:
        rgb: (V, H, W, 3) uint8.
        depth: (V, H, W) float16, metres along the optical axis.
        categories: (V, H, W) uint8, indices into `PIXEL_CATEGORIES`.
        extrinsics: (V, 3, 4) float32, camera <- world in metres, OpenCV axes.
        intrinsics: (3, 3) float32, pixels.
    """

    rgb: np.ndarray
    depth: np.ndarray
    categories: np.ndarray
    extrinsics: np.ndarray
    intrinsics: np.ndarray


@dataclass(frozen=True)
class RoomWalks(Sequence[RoomWalk]):
    """
    One walk through each procedural room; the horizontal field of view is drawn for each room.

    Args:
        seeds: Seeds of the rooms (and of the walks).
        num_views: Views of a walk, V.
        image_size: (height, width) in pixels.
        fields_of_view: Lowest and highest horizontal field of view, in degrees.
        cache_dir: Where walks are written when first asked for, about 3 MB each at 112 x 112 and 40 views, and read
            from by whoever asks next, in this process or another. None: they are rendered every time.
    """

    seeds: Sequence[int]
    num_views: int = 40
    image_size: tuple[int, int] = (112, 112)
    fields_of_view: tuple[float, float] = (60.0, 80.0)
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        if not len(self.seeds):
            raise ValueError("there are 0 rooms; expected at least 1")

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> RoomWalk:  # type: ignore[override]  # no slices
        seed = self.seeds[index]
        if self.cache_dir is None:
            return self._render(seed)
        # All settings of a walk are in its name; after a change of the rooms themselves, start a new folder.
        height, width = self.image_size
        low, high = self.fields_of_view
        path = Path(self.cache_dir) / f"{self.num_views}x{height}x{width}_{low:g}-{high:g}" / f"room_{seed}.npz"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Other processes see a whole file or none.
            part = path.with_name(f"{path.stem}.{os.getpid()}.npz")
            np.savez(part, **asdict(self._render(seed)))
            part.replace(path)
        with np.load(path) as arrays:
            return RoomWalk(**arrays)

    def _render(self, seed: int) -> RoomWalk:
        field_of_view = np.random.default_rng((seed, 0)).uniform(*self.fields_of_view)
        intrinsics = pinhole_intrinsics(self.image_size, field_of_view)
        room = generate_room(seed)
        extrinsics = camera_walk(room, self.num_views, seed)
        views = RoomRenderer(room).render(extrinsics, intrinsics, self.image_size)
        return RoomWalk(
            rgb=views.rgb,
            depth=views.depth.astype(np.float16),
            categories=pixel_categories(room, views.instance_ids, views.normals),
            extrinsics=extrinsics,
            intrinsics=intrinsics,
        )


def pixel_categories(room: Room, instance_ids: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Indices (...) uint8 into `PIXEL_CATEGORIES` of pixels with instance ids (...) and world normals (..., 3)."""
    of_instance = [0, *(PIXEL_CATEGORIES.index(thing.category) for thing in room.objects)]
    upright = normals[..., 2]
    surface = np.select([upright > 0.5, upright < -0.5], [0, 2], default=1)
    return np.where(instance_ids == 0, surface, np.array(of_instance)[instance_ids]).astype(np.uint8)
