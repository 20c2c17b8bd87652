"""Pictures of scenes to pixel values: resized, cropped or padded as VGGT was trained, with the cameras following."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs
from transformers.utils import is_torch_tensor


MODES = ("crop", "pad")
# What a saved configuration holds besides the options.
_METADATA_KEYS = {"auto_map", "feature_extractor_type", "image_processor_type", "processor_class"}


class Spa3RImageProcessorKwargs(ImagesKwargs, total=False):
    """Options of `Spa3RImageProcessor` that `from_pretrained` may override."""

    mode: str
    patch_size: int


class Spa3RImageProcessor(BaseImageProcessor):
    """Turns scenes of pictures into `pixel_values` (B, V, 3, H, W) in [0, 1], H and W multiples of `patch_size`.

    The preprocessing of VGGT (its `load_and_preprocess_images`), with PIL only: transparent pictures are laid on
    white, the EXIF orientation is applied, resizing is bicubic. Normalisation is left to the model.

    - `mode="crop"`: the width becomes `size`, the height follows to the nearest multiple of `patch_size` and is
      centre-cropped to at most `size`. Pictures of a call that differ in height are centre-cropped to the lowest of
      them, so all come out alike; nothing is stretched or padded.
    - `mode="pad"`: the longer side becomes `size`, the other follows to the nearest multiple of `patch_size`, and
      white fills up to `size` x `size`, the picture in the middle.

    Args:
        size: Target size in pixels, a positive multiple of `patch_size`.
        mode: `"crop"` or `"pad"`.
        patch_size: Side of the backbone's patches in pixels, positive.

    Raises:
        TypeError: An unknown option.
        ValueError: An option out of its range.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = Spa3RImageProcessorKwargs

    def __init__(self, size: int = 518, mode: str = "crop", patch_size: int = 14, **kwargs: Any):
        unknown = sorted(kwargs.keys() - _METADATA_KEYS)
        if unknown:
            raise TypeError(f"Spa3RImageProcessor has no option {unknown}; its options are size, mode, patch_size")
        super().__init__(**kwargs)
        if type(patch_size) is not int or patch_size < 1:
            raise ValueError(f"patch_size is {patch_size!r}; expected a positive integer")
        if type(size) is not int or size < 1 or size % patch_size:
            raise ValueError(f"size is {size!r}; expected a positive multiple of patch_size = {patch_size}")
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; expected one of {MODES}")
        self.size = size
        self.mode = mode
        self.patch_size = patch_size

    def preprocess(  # type: ignore[override]  # cameras go with the pictures, and no option can be changed by a call
        self, images: Any, intrinsics: Any = None, return_tensors: str | None = None
    ) -> BatchFeature:
        """
        Args:
            images: One scene, a sequence of views, or a batch, a sequence of scenes of equally many views. A view is a
                PIL picture, or an array or tensor with 1, 3 or 4 channels first or last (or (H, W), grey): integers
                0..255, or floats in [0, 1], which are rounded to 8 bits. A scene may be one array (V, 3, H, W), a
                batch one array (B, V, 3, H, W), channels again first or last. A lone picture is a scene of one view.
            intrinsics: (V, 3, 3) or (B, V, 3, 3) in pixels of the pictures as given (upright, i.e. after their EXIF
                orientation), pixel centres at +0.5.
            return_tensors: `"pt"`; `"np"` and None give numpy arrays.

        Returns:
            `pixel_values` (B, V, 3, H, W) float32 in [0, 1] and, when given, `intrinsics` (B, V, 3, 3) float32 in
            pixels of `pixel_values`.

        Raises:
            ValueError: A picture or camera matrix that cannot be used; the message names the scene and the view.
        """
        scenes = [
            [to_rgb(view, f"scene {b}, view {v}") for v, view in enumerate(scene)]
            for b, scene in enumerate(_as_scenes(images))
        ]
        num_views = len(scenes[0])
        for b, scene in enumerate(scenes):
            if not scene or len(scene) != num_views:
                expected = f"{num_views} as in scene 0" if num_views else "at least 1"
                raise ValueError(f"scene {b} has {len(scene)} views; expected {expected}")

        resized_sizes = [
            [self._resized_size(view.width, view.height, f"scene {b}, view {v}") for v, view in enumerate(scene)]
            for b, scene in enumerate(scenes)
        ]
        width, height = self.size, self.size
        if self.mode == "crop":
            height = min(self.size, min(resized[1] for scene in resized_sizes for resized in scene))

        pixel_values = np.empty((len(scenes), num_views, 3, height, width), dtype=np.float32)
        to_output = np.empty((len(scenes), num_views, 3, 3))  # original pixels -> output pixels
        for b, scene in enumerate(scenes):
            for v, view in enumerate(scene):
                new_width, new_height = resized_sizes[b][v]
                # Width first, then height, as Pillow < 13 does in one call; 13 chooses the order by size
                # (python-pillow #9549), which moves values by 1/255.
                resized = view.resize((new_width, view.height), Image.Resampling.BICUBIC)
                resized = resized.resize((new_width, new_height), Image.Resampling.BICUBIC)
                # Negative offsets crop, positive ones pad; both round towards zero as VGGT's do.
                left, top = int((width - new_width) / 2), int((height - new_height) / 2)
                canvas = Image.new("RGB", (width, height), "white")
                canvas.paste(resized, (left, top))
                pixel_values[b, v] = np.asarray(canvas).transpose(2, 0, 1) / np.float32(255)
                scale_x, scale_y = new_width / view.width, new_height / view.height
                to_output[b, v] = (scale_x, 0, left), (0, scale_y, top), (0, 0, 1)

        data = {"pixel_values": pixel_values}
        if intrinsics is not None:
            cameras = _as_intrinsics(intrinsics, len(scenes), num_views)
            data["intrinsics"] = (to_output @ cameras).astype(np.float32)
        return BatchFeature(data, tensor_type=return_tensors)

    def _resized_size(self, width: int, height: int, name: str) -> tuple[int, int]:
        """Width and height after resizing, before cropping or padding."""
        fixed = width if self.mode == "crop" else max(width, height)

        def follow(side: int) -> int:
            return round(side * (self.size / fixed) / self.patch_size) * self.patch_size

        resized = (self.size if width == fixed else follow(width), follow(height) if width == fixed else self.size)
        if not min(resized):
            raise ValueError(
                f"{name} is {width} x {height} pixels (width x height); at size {self.size} its short side would be "
                f"less than half a patch of {self.patch_size} pixels: expected a less elongated picture"
            )
        return resized


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or is_torch_tensor(value)


