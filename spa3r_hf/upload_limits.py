"""What strangers may upload: pictures, videos and prompts within limits of size, number, length and kind.

Kinds are told by content, never by suffix. Messages name an upload by a harmless form of its file name and never
repeat its content, so that they can be shown in a web page. Memory stays below `UploadLimits.memory_bound`.
"""

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image

from .errors import BadSampleError
from .image_processing_spa3r import to_rgb
from .optional import require


IMAGE_KINDS = ("JPEG", "PNG", "WEBP")
VIDEO_KINDS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi")  # as FFmpeg calls them
# What opening a picture may take for each of its pixels: WebP, the hungriest, holds its canvas several times. Measured
# in tests/test_upload_limits.py.
_BYTES_PER_PIXEL = 24
# Of a video's frames, likewise: a codec holds up to 16 frames of reference, and some for each of its threads.
_BYTES_PER_VIDEO_PIXEL = 96
# A progressive JPEG has about 10 scans. Each goes over the whole picture, and may be a few bytes long.
_MAX_SCANS = 100


@dataclass(frozen=True)
class UploadLimits:
    """
    The most of everything, all 1 or more.

    Args:
        max_files: Pictures at once.
        max_file_bytes: Size of a picture's file.
        max_pixels: Width x height of a picture.
        max_side: Longer side of what `check_images` returns, in pixels; larger pictures are made smaller.
        max_video_bytes: Size of a video's file.
        max_video_pixels: Width x height of its frames.
        max_seconds: Its duration.
        max_video_frames: Number of its frames.
        max_prompt_characters: Length of a prompt.

    Raises:
        ValueError: A limit below 1.
    """

    max_files: int = 32
    max_file_bytes: int = 20_000_000
    max_pixels: int = 25_000_000
    max_side: int = 1024
    max_video_bytes: int = 200_000_000
    max_video_pixels: int = 3840 * 2160
    max_seconds: float = 120.0
    max_video_frames: int = 7200
    max_prompt_characters: int = 2000

    def __post_init__(self) -> None:
        for limit in fields(self):
            if not getattr(self, limit.name) >= 1:
                raise ValueError(f"{limit.name} = {getattr(self, limit.name)}; expected 1 or more")

    @property
    def memory_bound(self) -> int:
        """Bytes that `check_images` or `check_video` may take, what they return included, on top of the libraries."""
        pictures = _BYTES_PER_PIXEL * self.max_pixels + self.max_file_bytes + 3 * self.max_files * self.max_side**2
        return max(pictures, _BYTES_PER_VIDEO_PIXEL * self.max_video_pixels)


DEFAULT_LIMITS = UploadLimits()


def check_images(
    paths: Sequence[str | Path], limits: UploadLimits = DEFAULT_LIMITS, root: str | Path | None = None
) -> list[Image.Image]:
    """
    Open uploaded pictures, one after the other; each is decoded whole, so that what is damaged is found.

    Args:
        paths: Their files.
        limits: See `UploadLimits`.
        root: The folder that they have to be in. None: anywhere.

    Returns:
        Upright RGB pictures, the longer side at most `limits.max_side`.

    Raises:
        ValueError: No or too many files; or a file that is missing, a link, outside `root`, too large, no picture of
            `IMAGE_KINDS` or damaged.
    """
    if not 1 <= len(paths) <= limits.max_files:
        raise ValueError(f"{len(paths)} files; expected 1 to {limits.max_files} pictures")
    files = [_checked_file(path, limits.max_file_bytes, root) for path in paths]  # all, before the first is decoded
    return [_open_picture(file, limits) for file in files]


