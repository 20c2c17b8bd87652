"""A visitor's scene: where its views come from, which of them are context, and what is kept of it, for how long."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from spa3r_hf import Spa3RImageProcessor
from spa3r_hf.feature_field import Field
from spa3r_hf.media_spa3_vlm import FrameSampling
from spa3r_hf.upload_limits import UploadLimits, check_images, check_video
from spa3r_hf.video import VideoFrames


Progress = Callable[..., None]

EXAMPLES = Path(__file__).parent / "examples"
LIMITS = UploadLimits(
    max_files=16,
    max_file_bytes=12_000_000,
    max_pixels=25_000_000,
    max_side=1024,
    max_video_bytes=100_000_000,
    max_seconds=120.0,
)
MOST_BYTES_AT_ONCE = LIMITS.max_files * LIMITS.max_file_bytes + 1_000_000  # of a request that uploads
MOST_BYTES_STORED = 2_000_000_000  # of everybody's files together
SAMPLING = FrameSampling(seconds_per_frame=1.0, min_frames=4, max_frames=12)  # of videos

VIEW_SIZE = 336  # pixels of width, at least, of the views that are kept
THUMBNAIL_SIZE = 168
_CONTEXT_COLOUR, _HELD_OUT_VEIL = (79, 70, 229), (255, 255, 255)


@dataclass(eq=False)
class Session:
    """
    One visitor's scene. Nothing of it is shared, and all of it goes when it is closed or forgotten.

    Attributes:
        title: For people.
        views: Pictures of one size, the first one's camera being the world's frame.
        context: Which of them the field is made of; the first always is.
        questions: About an example: see `make_examples.make_example`.
        field: Of the context views, once it has been computed.
        spatial_latents: What the VLM reads of the scene, once it has been computed, from all views.
        folder: For files that a browser is given.
        num_files: How many there have been.
    """

    title: str
    views: list[Image.Image]
    context: list[bool]
    questions: list[dict[str, str]]
    folder: TemporaryDirectory
    field: Field | None = None
    spatial_latents: Tensor | None = None
    num_files: int = 0

    def toggle(self, view: int) -> None:
        """
        Make a held-out view context, or the reverse; the field has to be computed anew.

        Raises:
            ValueError: No such view, or the first one, which stays context.
        """
        if not 0 <= view < len(self.views):
            raise ValueError(f"view = {view}; expected 0 to {len(self.views) - 1}")
        if view == 0:
            raise ValueError("The first view is always context: its camera is the frame of the world.")
        self.context[view] = not self.context[view]
        self.field = None

    @property
    def context_views(self) -> list[Image.Image]:
        return [view for view, chosen in zip(self.views, self.context, strict=True) if chosen]

    def new_file(self, name: str) -> Path:
        """A path for a file "kind.suffix", in the place of the one of this kind that was there before."""
        kind, suffix = name.split(".")
        folder = Path(self.folder.name)
        for old in folder.glob(f"{kind}_*"):
            old.unlink(missing_ok=True)
        self.num_files += 1
        return folder / f"{kind}_{self.num_files}.{suffix}"  # a new name, so that browsers load it

    def close(self) -> None:
        """Remove its files; what it holds in memory goes with it."""
        self.folder.cleanup()
        self.field = self.spatial_latents = None

    def thumbnails(self) -> list[Image.Image]:
        """The views, numbered from 1; context views are framed, the others pale."""
        return [_thumbnail(view, number, self.context[number]) for number, view in enumerate(self.views)]


def default_context(num_views: int) -> list[bool]:
    """
    Views 0, 1, 3 and 4, as far as there are so many: views beside each other overlap, one in between is left to be
    predicted, and four are what small backbones learnt from. Of two views both are context.
    """
    return [view in (0, 1, 3, 4) for view in range(num_views)]


def open_session(
    title: str,
    pictures: Sequence[Image.Image],
    processor: Spa3RImageProcessor,
    root: Path,
    questions: Sequence[dict[str, str]] = (),
) -> Session:
    """
    A scene of pictures, cropped to one size as the models will have them.

    Args:
        processor: The model's: pictures are kept at a multiple of its size.
        root: Where the session makes its folder.

    Raises:
        ValueError: Pictures that the processor cannot use.
    """
    larger = Spa3RImageProcessor(
        size=processor.size * -(-VIEW_SIZE // processor.size), mode=processor.mode, patch_size=processor.patch_size
    )
    pixels = larger(list(pictures))["pixel_values"][0]
    views = [Image.fromarray(np.rint(255 * view).astype(np.uint8).transpose(1, 2, 0)) for view in pixels]
    root.mkdir(parents=True, exist_ok=True)
    folder = TemporaryDirectory(prefix="scene_", dir=root, ignore_cleanup_errors=True)
    return Session(title, views, default_context(len(views)), list(questions), folder)


# --- where scenes come from


def list_examples() -> list[dict[str, Any]]:
    """The examples' entries, see `make_examples.make_example`."""
    return json.loads((EXAMPLES / "examples.json").read_text())


