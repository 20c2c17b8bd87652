"""What goes into each kind of procedural room, and in which arrangement."""

import numpy as np

from .rooms_furniture import VARIANTS
from .rooms_layout import Layout, Piece
from .rooms_materials import Look, Material
from .rooms_parts import Parts


_DOOR_SWING = 0.85
_WALL_GAP = 0.015
_EXTRAS = {
    "living room": ("bookshelf", "plant", "floor_lamp", "cabinet", "stool", "plant", "suitcase", "heater", "chair"),
    "bedroom": ("plant", "floor_lamp", "chair", "bookshelf", "suitcase", "stool", "heater", "cabinet", "trash_bin"),
    "study": ("bookshelf", "plant", "trash_bin", "floor_lamp", "cabinet", "heater", "stool", "suitcase", "bookshelf"),
    "kitchen": ("trash_bin", "plant", "stool", "cabinet", "heater", "stool"),
    "bathroom": ("trash_bin", "stool", "heater", "plant"),
}
_TABLETOP = {
    "living room": ("book", "bowl", "small_plant", "cup", "laptop", "table_lamp"),
    "bedroom": ("book", "cup", "small_plant", "laptop", "table_lamp"),
    "study": ("book", "cup", "small_plant", "book", "table_lamp"),
    "kitchen": ("cup", "bowl", "cup", "small_plant"),
    "bathroom": ("cup", "small_plant"),
}


class _Furnisher:
    """Builds pieces and asks the layout for places; one method for each arrangement."""

    def __init__(self, layout: Layout, kind: str, look: Look, materials: dict[Material, int]):
        self.layout = layout
        self.rng = layout.rng
        self.kind = kind
        self.look = look
        self.materials = materials

    def piece(self, variant: str) -> Piece:
        category, build = VARIANTS[variant]
        parts = Parts(self.rng, self.look, self.materials)
        build(parts)
        mesh = parts.mesh()
        low, high = mesh.vertices.min(0), mesh.vertices.max(0)
        depth, width, height = (float(extent) for extent in high - low)
        return Piece(category, mesh, (depth, width, height))

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    # --- doors, windows, lights and things on walls

    def openings(self) -> None:
        layout, rng = self.layout, self.rng
        lengths = np.array([wall.length for wall in layout.walls])
        for _ in range(2 if self.chance(0.2) else 1):
            door = self.piece("door")
            index = layout.place(door, layout.wall_poses(door), on_floor=False)
            if index is not None:
                layout.reserve_front(index, _DOOR_SWING, top=2.0)
        for _ in range(int(rng.integers(1, 4))):
            window = self.piece("window")
            sill = float(rng.uniform(0.8, 1.0))
            if sill + window.size[2] > layout.height - 0.1:
                sill = layout.height - 0.1 - window.size[2]
            walls = [index for index in range(len(lengths)) if lengths[index] > window.size[1] + 0.3]
            if walls:
                index = layout.place(window, layout.wall_poses(window, walls=walls), sill, on_floor=False)
                if index is not None:
                    layout.reserve_front(index, 0.35, sill, sill + window.size[2])

    def lights(self) -> None:
        layout = self.layout
        low, high = layout.bounds
        for _ in range(2 if np.prod(high - low) > 22 else 1):
            light = self.piece("ceiling_light")
            poses = layout.floor_poses()
            clear = layout.clearance(poses[:, :2])
            order = np.argsort(-np.minimum(clear, 1.3), kind="stable")
            layout.place(light, poses[order], layout.height - light.size[2], on_floor=False)

    def on_wall(self, variant: str) -> None:
        item = self.piece(variant)
        middle = 1.75 if variant == "clock" else 1.55
        bottom = middle - item.size[2] / 2 + float(self.rng.uniform(-0.1, 0.15))
        self.layout.place(item, self.layout.wall_poses(item), bottom, on_floor=False)

    # --- furniture

    def at_wall(self, variant: str, front: float = 0.5, reserve: bool = True) -> int | None:
        item = self.piece(variant)
        index = self.layout.place(item, self.layout.wall_poses(item, _WALL_GAP), front=front)
        if index is not None and front and reserve:
            self.layout.reserve_front(index, front)
        return index

    def on_top(self, variant: str, index: int | None, back: bool = False) -> int | None:
        if index is None:
            return None
        item = self.piece(variant)
        turn = 0.0 if back else float(self.rng.uniform(-0.5, 0.5))
        return self.layout.place_on(item, index, turn, back)

    def clutter(self, index: int | None, most: int = 3) -> None:
        names = _TABLETOP[self.kind]
        for _ in range(int(self.rng.integers(0, most + 1))):
            self.on_top(names[self.rng.integers(len(names))], index)

    def bed(self) -> None:
        bed = self.at_wall("bed", front=0.5)
        if bed is None:
            return
        depth, width = self.layout.placed[bed].piece.size[:2]
        for side in (-1, 1):
            stand = self.piece("nightstand")
            forward = (stand.size[0] - depth) / 2
            pose = self.layout.beside(bed, forward, side * (width / 2 + stand.size[1] / 2 + 0.05))
            index = self.layout.place(stand, pose) if self.chance(0.8) else None
            if index is not None and self.chance(0.7):
                self.on_top("table_lamp", index)
            self.clutter(index, 1)

    def tv(self) -> None:
        stand = self.at_wall("tv_stand", front=0.7)
        self.on_top("tv", stand, back=True)
        self.clutter(stand, 1)

    def sofas(self) -> None:
        for _ in range(2 if self.chance(0.35) else 1):
            sofa = self.at_wall("sofa", front=0.6, reserve=False)
            if sofa is None:
                continue
            table = self.piece("coffee_table")
            forward = (
                self.layout.placed[sofa].piece.size[0] / 2 + table.size[0] / 2 + float(self.rng.uniform(0.35, 0.5))
            )
            index = self.layout.place(table, self.layout.beside(sofa, forward, float(self.rng.uniform(-0.2, 0.2))))
            self.clutter(index)
            if index is None:
                self.layout.reserve_front(sofa, 0.4)

    def desk(self) -> None:
        desk = self.at_wall("desk", front=0.8, reserve=False)
        if desk is None:
            return
        screens = 2 if self.chance(0.25) else 1
        if self.chance(0.75):
            for _ in range(screens):
                self.on_top("monitor", desk, back=True)
        else:
            self.on_top("laptop", desk)
        self.clutter(desk)
        chair = self.piece("office_chair" if self.chance(0.7) else "chair")
        self._seat(desk, chair, 0.0, float(self.rng.uniform(-0.15, 0.15)))

    def _seat(self, table: int, chair: Piece, side: float, shift: float) -> None:
        """A chair facing the table from the direction `side` (0: its front), turned a little."""
        depth, width = self.layout.placed[table].piece.size[:2]
        reach = (depth if round(side / (np.pi / 2)) % 2 == 0 else width) / 2 + 0.04
        turn = float(self.rng.normal(0, 0.12))
        swing = chair.size[0] / 2 * np.cos(turn) + chair.size[1] / 2 * abs(np.sin(turn))
        out = reach + swing + float(self.rng.uniform(0.0, 0.12))
        forward, left = out * np.cos(side) - shift * np.sin(side), out * np.sin(side) + shift * np.cos(side)
        self.layout.place(chair, self.layout.beside(table, forward, left, side + np.pi + turn))

    def dining(self) -> None:
        table = self.piece("table")
        poses = self.layout.floor_poses(40)
        wide = self.layout.fits(poses, (table.size[0] / 2 + 0.6, table.size[1] / 2 + 0.6), 0.1, 0.8)
        index = self.layout.place(table, np.concatenate([poses[wide], poses[~wide]]))
        if index is None:
            return
        self.clutter(index)
        chair_seed = int(self.rng.integers(2**31))  # the same chair all round
        width = table.size[1]
        seats = [(0.0, 0.0), (np.pi, 0.0)]
        if width > 1.25:
            seats = [(side, shift * width / 4) for side in (0.0, np.pi) for shift in (-1, 1)]
        if self.chance(0.6):
            seats += [(np.pi / 2, 0.0), (-np.pi / 2, 0.0)]
        for side, shift in seats:
            if self.chance(0.9):
                self._seat(index, self._same_chair(chair_seed), side, shift)

    def _same_chair(self, seed: int) -> Piece:
        own, self.rng = self.rng, np.random.default_rng(seed)
        piece = self.piece("chair")
        self.rng = own
        return piece

    def kitchen_row(self) -> None:
        """Fridge, stove, sink and cupboards side by side along one wall."""
        names = ["refrigerator", "stove", "sink"] + ["cabinet"] * int(self.rng.integers(0, 2))
        names += ["washer"] * self.chance(0.3)
        pieces = [self.piece(name) for name in self.rng.permutation(names)]
        walls = sorted(range(len(self.layout.walls)), key=lambda index: self.rng.random())
        for item in pieces:
            poses = []
            for index in walls:
                wall, along = self.layout.walls[index], item.size[1] / 2 + 0.03
                for start in np.arange(along, wall.length - along, 0.05):
                    poses.append(self.layout.pose_at_wall(wall, float(start), item.size[0], _WALL_GAP))
            placed = self.layout.place(item, np.array(poses), front=0.7)
            if placed is not None:
                self.layout.reserve_front(placed, 0.6)
                if item.category == "cabinet":
                    self.on_top("microwave", placed, back=True)
                    self.clutter(placed, 2)

    def rug(self) -> None:
        rug = self.piece("rug")
        self.layout.place(rug, self.layout.floor_poses(30), on_floor=False)


