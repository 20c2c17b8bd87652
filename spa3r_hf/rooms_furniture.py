"""The furniture of procedural rooms, built of solid parts.

Every builder works in the object's own frame (x to the front, y to the left, z up, metres) and draws its sizes and
colours from the generator that its `Parts` holds.
"""

from collections.abc import Callable

import numpy as np

from .rooms_fittings import (
    book,
    bowl,
    ceiling_light,
    clock,
    cup,
    door,
    floor_lamp,
    laptop,
    microwave,
    mirror,
    monitor,
    picture,
    plant,
    rug,
    small_plant,
    table_lamp,
    tv,
    window,
)
from .rooms_materials import hsv, plain
from .rooms_parts import Parts


def chair(p: Parts) -> None:
    width, depth = p.uniform(0.42, 0.5), p.uniform(0.42, 0.5)
    seat, back = p.uniform(0.43, 0.48), p.uniform(0.82, 1.0)
    frame = p.wood() if p.chance(0.7) else p.look.metal
    cushion = p.fabric() if p.chance(0.6) else frame
    p.legs(depth, width, seat - 0.05, 0.04, frame)
    p.box(0, 0, seat - 0.05, depth, width, 0.05, cushion)
    x = -depth / 2 + 0.02
    for y in (-width / 2 + 0.02, width / 2 - 0.02):
        p.box(x, y, seat, 0.04, 0.04, back - seat, frame)
    inner = width - 0.08
    if p.chance(0.5):
        p.box(x, 0, seat + 0.12, 0.03, inner, back - seat - 0.14, cushion)
    else:
        for z in np.linspace(seat + 0.1, back - 0.09, 3):
            p.box(x, 0, z, 0.025, inner, 0.07, frame)


def office_chair(p: Parts) -> None:
    seat, width = p.uniform(0.44, 0.5), p.uniform(0.46, 0.52)
    fabric = p.fabric() if p.chance(0.5) else p.look.dark
    for angle in np.arange(5) * 2 * np.pi / 5:
        p.rod((0, 0, 0.07), (0.26 * np.cos(angle), 0.26 * np.sin(angle), 0.05), 0.025, p.look.dark, 0.02, 5)
        p.column(0.26 * np.cos(angle), 0.26 * np.sin(angle), 0, 0.03, 0.05, p.look.dark, sides=6)
    p.column(0, 0, 0.07, 0.03, seat - 0.15, p.look.metal, sides=6)
    p.box(0, 0, seat - 0.08, width, width, 0.08, fabric)
    p.box(-width / 2 + 0.03, 0, seat, 0.06, 0.05, 0.12, p.look.dark)
    p.box(-width / 2 + 0.03, 0, seat + 0.12, 0.06, width * 0.9, p.uniform(0.35, 0.5), fabric)


def stool(p: Parts) -> None:
    height, radius = p.uniform(0.42, 0.68), p.uniform(0.15, 0.2)
    wood = p.paint()
    if p.chance(0.5):
        p.column(0, 0, height - 0.05, radius, 0.05, wood, sides=12)
        for angle in np.arange(3) * 2 * np.pi / 3:
            x, y = np.cos(angle), np.sin(angle)
            p.rod(
                (radius * x, radius * y, 0), (0.6 * radius * x, 0.6 * radius * y, height - 0.05), 0.018, wood, sides=6
            )
    else:
        p.legs(2 * radius, 2 * radius, height - 0.07, 0.04, wood)
        p.box(0, 0, height - 0.07, 2 * radius, 2 * radius, 0.07, p.fabric())


def table(p: Parts) -> None:
    """A dining table, square, long or round."""
    height, top = p.uniform(0.72, 0.77), p.paint()
    if p.chance(0.3):
        radius = p.uniform(0.42, 0.6)
        p.column(0, 0, height - 0.04, radius, 0.04, top, sides=20)
        p.column(0, 0, 0.04, 0.05, height - 0.08, p.look.metal)
        p.column(0, 0, 0, 0.28, 0.04, p.look.metal, sides=12)
        return
    depth, width = p.uniform(0.75, 0.95), p.uniform(0.8, 1.8)
    legs = top if p.chance(0.7) else p.look.metal
    p.box(0, 0, height - 0.04, depth, width, 0.04, top)
    p.box(0, 0, height - 0.12, depth - 0.14, width - 0.14, 0.08, legs)
    p.legs(depth - 0.06, width - 0.06, height - 0.04, 0.06, legs)