def _as_scenes(images: Any) -> list[Sequence[Any]]:
    """The batch as a list of scenes, each a sequence of views that are still in the caller's form."""
    if isinstance(images, Image.Image) or (_is_array(images) and images.ndim in (2, 3)):
        return [[images]]
    if _is_array(images):
        if images.ndim not in (4, 5):
            raise ValueError(f"images has shape {tuple(images.shape)}; expected (V, 3, H, W) or (B, V, 3, H, W)")
        images = [images] if images.ndim == 4 else images
    elif not isinstance(images, Sequence) or isinstance(images, str | bytes):
        raise ValueError(f"images is a {type(images).__name__}; expected a sequence of pictures or of such sequences")
    if not len(images):
        raise ValueError("images is empty; expected at least one scene of at least one view")

    def is_scene(item: Any) -> bool:
        return item.ndim == 4 if _is_array(item) else isinstance(item, Sequence) and not isinstance(item, str | bytes)

    are_scenes = [is_scene(item) for item in images]
    if any(are_scenes) and not all(are_scenes):
        raise ValueError(
            f"item {are_scenes.index(False)} of images is one picture and item {are_scenes.index(True)} a scene; "
            "expected all pictures (one scene) or all scenes (a batch)"
        )
    return list(images) if all(are_scenes) else [images]


def to_rgb(view: Any, name: str) -> Image.Image:
    """Any view as an upright 8-bit RGB picture."""
    if _is_array(view):
        view = _array_to_picture(view, name)
    if not isinstance(view, Image.Image):
        raise ValueError(f"{name} is a {type(view).__name__}; expected a PIL picture, an array or a tensor")
    if 0 in view.size:
        raise ValueError(f"{name} is {view.width} x {view.height} pixels; expected at least one")
    if view.mode[0] in "IF":
        raise ValueError(f"{name} has PIL mode {view.mode!r}; expected 8 bits per channel")
    try:
        view = ImageOps.exif_transpose(view)
        if "A" in view.getbands() or "transparency" in view.info:
            view = view.convert("RGBA")
            view = Image.alpha_composite(Image.new("RGBA", view.size, (255, 255, 255, 255)), view)
        return view.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name} cannot be decoded: {error}") from error


def _array_to_picture(view: Any, name: str) -> Image.Image:
    if is_torch_tensor(view):
        view = view.detach().cpu()
        view = (view.float() if view.is_floating_point() else view).numpy()
    if view.ndim == 2:
        view = view[..., None]
    channels_first, channels_last = (view.ndim == 3 and view.shape[axis] in (1, 3, 4) for axis in (0, -1))
    if channels_first == channels_last or 0 in view.shape:
        problem = "could have its channels first or last" if channels_first and channels_last else "is no picture"
        raise ValueError(f"{name} has shape {view.shape}, which {problem}; expected 1, 3 or 4 channels, first or last")
    if channels_first:
        view = view.transpose(1, 2, 0)

    is_float = np.issubdtype(view.dtype, np.floating)
    if not is_float and not np.issubdtype(view.dtype, np.integer):
        raise ValueError(f"{name} has data type {view.dtype}; expected integers 0..255 or floats in [0, 1]")
    low, high = view.min(), view.max()
    if not (low >= 0 and high <= (1 if is_float else 255)):  # false for NaN as well
        expected = "floats in [0, 1]" if is_float else "integers 0..255"
        raise ValueError(f"{name} has values from {low} to {high}; expected {expected}")
    if is_float:
        view = np.rint(view * np.float32(255))
    view = view.astype(np.uint8)
    return Image.fromarray(view[..., 0] if view.shape[-1] == 1 else view)


def _as_intrinsics(intrinsics: Any, num_scenes: int, num_views: int) -> np.ndarray:
    if is_torch_tensor(intrinsics):
        intrinsics = intrinsics.detach().cpu().double().numpy()
    cameras = np.asarray(intrinsics, dtype=np.float64)
    if cameras.ndim == 3:
        cameras = cameras[None]
    if cameras.shape != (num_scenes, num_views, 3, 3):
        raise ValueError(f"intrinsics has shape {np.shape(intrinsics)}; expected {(num_scenes, num_views, 3, 3)}")
    bad = np.argwhere(~np.isfinite(cameras).all((-1, -2)))
    if len(bad):
        b, v = bad[0]
        raise ValueError(f"intrinsics of scene {b}, view {v} are {cameras[b, v].tolist()}; expected finite numbers")
    return cameras
