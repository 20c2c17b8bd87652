"""Surface patterns and colours of procedural rooms: a small library of grey patterns, coloured through ramps."""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from .optional import require


Color = tuple[float, float, float]
PATTERN_SIZE = 128


@dataclass(frozen=True)
class Material:
    """How a surface looks.

    Args:
        pattern: Name in `PATTERNS`; its values in [0, 1] run through the colour ramp.
        colors: Ramp of sRGB colours in [0, 1], evenly spaced over the pattern's values.
        tile: Metres that one repeat of the pattern covers; 0 stretches it once over each face.
        emission: Light given off, in units of the picture's white; 0 for a surface that only reflects.
    """

    pattern: str
    colors: tuple[Color, ...]
    tile: float = 1.0
    emission: float = 0.0


def hsv(hue: float, saturation: float, value: float) -> Color:
    """sRGB colour of a hue (wraps around at 1), saturation and value in [0, 1]."""
    return colorsys.hsv_to_rgb(hue % 1.0, float(np.clip(saturation, 0, 1)), float(np.clip(value, 0, 1)))


def scaled(color: Color, factor: float) -> Color:
    """`color` made darker or lighter."""
    red, green, blue = (min(1.0, max(0.0, channel * factor)) for channel in color)
    return red, green, blue


def plain(color: Color, variation: float = 0.04, emission: float = 0.0) -> Material:
    """Paint, plastic or metal: one colour with faint cloudy variation."""
    return Material("cloudy", (scaled(color, 1 - variation), scaled(color, 1 + variation)), 1.5, emission)


# --- patterns: each returns (PATTERN_SIZE, PATTERN_SIZE) values, rows = v, columns = u, periodic in both


def _grid() -> tuple[np.ndarray, np.ndarray]:
    centres = (np.arange(PATTERN_SIZE) + 0.5) / PATTERN_SIZE
    u, v = np.meshgrid(centres, centres)
    return u, v


def _noise(rng: np.random.Generator, sigma_v: float, sigma_u: float) -> np.ndarray:
    """Periodic smooth noise stretched to [0, 1]."""
    ndimage = require("scipy.ndimage", extra="rooms")
    noise = ndimage.gaussian_filter(rng.normal(size=(PATTERN_SIZE, PATTERN_SIZE)), (sigma_v, sigma_u), mode="wrap")
    low, high = np.percentile(noise, (1, 99))
    return np.clip((noise - low) / (high - low), 0, 1)