def coffee_table(p: Parts) -> None:
    height, top = p.uniform(0.36, 0.46), p.paint()
    if p.chance(0.3):
        p.column(0, 0, height - 0.035, p.uniform(0.3, 0.45), 0.035, top, sides=18)
        p.column(0, 0, 0, 0.2, height - 0.035, p.look.dark, 0.08, sides=12)
        return
    depth, width = p.uniform(0.45, 0.65), p.uniform(0.7, 1.2)
    p.box(0, 0, height - 0.04, depth, width, 0.04, top)
    p.legs(depth, width, height - 0.04, 0.05, top if p.chance(0.6) else p.look.metal)
    if p.chance(0.5):
        p.box(0, 0, 0.12, depth - 0.1, width - 0.1, 0.02, top)


def sofa(p: Parts) -> None:
    """A two- or a three-seater."""
    seats = int(p.rng.integers(2, 4))
    width, depth = seats * p.uniform(0.58, 0.7), p.uniform(0.82, 0.95)
    seat, back, arm = p.uniform(0.4, 0.46), p.uniform(0.75, 0.9), p.uniform(0.1, 0.2)
    fabric, cushion, arm_height = p.fabric(), p.fabric(), seat + p.uniform(0.05, 0.12)
    p.box(0, 0, 0.08, depth, width, seat - 0.22, fabric)
    p.legs(depth - 0.08, width - 0.04, 0.08, 0.05, p.wood())
    p.box(-depth / 2 + 0.11, 0, seat - 0.14, 0.22, width, back - seat + 0.14, fabric)
    for side in (-1, 1):
        p.box(0, side * (width + arm) / 2, 0.08, depth, arm, arm_height - 0.08, fabric)
    each = width / seats
    for index in range(seats):
        y = (index + 0.5) * each - width / 2
        p.box(0.11, y, seat - 0.14, depth - 0.22, each - 0.015, 0.14, fabric)
        if p.chance(0.5):
            p.box(-depth / 2 + 0.29, y, seat, 0.14, min(each - 0.1, 0.45), 0.34, cushion)


def bed(p: Parts) -> None:
    """The head (headboard, pillows) is at the back."""
    width, length = float(p.rng.choice([0.95, 1.25, 1.5, 1.7])), p.uniform(1.98, 2.1)
    frame, top = p.wood() if p.chance(0.7) else p.fabric(), p.uniform(0.45, 0.58)
    sheet, blanket, pillow = p.look.white, p.fabric(), p.look.white if p.chance(0.6) else p.fabric()
    p.legs(length - 0.04, width - 0.04, 0.12, 0.07, p.look.dark)
    p.box(0, 0, 0.12, length, width, 0.2, frame)
    p.box(0, 0, 0.32, length - 0.03, width - 0.03, top - 0.32, sheet)
    p.box(-length / 2 - 0.03, 0, 0, 0.06, width + 0.04, p.uniform(0.85, 1.2), frame)
    covered = length * p.uniform(0.55, 0.7)
    p.box(length / 2 - covered / 2, 0, 0.34, covered, width + 0.03, top - 0.32 + 0.015, blanket)
    pillows = 1 if width < 1.2 else 2
    for index in range(pillows):
        y = ((index + 0.5) / pillows - 0.5) * width
        p.box(-length / 2 + 0.27, y, top, 0.38, min(0.62, width / pillows - 0.1), 0.11, pillow)


def wardrobe(p: Parts) -> None:
    width, depth, height = p.uniform(0.8, 1.8), p.uniform(0.55, 0.62), p.uniform(1.9, 2.2)
    body = p.paint()
    door = body if p.chance(0.6) else p.paint()
    p.box(0, 0, 0, depth - 0.04, width - 0.06, 0.08, p.look.dark)
    p.box(0, 0, 0.08, depth, width, height - 0.08, body)
    count = max(2, round(width / 0.5))
    each = width / count
    for index in range(count):
        y = (index + 0.5) * each - width / 2
        p.box(depth / 2 + 0.01, y, 0.11, 0.02, each - 0.02, height - 0.14, door)
        p.handle(depth / 2 + 0.02, y + (0.5 - index % 2) * (each - 0.14), height * 0.45, 0.02, 0.25)


def cabinet(p: Parts) -> None:
    """A chest of drawers or a sideboard; `tv_stand` is its low relative."""
    _case(p, p.uniform(0.6, 1.4), p.uniform(0.38, 0.48), p.uniform(0.7, 1.05))


