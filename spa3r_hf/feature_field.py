"""The feature field of a scene: what the models say of its views, and what cameras in between would see."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .camera_spa3r import unproject
from .modeling_spa3r import Spa3RForPreTraining
from .visualization import FeatureBasis, feature_basis, save_gif
from .visualization_cloud import draw_cloud, grid_faces, save_glb


MAP_SIZE = 336  # pixels of width of a drawn map
ORBIT_FRAMES, ORBIT_SIZE = 24, 252  # and of its maps
MOST_POINTS = 80_000  # of a cloud: 4 MB
EDGE = 0.06  # relative step of depth between neighbouring pixels, from which on there is an edge between them
Progress = Callable[..., None]


@dataclass(frozen=True)
class Camera:
    """
    A camera without roll, in the frame of the first context camera.

    Args:
        yaw, pitch: Degrees; positive looks right and up.
        forward, right, up: Position, scene units.
    """

    yaw: float = 0.0
    pitch: float = 0.0
    forward: float = 0.0
    right: float = 0.0
    up: float = 0.0

    def extrinsics(self) -> np.ndarray:
        """(3, 4), camera <- world, OpenCV axes, world = first context camera."""
        yaw, pitch = np.radians([self.yaw, self.pitch])
        right = np.array([np.cos(yaw), 0.0, -np.sin(yaw)])
        forward = np.array([np.sin(yaw) * np.cos(pitch), -np.sin(pitch), np.cos(yaw) * np.cos(pitch)])
        rotation = np.stack([right, np.cross(forward, right), forward])
        position = np.array([self.right, -self.up, self.forward])
        return np.concatenate([rotation, -(rotation @ position)[:, None]], 1)

    @classmethod
    def of(cls, extrinsics: np.ndarray) -> "Camera":
        """The camera that stands where this one (3, 4) does and looks the same way; its roll is lost."""
        rotation, translation = extrinsics[:, :3], extrinsics[:, 3]
        x, y, z = rotation[2]
        position = -rotation.T @ translation
        pitch = np.degrees(np.arcsin(np.clip(-y, -1, 1)))
        yaw = np.degrees(np.arctan2(x, z))
        return cls(*(float(number) for number in (yaw, pitch, position[2], position[0], -position[1])))


@dataclass(frozen=True, eq=False)
class Views:
    """
    V views of a scene as the models see them. Features are kept in half precision.

    Attributes:
        pixels: (V, H, W, 3) float32 in [0, 1].
        extrinsics: (V, 3, 4) camera <- world, OpenCV axes, world = the scene's first view, scene units.
        intrinsics: (V, 3, 3), pixels.
        depth: (V, H, W), scene units.
        features: True maps (V, h, w, C) by kind, "geometric" and "semantic", as far as the model has them.
    """

    pixels: np.ndarray
    extrinsics: np.ndarray
    intrinsics: np.ndarray
    depth: np.ndarray
    features: dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Field:
    """
    A scene, given its context views.

    Attributes:
        context: The context views.
        latents: (1, Q, D), of these alone.
        bases: Colours of each kind of feature, fitted on the context views.
    """

    context: Views
    latents: Tensor
    bases: dict[str, FeatureBasis]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels, as the models see them."""
        height, width = self.context.depth.shape[1:]
        return height, width