def _tones(rng: np.random.Generator, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """One random value for each integer (row, column) cell."""
    table = rng.random((int(rows.max()) + 1, int(columns.max()) + 1))
    return table[rows.astype(int), columns.astype(int)]


def _cloudy(rng: np.random.Generator) -> np.ndarray:
    return _noise(rng, 12, 12)


def _grain(rng: np.random.Generator) -> np.ndarray:
    return 0.6 * _noise(rng, 1.6, 30) + 0.4 * _noise(rng, 8, 40)


def _planks(rng: np.random.Generator) -> np.ndarray:
    u, v = _grid()
    row = np.floor(v * 6)
    shifted = (u + 0.37 * row) % 1.0
    column = np.floor(shifted * 2)
    joint = (np.abs((v * 6) % 1 - 0.5) > 0.47) | (np.abs((shifted * 2) % 1 - 0.5) > 0.493)
    tone = 0.3 + 0.5 * _tones(rng, row, column) + 0.2 * _grain(rng)
    return np.where(joint, 0.0, tone)


def _parquet(rng: np.random.Generator) -> np.ndarray:
    u, v = _grid()
    turned = (np.floor(u * 4) + np.floor(v * 4)) % 2 == 0
    across = np.where(turned, u, v)
    strip = (across * 16) % 1
    tone = 0.35 + 0.25 * turned + 0.4 * _tones(rng, np.floor(v * 4) * 4 + np.floor(u * 4), np.floor(across * 16))
    return np.where(np.abs(strip - 0.5) > 0.44, 0.1, tone)


def _tiles(rng: np.random.Generator) -> np.ndarray:
    u, v = _grid()
    grout = (np.abs((u * 2) % 1 - 0.5) > 0.475) | (np.abs((v * 2) % 1 - 0.5) > 0.475)
    tone = 0.75 + 0.15 * _tones(rng, np.floor(v * 2), np.floor(u * 2)) + 0.1 * _noise(rng, 5, 5)
    return np.where(grout, 0.0, tone)


def _bricks(rng: np.random.Generator) -> np.ndarray:
    u, v = _grid()
    row = np.floor(v * 8)
    shifted = (u + 0.125 * (row % 2)) % 1.0
    grout = (np.abs((v * 8) % 1 - 0.5) > 0.4) | (np.abs((shifted * 4) % 1 - 0.5) > 0.45)
    tone = 0.45 + 0.45 * _tones(rng, row, np.floor(shifted * 4)) + 0.1 * _noise(rng, 2, 2)
    return np.where(grout, 0.0, tone)


def _checks(rng: np.random.Generator) -> np.ndarray:
    u, v = _grid()
    return 0.92 * ((np.floor(u * 4) + np.floor(v * 4)) % 2) + 0.08 * _noise(rng, 4, 4)


def _stripes(rng: np.random.Generator) -> np.ndarray:
    u, _ = _grid()
    wide = (np.floor(u * 8) % 2).astype(float)
    thin = np.abs((u * 8) % 1 - 0.5) < 0.06
    return np.where(thin, 0.5, wide)


def _dots(rng: np.random.Generator) -> np.ndarray:
    u, v = _grid()
    cells = [((u * 4) % 1, (v * 4) % 1), ((u * 4 + 0.5) % 1, (v * 4 + 0.5) % 1)]
    distance = np.minimum(*(np.hypot(a - 0.5, b - 0.5) for a, b in cells))
    return np.clip((0.24 - distance) * 14 + 0.5, 0, 1)


def _diamonds(rng: np.random.Generator) -> np.ndarray:
    u, v = _grid()
    distance = np.abs((u * 3) % 1 - 0.5) + np.abs((v * 3) % 1 - 0.5)
    return np.clip(np.abs(distance - 0.5) * 9, 0, 1) * (0.6 + 0.4 * (distance < 0.5))


def _waves(rng: np.random.Generator) -> np.ndarray:
    u, v = _grid()
    return 0.5 + 0.5 * np.sin(2 * np.pi * (5 * v + 0.16 * np.sin(2 * np.pi * 3 * u)))


def _carpet(rng: np.random.Generator) -> np.ndarray:
    return 0.5 * _noise(rng, 1.5, 1.5) + 0.5 * _noise(rng, 6, 6)


def _fabric(rng: np.random.Generator) -> np.ndarray:
    return 0.4 * _noise(rng, 1, 10) + 0.4 * _noise(rng, 10, 1) + 0.2 * _noise(rng, 9, 9)


def _marble(rng: np.random.Generator) -> np.ndarray:
    u, v = _grid()
    warp = _noise(rng, 10, 10) + 0.4 * _noise(rng, 4, 4)
    return 1 - np.abs(np.sin(np.pi * (u + v + 1.5 * warp))) ** 0.25 * 0.9


def _leaves(rng: np.random.Generator) -> np.ndarray:
    return _noise(rng, 3, 2)


def _outdoors(rng: np.random.Generator) -> np.ndarray:
    """Ground, hedge and hills below, sky above: v grows upwards."""
    u, v = _grid()
    hills = 0.38 + 0.06 * np.sin(2 * np.pi * u) + 0.04 * np.sin(6 * np.pi * u + 1)
    hedge = 0.22 + 0.05 * _noise(rng, 3, 3)
    sky = 0.72 + 0.28 * (v - 0.35) / 0.65 + 0.05 * _noise(rng, 5, 14)
    return np.where(v < hedge, 0.1 * _noise(rng, 3, 3) + 0.05, np.where(v < hills, 0.4, sky))


def _rings(rng: np.random.Generator) -> np.ndarray:
    u, v = _grid()
    return np.floor(np.clip(np.hypot(u - 0.5, v - 0.5) * 2, 0, 0.999) * 5) / 4


def _blobs(rng: np.random.Generator) -> np.ndarray:
    return np.floor(_noise(rng, 11, 11) * 4.99) / 4


def _blocks(rng: np.random.Generator) -> np.ndarray:
    u, v = _grid()
    values = np.zeros_like(u)
    for _ in range(14):
        u0, v0 = rng.uniform(0, 0.8, 2)
        width, height = rng.uniform(0.12, 0.5, 2)
        values[(u > u0) & (u < u0 + width) & (v > v0) & (v < v0 + height)] = rng.choice([0.0, 0.25, 0.5, 0.75, 1.0])
    return values


def _mountains(rng: np.random.Generator) -> np.ndarray:
    u, v = _grid()
    values = 0.75 + 0.25 * v
    for base, depth in ((0.62, 0.6), (0.45, 0.35), (0.25, 0.0)):
        ridge = base + 0.12 * np.abs(np.sin(np.pi * (u * rng.uniform(2, 4) + rng.random()))) - 0.05
        values = np.where(v < ridge, depth, values)
    return np.where(np.hypot(u - 0.7, v - 0.82) < 0.08, 1.0, values)


def _sunburst(rng: np.random.Generator) -> np.ndarray:
    u, v = _grid()
    angle = np.arctan2(v - 0.3, u - 0.5)
    rays = np.floor(angle / (2 * np.pi) * 18) % 2
    return np.where(np.hypot(u - 0.5, v - 0.3) < 0.2, 1.0, 0.25 + 0.4 * rays)


def _bordered(rng: np.random.Generator) -> np.ndarray:
    """A rug: borders around a field of diamonds."""
    u, v = _grid()
    edge = np.minimum(np.minimum(u, 1 - u), np.minimum(v, 1 - v))
    field = 0.25 + 0.5 * (np.abs((u * 4) % 1 - 0.5) + np.abs((v * 4) % 1 - 0.5) < 0.36)
    return np.where(edge < 0.03, 0.0, np.where(edge < 0.09, 1.0, np.where(edge < 0.13, 0.5, field)))


def _page(rng: np.random.Generator) -> np.ndarray:
    """A screen or printed page: a bar on top, lines and boxes below."""
    u, v = _grid()
    lines = (np.abs((v * 9) % 1 - 0.5) < 0.2) & (u > 0.08) & (u < 0.35 + 0.25 * _tones(rng, np.floor(v * 9), 0 * u))
    values = np.where(lines, 0.25, 0.8)
    values = np.where((u > 0.66) & (u < 0.93) & (v > 0.3) & (v < 0.7), 0.5, values)
    return np.where(v > 0.88, 0.0, values)


PATTERNS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "cloudy": _cloudy,
    "grain": _grain,
    "planks": _planks,
    "parquet": _parquet,
    "tiles": _tiles,
    "bricks": _bricks,
    "checks": _checks,
    "stripes": _stripes,
    "dots": _dots,
    "diamonds": _diamonds,
    "waves": _waves,
    "carpet": _carpet,
    "fabric": _fabric,
    "marble": _marble,
    "leaves": _leaves,
    "outdoors": _outdoors,
    "rings": _rings,
    "blobs": _blobs,
    "blocks": _blocks,
    "mountains": _mountains,
    "sunburst": _sunburst,
    "bordered": _bordered,
    "page": _page,
}
PICTURES = ("rings", "blobs", "blocks", "mountains", "sunburst", "waves", "diamonds")