def tv_stand(p: Parts) -> None:
    _case(p, p.uniform(1.1, 1.7), p.uniform(0.36, 0.45), p.uniform(0.42, 0.55))


def nightstand(p: Parts) -> None:
    _case(p, p.uniform(0.38, 0.5), p.uniform(0.36, 0.42), p.uniform(0.45, 0.58))


def _case(p: Parts, width: float, depth: float, height: float) -> None:
    body = p.paint()
    front = body if p.chance(0.6) else p.paint()
    foot = p.uniform(0.05, 0.14)
    p.legs(depth - 0.04, width - 0.04, foot, 0.05, p.look.dark if p.chance(0.5) else body)
    p.box(0, 0, foot, depth, width, height - foot, body)
    columns = max(1, round(width / 0.55))
    rows = max(1, round((height - foot) / p.uniform(0.2, 0.45)))
    each, tall = width / columns, (height - foot - 0.02) / rows
    for column in range(columns):
        for row in range(rows):
            y, z = (column + 0.5) * each - width / 2, foot + row * tall + 0.02
            p.box(depth / 2 + 0.009, y, z, 0.018, each - 0.03, tall - 0.02, front)
            p.handle(depth / 2 + 0.018, y, z + tall * 0.6, min(0.14, each / 3), 0.02)


def bookshelf(p: Parts) -> None:
    width, depth, height = p.uniform(0.6, 1.1), p.uniform(0.26, 0.34), p.uniform(1.3, 2.1)
    wood, board = p.paint(), 0.025
    for side in (-1, 1):
        p.box(0, side * (width - board) / 2, 0, depth, board, height, wood)
    p.box(-depth / 2 + 0.006, 0, 0, 0.012, width - 2 * board, height, wood)
    shelves = round(height / 0.36)
    gap, inner = (height - board) / shelves, width - 2 * board
    for level in range(shelves + 1):
        p.box(0.006, 0, level * gap, depth - 0.012, inner, board, wood)
    spines = [plain(hsv(p.rng.random(), p.uniform(0.2, 0.8), p.uniform(0.25, 0.85))) for _ in range(6)]
    for level in range(shelves):
        y, stop = -inner / 2 + 0.01, inner / 2 - p.uniform(0.02, 0.5 * inner)
        while y < stop - 0.08:
            thick = p.uniform(0.03, 0.075)
            tall = (gap - board) * p.uniform(0.6, 0.92)
            spine = spines[int(p.rng.integers(6))]
            p.box(-0.03, y + thick / 2, level * gap + board, depth * 0.65, thick, tall, spine)
            y += thick + 0.002
        if inner / 2 - y > 0.2 and p.chance(0.6):
            radius = p.uniform(0.05, 0.08)
            p.column(0, (y + inner / 2) / 2, level * gap + board, radius * 0.6, gap * 0.6, spines[0], radius, 8)


def desk(p: Parts) -> None:
    width, depth, height = p.uniform(1.0, 1.6), p.uniform(0.55, 0.75), p.uniform(0.71, 0.76)
    top = p.paint()
    p.box(0, 0, height - 0.035, depth, width, 0.035, top)
    legs = p.look.metal if p.chance(0.5) else top
    if p.chance(0.5):
        p.legs(depth - 0.04, width - 0.04, height - 0.035, 0.05, legs)
        p.box(-depth / 2 + 0.04, 0, height - 0.3, 0.02, width - 0.16, 0.2, legs)
        return
    y = width / 2 - 0.22
    p.box(0, y, 0, depth - 0.06, 0.4, height - 0.035, top)
    for row in range(3):
        z = 0.04 + row * (height - 0.08) / 3
        p.box(depth / 2 - 0.021, y, z, 0.018, 0.37, (height - 0.08) / 3 - 0.02, p.look.white)
        p.handle(depth / 2 - 0.012, y, z + 0.12, 0.12, 0.02)
    p.box(0, -width / 2 + 0.03, 0, depth - 0.04, 0.04, height - 0.035, legs)


def refrigerator(p: Parts) -> None:
    width, depth, height = p.uniform(0.6, 0.78), p.uniform(0.6, 0.68), p.uniform(1.6, 1.95)
    body = p.look.white if p.chance(0.5) else p.look.metal
    p.box(0, 0, 0, depth - 0.05, width - 0.03, 0.06, p.look.dark)
    p.box(0, 0, 0.06, depth, width, height - 0.06, body)
    split = height * p.uniform(0.35, 0.65)
    p.box(depth / 2 + 0.02, 0, 0.08, 0.04, width - 0.01, split - 0.09, body)
    p.box(depth / 2 + 0.02, 0, split, 0.04, width - 0.01, height - split - 0.01, body)
    for z in (split - 0.42, split + 0.06):
        p.handle(depth / 2 + 0.04, width / 2 - 0.08, max(z, 0.1), 0.025, 0.32)


