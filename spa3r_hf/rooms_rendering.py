"""Renders procedural rooms to colour, depth, normals and instances with Embree's ray caster."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .optional import require
from .rooms import Room, RoomObject
from .rooms_cameras import check_image_size
from .rooms_materials import PATTERN_SIZE, pattern_atlas


_RAMP = 64  # steps of a colour ramp
_TONES = 8192  # steps of the table from linear light to 8-bit sRGB
_WHITE = 2.0  # linear light at the table's end
_AMBIENT_REACH = 0.9  # metres within which surfaces darken each other


@dataclass(frozen=True, eq=False)
class RoomViews:
    """Rendered views of a room.

    Args:
        rgb: (V, H, W, 3) uint8 sRGB, edges antialiased.
        depth: (V, H, W) float32 metres along the optical axis (z-depth) at the pixel's centre.
        normals: (V, H, W, 3) float32 unit normals in the world frame, facing the camera.
        instance_ids: (V, H, W) int32; 0 is the room itself, otherwise `RoomObject.instance_id`.
    """

    rgb: np.ndarray
    depth: np.ndarray
    normals: np.ndarray
    instance_ids: np.ndarray


class RoomRenderer:
    """Holds a room's ray-casting scene, light and textures, so that many calls can share them.

    Light (lamps, windows, their shadows, and the darkening of corners) is gathered once for each vertex and
    interpolated; it depends on neither the camera nor the number of views.
    """

    def __init__(self, room: Room):
        rtcore_scene = require("embreex.rtcore_scene", extra="rooms")
        mesh_construction = require("embreex.mesh_construction", extra="rooms")
        self.room = room
        self._scene: Any = rtcore_scene.EmbreeScene()
        vertices = room.vertices.astype(np.float32)
        mesh_construction.TriangleMesh(self._scene, vertices, room.faces)

        triangles = room.vertices[room.faces]
        cross = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
        area = np.linalg.norm(cross, axis=1)
        normals = cross / area[:, None]
        uv = room.uv[room.faces]
        du, dv = uv[:, 1] - uv[:, 0], uv[:, 2] - uv[:, 0]
        texels_per_metre = PATTERN_SIZE * np.sqrt(np.abs(du[:, 0] * dv[:, 1] - du[:, 1] * dv[:, 0]) / area)

        light = _gather_light(self._scene, room, triangles, normals)
        corners = np.concatenate([uv, light[room.faces]], 2)  # (face, corner, u v r g b)
        start, along_u, along_v = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
        self._faces = np.concatenate(
            [start, along_u, along_v, normals, texels_per_metre[:, None]], 1, dtype=np.float32
        )  # columns 0-4, 5-9, 10-14, 15-17, 18

        atlas = pattern_atlas()
        pattern_starts = np.array([atlas.starts[material.pattern] for material in room.materials], np.int32)
        self._pattern_start = pattern_starts[room.face_materials]
        self._ramp_start = room.face_materials * np.int32(_RAMP)
        self._ramps = _color_ramps(room)
        self._instances = room.face_instances
        # Equal on the two sides of a pixel border: the surfaces continue, and one ray a pixel will do.
        facing = np.round(normals @ [13.0, 29.0, 53.0], 3)
        self._surface = facing + 1000.0 * room.face_materials + 1e6 * room.face_instances

    def render(self, extrinsics: np.ndarray, intrinsics: np.ndarray, image_size: tuple[int, int]) -> RoomViews:
        """Render views of the room.

        Args:
            extrinsics: (V, 3, 4) camera <- world, OpenCV axes; the cameras are inside the room.
            intrinsics: (3, 3) or (V, 3, 3) in pixels.
            image_size: (height, width).

        Raises:
            ValueError: A shape is wrong, or a camera looks out of the room from outside.
        """
        extrinsics, intrinsics = np.asarray(extrinsics, np.float64), np.asarray(intrinsics, np.float64)
        if extrinsics.ndim != 3 or extrinsics.shape[1:] != (3, 4) or not len(extrinsics):
            raise ValueError(f"extrinsics must have shape (V, 3, 4) with V >= 1, got {extrinsics.shape}")
        count = len(extrinsics)
        if intrinsics.shape not in ((3, 3), (count, 3, 3)):
            raise ValueError(f"intrinsics must have shape (3, 3) or ({count}, 3, 3), got {intrinsics.shape}")
        height, width = check_image_size(image_size)
        intrinsics = np.broadcast_to(intrinsics, (count, 3, 3))
        views = RoomViews(
            rgb=np.empty((count, height, width, 3), np.uint8),
            depth=np.empty((count, height, width), np.float32),
            normals=np.empty((count, height, width, 3), np.float32),
            instance_ids=np.empty((count, height, width), np.int32),
        )
        y, x = np.mgrid[:height, :width] + 0.5
        pixels = np.stack([x.ravel(), y.ravel(), np.ones(x.size)], 1)
        for view in range(count):
            rotation, translation = extrinsics[view, :, :3], extrinsics[view, :, 3]
            position = (-rotation.T @ translation).astype(np.float32)
            to_world = np.linalg.inv(intrinsics[view]).T @ rotation  # pixel rows to directions of unit depth
            pixel_angle = 1.0 / intrinsics[view, 0, 0]
            try:
                face, depth, color = self._shade(position, pixels @ to_world, pixel_angle)
                edges = self._edges(face.reshape(height, width))
                samples = (pixels[edges, None] + _SUBPIXELS).reshape(-1, 3)
                _, _, finer = self._shade(position, samples @ to_world, pixel_angle / 2)
            except _Missed:
                raise ValueError(
                    f"view {view} of room {self.room.seed}: its camera at {position} sees no surface; "
                    f"is it outside the room?"
                ) from None
            color[edges] = finer.reshape(-1, len(_SUBPIXELS), 3).mean(1)
            views.rgb[view] = _to_srgb(color).reshape(height, width, 3)
            views.depth[view] = depth.reshape(height, width)
            views.normals[view] = self._faces[face, 15:18].reshape(height, width, 3)
            views.instance_ids[view] = self._instances[face].reshape(height, width)
        return views

    def _cast(self, position: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, ...]:
        """Face, depth and barycentric coordinates of the first surface along each ray."""
        origins = np.broadcast_to(position, directions.shape).copy()
        hit = self._scene.run(origins, directions, query="INTERSECT", output=True)
        face, depth, u, v = hit["primID"], hit["tfar"], hit["u"], hit["v"]
        for attempt in range(1, 4):  # a ray may slip through the seam of two triangles
            lost = np.flatnonzero(face < 0)
            if not len(lost):
                return face, depth, u, v
            nudged = directions[lost] + np.float32(1e-5 * attempt)
            again = self._scene.run(origins[lost], nudged, query="INTERSECT", output=True)
            face[lost], depth[lost], u[lost], v[lost] = again["primID"], again["tfar"], again["u"], again["v"]
        if (face < 0).any():
            raise _Missed
        return face, depth, u, v

    def _shade(
        self, position: np.ndarray, directions: np.ndarray, pixel_angle: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Face (P,), depth (P,) and linear colour (P, 3) along (P, 3) directions of unit depth."""
        directions = np.ascontiguousarray(directions, np.float32)
        face, depth, u, v = self._cast(position, directions)
        rows = self._faces.take(face, 0)
        values = rows[:, :5] + u[:, None] * rows[:, 5:10] + v[:, None] * rows[:, 10:15]
        # The mip level whose texels are about as large as the pixel's footprint on the slanted surface.
        slant = np.einsum("ij,ij->i", rows[:, 15:18], directions)
        footprint = depth * rows[:, 18] * np.float32(pixel_angle)
        level = np.log2(footprint * footprint / np.maximum(-slant, np.float32(0.05)) + np.float32(1e-9))
        atlas = pattern_atlas()
        level = np.clip(level * np.float32(0.5) + np.float32(0.5), 0, len(atlas.level_starts) - 1).astype(np.int32)
        size = np.int32(PATTERN_SIZE) >> level
        first = self._pattern_start.take(face) + atlas.level_starts.take(level)
        tone = _bilinear(atlas.texels, first, size, values[:, 0], values[:, 1])
        ramp = self._ramp_start.take(face) + (tone * np.float32(_RAMP - 1) + np.float32(0.5)).astype(np.int32)
        return face, depth, self._ramps.take(ramp, 0) * values[:, 2:]

    def _edges(self, face: np.ndarray) -> np.ndarray:
        """Indices of the pixels of an (H, W) face map at the border of another surface."""
        surface = self._surface.take(face)
        edge = np.zeros(face.shape, bool)
        across, down = surface[:, 1:] != surface[:, :-1], surface[1:] != surface[:-1]
        edge[:, 1:] |= across
        edge[:, :-1] |= across
        edge[1:] |= down
        edge[:-1] |= down
        return np.flatnonzero(edge)


