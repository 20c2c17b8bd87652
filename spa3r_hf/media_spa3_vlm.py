"""Chat messages with pictures and videos, as views of scenes: what Spa3-VLM sees of them."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import BadSampleError
from .image_processing_spa3r import Spa3RImageProcessor, to_rgb
from .scenes import FolderScenes, LazyImages
from .video import VideoFrames


@dataclass(frozen=True)
class FrameSampling:
    """
    Which frames of a video are seen. The defaults are those of the paper's training.

    Args:
        seconds_per_frame: A frame for every so many seconds, more than 0,
        min_frames: but at least so many, 1 or more, as far as there are so many,
        max_frames: and at most so many.

    Raises:
        ValueError: A value out of its range.
    """

    seconds_per_frame: float = 2.0
    min_frames: int = 4
    max_frames: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.seconds_per_frame < float("inf"):
            raise ValueError(f"seconds_per_frame = {self.seconds_per_frame}; expected a number above 0")
        if not 1 <= self.min_frames <= self.max_frames:
            raise ValueError(
                f"min_frames = {self.min_frames} and max_frames = {self.max_frames}; expected 1 <= min_frames <= "
                "max_frames"
            )

    def choose(self, num_frames: int, seconds: np.ndarray | None = None) -> list[int]:
        """
        Frames from the first to the last, evenly far apart: in time, where the times are known, else in number.

        Args:
            num_frames: How many there are.
            seconds: (num_frames,), when each is shown, ascending. None: unknown, as of pictures in a folder, of which
                all are taken, up to `max_frames`.
        """
        if seconds is None:
            count = min(num_frames, self.max_frames)
            seconds = np.arange(num_frames, dtype=np.float64)
        else:
            count = round((seconds[-1] - seconds[0]) / self.seconds_per_frame)
            count = min(max(count, self.min_frames), self.max_frames)
        # The frame on display at each time. A millionth of a second is for times that are off by their rounding only.
        times = np.linspace(seconds[0], seconds[-1], count) + 1e-6
        return np.unique(np.searchsorted(seconds, times, side="right") - 1).tolist()


@dataclass(frozen=True)
class View:
    """
    A view, not opened yet: calling it opens it, as an upright RGB picture.

    Attributes:
        name: For people: the file's name; of a video, the file's and when the frame is shown.
        open: What opens it.
    """

    name: str
    open: Callable[[], Image.Image]

    def __call__(self) -> Image.Image:
        return self.open()


@dataclass
class SampleViews:
    """
    A conversation, and the views in it.

    Attributes:
        messages: The messages, their contents lists, with a bare `{"type": "image"}` in the place of every view.
        views: The views, in the order of their places.
        scenes: What names the scene of each view.
    """

    messages: list[dict[str, Any]]
    views: list[View] = field(default_factory=list)
    scenes: list[Hashable] = field(default_factory=list)


def read_conversation(conversation: Any, sampling: FrameSampling, name: str) -> SampleViews:
    """
    Find the pictures and videos of a conversation. Their pixels stay where they are: together they may be large.

    Args:
        conversation: Messages `{"role": ..., "content": ...}`; the content is text, or a list of entries

            - `{"type": "text", "text": ...}`,
            - `{"type": "image", "image": ...}`: a picture of PIL, an array, a tensor or a path,
            - `{"type": "video", "video": ...}`: a video's path, a folder of its frames, or a list of pictures,

            where a path may also stand under "path" or, with or without file://, "url". The key "scene" of a picture
            or video names the scene that it belongs to; those without it are one scene.
        sampling: Which frames of videos are seen.
        name: For messages: "sample 0".

    Raises:
        BadSampleError: There are no messages, they are not as described, or a video cannot be used.
        FileNotFoundError: A video is missing. (What a picture lacks shows when it is opened.)
    """
    if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
        found = "no message" if isinstance(conversation, Sequence) and not conversation else repr(conversation)
        raise BadSampleError(f"{name} is a conversation of {found}; expected a list of at least one message")
    sample = SampleViews([])
    for index, message in enumerate(conversation):
        where = f"{name}, message {index}"
        if not isinstance(message, Mapping) or "role" not in message:
            raise BadSampleError(f"{where} is {message!r}; expected {{'role': ..., 'content': ...}}")
        content = message.get("content")
        if isinstance(content, str):  # some templates leave out what is not in a list
            content = [{"type": "text", "text": content}]
        if not isinstance(content, Sequence):
            raise BadSampleError(f"{where} has content {content!r}; expected text or a list of entries")
        entries: list[dict[str, Any]] = []
        for position, entry in enumerate(content):
            entries += _read_entry(entry, sample, sampling, f"{where}, entry {position}")
        sample.messages.append(dict(message, content=entries))
    return sample


def _read_entry(entry: Any, sample: SampleViews, sampling: FrameSampling, where: str) -> list[dict[str, Any]]:
    """What stands in an entry's place; views are added to the sample."""
    kind = entry.get("type") if isinstance(entry, Mapping) else None
    if kind == "text":
        if not isinstance(entry.get("text"), str):
            raise BadSampleError(f"{where} is {entry!r}; expected {{'type': 'text', 'text': ...}}")
        return [dict(entry)]
    if kind not in ("image", "video"):
        what = f"of type {kind!r}" if isinstance(entry, Mapping) else repr(entry)
        raise BadSampleError(f"{where} is {what}; expected an entry of type 'text', 'image' or 'video'")
    media = next((entry[key] for key in (kind, "path", "url") if entry.get(key) is not None), None)
    if media is None:
        raise BadSampleError(f"{where} has no {kind}: its keys are {sorted(entry)}; expected it under {kind!r}")
    scene = entry.get("scene")
    if not isinstance(scene, Hashable):
        raise BadSampleError(f"{where} has scene {scene!r}; expected a name or a number")
    if kind == "image":
        title = Path(media).name if isinstance(media, str | Path) else "picture"
        views = [View(title, partial(open_picture, media, where))]
    else:
        views = find_frames(media, sampling, where)
    sample.views += views
    sample.scenes += [scene] * len(views)
    return [{"type": "image"} for _ in views]