def open_example(index: int, processor: Spa3RImageProcessor, root: Path) -> Session:
    """
    Raises:
        ValueError: There is no such example.
    """
    examples = list_examples()
    if not 0 <= index < len(examples):
        raise ValueError(f"example {index}; expected 0 to {len(examples) - 1}")
    example = examples[index]
    pictures = [Image.open(path).convert("RGB") for path in sorted((EXAMPLES / example["name"]).glob("*.jpg"))]
    return open_session(example["title"], pictures, processor, root, example["questions"])


def open_upload(
    paths: Sequence[str | Path],
    processor: Spa3RImageProcessor,
    root: Path,
    progress: Progress,
    limits: UploadLimits = LIMITS,
) -> Session:
    """
    A scene of uploaded files: photographs, or one video.

    Args:
        paths: In the folder `root`.
        progress: Called as a `gradio.Progress` is.

    Raises:
        ValueError: Files that are not what is expected, or beyond the limits; the message can be shown.
    """
    if len(paths) > limits.max_files:  # before any of them is looked at
        raise ValueError(f"{len(paths)} files; expected at most {limits.max_files} photographs, or one video")
    if not any(map(_is_video, paths)):
        pictures = []
        for number, path in enumerate(paths):
            progress((number, len(paths)), desc="Opening photographs", unit="photographs")
            pictures += check_images([path], limits, root)
        if not pictures:
            raise ValueError("no file; expected photographs, or one video")
        return open_session("Your photographs", pictures, processor, root)
    if len(paths) > 1:
        raise ValueError(f"{len(paths)} files, a video among them; expected photographs, or one video alone")
    progress(0, desc="Looking at the video")
    check_video(paths[0], limits, root)
    frames = VideoFrames(paths[0])
    chosen = SAMPLING.choose(len(frames), frames.seconds)
    pictures = []
    for number, index in enumerate(chosen):
        progress((number, len(chosen)), desc="Opening frames", unit="frames")
        picture = frames[index]
        picture.thumbnail((limits.max_side, limits.max_side))
        pictures.append(picture)
    return open_session("Your video", pictures, processor, root)


def _is_video(path: str | Path) -> bool:
    """By its first bytes: MP4 and MOV, Matroska and WebM, AVI. HEIC pictures begin as MP4 does."""
    try:
        with open(path, "rb") as file:
            start = file.read(12)
    except OSError:
        return False
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"avif"):
        raise ValueError("HEIC and AVIF pictures are not read here; expected JPEG, PNG or WebP")
    is_mp4 = start[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip")
    return is_mp4 or start[:4] == b"\x1aE\xdf\xa3" or (start[:4] == b"RIFF" and start[8:12] == b"AVI ")


# --- what of it is shown


def _thumbnail(view: Image.Image, number: int, is_context: bool) -> Image.Image:
    width = THUMBNAIL_SIZE
    picture = view.resize((width, round(width * view.height / view.width)), Image.Resampling.LANCZOS)
    if not is_context:
        picture = Image.blend(picture, Image.new("RGB", picture.size, _HELD_OUT_VEIL), 0.55)
    draw = ImageDraw.Draw(picture)
    if is_context:
        draw.rectangle((0, 0, picture.width - 1, picture.height - 1), outline=_CONTEXT_COLOUR, width=6)
    label, font = str(number + 1), ImageFont.load_default(size=17)
    box = (0, 0, 18 + font.getlength(label), 26)
    draw.rectangle(box, fill=_CONTEXT_COLOUR if is_context else (120, 124, 135))
    draw.text(((box[2]) / 2, 13), label, fill="white", font=font, anchor="mm")
    return picture
