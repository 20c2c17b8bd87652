"""The geometry that spatial questions about procedural rooms rest on: closest points, turns, sightings and routes."""

import numpy as np

from .rooms import Room, RoomObject
from .rooms_cameras import free_floor, pinhole_intrinsics
from .rooms_layout import distance_inside
from .rooms_rendering import RoomRenderer


_PAIRS_AT_ONCE = 192  # pairs of triangles measured before those that are too far apart are dropped again
_WALK_SAMPLE = 0.05  # metres between the places tested for free floor along a straight line
STOP_REACH = 0.7  # metres from a thing's footprint within which a robot has reached it; walking keeps 0.4 off walls
_WALL_BEHIND, _IN_FRONT = 0.15, 0.5  # metres


# --- closest points


def closest_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Exact distance in metres between the closest points of two surfaces; 0 where they touch or cross.

    Args:
        first: (S, 3, 3) triangles by their corners, metres.
        second: (T, 3, 3).

    Raises:
        ValueError: A shape is wrong, or there are no triangles.
    """
    for name, triangles in (("first", first), ("second", second)):
        if triangles.ndim != 3 or triangles.shape[1:] != (3, 3) or not len(triangles):
            raise ValueError(f"{name} must be (T, 3, 3) triangles with T >= 1, got shape {triangles.shape}")
    bound = _distance_of_some_corners(first, second)
    first = first[_box_gap(first.min(1), first.max(1), second.min((0, 1)), second.max((0, 1))) <= bound]
    second = second[_box_gap(second.min(1), second.max(1), first.min((0, 1)), first.max((0, 1))) <= bound]
    gap = _box_gap(first.min(1)[:, None], first.max(1)[:, None], second.min(1), second.max(1))
    near_first, near_second = np.nonzero(gap <= bound)
    order = np.argsort(gap[near_first, near_second], kind="stable")
    near_first, near_second = near_first[order], near_second[order]
    gaps = gap[near_first, near_second]
    for start in range(0, len(gaps), _PAIRS_AT_ONCE):
        if gaps[start] >= bound:  # and so are all that follow
            break
        chunk = slice(start, start + _PAIRS_AT_ONCE)
        bound = min(bound, float(_pair_distances(first[near_first[chunk]], second[near_second[chunk]]).min()))
    return bound


def _distance_of_some_corners(first: np.ndarray, second: np.ndarray) -> float:
    """An upper bound: the distance of two corners that are near each other."""
    corners, others = first.reshape(-1, 3), second.reshape(-1, 3)
    there = others.mean(0)
    for _ in range(3):
        here = corners[((corners - there) ** 2).sum(1).argmin()]
        there = others[((others - here) ** 2).sum(1).argmin()]
    return float(np.linalg.norm(here - there))


def _box_gap(low: np.ndarray, high: np.ndarray, other_low: np.ndarray, other_high: np.ndarray) -> np.ndarray:
    """(...) distance between axis-aligned boxes with corners (..., 3); never more than that of what they hold."""
    return np.linalg.norm(np.maximum(np.maximum(low - other_high, other_low - high), 0), axis=-1)


def _pair_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(P,) distances between (P, 3, 3) triangles, pair by pair.

    The closest points of two triangles are a corner and a point inside the other face, or lie on two edges (a corner
    being an edge's end), unless an edge passes through the other face.
    """
    squared = np.minimum(_edges_squared(first, second), _corners_to_faces_squared(first, second))
    squared = np.minimum(squared, _corners_to_faces_squared(second, first))
    crossing = _edge_crosses_face(first, second) | _edge_crosses_face(second, first)
    return np.where(crossing, 0.0, np.sqrt(squared))


