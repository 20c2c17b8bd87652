"""Procedural rooms: seeded, furnished indoor scenes with exact geometry.

The world frame has its z axis up, the floor at z = 0, and metres as its unit.
"""

from dataclasses import dataclass

import numpy as np

from .rooms_furnishing import furnish
from .rooms_furniture import CATEGORIES
from .rooms_layout import Layout, Placed, distance_inside, walls_of
from .rooms_materials import Look, Material, draw_look
from .rooms_parts import Mesh, merge_meshes


__all__ = ["CATEGORIES", "Room", "RoomObject", "generate_room"]

ROOM_KINDS = ("living room", "bedroom", "study", "kitchen", "bathroom")
_SKIRTING = 0.08
_LOWER_WALL = 1.0


@dataclass(frozen=True, eq=False)
class RoomObject:
    """One thing in a room.

    Args:
        instance_id: Its value in instance maps, 1 or more.
        category: One of `CATEGORIES`.
        center: (3,) centre of its oriented box in metres, world frame.
        size: (3,) full extents in metres along its own axes: front to back, side to side, height.
        yaw: Radians about +z; the object's front faces (cos yaw, sin yaw, 0).
        support_id: Instance it stands on; 0 for the room itself (floor, wall or ceiling).
    """

    instance_id: int
    category: str
    center: np.ndarray
    size: np.ndarray
    yaw: float
    support_id: int

    @property
    def rotation(self) -> np.ndarray:
        """(3, 3) world <- object: columns are the object's front, left and up."""
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])

    def box_corners(self) -> np.ndarray:
        """(8, 3) corners of the oriented box, world frame: the lower four counter-clockwise, then the upper four."""
        signs = np.array([[1, -1], [1, 1], [-1, 1], [-1, -1]])
        local = np.concatenate([np.insert(signs, 2, -1, 1), np.insert(signs, 2, 1, 1)]) * self.size / 2
        return self.center + local @ self.rotation.T


@dataclass(frozen=True, eq=False)
class Room:
    """A furnished room: what is in it, and its exact triangles. The structure (floor, walls, ceiling) is instance 0.

    Args:
        seed: The seed it was generated from.
        kind: One of `ROOM_KINDS`.
        outline: (K, 2) floor polygon in metres, counter-clockwise; K = 4 (rectangular) or 6 (L-shaped).
        height: Floor to ceiling in metres.
        objects: Furniture, doors, windows, lights and things on walls and tables; `objects[i].instance_id == i + 1`.
        vertices: (N, 3) float64 metres.
        uv: (N, 2) texture coordinates in pattern repeats.
        faces: (M, 3) int32 vertex indices, counter-clockwise from the side that can be seen.
        face_instances: (M,) int32 instance of each face.
        face_materials: (M,) int32 index into `materials`.
        materials: The room's materials.
    """

    seed: int
    kind: str
    outline: np.ndarray
    height: float
    objects: tuple[RoomObject, ...]
    vertices: np.ndarray
    uv: np.ndarray
    faces: np.ndarray
    face_instances: np.ndarray
    face_materials: np.ndarray
    materials: tuple[Material, ...]

    @property
    def floor_area(self) -> float:
        """Area of the outline in square metres."""
        x, y = self.outline.T
        return float(0.5 * (x * np.roll(y, -1) - y * np.roll(x, -1)).sum())

    def object_triangles(self, instance_id: int) -> np.ndarray:
        """(T, 3, 3) exact triangles of one instance (0: the structure), world frame, metres.

        Raises:
            KeyError: The room has no such instance.
        """
        faces = self.faces[self.face_instances == instance_id]
        if not len(faces):
            raise KeyError(f"room {self.seed} has instances 0 to {len(self.objects)}, not {instance_id}")
        return self.vertices[faces]

    def object_vertices(self, instance_id: int) -> np.ndarray:
        """(N, 3) vertices of one instance, each once; see `object_triangles`."""
        return np.unique(self.object_triangles(instance_id).reshape(-1, 3), axis=0)


def generate_room(seed: int) -> Room:
    """Build a room: its outline, surfaces, furniture and their places. A pure function of the seed.

    Raises:
        ValueError: `seed` is negative.
    """
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    rng = np.random.default_rng(seed)
    kind = str(rng.choice(ROOM_KINDS, p=(0.28, 0.26, 0.16, 0.17, 0.13)))
    outline = _draw_outline(rng, small=kind == "bathroom")
    height = round(float(rng.uniform(2.4, 3.0)), 2)
    look = draw_look(rng, wet=kind in ("kitchen", "bathroom"))
    materials: dict[Material, int] = {}

    layout = Layout(outline, height, rng)
    furnish(layout, kind, look, materials)
    structure = _structure(outline, height, look, int(rng.integers(len(outline))), materials)

    objects = tuple(_room_object(index, item) for index, item in enumerate(layout.placed))
    meshes = [structure] + [_in_world(item, thing) for item, thing in zip(layout.placed, objects, strict=True)]
    merged = merge_meshes(meshes)
    instances = np.repeat(np.arange(len(meshes), dtype=np.int32), [len(mesh.faces) for mesh in meshes])
    return Room(
        seed=seed,
        kind=kind,
        outline=outline,
        height=height,
        objects=objects,
        vertices=merged.vertices,
        uv=merged.uv,
        faces=merged.faces.astype(np.int32),
        face_instances=instances,
        face_materials=merged.face_materials.astype(np.int32),
        materials=tuple(materials),
    )


