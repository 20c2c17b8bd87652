"""What a scene is, and where scenes come from: photographs, ScanNet(++), videos and Hub datasets.

Sources list their scenes when they are made and open pictures only when asked for them.
"""

import copy
import io
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from .camera_spa3r import check_cameras
from .errors import BadSampleError
from .image_processing_spa3r import to_rgb
from .optional import require
from .video import VideoFrames


logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
CAMERA_FILE = "cameras.npz"
LAYOUTS = (
    f"a folder of photographs {IMAGE_SUFFIXES}, a folder of such folders, ScanNet (scene*/color), ScanNet++ "
    f"(splits/nvs_sem_*.txt), video files {VIDEO_SUFFIXES}, a dataset's folder (save_to_disk or *.parquet), or the "
    "name of a dataset on the Hub (owner/name)"
)


@dataclass(frozen=True)
class Scene:
    """An ordered sequence of pictures of one place, with or without cameras.

    Attributes:
        name: For messages.
        images: The V pictures, upright RGB, each opened when it is asked for.
        frame_step: Lowest and highest distance between the pictures that make up a sample, in pictures.
        extrinsics: (V, 3, 4) float64, camera <- world, OpenCV axes, or None.
        intrinsics: (V, 3, 3) float64 in pixels of the pictures, pixel centres at +0.5, or None.
    """

    name: str
    images: Sequence[Image.Image]
    frame_step: tuple[int, int]
    extrinsics: np.ndarray | None = None
    intrinsics: np.ndarray | None = None

    def __post_init__(self) -> None:
        check_frame_step(self.frame_step, f"scene {self.name!r}")
        if (self.extrinsics is None) != (self.intrinsics is None):
            raise BadSampleError(f"scene {self.name!r} has only one of extrinsics and intrinsics; expected both")
        if self.extrinsics is not None and self.intrinsics is not None:
            check_scene_cameras(self.extrinsics, self.intrinsics, len(self.images), f"scene {self.name!r}")