class PatternAtlas(NamedTuple):
    """All patterns with their mip levels, one after the other in one array.

    Args:
        texels: (T,) float32 in [0, 1]; a level of size s is s * s values, row-major.
        starts: Pattern name to the index of its first texel.
        level_starts: (L,) int32 offset of each mip level from the pattern's first texel; level l has size 128 >> l.
    """

    texels: np.ndarray
    starts: dict[str, int]
    level_starts: np.ndarray


@cache
def pattern_atlas() -> PatternAtlas:
    """The pattern library, baked once a process; the same for every room."""
    levels = PATTERN_SIZE.bit_length()
    level_starts = np.cumsum([0] + [(PATTERN_SIZE >> level) ** 2 for level in range(levels - 1)]).astype(np.int32)
    chunks: list[np.ndarray] = []
    starts: dict[str, int] = {}
    total = 0
    for index, (name, draw) in enumerate(PATTERNS.items()):
        values = draw(np.random.default_rng((20, index))).astype(np.float32)
        starts[name] = total
        for _ in range(levels):
            chunks.append(values.reshape(-1))
            total += values.size
            if len(values) > 1:
                values = values.reshape(len(values) // 2, 2, len(values) // 2, 2).mean((1, 3), dtype=np.float32)
    return PatternAtlas(np.clip(np.concatenate(chunks), 0, 1), starts, level_starts)


# --- the colours of one room


@dataclass(frozen=True)
class Look:
    """The materials that furnish one room, so that its objects match each other as they do in a real one."""

    wall: Material
    accent_wall: Material
    lower_wall: Material | None
    skirting: Material
    floor: Material
    ceiling: Material
    woods: tuple[Material, ...]
    fabrics: tuple[Material, ...]
    metal: Material
    dark: Material
    white: Material
    ceramic: Material
    outdoors: Material


def _wood(rng: np.random.Generator) -> Material:
    tone = [(0.085, 0.45, 0.72), (0.07, 0.55, 0.5), (0.06, 0.6, 0.33), (0.1, 0.3, 0.85), (0.1, 0.03, 0.9)]
    hue, saturation, value = tone[rng.integers(len(tone))]
    color = hsv(hue + rng.uniform(-0.01, 0.01), saturation, value * rng.uniform(0.9, 1.08))
    return Material("grain", (scaled(color, 0.8), scaled(color, 1.08)), 0.7)


def random_fabric(rng: np.random.Generator) -> Material:
    """Upholstery, bedding or a curtain in a random colour, mostly plain and at times patterned."""
    color = hsv(rng.random(), rng.choice([0.08, 0.35, 0.6]), rng.uniform(0.35, 0.85))
    if rng.random() < 0.3:
        other = hsv(rng.random(), rng.uniform(0.05, 0.4), rng.uniform(0.6, 0.95))
        return Material(str(rng.choice(["stripes", "checks", "dots", "waves"])), (color, other), rng.uniform(0.5, 0.9))
    return Material("fabric", (scaled(color, 0.85), scaled(color, 1.1)), 0.5)


def random_picture(rng: np.random.Generator) -> Material:
    """A poster: one of the picture patterns through a ramp of three to five random colours, fitted to its face."""
    hue = rng.random()
    colors = tuple(
        hsv(hue + rng.normal(0, 0.18), rng.uniform(0.15, 0.85), rng.uniform(0.2, 1.0))
        for _ in range(rng.integers(3, 6))
    )
    return Material(str(rng.choice(PICTURES)), colors, 0.0)


def _wall_paint(rng: np.random.Generator) -> Material:
    hue = rng.choice([0.08, 0.12, 0.16, 0.3, 0.48, 0.56, 0.6, 0.75, 0.95]) + rng.uniform(-0.02, 0.02)
    color = hsv(hue, rng.choice([0.04, 0.12, 0.28]), rng.uniform(0.72, 0.92))
    if rng.random() < 0.4:
        pattern = str(rng.choice(["stripes", "dots", "diamonds", "waves"]))
        return Material(pattern, (color, scaled(color, rng.choice([0.86, 0.92, 1.08]))), rng.uniform(0.7, 1.3))
    return plain(color, 0.035)


def _accent(rng: np.random.Generator, paint: Material) -> Material:
    kind = rng.random()
    if kind < 0.5:
        return paint
    if kind < 0.62:
        brick = hsv(rng.uniform(0.01, 0.06), rng.uniform(0.2, 0.6), rng.uniform(0.5, 0.75))
        return Material("bricks", ((0.75, 0.72, 0.68), scaled(brick, 0.8), scaled(brick, 1.2)), 0.9)
    color = hsv(rng.random(), rng.uniform(0.2, 0.55), rng.uniform(0.35, 0.75))
    if kind < 0.8:
        pattern = str(rng.choice(["diamonds", "stripes", "waves", "dots"]))
        return Material(pattern, (scaled(color, 0.85), scaled(color, 1.3)), rng.uniform(0.8, 1.4))
    return plain(color, 0.04)


def _floor(rng: np.random.Generator, wet: bool) -> Material:
    wood = _wood(rng).colors[1]
    if wet or rng.random() < 0.18:
        color = hsv(rng.choice([0.08, 0.12, 0.55]), rng.uniform(0.02, 0.2), rng.uniform(0.45, 0.9))
        if rng.random() < 0.3:
            return Material("checks", (scaled(color, 0.45), scaled(color, 1.1)), rng.choice([1.2, 1.6]))
        return Material("tiles", (scaled(color, 0.6), scaled(color, 1.05)), rng.uniform(0.6, 1.2))
    kind = rng.random()
    if kind < 0.25:
        color = hsv(rng.random(), rng.uniform(0.05, 0.35), rng.uniform(0.35, 0.7))
        return Material("carpet", (scaled(color, 0.85), scaled(color, 1.12)), 0.8)
    pattern, tile = ("parquet", 1.6) if kind < 0.45 else ("planks", rng.uniform(0.8, 1.3))
    return Material(pattern, (scaled(wood, 0.5), scaled(wood, 0.9), scaled(wood, 1.1)), tile)


def draw_look(rng: np.random.Generator, wet: bool) -> Look:
    """Draw the colours of a room; `wet` rooms (bathroom, kitchen) get tiles."""
    paint = _wall_paint(rng)
    tile_color = hsv(rng.random(), rng.uniform(0.02, 0.35), rng.uniform(0.65, 0.95))
    lower = None
    if wet:
        lower = Material("tiles", (scaled(tile_color, 0.75), tile_color), rng.choice([0.3, 0.4, 0.6]))
    elif rng.random() < 0.15:
        lower = plain(hsv(rng.random(), rng.uniform(0.1, 0.4), rng.uniform(0.4, 0.8)))
    metal = rng.uniform(0.35, 0.75)
    dark = rng.uniform(0.06, 0.16)
    white = rng.uniform(0.85, 0.95)
    sky = hsv(rng.uniform(0.54, 0.6), rng.uniform(0.2, 0.5), 1.0)
    green = hsv(rng.uniform(0.2, 0.38), rng.uniform(0.3, 0.6), rng.uniform(0.3, 0.6))
    hills = hsv(rng.uniform(0.3, 0.65), rng.uniform(0.15, 0.4), rng.uniform(0.5, 0.8))
    return Look(
        wall=paint,
        accent_wall=_accent(rng, paint),
        lower_wall=lower,
        skirting=plain((white, white, white)) if rng.random() < 0.7 else _wood(rng),
        floor=_floor(rng, wet),
        ceiling=plain((0.93, 0.93, 0.91), 0.02),
        woods=tuple(_wood(rng) for _ in range(2)),
        fabrics=tuple(random_fabric(rng) for _ in range(3)),
        metal=plain((metal, metal, metal * 1.03), 0.08),
        dark=plain((dark, dark, dark * 1.1), 0.1),
        white=plain((white, white, white * 0.98)),
        ceramic=plain((0.93, 0.94, 0.95), 0.02),
        outdoors=Material("outdoors", (green, hills, scaled(sky, 0.9), sky, (0.97, 0.98, 1.0)), 0.0, 1.0),
    )