def open_picture(media: Any, name: str) -> Image.Image:
    """
    Any picture, upright and RGB.

    Raises:
        BadSampleError: It cannot be used.
        FileNotFoundError: The file is missing.
    """
    if isinstance(media, str | Path):
        return LazyImages([_existing(media, name)], name)[0]
    try:
        return to_rgb(media, name)
    except ValueError as error:
        raise BadSampleError(str(error)) from error


def find_frames(media: Any, sampling: FrameSampling, name: str) -> list[View]:
    """
    The frames of a video that are seen.

    Args:
        media: Path of a video or of a folder of pictures in natural order, or a sequence of pictures as `open_picture`
            takes them.
        sampling: Which are seen.
        name: For messages.

    Raises:
        BadSampleError: There are no frames, or, when it is opened, that a frame cannot be used.
        FileNotFoundError: There is no such file or folder.
    """
    frames: Sequence[Any]
    if isinstance(media, str | Path):
        path = _existing(media, name)
        frames = FolderScenes({name: path}, use_cameras=False)[0].images if path.is_dir() else VideoFrames(path)
    elif isinstance(media, Sequence):
        frames = media
    else:
        raise BadSampleError(
            f"{name} has a {type(media).__name__} as its video; expected a path or a list of pictures"
        )
    if not len(frames):
        raise BadSampleError(f"{name} is a video with no frames; expected at least one")
    chosen = sampling.choose(len(frames), getattr(frames, "seconds", None))
    source = _FramesTogether(frames, chosen) if isinstance(frames, VideoFrames) else frames
    return [
        View(_title(frames, index), partial(_open_frame, source, index, f"{name}, frame {index}")) for index in chosen
    ]


def _title(frames: Sequence[Any], index: int) -> str:
    if isinstance(frames, VideoFrames):
        return f"{frames.path.name} at {frames.seconds[index]:.2f} s"
    file = frames.files[index] if isinstance(frames, LazyImages) else None
    return file.name if isinstance(file, Path) else f"frame {index}"


class _FramesTogether:
    """Frames of a video, all decoded when one of them is opened, and each kept until it is opened itself."""

    def __init__(self, video: VideoFrames, indices: Sequence[int]):
        self._video, self._indices = video, indices
        self._waiting: dict[int, Image.Image] = {}

    def __getitem__(self, index: int) -> Image.Image:
        if index not in self._waiting:
            self._waiting = dict(zip(self._indices, self._video.pictures(self._indices), strict=True))
        return self._waiting.pop(index)


def _open_frame(frames: Sequence[Any] | _FramesTogether, index: int, name: str) -> Image.Image:
    return open_picture(frames[index], name)


def _existing(media: str | Path, name: str) -> Path:
    if isinstance(media, str):
        media = media.removeprefix("file://")
        if "://" in media or media.startswith("data:"):
            raise BadSampleError(f"{name} is at {media[:80]!r}; expected the path of a file, or the picture itself")
    path = Path(media)
    try:
        exists = path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise BadSampleError(f"{name}: {str(path)[:80]!r} cannot be opened: {error.strerror}") from error
    if not exists:
        raise FileNotFoundError(f"{name}: {path} does not exist")
    return path