def stove(p: Parts) -> None:
    body = p.look.white if p.chance(0.5) else p.look.metal
    p.box(0, 0, 0, 0.58, 0.6, 0.88, body)
    p.box(0, 0, 0.88, 0.6, 0.6, 0.02, p.look.dark)
    p.box(0.295, 0, 0.2, 0.01, 0.5, 0.42, p.look.dark)
    p.handle(0.3, 0, 0.66, 0.44, 0.025)
    for y in np.linspace(-0.22, 0.22, 5):
        p.box(0.3, y, 0.77, 0.02, 0.045, 0.045, p.look.dark)
    for x, y in ((-0.15, -0.15), (-0.15, 0.15), (0.14, -0.15), (0.14, 0.15)):
        p.column(x, y, 0.9, 0.085, 0.012, p.look.metal, sides=12)
    p.box(-0.28, 0, 0.9, 0.04, 0.6, 0.08, body)


def sink(p: Parts) -> None:
    """A basin in a cupboard."""
    width, depth, height = p.uniform(0.55, 0.95), p.uniform(0.48, 0.6), p.uniform(0.8, 0.88)
    body, top = p.paint(), p.look.ceramic
    p.box(0, 0, 0, depth - 0.05, width - 0.02, 0.08, p.look.dark)
    p.box(0, 0, 0.08, depth - 0.02, width - 0.02, height - 0.2, body)
    for y in (-1, 1):
        p.box(depth / 2, y * width / 4, 0.1, 0.02, width / 2 - 0.04, height - 0.25, body)
        p.handle(depth / 2 + 0.01, y * 0.06, height * 0.6, 0.02, 0.14)
    rim, z = 0.06, height - 0.12
    p.box(0, 0, z, depth - 0.02, width - 0.02, 0.02, top)
    for x in (-1, 1):
        p.box(x * (depth - rim) / 2, 0, z + 0.02, rim, width, 0.12, top)
    for y in (-1, 1):
        p.box(0, y * (width - 0.1) / 2, z + 0.02, depth - 2 * rim, 0.1, 0.12, top)
    p.column(-depth / 2 + 0.03, 0, z + 0.14, 0.016, 0.2, p.look.metal, sides=6)
    p.rod((-depth / 2 + 0.03, 0, z + 0.33), (-depth / 2 + 0.18, 0, z + 0.29), 0.014, p.look.metal, sides=6)


def toilet(p: Parts) -> None:
    white = p.look.ceramic
    p.column(0.08, 0, 0, 0.13, 0.26, white, 0.11, 12)
    p.column(0.1, 0, 0.26, 0.13, 0.12, white, 0.2, 14)
    p.column(0.1, 0, 0.38, 0.21, 0.03, plain((0.8, 0.8, 0.78)), sides=14)
    p.box(-0.2, 0, 0.26, 0.2, 0.38, 0.5, white)
    p.box(-0.2, 0, 0.76, 0.22, 0.4, 0.03, white)
    p.box(-0.09, 0.13, 0.68, 0.02, 0.06, 0.02, p.look.metal)


def bathtub(p: Parts) -> None:
    length, width, height, rim = p.uniform(1.5, 1.75), p.uniform(0.68, 0.8), p.uniform(0.5, 0.6), 0.08
    white = p.look.ceramic
    p.box(0, 0, 0, width, length, 0.14, white)
    for x in (-1, 1):
        p.box(x * (width - rim) / 2, 0, 0.14, rim, length, height - 0.14, white)
    for side in (-1, 1):
        p.box(0, side * (length - rim) / 2, 0.14, width - 2 * rim, rim, height - 0.14, white)
    if p.chance(0.6):
        water = plain((0.55, 0.75, 0.8), 0.08)
        p.box(0, 0, 0.14, width - 2 * rim, length - 2 * rim, height * 0.4, water)
    y = length / 2 - rim / 2
    p.column(0, y, height, 0.02, 0.12, p.look.metal, sides=6)
    p.rod((0, y, height + 0.1), (0, y - 0.16, height + 0.08), 0.018, p.look.metal, sides=6)


