"""Pictures of what a geometry backbone sees: depth maps, and point clouds as pictures and as files for 3-D viewers."""

from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


# Near to far: eight equal steps of the "viridis" colour map, reversed, evenly darker to the eye.
_DEPTH_COLOURS = np.array(
    [
        (253, 231, 37),
        (160, 218, 57),
        (74, 193, 109),
        (31, 161, 135),
        (39, 127, 142),
        (54, 92, 141),
        (70, 50, 127),
        (68, 1, 84),
    ],
    dtype=np.float64,
)
_CELL, _GAP, _LABEL = 168, 8, 120


def depth_to_rgb(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Colours, uint8 (..., 3), of depths (...): yellow up to `near`, through green, to violet from `far` on."""
    position = ((depth - near) / max(far - near, 1e-9)).clip(0, 1)
    stops = np.linspace(0, 1, len(_DEPTH_COLOURS))
    return np.stack([np.interp(position, stops, channel) for channel in _DEPTH_COLOURS.T], -1).round().astype(np.uint8)


def picture_grid(rows: dict[str, list[np.ndarray]], caption: str = "") -> Image.Image:
    """
    A row of pictures for each label.

    Args:
        rows: Label -> pictures (h, w, 3) uint8, enlarged to the same cells without smoothing.
        caption: A line below.
    """
    columns = max(len(row) for row in rows.values())
    width = _LABEL + columns * (_CELL + _GAP) + _GAP
    sheet = Image.new("RGB", (width, len(rows) * (_CELL + _GAP) + _GAP + (32 if caption else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=15)
    for r, (label, row) in enumerate(rows.items()):
        top = _GAP + r * (_CELL + _GAP)
        draw.multiline_text((_GAP, top + 6), label.replace(" ", "\n"), fill=(32, 32, 32), font=font)
        for c, picture in enumerate(row):
            cell = Image.fromarray(picture).resize((_CELL, _CELL), Image.Resampling.NEAREST)
            sheet.paste(cell, (_LABEL + c * (_CELL + _GAP), top))
    if caption:
        draw.text((_GAP, sheet.height - 26), caption, fill=(110, 110, 110), font=font)
    return sheet


def depth_sheet(rgb: np.ndarray, true: np.ndarray, predicted: np.ndarray, max_views: int = 6) -> Image.Image:
    """
    Views, their true and their predicted depth, in the same colours.

    Args:
        rgb: (V, H, W, 3) uint8.
        true, predicted: (V, H, W) depth in the same unit; scale the prediction before.
    """
    views = range(min(len(rgb), max_views))
    near, far = np.percentile(true, (2, 98))
    rows = {"view": [rgb[view] for view in views]}
    for name, depth in (("true depth", true), ("predicted depth", predicted)):
        rows[name] = [depth_to_rgb(depth[view], near, far) for view in views]
    return picture_grid(rows, f"yellow: {near:.1f} m and nearer, violet: {far:.1f} m and farther")


def draw_points(points: np.ndarray, colours: np.ndarray, size: int = 640, yaw: float = 30.0) -> Image.Image:
    """
    A point cloud seen obliquely from above, in parallel projection.

    Args:
        points: (N, 3), OpenCV axes of some level camera (y down).
        colours: (N, 3) uint8.
        size: Side of the picture in pixels.
        yaw: Degrees that the cloud is turned about the vertical.
    """
    low, high = np.percentile(points, (1, 99), axis=0)
    inside = ((points >= low) & (points <= high)).all(1)
    points, colours = points[inside] - (low + high) / 2, colours[inside]
    turn, tilt = np.radians(yaw), np.radians(50.0)
    x = np.cos(turn) * points[:, 0] + np.sin(turn) * points[:, 2]
    away = -np.sin(turn) * points[:, 0] + np.cos(turn) * points[:, 2]
    y = np.cos(tilt) * points[:, 1] - np.sin(tilt) * away
    depth = np.sin(tilt) * points[:, 1] + np.cos(tilt) * away
    reach = 1.05 * max(np.abs(x).max(), np.abs(y).max(), 1e-9)
    image = np.full((size, size, 3), 255, np.uint8)
    far_first = np.argsort(-depth)
    columns, rows = (((axis[far_first] / reach + 1) / 2 * (size - 3)).astype(int) for axis in (x, y))
    for dx in range(3):
        for dy in range(3):
            image[rows + dy, columns + dx] = colours[far_first]
    return Image.fromarray(image)


def save_ply(path: str | PathLike[str], points: np.ndarray, colours: np.ndarray) -> None:
    """
    Write a coloured point cloud as binary PLY, which MeshLab, Blender, CloudCompare and model viewers open.

    Args:
        path: The file.
        points: (N, 3).
        colours: (N, 3) uint8.

    Raises:
        ValueError: Shapes that do not fit, or points that are not finite.
    """
    points = np.asarray(points, np.float32)
    if points.ndim != 2 or points.shape[1] != 3 or np.shape(colours) != points.shape:
        raise ValueError(f"points are {points.shape}, colours {np.shape(colours)}; expected (N, 3) both")
    if not np.isfinite(points).all():
        raise ValueError("points hold NaN or infinite numbers; expected finite ones")
    vertices = np.empty(len(points), [("points", "<f4", 3), ("colours", "u1", 3)])
    vertices["points"], vertices["colours"] = points, colours
    properties = [f"property float {axis}" for axis in "xyz"]
    properties += [f"property uchar {channel}" for channel in ("red", "green", "blue")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}", *properties, "end_header", ""]
    Path(path).write_bytes("\n".join(header).encode() + vertices.tobytes())
