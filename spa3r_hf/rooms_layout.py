"""Where things stand in a procedural room: collision-free placement on floor, walls, ceiling and table tops."""

from dataclasses import dataclass

import numpy as np

from .optional import require
from .rooms_parts import Mesh


WALL_CLEARANCE = 0.4  # metres that a walking camera keeps from walls
FURNITURE_CLEARANCE = 0.2  # metres that it keeps from the boxes of furniture
_CELL = 0.1
_TOUCH = 1e-6  # boxes may touch


class FloorGrid:
    """The floor as square cells of 0.1 m, each free to walk on or not.

    Args:
        outline: (K, 2) floor polygon in metres.

    Attributes:
        centres: (rows, columns, 2) cell centres in metres.
        free: (rows, columns) bool; starts as all cells at least `WALL_CLEARANCE` from every wall.
    """

    def __init__(self, outline: np.ndarray):
        low, high = outline.min(0), outline.max(0)
        columns, rows = np.ceil((high - low) / _CELL).astype(int)
        x, y = low[0] + (np.arange(columns) + 0.5) * _CELL, low[1] + (np.arange(rows) + 0.5) * _CELL
        self.centres = np.stack(np.meshgrid(x, y), -1)
        self.free = distance_inside(self.centres, outline) >= WALL_CLEARANCE

    def near_box(self, x: float, y: float, half: tuple[float, float], yaw: float) -> np.ndarray:
        """(rows, columns) bool: cell centres in an upright box's footprint widened by `FURNITURE_CLEARANCE`."""
        cos, sin = np.cos(yaw), np.sin(yaw)
        dx, dy = self.centres[..., 0] - x, self.centres[..., 1] - y
        along = np.abs(dx * cos + dy * sin) < half[0] + FURNITURE_CLEARANCE
        return along & (np.abs(dy * cos - dx * sin) < half[1] + FURNITURE_CLEARANCE)

    def contains(self, points: np.ndarray, region: np.ndarray) -> np.ndarray:
        """(P,) bool: whether (P, 2) points lie in cells where the (rows, columns) mask `region` is set."""
        columns, rows = np.floor((points - self.centres[0, 0]) / _CELL + 0.5).astype(int).T
        return region[rows.clip(0, region.shape[0] - 1), columns.clip(0, region.shape[1] - 1)]


def distance_inside(points: np.ndarray, outline: np.ndarray) -> np.ndarray:
    """(...) metres from (..., 2) points to the nearest wall of a polygon, negative outside it."""
    start, end = outline, np.roll(outline, -1, 0)
    edge = end - start
    offset = points[..., None, :] - start
    along = np.clip((offset * edge).sum(-1) / (edge**2).sum(-1), 0, 1)
    distance = np.linalg.norm(offset - along[..., None] * edge, axis=-1).min(-1)
    y = points[..., None, 1]
    crosses = (start[:, 1] > y) != (end[:, 1] > y)
    rise = np.where(edge[:, 1] == 0, 1.0, edge[:, 1])
    left = points[..., None, 0] < start[:, 0] + (y - start[:, 1]) / rise * edge[:, 0]
    inside = (crosses & left).sum(-1) % 2 == 1
    return np.where(inside, distance, -distance)


@dataclass(frozen=True)
class Wall:
    """A straight wall: its start corner, unit direction, inward normal and length in metres."""

    start: np.ndarray
    direction: np.ndarray
    normal: np.ndarray
    length: float

    @property
    def yaw(self) -> float:
        """The yaw of something that stands with its back to this wall."""
        return float(np.arctan2(self.normal[1], self.normal[0]))


def walls_of(outline: np.ndarray) -> list[Wall]:
    """The walls of a counter-clockwise outline, in its order."""
    walls = []
    for start, end in zip(outline, np.roll(outline, -1, 0), strict=True):
        length = float(np.linalg.norm(end - start))
        direction = (end - start) / length
        walls.append(Wall(start, direction, np.array([-direction[1], direction[0]]), length))
    return walls


@dataclass(frozen=True)
class Piece:
    """A thing to place: its category, mesh in its own frame (standing on z = 0, centred) and extents in metres."""

    category: str
    mesh: Mesh
    size: tuple[float, float, float]


@dataclass(frozen=True)
class Placed:
    """A piece in the room: position of its footprint's centre and its underside, yaw, and what it rests on.

    `support` is the index, among the placed things, of what it stands on; None for floor, wall or ceiling.
    """

    piece: Piece
    x: float
    y: float
    z: float
    yaw: float
    support: int | None = None