class FieldModel:
    """
    Spa3R with its decoder, for all visitors: nothing of it is written to.

    Args:
        path: A folder or the id of a Hub repository of `Spa3RForPreTraining`, with its image processor.
        device: Such as "cuda".
    """

    def __init__(self, path: str | Path, device: str = "cpu"):
        self.model = Spa3RForPreTraining.from_pretrained(path, dtype=torch.float32).eval().to(device)
        self.processor = AutoImageProcessor.from_pretrained(path)
        self.device = device
        self.kinds: list[str] = list(self.model.config.targets)

    @torch.no_grad()
    def read(self, context: Sequence[Image.Image]) -> Field:
        """
        The field of a scene.

        Args:
            context: Pictures of one size; the camera of the first one is the world's frame.
        """
        pixels = self._pixels(context)
        views, tokens = self._see(pixels, None)
        height, width = pixels.shape[-2:]
        return Field(
            context=views,
            latents=self.model.spa3r.encode(tokens, (height, width)),
            bases={kind: feature_basis(maps.astype(np.float32)) for kind, maps in views.features.items()},
        )

    @torch.no_grad()
    def look_at(self, context: Sequence[Image.Image], held_out: Image.Image) -> Views:
        """
        One more view, as the backbone sees it beside the context views, which do not see it.

        By itself: of several at once, each would see the others too, and the more views there are, the worse small
        backbones get at their cameras.
        """
        mask = torch.arange(len(context) + 1, device=self.device)[None] == len(context)
        views, _ = self._see(self._pixels([*context, held_out]), mask)
        return views

    def _pixels(self, views: Sequence[Image.Image]) -> Tensor:
        return self.processor(list(views), return_tensors="pt")["pixel_values"].to(self.device)

    def _see(self, pixels: Tensor, mask: Tensor | None) -> tuple[Views, Tensor]:
        """The target views among `pixels` (1, V, 3, H, W), all if there is no mask; and the tokens of all of them."""
        seen = self.model.spa3r.backbone(pixels, view_mask=mask, output_cameras=True, output_depth=True)
        chosen = slice(None) if mask is None else mask[0]
        prefix = self.model.config.backbone_config.num_prefix_tokens
        rows, columns = self.grid_size(pixels.shape[-2:])
        maps = {"geometric": seen.last_hidden_state[0, chosen, prefix:]}
        if "semantic" in self.kinds:
            maps["semantic"] = self.model.semantic_features(pixels[:, chosen])[0]
        views = Views(
            pixels=_numpy(pixels[0, chosen].movedim(1, -1)),
            extrinsics=_numpy(seen.extrinsics[0, chosen]),
            intrinsics=_numpy(seen.intrinsics[0, chosen]),
            depth=_numpy(seen.depth[0, chosen, ..., 0]),
            features={kind: _numpy(maps[kind].unflatten(1, (rows, columns)).half()) for kind in self.kinds},
        )
        return views, seen.last_hidden_state

    def grid_size(self, image_size: Sequence[int]) -> tuple[int, int]:
        """(rows, columns) of patches of a picture of (height, width) pixels."""
        patch_size = self.model.config.backbone_config.patch_size
        return image_size[0] // patch_size, image_size[1] // patch_size

    @torch.no_grad()
    def predict(self, field: Field, extrinsics: np.ndarray, intrinsics: np.ndarray, kind: str) -> np.ndarray:
        """
        What cameras would see, by the latents alone.

        Args:
            extrinsics: (V, 3, 4), camera <- world, world = first view.
            intrinsics: (V, 3, 3), pixels.

        Returns:
            (V, h, w, C) float32.
        """
        cameras = (
            torch.as_tensor(array, dtype=torch.float32, device=self.device)[None] for array in (extrinsics, intrinsics)
        )
        seen = self.model.decode(field.latents, *cameras, field.image_size)
        return _numpy(seen[f"{kind}_prediction"][0].unflatten(1, self.grid_size(field.image_size)))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def cosine(predicted: np.ndarray, true: np.ndarray) -> float:
    """Mean cosine similarity of the patches of two maps (h, w, C)."""
    maps = [torch.from_numpy(np.asarray(features, np.float32)) for features in (predicted, true)]
    return float(F.cosine_similarity(maps[0], maps[1], dim=-1).mean())


def draw_map(basis: FeatureBasis, features: np.ndarray, size: int = MAP_SIZE) -> Image.Image:
    """A feature map (h, w, C) in the colours of a basis, smoothly enlarged to `size` pixels of width."""
    rows, columns = features.shape[:2]
    # In the three coordinates that are shown, so that what lies between two patches has a colour between theirs.
    flat = (np.asarray(features, np.float32) - basis.mean) @ basis.components.T
    shown = FeatureBasis(np.zeros(3, np.float32), np.eye(3, dtype=np.float32), basis.low, basis.high)
    smooth = F.interpolate(
        torch.from_numpy(flat).movedim(-1, 0)[None],
        size=(round(size * rows / columns), size),
        mode="bicubic",
        align_corners=False,
    )
    return Image.fromarray(shown.to_rgb(smooth[0].movedim(0, -1).numpy()))


@dataclass(frozen=True, eq=False)
class Cloud:
    """
    The points that the context views' depth maps show, in the first view's frame.

    Attributes:
        points: (N, 3) float32, scene units.
        colours: (N, 3) uint8.
        sides: (N,), what a pixel covers there, scene units.
        faces: (M, 3), triangles between neighbours, see `grid_faces`.
    """

    points: np.ndarray
    colours: np.ndarray
    sides: np.ndarray
    faces: np.ndarray