def furnish(layout: Layout, kind: str, look: Look, materials: dict[Material, int]) -> None:
    """Fill `layout` with what belongs into a room of this kind; new materials are added to `materials`."""
    room = _Furnisher(layout, kind, look, materials)
    rng = layout.rng
    room.openings()
    room.lights()
    if kind == "living room":
        room.sofas()
        if room.chance(0.8):
            room.tv()
        if room.chance(0.5):
            room.dining()
    elif kind == "bedroom":
        room.bed()
        if room.chance(0.85):
            room.at_wall("wardrobe", 0.6)
        if room.chance(0.5):
            room.desk()
        if room.chance(0.35):
            room.tv()
    elif kind == "study":
        for _ in range(int(rng.integers(1, 4))):
            room.desk()
        if room.chance(0.4):
            room.sofas()
        if room.chance(0.3):
            room.dining()
    elif kind == "kitchen":
        room.kitchen_row()
        room.dining()
    else:
        for name in ("bathtub", "toilet", "sink", "washer"):
            if name != "washer" or room.chance(0.5):
                room.at_wall(name, 0.5)
    extras = _EXTRAS[kind]
    for _ in range(int(rng.integers(2, 4) if kind == "bathroom" else rng.integers(3, 8))):
        index = room.at_wall(extras[rng.integers(len(extras))], 0.35)
        if index is not None and layout.placed[index].piece.category == "cabinet":
            room.clutter(index)
    if kind != "kitchen" and room.chance(0.65):
        room.rug()
    if room.chance(0.4):
        room.on_wall("clock")
    if room.chance(0.8 if kind == "bathroom" else 0.2):
        room.on_wall("mirror")
    for _ in range(int(rng.integers(2, 6))):
        room.on_wall("picture")
