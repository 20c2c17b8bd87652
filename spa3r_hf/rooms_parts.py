"""Solid parts (boxes and tapered rods) that furniture is built of, and the meshes they make."""

from dataclasses import dataclass

import numpy as np

from .rooms_materials import Look, Material


# Corners of a unit box about the origin, four for each of its six faces, counter-clockwise from outside.
_BOX_CORNERS = 0.5 * np.array(
    [
        [[1, -1, -1], [1, 1, -1], [1, 1, 1], [1, -1, 1]],
        [[-1, 1, -1], [-1, -1, -1], [-1, -1, 1], [-1, 1, 1]],
        [[1, 1, -1], [-1, 1, -1], [-1, 1, 1], [1, 1, 1]],
        [[-1, -1, -1], [1, -1, -1], [1, -1, 1], [-1, -1, 1]],
        [[-1, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]],
        [[-1, 1, -1], [1, 1, -1], [1, -1, -1], [-1, -1, -1]],
    ]
)
_BOX_FACES = np.concatenate(
    [[[4 * side, 4 * side + 1, 4 * side + 2], [4 * side, 4 * side + 2, 4 * side + 3]] for side in range(6)]
)
_FACE_AXES = np.array([[1, 2], [1, 2], [0, 2], [0, 2], [0, 1], [0, 1]])  # the axes that each face's u and v run along
_FITTED_UV = np.tile(np.array([[0.01, 0.01], [0.99, 0.01], [0.99, 0.99], [0.01, 0.99]]), (6, 1, 1))


@dataclass(frozen=True)
class Mesh:
    """Triangles with texture coordinates; a vertex belongs to one flat surface, so normals and light do not leak.

    Args:
        vertices: (N, 3) metres.
        uv: (N, 2) in repeats of the material's pattern.
        faces: (M, 3) vertex indices, counter-clockwise seen from outside the solid.
        face_materials: (M,) indices into a list of materials.
    """

    vertices: np.ndarray
    uv: np.ndarray
    faces: np.ndarray
    face_materials: np.ndarray


def merge_meshes(meshes: list[Mesh]) -> Mesh:
    """One mesh of several, in their order."""
    starts = np.cumsum([0] + [len(mesh.vertices) for mesh in meshes[:-1]])
    return Mesh(
        np.concatenate([mesh.vertices for mesh in meshes]),
        np.concatenate([mesh.uv for mesh in meshes]),
        np.concatenate([mesh.faces + start for mesh, start in zip(meshes, starts, strict=True)]),
        np.concatenate([mesh.face_materials for mesh in meshes]),
    )