def check_video(
    path: str | Path, limits: UploadLimits = DEFAULT_LIMITS, root: str | Path | None = None
) -> tuple[int, float]:
    """
    Look at an uploaded video without keeping it: its header, the times of its packets, and its first frame.

    Args:
        path: Its file.
        limits, root: As for `check_images`.

    Returns:
        The number of its frames and its duration in seconds.

    Raises:
        ValueError: The file is missing, a link, outside `root`, too large, no video of `VIDEO_KINDS`, damaged, or
            longer or larger than allowed, whatever its header says.
    """
    file = _checked_file(path, limits.max_video_bytes, root)
    name = shown_name(file)
    av = require("av", extra="video")
    # Playlists and the like would have FFmpeg open other files; and frames can be larger than the header says.
    codec = {"max_pixels": str(limits.max_video_pixels), "threads": "1"}
    options = {"format_whitelist": ",".join(VIDEO_KINDS), "protocol_whitelist": "file", **codec}
    try:
        with av.open(str(file), options=options) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise BadSampleError(f"{name} holds no video")
            _check_frame_size(stream.width, stream.height, name, limits)
            if container.duration is not None:
                _check_length(stream.frames, container.duration / av.time_base, name, limits)
            num_frames, seconds = _walk(container, stream, name, limits)
        with av.open(str(file), options=options) as container:
            stream = container.streams.best("video")
            stream.codec_context.options = codec
            frame = next(container.decode(stream), None)
            if frame is None:
                raise BadSampleError(f"{name} holds no frames that can be decoded; expected at least one")
            _check_frame_size(frame.width, frame.height, name, limits)
    except av.FFmpegError as error:
        raise BadSampleError(
            f"{name} cannot be read as a video ({type(error).__name__}); expected MP4, MOV, MKV, WebM or AVI, whole, "
            f"with at most {limits.max_video_pixels / 1e6:g} megapixels a frame"
        ) from error
    return num_frames, seconds


def check_prompt(text: str, limits: UploadLimits = DEFAULT_LIMITS) -> str:
    """
    The text of a prompt, without white space around it.

    Raises:
        ValueError: No text, an empty or too long one, or one with control characters (lines and tabs are fine).
    """
    if not isinstance(text, str):
        raise ValueError(f"the prompt is a {type(text).__name__}; expected text")
    if len(text) > limits.max_prompt_characters:
        raise ValueError(f"the prompt has {len(text)} characters; expected at most {limits.max_prompt_characters}")
    text = text.strip()
    if not text:
        raise ValueError("the prompt is empty; expected a question")
    # U+D800 to U+DFFF: halves of characters, which no tokenizer can encode.
    if odd := re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", text):
        raise ValueError(f"the prompt holds the character U+{ord(odd.group()):04X}; expected text")
    return text


def check_name(name: str) -> str:
    """
    The name of an upload, good for a file of a folder of one's own.

    Raises:
        ValueError: It leads elsewhere, is hidden, too long, or holds what file systems refuse.
    """
    bad = name in ("", ".", "..") or name.startswith(".") or re.search(r'[/\\:*?"<>|\x00-\x1f\x7f\ud800-\udfff]', name)
    if bad or len(name.encode(errors="replace")) > 255:
        raise ValueError(
            f"{shown_name(name)} cannot be the name of a file; expected one without folders, a dot in front or "
            "control characters, of at most 255 bytes"
        )
    return name


def shown_name(path: str | Path) -> str:
    """How a message names an upload: its file name alone, up to 60 characters, nothing in it that HTML would read."""
    name = re.split(r"[/\\]", os.fspath(path))[-1]
    harmless = re.sub(r"[^\w .()+-]", "_", name)
    return f"'{harmless if len(harmless) <= 60 else harmless[:40] + '...' + harmless[-15:]}'"