def cloud_of(field: Field, kind: str | None = None) -> Cloud:
    """
    The cloud, of at most `MOST_POINTS` points.

    Args:
        kind: Features that give the colours. None: the photographs do.
    """
    views = field.context
    if kind is None:
        colours = (255 * views.pixels).round().astype(np.uint8)
    else:
        side = field.image_size[1]
        maps = [np.asarray(draw_map(field.bases[kind], features, side)) for features in views.features[kind]]
        colours = np.stack(maps)
    points = unproject(*(torch.from_numpy(array) for array in (views.depth, views.extrinsics, views.intrinsics)))
    sides = views.depth / views.intrinsics[:, 0, 0, None, None]
    num_views, height, width = views.depth.shape
    step = next(s for s in count(1) if num_views * math.ceil(height / s) * math.ceil(width / s) <= MOST_POINTS)
    depth, places, colours, sides = (
        array[:, ::step, ::step] for array in (views.depth, points.numpy(), colours, sides * step)
    )
    return Cloud(places.reshape(-1, 3), colours.reshape(-1, 3), sides.ravel(), grid_faces(depth, EDGE * step))


def write_cloud(field: Field, path: Path, kind: str | None = None) -> None:
    """Write `cloud_of` as GLB, neighbours joined."""
    cloud = cloud_of(field, kind)
    save_glb(path, cloud.points, cloud.colours, cloud.faces)


def draw_from(field: Field, camera: np.ndarray, size: int = MAP_SIZE, cloud: Cloud | None = None) -> Image.Image:
    """The cloud as a camera (3, 4) with the first view's lens sees it, `size` pixels wide."""
    cloud = cloud or cloud_of(field)
    height, width = field.image_size
    scale = size / width
    intrinsics = field.context.intrinsics[0] * np.array([[scale], [scale], [1.0]])
    kept = np.unique(cloud.faces)  # what lies on an edge floats in the air
    sides = 1.3 * cloud.sides[kept]  # what is seen at a slant is farther from its neighbours
    shape = (round(height * scale), size)
    return draw_cloud(cloud.points[kept], cloud.colours[kept], sides, camera, intrinsics, shape)


def orbit_cameras(field: Field, start: Camera, num_frames: int = ORBIT_FRAMES) -> np.ndarray:
    """
    Cameras (num_frames, 3, 4) on a closed loop around what `start` looks at, which stays in the middle; the first is
    `start`. They swing 20 degrees to both sides and 6 up and down, at the context views' median depth from there.
    """
    reach = float(np.median(field.context.depth))
    first = start.extrinsics()
    centre = -first[:, :3].T @ first[:, 3] + reach * first[2, :3]
    cameras = []
    for turn in np.linspace(0, 2 * np.pi, num_frames, endpoint=False):
        yaw, pitch = start.yaw + 20 * np.sin(turn), start.pitch + 6 * np.sin(2 * turn)
        rotation = Camera(yaw, float(np.clip(pitch, -90, 90))).extrinsics()[:, :3]
        position = centre - reach * rotation[2]
        cameras.append(np.concatenate([rotation, -(rotation @ position)[:, None]], 1))
    return np.stack(cameras)


def write_orbit(model: FieldModel, field: Field, start: Camera, kind: str, path: Path, progress: Progress) -> None:
    """Write a GIF: a camera circles; left the point cloud as it sees it, right the predicted features."""
    cloud, intrinsics = cloud_of(field), field.context.intrinsics[0]
    frames = []
    for done, camera in enumerate(orbit_cameras(field, start)):
        progress((done, ORBIT_FRAMES), desc="Circling", unit="frames")
        left = draw_from(field, camera, ORBIT_SIZE, cloud)
        seen = model.predict(field, camera[None], intrinsics[None], kind)[0]
        right = draw_map(field.bases[kind], seen, ORBIT_SIZE)
        frame = Image.new("RGB", (left.width + right.width + 8, left.height), "white")
        frame.paste(left, (0, 0))
        frame.paste(right, (left.width + 8, 0))
        # The 256 colours of a GIF make steps of what is smooth, unless they are mixed.
        frames.append(frame.quantize(palette=frame.quantize(256), dither=Image.Dither.FLOYDSTEINBERG))
    save_gif(frames, path, milliseconds=80)
