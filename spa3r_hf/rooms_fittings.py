"""Lamps, plants, screens, table-top things, pictures, doors and windows of procedural rooms, built of solid parts.

Every builder works in the object's own frame (x to the front, y to the left, z up, metres) and draws its sizes and
colours from the generator that its `Parts` holds.
"""

import numpy as np

from .rooms_materials import Material, hsv, plain, random_fabric, random_picture, scaled
from .rooms_parts import Parts


def floor_lamp(p: Parts) -> None:
    height, radius = p.uniform(1.4, 1.7), p.uniform(0.15, 0.22)
    shade = _lamp_shade(p)
    p.column(0, 0, 0, radius * 0.8, 0.03, p.look.dark, sides=12)
    p.column(0, 0, 0.03, 0.015, height - 0.28, p.look.metal, sides=6)
    p.column(0, 0, height - 0.25, radius, 0.25, shade, radius * p.uniform(0.6, 0.95), 14)


def table_lamp(p: Parts) -> None:
    height, radius = p.uniform(0.35, 0.5), p.uniform(0.1, 0.14)
    base = plain(hsv(p.rng.random(), 0.5, p.uniform(0.3, 0.9)))
    p.column(0, 0, 0, radius * 0.7, height - 0.2, base, radius * 0.25, 10)
    p.column(0, 0, height - 0.2, radius, 0.2, _lamp_shade(p), radius * 0.7, 12)


def _lamp_shade(p: Parts) -> Material:
    return plain(hsv(p.uniform(0.06, 0.14), p.uniform(0.1, 0.35), 1.0), 0.02, emission=p.uniform(0.55, 0.9))


def plant(p: Parts) -> None:
    radius, height = p.uniform(0.13, 0.19), p.uniform(0.25, 0.38)
    _pot(p, radius, height)
    _foliage(p, height, p.uniform(0.6, 1.15), p.uniform(0.22, 0.34))


def small_plant(p: Parts) -> None:
    _pot(p, 0.07, 0.11)
    _foliage(p, 0.11, p.uniform(0.16, 0.28), p.uniform(0.09, 0.13))


def _pot(p: Parts, radius: float, height: float) -> None:
    pot = plain(hsv(p.rng.random(), p.uniform(0.05, 0.6), p.uniform(0.35, 0.9)))
    p.column(0, 0, 0, radius * 0.72, height, pot, radius, 12)
    p.column(0, 0, height, radius * 0.85, 0.005, plain((0.2, 0.14, 0.1)), sides=12)


def _foliage(p: Parts, z: float, height: float, radius: float) -> None:
    green = hsv(p.uniform(0.22, 0.38), p.uniform(0.45, 0.75), p.uniform(0.3, 0.6))
    leaf = Material("leaves", (scaled(green, 0.45), green, scaled(green, 1.5)), 0.5)
    if p.chance(0.5):  # blades rising from the pot
        for angle in np.arange(9) * 2.4:
            out = radius * p.uniform(0.4, 0.95)
            middle = (0.45 * out * np.cos(angle), 0.45 * out * np.sin(angle), z + height * p.uniform(0.5, 0.65))
            tip = (out * np.cos(angle), out * np.sin(angle), z + height * p.uniform(0.75, 1.0))
            p.rod((0, 0, z), middle, 0.012, leaf, radius * 0.14, 5)
            p.rod(middle, tip, radius * 0.14, leaf, 0.006, 5)
        return
    trunk = height * p.uniform(0.15, 0.4)
    p.column(0, 0, z, 0.02, trunk + 0.05, p.wood(), sides=6)
    for _ in range(5):  # a crown of lumps
        lump = radius * p.uniform(0.45, 0.6)
        angle, out = p.uniform(0, 2 * np.pi), radius - lump
        x, y = out * np.cos(angle), out * np.sin(angle)
        low = z + trunk + p.uniform(0, max(0.01, height - trunk - 2 * lump))
        p.column(x, y, low, lump * 0.35, lump * 0.8, leaf, lump, 7)
        p.column(x, y, low + lump * 0.8, lump, lump * 0.9, leaf, lump * 0.25, 7)


def tv(p: Parts) -> None:
    width = p.uniform(0.75, 1.05)
    _screen(p, width, width * 0.57, 0.07, Material("mountains", _screen_colors(p), 0.0, 0.7))


def monitor(p: Parts) -> None:
    width = p.uniform(0.48, 0.65)
    pattern = "page" if p.chance(0.6) else "blobs"
    _screen(p, width, width * 0.58, 0.1, Material(pattern, _screen_colors(p), 0.0, 0.75))


def _screen_colors(p: Parts) -> tuple[tuple[float, float, float], ...]:
    hue = p.rng.random()
    return tuple(hsv(hue + 0.12 * step, 0.65 - 0.15 * step, 0.25 + 0.2 * step) for step in range(4))