class SceneDataset(Protocol):
    """What training draws from; any list of scenes will do."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Scene: ...


def check_frame_step(frame_step: Sequence[int], name: str) -> None:
    """
    Check the lowest and highest distance between the views of a sample.

    Raises:
        ValueError: They are out of range; `name` says whose they are.
    """
    if len(frame_step) != 2 or not 1 <= frame_step[0] <= frame_step[1]:
        raise ValueError(f"{name}: frame_step is {frame_step}; expected 1 <= lowest <= highest")


def check_scene_cameras(extrinsics: np.ndarray, intrinsics: np.ndarray, num_views: int, name: str) -> None:
    """`check_cameras` of the views of a scene, to 1e-3; its errors are `BadSampleError`s, and begin with `name`."""
    if extrinsics.shape[1:] == (4, 4):
        raise BadSampleError(f"{name}: extrinsics have shape {extrinsics.shape}; expected {(num_views, 3, 4)}")
    # Copies: torch takes no arrays that run backwards.
    given, pixels = torch.from_numpy(np.array(extrinsics)), torch.from_numpy(np.array(intrinsics))
    try:
        check_cameras(given, pixels, (num_views,), tolerance=1e-3)
    except ValueError as error:
        raise BadSampleError(f"{name}: {error}") from error


@dataclass(frozen=True)
class LazyImages(Sequence[Image.Image]):
    """Pictures that are files, or encoded files in memory, opened when asked for.

    Attributes:
        files: Paths or encoded bytes.
        scene: Name of the scene, for messages.
    """

    files: Sequence[Path | bytes]
    scene: str

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Image.Image:  # type: ignore[override]  # no slices
        file = self.files[index]
        name = f"scene {self.scene!r}, view {index}"
        if isinstance(file, Path):
            name += f" ({file})"
        try:
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                return to_rgb(image, name)
        except (OSError, Image.DecompressionBombError) as error:
            # Pillow would name the address of a file in memory: another one each time.
            reason = "unknown format" if isinstance(error, UnidentifiedImageError) else error
            raise BadSampleError(f"{name} cannot be opened: {reason}; expected a picture") from error
        except ValueError as error:
            raise BadSampleError(str(error)) from error


class FolderScenes(Sequence[Scene]):
    """Folders of photographs, one scene each, in natural order of the file names (2.jpg before 10.jpg).

    A file `cameras.npz` beside the photographs gives their cameras: `poses` (V, 4, 4), world <- camera, OpenCV axes,
    and `intrinsics` (V, 3, 3) in pixels. File names are listed when a scene is opened: large data sets hold millions.

    Args:
        folders: Name of a scene -> folder of its photographs.
        frame_step: See `Scene`.
        use_cameras: Whether to read `cameras.npz` where there is one.
    """

    def __init__(self, folders: Mapping[str, Path], frame_step: tuple[int, int] = (1, 4), use_cameras: bool = True):
        self.folders = dict(folders)
        self.names = sorted(self.folders, key=natural_key)
        self.frame_step = frame_step
        self.use_cameras = use_cameras

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Scene:  # type: ignore[override]  # no slices
        name = self.names[index]
        folder = self.folders[name]
        files = _files(folder, IMAGE_SUFFIXES)
        if not files:
            raise BadSampleError(f"scene {name!r}: {folder} holds no pictures; expected some of {IMAGE_SUFFIXES}")
        camera_file = folder / CAMERA_FILE
        cameras = _read_cameras(camera_file, len(files)) if self.use_cameras and camera_file.exists() else (None, None)
        return Scene(name, LazyImages(files, name), self.frame_step, *cameras)


class VideoScenes(Sequence[Scene]):
    """Video files, one scene each. Default steps: half a second to two seconds at 30 frames a second."""

    def __init__(self, files: Sequence[Path], frame_step: tuple[int, int] = (15, 60)):
        self.files = list(files)
        self.frame_step = frame_step

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Scene:  # type: ignore[override]  # no slices
        return Scene(self.files[index].name, VideoFrames(self.files[index]), self.frame_step)


def scannet_scenes(root: str | Path, frame_step: tuple[int, int] = (2, 6)) -> FolderScenes:
    """ScanNet: `scene*/color/*`, whose pictures have been thinned out already (paper: steps 2 to 6)."""
    return FolderScenes({folder.parent.name: folder for folder in Path(root).glob("scene*/color")}, frame_step)


def scannetpp_scenes(root: str | Path, split: str = "train", frame_step: tuple[int, int] = (20, 60)) -> FolderScenes:
    """ScanNet++: the scenes named in `splits/nvs_sem_{split}.txt`, `data/<id>/dslr/undistorted_images/*`.

    Raises:
        FileNotFoundError: No such split, or a scene it names is missing.
    """
    root = Path(root)
    names = (root / "splits" / f"nvs_sem_{split}.txt").read_text().split()
    folders = {name: root / "data" / name / "dslr" / "undistorted_images" for name in names}
    missing = [name for name, folder in folders.items() if not folder.is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} scenes of split {split!r} are missing, the first at {folders[missing[0]]}"
        )
    return FolderScenes(folders, frame_step)


class DatasetScenes(Sequence[Scene]):
    """A map-style `datasets.Dataset` with a column of lists of pictures (and, where present, of cameras).

    Pictures stay encoded until they are asked for. The columns `extrinsics` (V, 3, 4), camera <- world, and
    `intrinsics` (V, 3, 3), pixels, are used when both are there; a column `name` names the scenes.

    Args:
        dataset: `datasets.Dataset`.
        column: Its column of lists of pictures.
        frame_step: See `Scene`.
        use_cameras: Whether to use the camera columns.
    """

    def __init__(
        self, dataset: Any, column: str = "images", frame_step: tuple[int, int] = (1, 4), use_cameras: bool = True
    ):
        self.dataset = _keep_encoded(dataset, column)
        self._open = _RowToScene(column, frame_step, use_cameras)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Scene:  # type: ignore[override]  # no slices
        return self._open(self.dataset[index], index)


class StreamedScenes:
    """The scenes of a `datasets.IterableDataset`, one after the other; arguments as for `DatasetScenes`."""

    def __init__(
        self, dataset: Any, column: str = "images", frame_step: tuple[int, int] = (1, 4), use_cameras: bool = True
    ):
        self.dataset = _keep_encoded(dataset, column)
        self._open = _RowToScene(column, frame_step, use_cameras)

    def split(self, num_scenes: int) -> "tuple[list[Callable[[], Scene]], StreamedScenes]":
        """Functions that open the first so many scenes, and the stream of all others."""
        rows = enumerate(self.dataset.take(num_scenes))
        first: list[Callable[[], Scene]] = [partial(self._open, row, index) for index, row in rows]
        rest = copy.copy(self)
        rest.dataset = self.dataset.skip(num_scenes)
        return first, rest

    def set_epoch(self, epoch: int) -> None:
        """Shuffles a shuffled stream anew."""
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Callable[[], Scene]]:
        """Yields functions that open the scenes, so that a damaged one does not end the stream."""
        # Not iter(dataset): in a DataLoader's worker that gives a part of the data only; see `StreamingPSFMDataset`.
        for index, batch in enumerate(self.dataset.iter(batch_size=1)):
            yield partial(self._open, {key: values[0] for key, values in batch.items()}, index)


@dataclass(frozen=True)
class _RowToScene:
    column: str
    frame_step: tuple[int, int]
    use_cameras: bool

    def __call__(self, row: dict[str, Any], index: int) -> Scene:
        name = str(row.get("name", index))
        try:
            files = [Path(image["path"]) if image["bytes"] is None else image["bytes"] for image in row[self.column]]
        except TypeError as error:
            raise BadSampleError(f"scene {name!r}: {self.column} has empty entries; expected pictures") from error
        cameras: list[np.ndarray] = []
        if self.use_cameras and "extrinsics" in row and "intrinsics" in row:
            try:
                cameras = [np.array(row[key], dtype=np.float64) for key in ("extrinsics", "intrinsics")]
            except (TypeError, ValueError) as error:
                raise BadSampleError(f"scene {name!r}: cameras are no matrices: {error}") from error
        return Scene(name, LazyImages(files, name), self.frame_step, *cameras)


def _keep_encoded(dataset: Any, column: str) -> Any:
    """The dataset with its column cast so that pictures are not decoded."""
    datasets = require("datasets", extra="train")
    features = dataset.features or {}  # a stream made from a generator has none
    feature = features.get(column)
    if not isinstance(getattr(feature, "feature", None), datasets.Image):
        raise ValueError(f"column {column!r} is {feature!r}; expected List(Image()); the columns are {list(features)}")
    return dataset.cast_column(column, datasets.List(datasets.Image(decode=False)))


def natural_key(name: str) -> list[Any]:
    """Sorts numbers in names by value: view2 before view10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name.lower()))]


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files of the folder that end so, in natural order, without hidden ones."""
    return sorted(
        (path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith(".")),
        key=lambda path: natural_key(path.name),
    )


def _read_cameras(path: Path, num_views: int) -> tuple[np.ndarray, np.ndarray]:
    """(V, 3, 4) extrinsics, camera <- world, and (V, 3, 3) intrinsics, pixels, of a `cameras.npz`."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            poses, intrinsics = (np.asarray(arrays[key], dtype=np.float64) for key in ("poses", "intrinsics"))
    except (OSError, ValueError, KeyError, EOFError, TypeError, BadZipFile) as error:
        raise BadSampleError(f"{path} cannot be read: {error}; expected arrays poses and intrinsics") from error
    if poses.shape != (num_views, 4, 4):
        raise BadSampleError(
            f"{path}: poses have shape {poses.shape}; expected {(num_views, 4, 4)}, as many as pictures"
        )
    rotation = poses[:, :3, :3].swapaxes(1, 2)
    with np.errstate(invalid="ignore", over="ignore"):  # the check below names what is not finite
        extrinsics = np.concatenate([rotation, -rotation @ poses[:, :3, 3:]], axis=-1)
    check_scene_cameras(extrinsics, intrinsics, num_views, str(path))
    return extrinsics, intrinsics