class Parts:
    """Collects the parts of one object in its own frame: x to the front, y to the left, z up, metres.

    Args:
        rng: Source of the object's variation.
        look: The room's colours.
        materials: The room's material indices so far; new ones are added.
    """

    def __init__(self, rng: np.random.Generator, look: Look, materials: dict[Material, int]):
        self.rng = rng
        self.look = look
        self._materials = materials
        self._boxes: list[tuple[float, ...]] = []
        self._rods: list[Mesh] = []

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def wood(self) -> Material:
        return self.look.woods[0 if self.chance(0.65) else 1]

    def fabric(self) -> Material:
        return self.look.fabrics[self.rng.integers(len(self.look.fabrics))]

    def paint(self) -> Material:
        """A case good's finish: wood, or white lacquer."""
        return self.wood() if self.chance(0.65) else self.look.white

    def box(self, x: float, y: float, z: float, dx: float, dy: float, dz: float, material: Material) -> None:
        """A box of extents (dx, dy, dz) centred on (x, y), its underside at height z."""
        index = self._materials.setdefault(material, len(self._materials))
        self._boxes.append((x, y, z + dz / 2, dx, dy, dz, material.tile, index))

    def rod(
        self,
        start: tuple[float, float, float],
        end: tuple[float, float, float],
        radius: float,
        material: Material,
        end_radius: float | None = None,
        sides: int = 8,
    ) -> None:
        """A prism or frustum with flat sides between two points; `end_radius` defaults to `radius`."""
        index = self._materials.setdefault(material, len(self._materials))
        tile = material.tile or 1.0
        first, last = np.array(start), np.array(end)
        length = float(np.linalg.norm(last - first))
        axis = (last - first) / length
        helper = np.array([1.0, 0, 0]) if abs(axis[2]) > 0.9 else np.array([0, 0, 1.0])
        side = np.cross(helper, axis)
        side /= np.linalg.norm(side)
        other = np.cross(axis, side)
        angles = (np.arange(sides) + 0.5) * (2 * np.pi / sides)
        ring = np.cos(angles)[:, None] * side + np.sin(angles)[:, None] * other
        lower = first + radius * ring
        upper = last + (radius if end_radius is None else end_radius) * ring
        following = np.roll(np.arange(sides), -1)
        quads = np.stack([lower, lower[following], upper[following], upper], 1).reshape(-1, 3)
        around = np.arange(sides) * (2 * radius * np.sin(np.pi / sides))
        step = around[1]
        quad_uv = np.stack(
            [np.stack([np.zeros(sides), around], 1), np.stack([np.zeros(sides), around + step], 1)]
            + [np.stack([np.full(sides, length), around + step], 1), np.stack([np.full(sides, length), around], 1)],
            1,
        ).reshape(-1, 2)
        caps_uv = np.concatenate([lower @ np.stack([side, other], 1), upper @ np.stack([side, other], 1)])
        quad_faces = (4 * np.arange(sides)[:, None, None] + [[0, 1, 2], [0, 2, 3]]).reshape(-1, 3)
        fan = np.stack([np.zeros(sides - 2, int), np.arange(1, sides - 1), np.arange(2, sides)], 1)
        faces = np.concatenate([quad_faces, 4 * sides + fan[:, ::-1], 5 * sides + fan])
        vertices = np.concatenate([quads, lower, upper])
        uv = np.concatenate([quad_uv, caps_uv]) / tile
        self._rods.append(Mesh(vertices, uv, faces, np.full(len(faces), index)))

    def column(
        self, x: float, y: float, z: float, radius: float, height: float, material: Material,
        top_radius: float | None = None, sides: int = 10,
    ) -> None:  # fmt: skip
        """An upright rod standing at height z."""
        self.rod((x, y, z), (x, y, z + height), radius, material, top_radius, sides)

    def legs(self, depth: float, width: float, height: float, thickness: float, material: Material) -> None:
        """Four square legs at the corners of a rectangle."""
        x, y = (depth - thickness) / 2, (width - thickness) / 2
        for dx, dy in ((x, y), (x, -y), (-x, y), (-x, -y)):
            self.box(dx, dy, 0, thickness, thickness, height, material)

    def handle(self, x: float, y: float, z: float, width: float, height: float) -> None:
        """A metal grip on a front at `x`."""
        self.box(x + 0.01, y, z, 0.02, width, height, self.look.metal)

    def _box_mesh(self) -> Mesh:
        rows = np.array(self._boxes)
        centre, size, tile, index = rows[:, :3], rows[:, 3:6], rows[:, 6], rows[:, 7].astype(int)
        count = len(rows)
        local = _BOX_CORNERS * size[:, None, None]  # (box, face, corner, axis)
        # Wood grain runs along u: let u follow the longer side of the part.
        axes = np.broadcast_to(_FACE_AXES, (count, 6, 2))
        longest = size.argmax(1)[:, None]
        axes = np.where((axes[..., 1] == longest)[..., None], axes[..., ::-1], axes)
        uv = np.take_along_axis(local, axes[:, :, None, :], 3) + 0.37 * np.arange(count)[:, None, None, None]
        stretched = (tile == 0)[:, None, None, None]
        uv = np.where(stretched, _FITTED_UV, uv / np.where(stretched, 1.0, tile[:, None, None, None]))
        faces = (24 * np.arange(count)[:, None, None] + _BOX_FACES).reshape(-1, 3)
        vertices = (local + centre[:, None, None]).reshape(-1, 3)
        return Mesh(vertices, uv.reshape(-1, 2), faces, np.repeat(index, 12))

    def mesh(self) -> Mesh:
        """All parts, shifted so that the bounding box stands on z = 0, centred on the z axis."""
        merged = merge_meshes(([self._box_mesh()] if self._boxes else []) + self._rods)
        low, high = merged.vertices.min(0), merged.vertices.max(0)
        shift = np.array([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]])
        return Mesh(merged.vertices - shift, merged.uv, merged.faces, merged.face_materials)
