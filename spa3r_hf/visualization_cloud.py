"""Depth maps as coloured points: drawn as another camera sees them, and as GLB files, which 3-D viewers open."""

import json
import struct
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


# Numbers of the glTF 2.0 specification.
_UNSIGNED_SHORT, _UNSIGNED_INT, _FLOAT = 5123, 5125, 5126
_VERTICES, _INDICES = 34962, 34963
_JSON, _BIN = b"JSON", b"BIN\0"

_GROUND = (24, 26, 34)  # dark, of pictures of clouds
_NEAR = 0.05  # scene units before a camera, from where on it sees
_MOST_DOT = 8  # pixels of a drawn point, each way: it bounds the memory that drawing takes


def grid_faces(depth: np.ndarray, tolerance: float) -> np.ndarray:
    """
    Triangles between neighbouring pixels of depth maps, except across edges.

    At edges, networks answer depths in between, and a triangle across one would be a wall that is not there.

    Args:
        depth: (V, H, W), above 0.
        tolerance: How far apart, relatively, the depths of four neighbouring pixels may be.

    Returns:
        (M, 3) int64 indices into the V * H * W pixels, view by view, row by row; clockwise as the camera sees them.
    """
    logs = np.log(depth)
    four = np.stack([logs[:, :-1, :-1], logs[:, :-1, 1:], logs[:, 1:, 1:], logs[:, 1:, :-1]])
    joined = four.max(0) - four.min(0) <= tolerance
    upper_left = np.arange(depth.size).reshape(depth.shape)[:, :-1, :-1][joined]
    corners = upper_left[:, None] + np.array([0, 1, depth.shape[2] + 1, depth.shape[2]])
    return corners[:, [[0, 1, 2], [0, 2, 3]]].reshape(-1, 3)


def draw_cloud(
    points: np.ndarray,
    colours: np.ndarray,
    sides: np.ndarray,
    extrinsics: np.ndarray,
    intrinsics: np.ndarray,
    size: tuple[int, int],
) -> Image.Image:
    """
    A cloud as a camera sees it, the nearer the larger, on a dark ground; points may hide each other.

    Args:
        points: (N, 3), world frame.
        colours: (N, 3) uint8.
        sides: (N,), how wide they are, scene units; they are drawn as squares.
        extrinsics: (3, 4), camera <- world, OpenCV axes.
        intrinsics: (3, 3), pixels of the picture.
        size: (height, width) of the picture in pixels.
    """
    canvas = np.full((*size, 3), _GROUND, np.uint8)
    seen = points @ extrinsics[:, :3].T + extrinsics[:, 3]
    far_first = np.argsort(-seen[:, 2])
    far_first = far_first[seen[far_first, 2] > _NEAR]
    seen, colours, sides = seen[far_first], colours[far_first], sides[far_first]
    places = seen[:, :2] / seen[:, 2:] * intrinsics[(0, 1), (0, 1)] + intrinsics[:2, 2]
    dots = np.ceil(sides / seen[:, 2] * intrinsics[0, 0]).clip(1, _MOST_DOT).astype(np.int32)
    corners = np.floor(places - dots[:, None] / 2).clip(-_MOST_DOT, max(size)).astype(np.int32)
    # The pixels of all dots, one dot after the other: what is nearer overwrites what was drawn before it.
    counts = dots**2
    dot = np.repeat(np.arange(len(dots), dtype=np.int32), counts)
    within = np.arange(len(dot), dtype=np.int32) - np.repeat(np.cumsum(counts, dtype=np.int32) - counts, counts)
    down, along = np.divmod(within, dots[dot])
    y, x = corners[dot, 1] + down, corners[dot, 0] + along
    inside = (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
    canvas[y[inside], x[inside]] = colours[dot[inside]]
    return Image.fromarray(canvas)


def save_glb(path: str | PathLike[str], points: np.ndarray, colours: np.ndarray, faces: np.ndarray) -> None:
    """
    Write a surface that shines in its own colours and is seen from its front only, so that a room can be looked into
    from outside.

    Args:
        path: The file.
        points: (N, 3), OpenCV axes (x right, y down, z forward).
        colours: (N, 3) uint8, sRGB.
        faces: (M, 3) indices of points, clockwise as seen from the front; M >= 1.

    Raises:
        ValueError: Shapes or indices that do not fit, no face, or points that are not finite.
    """
    points, faces = np.asarray(points, np.float32), np.asarray(faces)
    if points.ndim != 2 or points.shape[1] != 3 or np.shape(colours) != points.shape:
        raise ValueError(f"points are {points.shape}, colours {np.shape(colours)}; expected (N, 3) both")
    if faces.ndim != 2 or faces.shape[1] != 3 or not len(faces):
        raise ValueError(f"faces are {faces.shape}; expected (M, 3), M >= 1")
    if faces.min() < 0 or faces.max() >= len(points):
        raise ValueError(f"faces have indices {faces.min()} to {faces.max()}; expected 0 to {len(points) - 1}")
    if not np.isfinite(points).all():
        raise ValueError("points hold NaN or infinite numbers; expected finite ones")
    positions = points * np.array([1, -1, -1], "<f4")  # glTF: y up, z towards the viewer
    shades = np.full((len(points), 4), 65535, "<u2")
    shades[:, :3] = np.rint(65535 * _linear(np.asarray(colours)))
    indices = faces[:, ::-1].astype("<u4").reshape(-1, 1)  # glTF: counter-clockwise
    parts = (
        (positions, _FLOAT, "VEC3", _VERTICES),
        (shades, _UNSIGNED_SHORT, "VEC4", _VERTICES),
        (indices, _UNSIGNED_INT, "SCALAR", _INDICES),
    )
    views, accessors, offset = [], [], 0
    for index, (array, component, kind, target) in enumerate(parts):
        views.append({"buffer": 0, "byteOffset": offset, "byteLength": array.nbytes, "target": target})
        accessors.append({"bufferView": index, "componentType": component, "count": len(array), "type": kind})
        offset += array.nbytes
    accessors[0] |= {"min": positions.min(0).tolist(), "max": positions.max(0).tolist()}
    accessors[1]["normalized"] = True
    primitive = {"attributes": {"POSITION": 0, "COLOR_0": 1}, "indices": 2, "material": 0}
    gltf: dict[str, Any] = {
        "asset": {"version": "2.0", "generator": "spa3r_hf"},
        "extensionsUsed": ["KHR_materials_unlit"],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "materials": [{"extensions": {"KHR_materials_unlit": {}}}],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": offset}],
    }
    text = json.dumps(gltf).encode()
    text += b" " * (-len(text) % 4)
    binary = b"".join(array.tobytes() for array, *_ in parts)
    chunks = b"".join(struct.pack("<I4s", len(data), name) + data for name, data in ((_JSON, text), (_BIN, binary)))
    Path(path).write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks)


def _linear(colours: np.ndarray) -> np.ndarray:
    """Light, in [0, 1], of sRGB colours 0 to 255."""
    shares = colours / 255
    return np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)


__all__ = ["draw_cloud", "grid_faces", "save_glb"]