def washer(p: Parts) -> None:
    body = p.look.white if p.chance(0.8) else p.look.dark
    p.box(0, 0, 0, 0.58, 0.6, 0.85, body)
    p.box(0.293, 0, 0.7, 0.006, 0.58, 0.13, p.look.metal)
    p.rod((0.29, 0, 0.38), (0.32, 0, 0.38), 0.2, p.look.metal, sides=16)
    p.rod((0.32, 0, 0.38), (0.33, 0, 0.38), 0.15, p.look.dark, sides=16)


def trash_bin(p: Parts) -> None:
    radius, height = p.uniform(0.11, 0.16), p.uniform(0.28, 0.5)
    body = p.look.metal if p.chance(0.4) else plain(hsv(p.rng.random(), p.uniform(0, 0.6), p.uniform(0.2, 0.8)))
    p.column(0, 0, 0, radius * 0.85, height, body, radius, 12)
    p.column(0, 0, height, radius * 1.04, 0.03, p.look.dark, sides=12)


def suitcase(p: Parts) -> None:
    width, depth, height = p.uniform(0.38, 0.5), p.uniform(0.2, 0.28), p.uniform(0.5, 0.68)
    shell = plain(hsv(p.rng.random(), p.uniform(0.2, 0.8), p.uniform(0.25, 0.8)))
    p.legs(depth * 0.8, width * 0.9, 0.04, 0.04, p.look.dark)
    p.box(0, 0, 0.04, depth, width, height - 0.04, shell)
    for y in np.linspace(-width / 3, width / 3, 4):
        p.box(depth / 2 + 0.004, y, 0.08, 0.008, 0.03, height - 0.12, p.look.dark)
    for y in (-0.08, 0.08):
        p.box(-depth / 2 + 0.03, y, height, 0.02, 0.02, 0.12, p.look.metal)
    p.box(-depth / 2 + 0.03, 0, height + 0.12, 0.03, 0.2, 0.025, p.look.dark)


def heater(p: Parts) -> None:
    """A radiator of upright ribs."""
    count = int(p.rng.integers(8, 16))
    height = p.uniform(0.45, 0.6)
    for index in range(count):
        p.box(0, (index - (count - 1) / 2) * 0.06, 0.1, 0.1, 0.045, height, p.look.white)
    p.box(0, 0, 0.16, 0.05, count * 0.06, 0.04, p.look.white)
    p.box(0, 0, height, 0.05, count * 0.06, 0.04, p.look.white)
    for y in (-1, 1):
        p.box(0, y * (count - 2) * 0.03, 0, 0.03, 0.03, 0.16, p.look.white)


# Variant name -> (category, builder). Variants of one category answer to one name in questions.
VARIANTS: dict[str, tuple[str, Callable[[Parts], None]]] = {
    "chair": ("chair", chair),
    "office_chair": ("chair", office_chair),
    "stool": ("stool", stool),
    "table": ("table", table),
    "coffee_table": ("table", coffee_table),
    "sofa": ("sofa", sofa),
    "bed": ("bed", bed),
    "wardrobe": ("wardrobe", wardrobe),
    "cabinet": ("cabinet", cabinet),
    "tv_stand": ("cabinet", tv_stand),
    "nightstand": ("nightstand", nightstand),
    "bookshelf": ("bookshelf", bookshelf),
    "desk": ("desk", desk),
    "floor_lamp": ("lamp", floor_lamp),
    "table_lamp": ("lamp", table_lamp),
    "plant": ("plant", plant),
    "small_plant": ("plant", small_plant),
    "tv": ("tv", tv),
    "monitor": ("monitor", monitor),
    "laptop": ("laptop", laptop),
    "book": ("book", book),
    "cup": ("cup", cup),
    "bowl": ("bowl", bowl),
    "microwave": ("microwave", microwave),
    "refrigerator": ("refrigerator", refrigerator),
    "stove": ("stove", stove),
    "sink": ("sink", sink),
    "toilet": ("toilet", toilet),
    "bathtub": ("bathtub", bathtub),
    "washer": ("washer", washer),
    "trash_bin": ("trash bin", trash_bin),
    "suitcase": ("suitcase", suitcase),
    "heater": ("heater", heater),
    "rug": ("rug", rug),
    "picture": ("picture", picture),
    "mirror": ("mirror", mirror),
    "clock": ("clock", clock),
    "window": ("window", window),
    "door": ("door", door),
    "ceiling_light": ("ceiling light", ceiling_light),
}
CATEGORIES: tuple[str, ...] = tuple(dict.fromkeys(category for category, _ in VARIANTS.values()))