def _screen(p: Parts, width: float, height: float, stand: float, picture: Material) -> None:
    p.box(0, 0, 0, 0.18, width * 0.4, 0.02, p.look.dark)
    p.box(-0.02, 0, 0.02, 0.03, 0.08, stand, p.look.dark)
    p.box(0, 0, stand, 0.04, width, height, p.look.dark)
    shown = picture if p.chance(0.7) else plain((0.03, 0.03, 0.04))
    p.box(0.022, 0, stand + 0.02, 0.004, width - 0.03, height - 0.035, shown)


def laptop(p: Parts) -> None:
    p.box(0, 0, 0, 0.23, 0.33, 0.018, p.look.metal)
    p.box(0.03, 0, 0.018, 0.11, 0.29, 0.003, p.look.dark)
    p.box(-0.11, 0, 0.018, 0.012, 0.33, 0.21, p.look.metal)
    p.box(-0.1025, 0, 0.03, 0.003, 0.31, 0.18, Material("page", _screen_colors(p), 0.0, 0.75))


def book(p: Parts) -> None:
    thick, depth, width = p.uniform(0.025, 0.05), p.uniform(0.15, 0.2), p.uniform(0.2, 0.26)
    cover = plain(hsv(p.rng.random(), p.uniform(0.3, 0.8), p.uniform(0.3, 0.85)))
    p.box(0, 0, 0, depth, width, 0.004, cover)
    p.box(-0.003, 0, 0.004, depth - 0.012, width - 0.012, thick - 0.008, p.look.white)
    p.box(0, 0, thick - 0.004, depth, width, 0.004, cover)


def cup(p: Parts) -> None:
    glaze = plain(hsv(p.rng.random(), p.uniform(0, 0.7), p.uniform(0.5, 0.95)))
    p.column(0, 0, 0, 0.032, 0.09, glaze, 0.042, 10)
    p.column(0, 0, 0.09, 0.034, 0.002, plain((0.25, 0.15, 0.1)), sides=10)
    p.box(0, 0.05, 0.025, 0.012, 0.03, 0.05, glaze)


def bowl(p: Parts) -> None:
    radius = p.uniform(0.1, 0.15)
    glaze = plain(hsv(p.rng.random(), p.uniform(0.05, 0.6), p.uniform(0.5, 0.95)))
    p.column(0, 0, 0, radius * 0.5, 0.07, glaze, radius, 14)
    fruit = plain(hsv(p.uniform(0.0, 0.3), 0.8, 0.8))
    for angle in np.arange(4) * np.pi / 2:
        x, y = 0.5 * radius * np.cos(angle), 0.5 * radius * np.sin(angle)
        p.column(x, y, 0.07, radius * 0.33, 0.03, fruit, radius * 0.2, 7)


def microwave(p: Parts) -> None:
    body = p.look.dark if p.chance(0.5) else p.look.white
    width = p.uniform(0.46, 0.52)
    p.box(0, 0, 0, 0.36, width, 0.28, body)
    p.box(0.185, 0.06, 0.03, 0.01, width - 0.16, 0.22, p.look.dark)
    p.handle(0.19, -0.1, 0.04, 0.02, 0.2)
    p.box(0.183, -width / 2 + 0.07, 0.03, 0.006, 0.1, 0.22, p.look.metal)


def rug(p: Parts) -> None:
    hue = p.rng.random()
    value = p.uniform(0.35, 0.75)
    colors = tuple(
        hsv(hue + shift, p.uniform(0.2, 0.7), value + lift) for shift, lift in ((0, -0.1), (0.1, 0.2), (0.5, 0))
    )
    pattern = str(p.rng.choice(["bordered", "bordered", "blobs", "stripes", "rings"]))
    p.box(0, 0, 0, p.uniform(0.8, 1.5), p.uniform(1.2, 2.2), 0.012, Material(pattern, colors, 0.0))


def picture(p: Parts) -> None:
    width, height = p.uniform(0.35, 1.0), p.uniform(0.35, 0.85)
    frame = p.wood() if p.chance(0.5) else (p.look.dark if p.chance(0.5) else p.look.white)
    p.box(0, 0, 0, 0.025, width, height, frame)
    p.box(0.015, 0, 0.03, 0.005, width - 0.06, height - 0.06, random_picture(p.rng))


def mirror(p: Parts) -> None:
    """A mirror shows a flat bright grey: reflections are not traced."""
    width, height = p.uniform(0.4, 0.7), p.uniform(0.6, 1.0)
    p.box(0, 0, 0, 0.025, width, height, p.wood())
    p.box(
        0.015,
        0,
        0.03,
        0.005,
        width - 0.06,
        height - 0.06,
        Material("cloudy", ((0.6, 0.68, 0.72), (0.85, 0.9, 0.93)), 0.0),
    )