class Layout:
    """Places pieces in a room so that their boxes never overlap and the free floor stays connected.

    Args:
        outline: (K, 2) counter-clockwise, axis-aligned; a rectangle or one with a corner cut out.
        height: Room height in metres.
        rng: Source of the positions.
    """

    def __init__(self, outline: np.ndarray, height: float, rng: np.random.Generator):
        self.walls = walls_of(outline)
        self.height = height
        self.rng = rng
        self.placed: list[Placed] = []
        self.grid = FloorGrid(outline)
        self.bounds = outline.min(0), outline.max(0)
        self._outline = outline
        self._boxes = np.zeros((0, 7))  # x, y, half extents, yaw, bottom, top
        self._solid = np.zeros(0, bool)
        # An L-shaped room is its bounding rectangle less the notch at its re-entrant corner.
        for index, wall in enumerate(self.walls):
            before = self.walls[index - 1]
            if before.normal @ wall.direction < 0:
                notch = _notch(outline, wall.start)
                self._add_box((*notch[0], *notch[1], 0.0, 0.0, height), solid=True)

    def _add_box(self, box: tuple[float, ...], solid: bool) -> None:
        self._boxes = np.concatenate([self._boxes, [box]])
        self._solid = np.append(self._solid, solid)

    def fits(
        self, poses: np.ndarray, half: tuple[float, float], bottom: float, top: float, solid_only: bool = False
    ) -> np.ndarray:
        """(C,) bool: which of (C, 3) poses (x, y, yaw) keep a box inside the room and clear of all others."""
        x, y, yaw = poses.T
        cos, sin = np.abs(np.cos(yaw)), np.abs(np.sin(yaw))
        reach = np.stack([half[0] * cos + half[1] * sin, half[0] * sin + half[1] * cos], 1)
        centre = poses[:, :2]
        inside = ((centre - reach >= self.bounds[0] - _TOUCH) & (centre + reach <= self.bounds[1] + _TOUCH)).all(1)
        others = self._boxes[
            (self._boxes[:, 5] < top - _TOUCH)
            & (self._boxes[:, 6] > bottom + _TOUCH)
            & (self._solid | (not solid_only))
        ]
        if not len(others):
            return inside
        dx, dy = others[:, 0] - x[:, None], others[:, 1] - y[:, None]
        turn = others[:, 4] - yaw[:, None]
        c, s = np.abs(np.cos(turn)), np.abs(np.sin(turn))
        hx, hy = others[:, 2], others[:, 3]
        own_cos, own_sin = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
        cos, sin = np.cos(others[:, 4]), np.sin(others[:, 4])
        apart = np.abs(dx * own_cos + dy * own_sin) > half[0] + hx * c + hy * s - _TOUCH
        apart |= np.abs(dy * own_cos - dx * own_sin) > half[1] + hx * s + hy * c - _TOUCH
        apart |= np.abs(dx * cos + dy * sin) > hx + half[0] * c + half[1] * s - _TOUCH
        apart |= np.abs(dy * cos - dx * sin) > hy + half[0] * s + half[1] * c - _TOUCH
        return inside & apart.all(1)

    def place(
        self,
        piece: Piece,
        poses: np.ndarray,
        z: float = 0.0,
        support: int | None = None,
        front: float = 0.0,
        on_floor: bool = True,
    ) -> int | None:
        """Put `piece` at the first of (C, 3) poses where it fits.

        Args:
            piece: What to place.
            poses: (C, 3) candidates x, y, yaw.
            z: Height of its underside.
            support: Index of what it stands on.
            front: Metres of floor in front of it that must be free.
            on_floor: Whether it blocks walking; the free floor must then stay connected.

        Returns:
            Its index among the placed things, or None where no pose fits.
        """
        half = (piece.size[0] / 2, piece.size[1] / 2)
        # Things on a table may stand in front of a window, say.
        good = self.fits(poses, half, z, z + piece.size[2], solid_only=support is not None)
        if front:
            good &= self.fits(_in_front(poses, half[0], front), (front / 2, half[1]), 0.05, 1.5, solid_only=True)
        tries = 0
        for x, y, yaw in poses[good]:
            if on_floor:
                remaining = self.grid.free & ~self.grid.near_box(x, y, half, yaw)
                tries += 1
                if not _connected(remaining):
                    if tries >= 6:
                        return None
                    continue
                self.grid.free = remaining
            self._add_box((x, y, *half, yaw, z, z + piece.size[2]), solid=True)
            self.placed.append(Placed(piece, float(x), float(y), float(z), float(yaw), support))
            return len(self.placed) - 1
        return None

    def reserve_front(self, index: int, depth: float, bottom: float = 0.05, top: float = 1.5) -> None:
        """Keep the space in front of a placed thing free of later things."""
        item = self.placed[index]
        half = (item.piece.size[0] / 2, item.piece.size[1] / 2)
        x, y, yaw = _in_front(np.array([[item.x, item.y, item.yaw]]), half[0], depth)[0]
        self._add_box((x, y, depth / 2, half[1], yaw, bottom, top), solid=False)

    def wall_poses(
        self, piece: Piece, gap: float = 0.0, walls: list[int] | None = None, count: int = 24
    ) -> np.ndarray:
        """(C, 3) random poses with the back at a wall, `gap` metres off it; some snug in a corner."""
        chosen = list(range(len(self.walls))) if walls is None else walls
        lengths = np.array([max(self.walls[index].length - piece.size[1], 0.0) for index in chosen])
        if not lengths.any():
            return np.zeros((0, 3))
        picks = self.rng.choice(len(chosen), count, p=lengths / lengths.sum())
        fraction = self.rng.random(count)
        corner = self.rng.random(count) < 0.25
        poses = []
        for pick, share, snug in zip(picks, fraction, corner, strict=True):
            wall = self.walls[chosen[pick]]
            share = round(share) if snug else share
            along = piece.size[1] / 2 + 0.02 + share * (wall.length - piece.size[1] - 0.04)
            poses.append(self.pose_at_wall(wall, along, piece.size[0], gap))
        return np.array(poses)

    def pose_at_wall(self, wall: Wall, along: float, depth: float, gap: float = 0.0) -> tuple[float, float, float]:
        """Pose of something `depth` deep with its back to `wall`, its middle `along` metres from the wall's start."""
        x, y = wall.start + along * wall.direction + (depth / 2 + gap) * wall.normal
        return float(x), float(y), wall.yaw

    def floor_poses(self, count: int = 24, turns: float = np.pi / 2) -> np.ndarray:
        """(C, 3) random poses anywhere on the floor, turned by multiples of `turns`."""
        points = self.rng.uniform(*self.bounds, (count, 2))
        yaw = self.rng.integers(0, 1000, (count, 1)) * turns % (2 * np.pi)
        return np.concatenate([points, yaw], 1)

    def clearance(self, points: np.ndarray) -> np.ndarray:
        """(C,) metres from (C, 2) points to the nearest wall, negative outside the room."""
        return distance_inside(points, self._outline)

    def beside(self, index: int, forward: float, left: float, turn: float = 0.0) -> np.ndarray:
        """(1, 3) pose at an offset from a placed thing, in its own frame."""
        item = self.placed[index]
        cos, sin = np.cos(item.yaw), np.sin(item.yaw)
        pose = (item.x + forward * cos - left * sin, item.y + forward * sin + left * cos, item.yaw + turn)
        return np.array([pose])

    def place_on(self, piece: Piece, index: int, turn: float = 0.0, back: bool = False) -> int | None:
        """Stand `piece` on the flat top of a placed thing; `back`: in the middle of the top's rear."""
        item = self.placed[index]
        cos, sin = abs(np.cos(turn)), abs(np.sin(turn))
        reach = np.array([piece.size[0] * cos + piece.size[1] * sin, piece.size[0] * sin + piece.size[1] * cos]) / 2
        room = np.array(item.piece.size[:2]) / 2 - reach - 0.015
        if (room < 0).any():
            return None
        offsets = self.rng.uniform(-1, 1, (8, 2)) * room
        if back:
            offsets = np.array([[-room[0], 0.0], [-room[0], 0.4 * room[1]], [-room[0], -0.4 * room[1]]])
        corners = offsets[:, None] + reach * np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])
        offsets = offsets[_on_top(item.piece, corners).all(1)]
        if not len(offsets):
            return None
        poses = np.concatenate([self.beside(index, forward, left, turn) for forward, left in offsets])
        return self.place(piece, poses, item.z + item.piece.size[2], support=index, on_floor=False)