def _checked_file(path: str | Path, max_bytes: int, root: str | Path | None) -> Path:
    name = shown_name(path)
    file = Path(path)
    if ".." in re.split(r"[/\\]", os.fspath(path)):
        raise ValueError(f"{name} has '..' in its path; expected a file of the upload folder")
    try:
        if root is not None and not file.resolve().is_relative_to(Path(root).resolve()):
            raise ValueError(f"{name} is outside the upload folder; expected a file in it")
        status = os.lstat(file)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and "upload folder" in str(error):
            raise
        raise ValueError(f"{name} cannot be opened ({type(error).__name__}); expected an uploaded file") from error
    if not stat.S_ISREG(status.st_mode):  # a link, a folder, a device without end
        raise ValueError(f"{name} is no regular file; expected an uploaded file")
    if not 1 <= status.st_size <= max_bytes:
        raise ValueError(f"{name} has {status.st_size} bytes; expected 1 to {max_bytes}")
    return file


def _open_picture(file: Path, limits: UploadLimits) -> Image.Image:
    name, kinds = shown_name(file), ", ".join(IMAGE_KINDS)
    try:
        with Image.open(file, formats=IMAGE_KINDS) as image:  # reads the header only
            if image.width * image.height > limits.max_pixels:
                size = f"{image.width} x {image.height} = {image.width * image.height} pixels"
                raise BadSampleError(f"{name} has {size}; expected at most {limits.max_pixels}")
            if image.mode[0] in "IF":
                raise BadSampleError(f"{name} has pixels of kind {image.mode}; expected 8 bits a channel")
            num_scans = file.read_bytes().count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 0
            if num_scans > _MAX_SCANS:
                raise BadSampleError(f"{name} has {num_scans} scans; expected a JPEG of at most {_MAX_SCANS}")
            return to_rgb(_downscaled(image, limits.max_side), name)
    except BadSampleError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow refuses before its size can be asked; its message has it.
        raise BadSampleError(f"{name} is too large: {error}; expected at most {limits.max_pixels} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise BadSampleError(f"{name} is no picture; expected {kinds}, by content and not by name") from error
    except Exception as error:  # of damaged files the decoders raise nearly anything
        raise BadSampleError(f"{name} is damaged ({type(error).__name__}); expected a whole {kinds}") from error


def _downscaled(image: Image.Image, max_side: int) -> Image.Image:
    """A decoded copy, made smaller before anything else is done with it: the larger picture is held once."""
    if image.mode in ("1", "P", "PA"):  # these cannot be interpolated
        has_alpha = image.mode == "PA" or "transparency" in image.info
        image = image.convert("RGBA" if has_alpha else "RGB")
    image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)  # decodes, a JPEG at a smaller scale at once
    return image


def _walk(container: Any, stream: Any, name: str, limits: UploadLimits) -> tuple[int, float]:
    """Frames and seconds by the packets themselves, of which none is kept; it stops at the first one too many."""
    num_frames, first, last = 0, None, None
    for packet in container.demux(stream):
        if not packet.size:  # flushes the decoder at the end
            continue
        num_frames += 1
        if packet.is_corrupt:
            raise BadSampleError(f"{name} is damaged at frame {num_frames}; expected a whole video")
        time = packet.pts if packet.pts is not None else packet.dts
        if time is not None:
            seconds = float(time * stream.time_base)
            first = seconds if first is None else min(first, seconds)
            last = seconds if last is None else max(last, seconds)
        _check_length(num_frames, 0.0 if first is None or last is None else last - first, name, limits)
    if first is None or last is None:
        raise BadSampleError(f"{name} holds no frames with a time; expected at least one")
    return num_frames, last - first


def _check_length(num_frames: int, seconds: float, name: str, limits: UploadLimits) -> None:
    if not seconds <= limits.max_seconds:
        raise BadSampleError(f"{name} lasts {seconds:.0f} seconds or more; expected at most {limits.max_seconds:g}")
    if num_frames > limits.max_video_frames:
        raise BadSampleError(f"{name} has {num_frames} frames or more; expected at most {limits.max_video_frames}")


def _check_frame_size(width: int, height: int, name: str, limits: UploadLimits) -> None:
    if width * height > limits.max_video_pixels:
        raise BadSampleError(
            f"{name} has frames of {width} x {height} pixels; expected at most {limits.max_video_pixels} in all"
        )