def _draw_outline(rng: np.random.Generator, small: bool) -> np.ndarray:
    """A rectangle, or one with a corner cut out, with a corner of its bounds at the origin; whole centimetres."""
    width, depth = np.round(rng.uniform(3.0, 4.2, 2) if small else rng.uniform(3.6, 6.8, 2), 2)
    if small or min(width, depth) < 4.0 or rng.random() < 0.3:
        return np.array([[0, 0], [width, 0], [width, depth], [0, depth]])
    cut_x = round(width * rng.uniform(0.3, 0.48), 2)
    cut_y = round(depth * rng.uniform(0.3, 0.48), 2)
    outline = np.array(
        [
            [0, 0],
            [width, 0],
            [width, depth - cut_y],
            [width - cut_x, depth - cut_y],
            [width - cut_x, depth],
            [0, depth],
        ]
    )
    if rng.random() < 0.5:  # mirror, and turn the corners' order to stay counter-clockwise
        outline = np.stack([width - outline[:, 0], outline[:, 1]], 1)[::-1]
    if rng.random() < 0.5:
        outline = np.stack([outline[:, 0], depth - outline[:, 1]], 1)[::-1]
    return np.ascontiguousarray(outline)


def _room_object(index: int, item: Placed) -> RoomObject:
    size = np.array(item.piece.size)
    center = np.array([item.x, item.y, item.z + size[2] / 2])
    support = 0 if item.support is None else item.support + 1
    return RoomObject(index + 1, item.piece.category, center, size, item.yaw, support)


def _in_world(item: Placed, thing: RoomObject) -> Mesh:
    mesh = item.piece.mesh
    vertices = mesh.vertices @ thing.rotation.T + [item.x, item.y, item.z]
    return Mesh(vertices, mesh.uv, mesh.faces, mesh.face_materials)


def _plane(
    origin: np.ndarray, along: np.ndarray, up: np.ndarray, lengths: tuple[float, float], offset: tuple[float, float],
    material: Material, materials: dict[Material, int],
) -> Mesh:  # fmt: skip
    """A rectangle seen from the side of along x up, in cells fine enough to hold light and shade per vertex."""
    columns, rows = (max(1, round(length / 0.28)) for length in lengths)
    a, b = np.linspace(0, lengths[0], columns + 1), np.linspace(0, lengths[1], rows + 1)
    grid_a, grid_b = (values.ravel() for values in np.meshgrid(a, b))
    vertices = origin + grid_a[:, None] * along + grid_b[:, None] * up
    uv = np.stack([grid_a + offset[0], grid_b + offset[1]], 1) / material.tile
    first = (np.arange(rows)[:, None] * (columns + 1) + np.arange(columns)).ravel()
    corners = np.stack([first, first + 1, first + columns + 2, first + columns + 1], 1)
    faces = np.concatenate([corners[:, [0, 1, 2]], corners[:, [0, 2, 3]]])
    index = materials.setdefault(material, len(materials))
    return Mesh(vertices, uv, faces, np.full(len(faces), index))


def _structure(outline: np.ndarray, height: float, look: Look, accent: int, materials: dict[Material, int]) -> Mesh:
    """Floor, ceiling and walls, seen from inside; wall number `accent` is finished differently."""
    x_axis, y_axis, z_axis = np.eye(3)
    planes = []
    xs, ys = np.unique(outline[:, 0]), np.unique(outline[:, 1])
    for x0, x1 in zip(xs[:-1], xs[1:], strict=True):
        for y0, y1 in zip(ys[:-1], ys[1:], strict=True):
            if distance_inside(np.array([(x0 + x1) / 2, (y0 + y1) / 2]), outline) < 0:
                continue
            origin = np.array([x0, y0, 0.0])
            planes.append(_plane(origin, x_axis, y_axis, (x1 - x0, y1 - y0), (x0, y0), look.floor, materials))
            origin = np.array([x0, y0, height])
            planes.append(_plane(origin, y_axis, x_axis, (y1 - y0, x1 - x0), (y0, x0), look.ceiling, materials))
    bands = [(0.0, _SKIRTING, look.skirting)]
    if look.lower_wall is not None:
        bands.append((_SKIRTING, _LOWER_WALL, look.lower_wall))
    for index, wall in enumerate(walls_of(outline)):
        upper = (bands[-1][1], height, look.accent_wall if index == accent else look.wall)
        # From its end to its start, which is left to right for who looks at it from inside.
        along, corner = np.append(-wall.direction, 0.0), np.append(wall.start + wall.length * wall.direction, 0.0)
        for low, high, material in [*bands, upper]:
            origin = corner + low * z_axis
            planes.append(_plane(origin, along, z_axis, (wall.length, high - low), (0.0, low), material, materials))
    return merge_meshes(planes)