def views_of_prompts(
    images: Any, prompts: Sequence[str], image_token: str, video_token: str | None
) -> list[list[Any]]:
    """
    The views of every prompt.

    Args:
        images: Pictures for the one prompt, or a list of them for each of the prompts; None for none.
        prompts: With `image_token` for every view, and no `video_token`.

    Raises:
        BadSampleError: A prompt has another number of views than of picture tokens, or a video token.
        ValueError: Not one list of views for each prompt.
    """
    if images is None:
        images = [[] for _ in prompts]
    elif not isinstance(images, list | tuple):
        images = [images]
    if len(prompts) == 1 and not all(isinstance(item, list | tuple) for item in images):
        images = [images]
    if len(images) != len(prompts) or not all(isinstance(item, list | tuple) for item in images):
        raise ValueError(f"{len(images)} images for {len(prompts)} prompts; expected a list of views for each prompt")
    for index, (sample, prompt) in enumerate(zip(images, prompts, strict=True)):
        if prompt.count(image_token) != len(sample):
            raise BadSampleError(
                f"sample {index} has {len(sample)} views and {prompt.count(image_token)} times {image_token!r} in its "
                "prompt; expected as many"
            )
        if video_token is not None and video_token in prompt:
            raise BadSampleError(
                f"sample {index} has {video_token!r} in its prompt; expected none, as frames of videos are views"
            )
    return [list(sample) for sample in images]


def number_scenes(views: Sequence[Sequence[Any]], names: Sequence[Sequence[Hashable]] | None) -> list[list[int]]:
    """
    For every sample, the number of the scene of each view; numbers go on through the batch.

    Args:
        views: Of every sample.
        names: What names the scene of each, within its sample. None: those of a sample are one scene.

    Raises:
        ValueError: Not one name for every view.
    """
    if names is None:
        names = [[None] * len(sample) for sample in views]
    if [len(sample) for sample in names] != [len(sample) for sample in views]:
        raise ValueError(
            f"scenes name {[len(sample) for sample in names]} views of the samples; expected "
            f"{[len(sample) for sample in views]}"
        )
    numbers: dict[tuple[int, Hashable], int] = {}
    return [[numbers.setdefault((index, name), len(numbers)) for name in sample] for index, sample in enumerate(names)]


def see_views(
    views: Sequence[Sequence[Any]], scenes: Sequence[Sequence[int]], resizer: Spa3RImageProcessor, step: int
) -> tuple[list[list[Image.Image]], list[np.ndarray]]:
    """
    What the VLM and the encoder see, of the same pixels: every view is resized once.

    Args:
        views: Of every sample, pictures as `Spa3RImageProcessor` takes them, or functions that open them, one by one.
        scenes: The number of the scene of each, see `number_scenes`.
        resizer: The encoder's.
        step: What the sides of the VLM's pictures have to be multiples of, in pixels.

    Returns:
        For every sample, its views as the VLM sees them: a border at the right and below is cut off, up to `step` - 1
        pixels wide. For every scene, its views as the encoder sees them: (V, 3, H, W) float32 in [0, 1].

    Raises:
        BadSampleError: A view cannot be used, or the views of a scene differ in shape.
    """
    pictures: list[list[Image.Image]] = []
    seen: dict[int, list[np.ndarray]] = {}
    for index, (sample, numbers) in enumerate(zip(views, scenes, strict=True)):
        pictures.append([])
        for place, (view, scene) in enumerate(zip(sample, numbers, strict=True)):
            name = f"sample {index}, view {place}"
            try:
                pixels = resizer([view() if callable(view) else view])["pixel_values"][0, 0]
            except BadSampleError:
                raise
            except ValueError as error:
                raise BadSampleError(f"{name}: {error}") from error
            others = seen.setdefault(scene, [])
            if others and others[0].shape != pixels.shape:
                raise BadSampleError(
                    f"{name} is {_shape(pixels)} to the encoder, but the first of its scene {_shape(others[0])}; "
                    'expected views of one shape in a scene (others can be a "scene" of their own)'
                )
            others.append(pixels)
            pictures[-1].append(_crop(pixels, step, name))
    return pictures, [np.stack(scene) for scene in seen.values()]


def _crop(pixels: np.ndarray, step: int, name: str) -> Image.Image:
    # From the upper left corner, so that the VLM's patches and the encoder's begin at the same point.
    height, width = (side // step * step for side in pixels.shape[1:])
    if not height or not width:
        raise BadSampleError(
            f"{name} is {_shape(pixels)} to the encoder; expected {step} x {step} pixels or more, which the VLM needs "
            "for a visual token"
        )
    # Exact: these pixels were 8 bits.
    return Image.fromarray(np.rint(pixels[:, :height, :width] * 255).astype(np.uint8).transpose(1, 2, 0))


def _shape(pixels: np.ndarray) -> str:
    return f"{pixels.shape[2]} x {pixels.shape[1]} pixels (width x height)"


__all__ = [
    "FrameSampling",
    "SampleViews",
    "View",
    "find_frames",
    "number_scenes",
    "open_picture",
    "read_conversation",
    "see_views",
    "views_of_prompts",
]