def _load_dataset(path: Path, split: str, streaming: bool) -> Any:
    """The dataset saved at the path or named by it, or None where there is something else, or nothing."""
    is_saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    parquet = [str(file) for pattern in ("*.parquet", "data/*.parquet") for file in path.glob(pattern)]
    may_be_on_hub = not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", path.as_posix())
    if not (is_saved or parquet or may_be_on_hub):
        return None
    datasets = require("datasets", extra="train")
    if is_saved:
        dataset = datasets.load_from_disk(str(path))
        dataset = dataset[split] if isinstance(dataset, datasets.DatasetDict) else dataset
        return dataset.to_iterable_dataset() if streaming else dataset
    try:
        return datasets.load_dataset(path.as_posix(), split=split, streaming=streaming)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(f"{path} does not exist, nor on the Hub ({error}); expected {LAYOUTS}") from error


def open_scenes(
    path: str | Path,
    *,
    split: str = "train",
    frame_step: tuple[int, int] | None = None,
    use_cameras: bool = True,
    column: str = "images",
    streaming: bool = False,
) -> "SceneDataset | StreamedScenes":
    """The scenes at a path, whatever its layout.

    Recognised, in this order: a video file; a folder of photographs (one scene); ScanNet++ (`splits/nvs_sem_*.txt`);
    ScanNet (`scene*/color`); a folder of videos; a folder of folders of photographs. Before all of these: a dataset
    folder (`save_to_disk`, or parquet files), or, where there is no such path, `owner/name`, a dataset on the Hub.

    Args:
        path: A file, a folder or the name of a dataset.
        split: Of ScanNet++ or of a dataset.
        frame_step: See `Scene`; by default that of the layout.
        use_cameras: Whether to use cameras where there are some.
        column: A dataset's column of lists of pictures.
        streaming: Whether to stream a dataset instead of preparing it; gives `StreamedScenes`.

    Raises:
        FileNotFoundError: Nothing is there, or nothing that is recognised; the message names the layouts.
        ValueError: `streaming` asked of something that is not a dataset.
    """
    step = {} if frame_step is None else {"frame_step": frame_step}
    path = Path(path)
    dataset = _load_dataset(path, split, streaming)
    if dataset is not None:
        kind = StreamedScenes if streaming else DatasetScenes
        return kind(dataset, column, use_cameras=use_cameras, **step)
    if streaming:
        raise ValueError(f"{path} cannot be streamed; expected a dataset: parquet files or a name on the Hub")
    if path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES:
        return VideoScenes([path], **step)
    if path.is_dir():
        if _files(path, IMAGE_SUFFIXES):
            return FolderScenes({path.resolve().name: path}, use_cameras=use_cameras, **step)
        if any((path / "splits").glob("nvs_sem_*.txt")):
            return scannetpp_scenes(path, split, **step)
        if any(path.glob("scene*/color")):
            return scannet_scenes(path, **step)
        videos = _files(path, VIDEO_SUFFIXES)
        if videos:
            return VideoScenes(videos, **step)
        folders = {folder.name: folder for folder in path.iterdir() if folder.is_dir() and folder.name[0] != "."}
        scenes = {name: folder for name, folder in folders.items() if _files(folder, IMAGE_SUFFIXES)}
        if scenes:
            if len(scenes) < len(folders):
                logger.warning(
                    "%d of %d folders in %s hold no pictures and are left out: %s",
                    len(folders) - len(scenes),
                    len(folders),
                    path,
                    sorted(folders.keys() - scenes.keys())[:10],
                )
            return FolderScenes(scenes, use_cameras=use_cameras, **step)
    raise FileNotFoundError(f"{path} {'holds no scenes' if path.exists() else 'does not exist'}; expected {LAYOUTS}")
