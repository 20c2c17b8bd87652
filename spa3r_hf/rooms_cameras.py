"""Cameras in procedural rooms: a pinhole's intrinsics and a smooth walk through the free floor."""

import numpy as np

from .optional import require
from .rooms import Room
from .rooms_layout import FloorGrid


_MAX_STEP = 0.35  # metres between consecutive views
_MAX_TURN = np.radians(22)  # of yaw between consecutive views


def pinhole_intrinsics(image_size: tuple[int, int], horizontal_fov_degrees: float = 70.0) -> np.ndarray:
    """(3, 3) float32 pixel intrinsics with square pixels and the principal point at the image's centre.

    Args:
        image_size: (height, width) in pixels.
        horizontal_fov_degrees: Field of view across the width, in (0, 180).

    Raises:
        ValueError: An argument is out of range.
    """
    height, width = check_image_size(image_size)
    if not 0 < horizontal_fov_degrees < 180:
        raise ValueError(f"horizontal_fov_degrees must be between 0 and 180, got {horizontal_fov_degrees}")
    focal = width / 2 / np.tan(np.radians(horizontal_fov_degrees) / 2)
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], np.float32)


def check_image_size(image_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) as given.

    Raises:
        ValueError: It is not two positive whole numbers.
    """
    if len(image_size) != 2 or any(int(side) != side or side < 1 for side in image_size):
        raise ValueError(f"image_size must be (height, width), two positive whole numbers, got {image_size}")
    return int(image_size[0]), int(image_size[1])


def look_at(position: np.ndarray, yaw: np.ndarray, pitch: np.ndarray) -> np.ndarray:
    """(V, 3, 4) float32 extrinsics, camera <- world in OpenCV axes, of cameras that do not roll.

    Args:
        position: (V, 3) metres.
        yaw: (V,) radians about +z of the viewing direction, 0 along +x.
        pitch: (V,) radians, positive looks up.
    """
    cos, sin, zero = np.cos(yaw), np.sin(yaw), np.zeros_like(yaw)
    right = np.stack([sin, -cos, zero], 1)
    forward = np.stack([np.cos(pitch) * cos, np.cos(pitch) * sin, np.sin(pitch)], 1)
    rotation = np.stack([right, np.cross(forward, right), forward], 1)
    translation = -np.einsum("vij,vj->vi", rotation, position)
    return np.concatenate([rotation, translation[..., None]], 2).astype(np.float32)


def camera_walk(room: Room, num_views: int, seed: int) -> np.ndarray:
    """A smooth walk at eye height over the free floor, looking around the room.

    Cameras keep 0.4 m from the walls and about 0.2 m from the boxes of furniture. Consecutive views are at most about
    0.35 m and 25 degrees apart, so that they overlap; 24 views or more turn at least once all around.

    Args:
        room: The room to walk in.
        num_views: Number of views V.
        seed: Of the walk; together with the room's seed it determines the cameras.

    Returns:
        (V, 3, 4) float32 extrinsics, camera <- world, OpenCV axes.

    Raises:
        ValueError: `num_views` is less than 1 or `seed` negative.
    """
    if num_views < 1:
        raise ValueError(f"num_views must be 1 or more, got {num_views}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    rng = np.random.default_rng((room.seed, seed))
    grid = free_floor(room)
    path = _smooth_path(grid, rng)
    travelled = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
    length = min(float(travelled[-1]), _MAX_STEP * (num_views - 1))
    begin = rng.uniform(0, travelled[-1] - length) if travelled[-1] > length else 0.0
    share = np.linspace(0, 1, num_views)
    at = begin + share * length
    ground = np.stack([np.interp(at, travelled, path[:, axis]) for axis in range(2)], 1)

    phase = rng.uniform(0, 2 * np.pi, 3)
    turn = min(rng.uniform(1.05, 1.3) * 2 * np.pi, _MAX_TURN * (num_views - 1)) * rng.choice([-1, 1])
    sway = 0.12 * np.sin(4 * np.pi * share + phase[0]) * min(1.0, num_views / 16)
    yaw = turn * share + sway
    yaw += _best_heading(room, ground, yaw)
    pitch = np.radians(rng.uniform(-14, -6) + 5 * np.sin(3 * np.pi * share + phase[1]))
    eye = rng.uniform(1.3, 1.6) + 0.04 * np.sin(5 * np.pi * share + phase[2])
    return look_at(np.concatenate([ground, eye[:, None]], 1), yaw, pitch)


def free_floor(room: Room) -> FloorGrid:
    """The floor that a walking camera keeps to: off the walls, and off what stands or hangs below 1.9 m."""
    grid = FloorGrid(room.outline)
    for thing in room.objects:
        bottom, top = thing.center[2] - thing.size[2] / 2, thing.center[2] + thing.size[2] / 2
        if bottom < 1.9 and top > 0.05:
            half = (thing.size[0] / 2, thing.size[1] / 2)
            grid.free &= ~grid.near_box(thing.center[0], thing.center[1], half, thing.yaw)
    return grid


def _smooth_path(grid: FloorGrid, rng: np.random.Generator) -> np.ndarray:
    """(S, 2) metres: a dense path through far-apart cells of the largest free region, rounded where there is space."""
    ndimage = require("scipy.ndimage", extra="rooms")
    sparse = require("scipy.sparse", extra="rooms")
    csgraph = require("scipy.sparse.csgraph", extra="rooms")
    labels, _ = ndimage.label(grid.free)
    region = labels == np.bincount(labels.ravel())[1:].argmax() + 1
    cells = np.argwhere(region)
    index = np.full(region.shape, -1)
    index[region] = np.arange(len(cells))
    space = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1][region]
    sources, targets, weights = [], [], []
    for step in ((0, 1), (1, 0)):
        here, there = index[: index.shape[0] - step[0], : index.shape[1] - step[1]], index[step[0] :, step[1] :]
        both = (here >= 0) & (there >= 0)
        sources.append(here[both])
        targets.append(there[both])
        weights.append(1 + 6 / (space[here[both]] + space[there[both]]))  # keep to the middle of the free floor
    graph = sparse.csr_matrix(
        (np.concatenate(weights), (np.concatenate(sources), np.concatenate(targets))), shape=(len(cells), len(cells))
    )
    stop = int(rng.integers(len(cells)))
    nearest = np.full(len(cells), np.inf)
    route = []
    for _ in range(4):
        distance, before = csgraph.dijkstra(graph, directed=False, indices=stop, return_predecessors=True)
        nearest = np.minimum(nearest, distance)
        following = int(nearest.argmax())
        leg = [following]
        while before[leg[-1]] >= 0:
            leg.append(int(before[leg[-1]]))
        route += leg[::-1][:-1]
        stop = following
    route.append(stop)
    path = grid.centres[region][route]
    for sigma in (8, 5, 3, 1.5):
        smooth = ndimage.gaussian_filter1d(path, sigma, axis=0, mode="nearest")
        if grid.contains(smooth, region).all():
            return smooth
    return path


def _best_heading(room: Room, ground: np.ndarray, yaw: np.ndarray) -> float:
    """The offset to all yaws with which the walls looked at are farthest on the whole."""
    offsets = np.arange(24) * 2 * np.pi / 24
    angle = yaw + offsets[:, None]
    direction = np.stack([np.cos(angle), np.sin(angle)], -1)  # (offset, view, 2)
    start = room.outline
    edge = np.roll(start, -1, 0) - start
    normal = np.stack([-edge[:, 1], edge[:, 0]], 1)
    ahead = direction @ normal.T
    gap = ((start[None] - ground[:, None]) * normal).sum(-1)  # (view, wall)
    with np.errstate(divide="ignore", invalid="ignore"):
        reach = gap / ahead
        hit = ground[:, None] + reach[..., None] * direction[:, :, None]
        along = ((hit - start) * edge).sum(-1) / (edge**2).sum(-1)
    reach = np.where((reach > 0) & (along >= 0) & (along <= 1), reach, np.inf).min(-1)
    far = np.minimum(reach, 3.0) - 3.0 * (reach < 1.3)  # a wall close by fills the view and shows nothing else
    return float(offsets[far.mean(1).argmax()])