class _Missed(Exception):
    """A ray left the room."""


_SUBPIXELS = np.array([[-0.25, -0.25, 0.0], [0.25, -0.25, 0.0], [-0.25, 0.25, 0.0], [0.25, 0.25, 0.0]])


def render_views(room: Room, extrinsics: np.ndarray, intrinsics: np.ndarray, image_size: tuple[int, int]) -> RoomViews:
    """`RoomRenderer(room).render(...)`, for a room that is rendered once."""
    return RoomRenderer(room).render(extrinsics, intrinsics, image_size)


def _bilinear(texels: np.ndarray, first: np.ndarray, size: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Values of periodic square textures, each starting at `first` with side `size` (a power of two)."""
    x, y = u * size - np.float32(0.5), v * size - np.float32(0.5)
    left, low = np.floor(x), np.floor(y)
    x -= left
    y -= low
    mask = size - 1
    column, row = left.astype(np.int32), low.astype(np.int32)
    column, right = column & mask, (column + 1) & mask
    row, upper = (row & mask) * size + first, ((row + 1) & mask) * size + first
    below = texels.take(row + column)
    below += (texels.take(row + right) - below) * x
    above = texels.take(upper + column)
    above += (texels.take(upper + right) - above) * x
    return below + (above - below) * y


def _color_ramps(room: Room) -> np.ndarray:
    """(materials * _RAMP, 3) float32 linear colours."""
    steps = np.linspace(0, 1, _RAMP)
    ramps = []
    for material in room.materials:
        stops = np.linspace(0, 1, len(material.colors))
        ramps.append(np.stack([np.interp(steps, stops, channel) for channel in zip(*material.colors, strict=True)], 1))
    return (np.concatenate(ramps) ** 2.2).astype(np.float32)


def _srgb_table() -> np.ndarray:
    linear = np.linspace(0, _WHITE, _TONES)
    rolled = np.where(linear < 0.7, linear, 0.7 + 0.3 * (1 - np.exp(-(linear - 0.7) / 0.3)))  # soft highlights
    return np.round(255 * rolled ** (1 / 2.2)).astype(np.uint8)


_SRGB = _srgb_table()


def _to_srgb(linear: np.ndarray) -> np.ndarray:
    steps = np.minimum(linear * np.float32((_TONES - 1) / _WHITE), np.float32(_TONES - 1))
    return _SRGB.take(steps.astype(np.int32))


# --- light, gathered per vertex


def _lamps(room: Room) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Point lights as (position, direction, colour); a direction of zero shines everywhere."""
    lamps = []
    emission = np.array([material.emission for material in room.materials])
    for thing in room.objects:
        if thing.category == "ceiling light":
            power = 1.3 * np.array([1.0, 0.95, 0.86])
            lamps += [(point, np.array([0, 0, -1.0]), power / 4) for point in _spread(thing, 2, -0.56)]
        elif thing.category == "window":
            seen = room.face_materials[room.face_instances == thing.instance_id]
            power = 1.6 * thing.size[1] * thing.size[2] * emission[seen].max() * np.array([0.9, 0.96, 1.05])
            inward = thing.rotation[:, 0]
            lamps += [(point, inward, power / 4) for point in _spread(thing, 0, 0.62)]
        elif thing.category == "lamp":
            above = thing.center + [0, 0, thing.size[2] / 2 + 0.06]
            lamps.append((above, np.zeros(3), 0.12 * np.array([1.0, 0.88, 0.68])))
    return lamps


def _spread(thing: RoomObject, axis: int, depth: float) -> np.ndarray:
    """(4, 3) points before a box's face, at `depth` box extents from its middle along `axis`."""
    offsets = np.full((4, 3), depth)
    offsets[:, np.arange(3) != axis] = [[0.25, 0.25], [0.25, -0.25], [-0.25, 0.25], [-0.25, -0.25]]
    return thing.center + (offsets * thing.size) @ thing.rotation.T


def _hemisphere(count: int) -> np.ndarray:
    """(count, 3) directions about +z, as dense as their cosine."""
    turn = np.arange(count) * np.pi * (3 - np.sqrt(5))
    radius = np.sqrt((np.arange(count) + 0.5) / count)
    return np.stack([radius * np.cos(turn), radius * np.sin(turn), np.sqrt(1 - radius**2)], 1)


def _gather_light(scene: Any, room: Room, triangles: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """(N, 3) linear light that falls on each vertex; emitting surfaces get what they give off."""
    count = len(room.vertices)
    corner = room.faces.ravel()
    normal = np.empty((count, 3))
    normal[corner] = np.repeat(normals, 3, 0)
    middle = np.empty((count, 3))
    middle[corner] = np.repeat(triangles.mean(1), 3, 0)
    # Look from slightly inside the surface: at its very border the neighbours would hide everything.
    inward = middle - room.vertices
    distance = np.maximum(np.linalg.norm(inward, axis=1, keepdims=True), 1e-9)
    point = room.vertices + inward * np.minimum(0.06 / distance, 0.5) + 0.004 * normal

    lit = np.zeros((count, 3))
    for position, direction, power in _lamps(room):
        toward = position - point
        squared = (toward**2).sum(1)
        cosine = np.maximum((toward * normal).sum(1) / np.sqrt(squared), 0)
        if direction.any():
            cosine *= np.maximum(-(toward @ direction) / np.sqrt(squared), 0)
        strength = cosine / (squared + 0.25)
        facing = np.flatnonzero(strength > 1e-4)
        clear = _clear(scene, point[facing], toward[facing], 0.99)
        lit[facing[clear]] += strength[facing[clear], None] * power

    side = np.where(np.abs(normal[:, 2:]) > 0.9, [1.0, 0, 0], [0, 0, 1.0])
    tangent = np.cross(side, normal)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    other = np.cross(normal, tangent)
    rays = _hemisphere(14)
    open_share = np.zeros(count)
    for x, y, z in rays:
        open_share += _clear(scene, point, x * tangent + y * other + z * normal, _AMBIENT_REACH)
    ambient = 0.25 + 0.75 * open_share / len(rays)

    structure = np.unique(room.faces[room.face_instances == 0])
    mean = lit[structure].mean()
    tint = lit[structure].mean(0) / mean
    direct = lit / mean
    direct = direct / (1 + 0.35 * direct)  # a camera's exposure would follow the light
    upward = 1.0 - 0.1 * normal[:, 2:]  # light off the floor reaches the ceiling
    light = 0.52 * ambient[:, None] * upward * (0.5 + 0.5 * tint) + 0.38 * direct
    emission = np.zeros(count)
    emission[corner] = np.repeat(np.array([material.emission for material in room.materials])[room.face_materials], 3)
    return np.where(emission[:, None] > 0, emission[:, None], light)


def _clear(scene: Any, origins: np.ndarray, directions: np.ndarray, reach: float) -> np.ndarray:
    """(P,) bool: nothing lies on the way, up to `reach` lengths of each direction."""
    reaches = np.full(len(origins), reach, np.float32)
    hits = scene.run(origins.astype(np.float32), directions.astype(np.float32), reaches, query="OCCLUDED")
    return hits < 0