def clock(p: Parts) -> None:
    radius = p.uniform(0.13, 0.2)
    p.rod((0, 0, 0), (0.03, 0, 0), radius, p.look.dark, sides=18)
    p.rod((0.03, 0, 0), (0.035, 0, 0), radius * 0.88, p.look.white, sides=18)
    for angle, length in ((p.uniform(0, 6.28), 0.5), (p.uniform(0, 6.28), 0.75)):
        y, z = radius * length * np.cos(angle), radius * length * np.sin(angle)
        p.rod((0.0375, 0, 0), (0.0375, y, z), 0.008, p.look.dark, sides=4)


def window(p: Parts) -> None:
    width, height, frame = p.uniform(0.8, 1.8), p.uniform(0.9, 1.4), p.look.white if p.chance(0.7) else p.wood()
    columns, rows = max(1, round(width / 0.6)), int(p.rng.integers(1, 3))
    p.box(0, 0, 0.06, 0.01, width, height, p.look.outdoors)
    for y in (-1, 1):
        p.box(0.025, y * (width / 2 + 0.03), 0, 0.06, 0.06, height + 0.12, frame)
    for z in (0.0, height + 0.06):
        p.box(0.025, 0, z, 0.06, width, 0.06, frame)
    for column in range(1, columns):
        p.box(0.02, column * width / columns - width / 2, 0.06, 0.03, 0.04, height, frame)
    if rows == 2:
        p.box(0.018, 0, 0.06 + height * 0.6, 0.025, width, 0.04, frame)
    p.box(0.045, 0, -0.03, 0.1, width + 0.18, 0.03, frame)
    if p.chance(0.45):
        curtain = random_fabric(p.rng)
        for y in (-1, 1):
            for fold in range(4):
                p.chance(0.5)  # decides nothing; without the draw, all that is drawn after it would be another room
                p.box(
                    0.075 + 0.015 * (fold % 2),
                    y * (width / 2 + 0.13 - 0.06 * fold),
                    0,
                    0.03,
                    0.06,
                    height + 0.16,
                    curtain,
                )
        p.rod(
            (0.08, -width / 2 - 0.25, height + 0.18),
            (0.08, width / 2 + 0.25, height + 0.18),
            0.015,
            p.look.metal,
            sides=6,
        )


def door(p: Parts) -> None:
    width, height, frame = p.uniform(0.78, 0.95), p.uniform(1.98, 2.08), p.look.white
    leaf = frame if p.chance(0.4) else p.wood()
    p.box(0, 0, 0, 0.03, width, height, leaf)
    for y in (-1, 1):
        p.box(0.01, y * (width / 2 + 0.035), 0, 0.05, 0.07, height + 0.07, frame)
    p.box(0.01, 0, height, 0.05, width, 0.07, frame)
    panel = Material(leaf.pattern, tuple(scaled(color, 0.88) for color in leaf.colors), leaf.tile)
    rows = int(p.rng.integers(1, 4))
    tall = (height - 0.2) / rows
    for row in range(rows):
        for y in (-1, 1):
            p.box(0.019, y * width / 4.4, 0.12 + row * tall, 0.008, width / 2.8, tall - 0.12, panel)
    p.box(0.02, width / 2 - 0.08, 0.97, 0.01, 0.04, 0.16, p.look.metal)
    p.rod((0.05, width / 2 - 0.08, 1.05), (0.05, width / 2 - 0.2, 1.05), 0.012, p.look.metal, sides=6)
    p.rod((0.02, width / 2 - 0.08, 1.05), (0.06, width / 2 - 0.08, 1.05), 0.012, p.look.metal, sides=6)


def ceiling_light(p: Parts) -> None:
    """A flush panel, a flush round lamp or a short pendant."""
    glow = plain(hsv(p.uniform(0.1, 0.16), p.uniform(0.0, 0.15), 1.0), 0.01, emission=1.1)
    kind = p.rng.integers(3)
    if kind == 0:
        width = p.uniform(0.3, 1.0)
        p.box(0, 0, 0.02, 0.36, width + 0.06, 0.05, p.look.metal)
        p.box(0, 0, 0, 0.3, width, 0.02, glow)
    elif kind == 1:
        radius = p.uniform(0.15, 0.25)
        p.column(0, 0, 0.06, radius, 0.03, p.look.metal, sides=16)
        p.column(0, 0, 0, radius * 0.7, 0.06, glow, radius * 0.95, 16)
    else:
        drop, radius = p.uniform(0.15, 0.35), p.uniform(0.14, 0.22)
        p.column(0, 0, 0, radius, 0.14, glow, radius * 0.45, 14)
        p.column(0, 0, 0.14, 0.012, drop, p.look.dark, sides=5)
        p.column(0, 0, 0.14 + drop, 0.05, 0.02, p.look.dark, sides=8)