def _edges_squared(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(P,) least squared distance of the 3 x 3 pairs of edges."""
    start, other = first[:, :, None], second[:, None]  # (P, 3, 1, 3), (P, 1, 3, 3)
    edge, other_edge = np.roll(first, -1, 1)[:, :, None] - start, np.roll(second, -1, 1)[:, None] - other
    between = start - other
    a, e, b = _dot(edge, edge), _dot(other_edge, other_edge), _dot(edge, other_edge)
    c, f = _dot(edge, between), _dot(other_edge, between)
    with np.errstate(divide="ignore", invalid="ignore"):
        along, along_other = (b * f - c * e) / (a * e - b * b), (a * f - b * c) / (a * e - b * b)
        inner = (along >= 0) & (along <= 1) & (along_other >= 0) & (along_other <= 1)  # not of parallel edges
        apart = between + along[..., None] * edge - along_other[..., None] * other_edge
        inside = np.where(inner, _dot(apart, apart), np.inf)
        # Otherwise an end of one edge is closest to the other edge.
        on_edge = np.nan_to_num(-c / a).clip(0, 1)[..., None] * edge + between
        on_other = np.nan_to_num(f / e).clip(0, 1)[..., None] * other_edge - between
    ends = np.minimum(_dot(on_edge, on_edge), _dot(on_other, on_other))
    return np.minimum(inside, ends).min((1, 2))


def _corners_to_faces_squared(corners: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """(P,) least squared distance of the three corners to the other face, where they stand above its inside."""
    normal = np.cross(faces[:, 1] - faces[:, 0], faces[:, 2] - faces[:, 0])[:, None]
    height = _dot(corners - faces[:, :1], normal)
    with np.errstate(divide="ignore", invalid="ignore"):
        squared = height**2 / _dot(normal, normal)
    return np.where(_above_inside(corners, faces), squared, np.inf).min(1)


def _edge_crosses_face(edges: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """(P,) whether an edge of the first triangle passes through the second."""
    normal = np.cross(faces[:, 1] - faces[:, 0], faces[:, 2] - faces[:, 0])[:, None]
    height = _dot(edges - faces[:, :1], normal)
    following, next_height = np.roll(edges, -1, 1), np.roll(height, -1, 1)
    opposite = (height * next_height) < 0
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(opposite, height / (height - next_height), 0.0)
    return (opposite & _above_inside(edges + share[..., None] * (following - edges), faces)).any(1)


def _above_inside(points: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """(P, N) whether (P, N, 3) points project into the (P, 3, 3) faces along their normals."""
    u, v = (faces[:, 1] - faces[:, 0])[:, None], (faces[:, 2] - faces[:, 0])[:, None]
    offset = points - faces[:, :1]
    uu, uv, vv, ou, ov = _dot(u, u), _dot(u, v), _dot(v, v), _dot(offset, u), _dot(offset, v)
    area = uu * vv - uv * uv
    along_u, along_v = vv * ou - uv * ov, uu * ov - uv * ou
    return (area > 0) & (along_u >= 0) & (along_v >= 0) & (along_u + along_v <= area)


def _dot(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.einsum("...i,...i->...", first, second)


# --- turns


def turn_degrees(heading: np.ndarray, towards: np.ndarray) -> np.ndarray:
    """(...) degrees in [-180, 180] that one turns from (..., 2) `heading` to `towards` on the floor; positive left."""
    cross = heading[..., 0] * towards[..., 1] - heading[..., 1] * towards[..., 0]
    return np.degrees(np.arctan2(cross, (heading * towards).sum(-1)))


def footprint(thing: RoomObject) -> np.ndarray:
    """(5, 2) metres: the middle of a thing's footprint, then its four corners."""
    return np.concatenate([thing.center[None, :2], thing.box_corners()[:4, :2]])


# --- what the views show


class Sightings:
    """What the views of a walk show of a room.

    Args:
        room: The room.
        extrinsics: (V, 3, 4) camera <- world, OpenCV axes.
        image_size: (height, width) of the views that are rendered for it, in pixels.
        horizontal_fov_degrees: Their field of view across the width.

    Attributes:
        shares: (V, N) share of each view's pixels that each of the room's N objects covers, in [0, 1].
    """

    def __init__(self, room: Room, extrinsics: np.ndarray, image_size: tuple[int, int], horizontal_fov_degrees: float):
        intrinsics = pinhole_intrinsics(image_size, horizontal_fov_degrees)
        instances = RoomRenderer(room).render(extrinsics, intrinsics, image_size).instance_ids
        count = len(room.objects) + 1
        pixels = [np.bincount(view.ravel(), minlength=count) for view in instances]
        self.shares = np.array(pixels)[:, 1:] / instances[0].size
        self._outline = room.outline
        self._height = room.height
        self._extrinsics = extrinsics.astype(np.float64)
        self._intrinsics = intrinsics.astype(np.float64)
        self._image_size = image_size

    def in_frame(self, points: np.ndarray) -> np.ndarray:
        """(V, P) whether (P, 3) points in metres project into each view, behind things or not."""
        camera = np.einsum("vij,pj->vpi", self._extrinsics[:, :, :3], points) + self._extrinsics[:, None, :, 3]
        pixels = camera @ self._intrinsics.T
        height, width = self._image_size
        with np.errstate(divide="ignore", invalid="ignore"):
            x, y = pixels[..., 0] / pixels[..., 2], pixels[..., 1] / pixels[..., 2]
        return (pixels[..., 2] > 0) & (x >= 0) & (x <= width) & (y >= 0) & (y <= height)

    def shows_whole_box(self, thing: RoomObject) -> bool:
        """Whether every corner of a thing's oriented box is in the frame of some view."""
        return bool(self.in_frame(thing.box_corners()).any(0).all())

    def shows_all_corners(self) -> bool:
        """Whether every corner of the room is in the frame of some view with no wall in between."""
        eyes = -np.einsum("vij,vi->vj", self._extrinsics[:, :, :3], self._extrinsics[:, :, 3])
        heights = np.linspace(0, self._height, 9)
        for corner in self._outline:
            edge = np.column_stack([np.tile(corner, (len(heights), 1)), heights])
            way = eyes[:, None, :2] + np.linspace(0, 1, 30)[:, None] * (corner - eyes[:, None, :2])
            open_way = (distance_inside(way, self._outline) > -1e-6).all(1)
            if not (self.in_frame(edge).any(1) & open_way).any():
                return False
        return True


# --- routes


class Floor:
    """Straight walks over a room's free floor, as `rooms_cameras.camera_walk` knows it."""

    def __init__(self, room: Room):
        self._grid = free_floor(room)
        self._outline = room.outline
        self._walks: dict[tuple[float, float, int], np.ndarray | None] = {}

    def standing_point(self, thing: RoomObject) -> np.ndarray | None:
        """(2,) the free place nearest to a thing; None where none is within `STOP_REACH`."""
        places = self._grid.centres[self._grid.free]
        distance = _footprint_distance(thing, places)
        if not len(places) or distance.min() > STOP_REACH:
            return None
        return places[distance.argmin()]

    def in_front(self, thing: RoomObject) -> np.ndarray | None:
        """(3, 2) places half a metre in front of a thing whose back is to a wall: before its middle and to both sides.

        None where no wall is behind it (its front is anybody's guess), or the first place is not free.
        """
        front, left = thing.rotation[:2, 0], thing.rotation[:2, 1]
        behind = thing.center[:2] - (thing.size[0] / 2 + _WALL_BEHIND) * front
        aside = np.array([0.0, 0.25, -0.25])[:, None] * thing.size[1] * left
        places = thing.center[:2] + (thing.size[0] / 2 + _IN_FRONT) * front + aside
        if distance_inside(behind, self._outline) > 0 or not self._grid.contains(places, self._grid.free)[0]:
            return None
        return places

    def walk(self, start: np.ndarray, thing: RoomObject) -> np.ndarray | None:
        """(2,) where one stops who goes from `start` straight towards a thing's middle; None if something bars it."""
        key = (float(start[0]), float(start[1]), thing.instance_id)
        if key not in self._walks:
            self._walks[key] = self._walk(start, thing)
        return self._walks[key]

    def _walk(self, start: np.ndarray, thing: RoomObject) -> np.ndarray | None:
        ahead = thing.center[:2] - start
        steps = max(2, round(float(np.linalg.norm(ahead)) / _WALK_SAMPLE))
        way = start + np.linspace(0, 1, steps)[:, None] * ahead
        barred = ~self._grid.contains(way, self._grid.free)
        last = int(barred.argmax()) - 1 if barred.any() else steps - 1
        if last < 0 or _footprint_distance(thing, way[last][None])[0] > STOP_REACH:
            return None
        return way[last]


def _footprint_distance(thing: RoomObject, points: np.ndarray) -> np.ndarray:
    """(P,) metres from (P, 2) points on the floor to a thing's footprint; 0 inside."""
    local = np.abs((points - thing.center[:2]) @ thing.rotation[:2, :2])
    return np.linalg.norm(np.maximum(local - thing.size[:2] / 2, 0), axis=1)