def _in_front(poses: np.ndarray, half_depth: float, depth: float) -> np.ndarray:
    ahead = half_depth + depth / 2
    step = np.stack([np.cos(poses[:, 2]), np.sin(poses[:, 2]), np.zeros(len(poses))], 1)
    return poses + ahead * step


def _on_top(piece: Piece, points: np.ndarray) -> np.ndarray:
    """(...) bool: which (..., 2) points of a piece's own frame lie on its topmost faces, which may be round."""
    triangles = piece.mesh.vertices[piece.mesh.faces]
    top = triangles[(triangles[..., 2] > piece.size[2] - _TOUCH).all(1)][..., :2]
    edges = np.roll(top, -1, 1) - top
    offset = points[..., None, None, :] - top
    return ((edges[..., 0] * offset[..., 1] - edges[..., 1] * offset[..., 0]) >= -_TOUCH).all(-1).any(-1)


def _notch(outline: np.ndarray, inner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre and half extents of the rectangle between the re-entrant corner and the outline's missing corner."""
    low, high = outline.min(0), outline.max(0)
    corners = np.array([[low[0], low[1]], [high[0], low[1]], [high[0], high[1]], [low[0], high[1]]])
    missing = next(corner for corner in corners if not (np.abs(outline - corner).sum(1) < 1e-9).any())
    return (missing + inner) / 2, np.abs(missing - inner) / 2


def _connected(free: np.ndarray) -> bool:
    """Whether the free floor is (nearly) one region, and large enough to walk in."""
    ndimage = require("scipy.ndimage", extra="rooms")
    labels, count = ndimage.label(free)
    if count == 0:
        return False
    areas = np.bincount(labels.ravel())[1:]
    return bool(areas.max() >= 0.94 * areas.sum() and areas.max() * _CELL**2 >= 1.0)
