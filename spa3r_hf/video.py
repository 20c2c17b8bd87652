"""Single frames of video files, exactly those a sequential decoder would give."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import BadSampleError
from .optional import require


class VideoFrames(Sequence[Image.Image]):
    """The frames of a video file in order of presentation, as upright RGB pictures, each decoded when asked for.

    Opening reads the container's packets without decoding them, so that the number of frames is known also where the
    header lacks it, and the times also where the frame rate varies. A frame costs a seek to the key frame before it
    and decoding from there on (in AVI, from the start); its pixels are those of decoding from the start.

    Attributes:
        seconds: (num_frames,) float64, presentation time of each frame, ascending (AVI: up to a few frames off).

    Raises:
        BadSampleError: The file is no video, or is damaged or truncated.
        FileNotFoundError: There is no such file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        status = self.path.stat()
        self._times, time_base, self._can_seek = _frame_times(self.path, status.st_size, status.st_mtime_ns)
        self.seconds = self._times * time_base

    def __len__(self) -> int:
        return len(self._times)

    def __getitem__(self, index: int) -> Image.Image:  # type: ignore[override]  # no slices
        index = range(len(self))[index]
        frame = self._seek(index) if self._can_seek else None
        if frame is None:
            with _open(self.path) as (container, stream):
                frame = next(islice(container.decode(stream), index, None), None)
        if frame is None or frame.is_corrupt:
            raise BadSampleError(f"video {self.path}: frame {index} (time {self.seconds[index]:.3f} s) is damaged")
        pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)  # phones film sideways
        return Image.fromarray(np.ascontiguousarray(pixels))

    def _seek(self, index: int) -> Any:
        """The frame, or None where the container's seeking misses it (MPEG-TS often goes too far)."""
        time = int(self._times[index])
        with _open(self.path) as (container, stream):
            container.seek(time, stream=stream)
            for frame in container.decode(stream):
                if frame.pts is not None and frame.pts >= time:
                    return frame if frame.pts == time else None
        return None


@lru_cache(maxsize=256)
def _frame_times(path: Path, size: int, modified: int) -> tuple[np.ndarray, float, bool]:
    """Times of the frames in units of the time base, the time base in seconds, and whether the times can be sought.

    `size` and `modified` belong to the key of the cache: a file written anew is read anew.
    """
    with _open(path) as (container, stream):
        # The packet that flushes the decoder at the end has no size.
        packets = [packet for packet in container.demux(stream) if packet.size]
        if any(packet.is_corrupt for packet in packets) or len(packets) < stream.frames:
            raise BadSampleError(
                f"video {path} is truncated: {len(packets)} frames; expected {stream.frames} by its header, all whole"
            )
        packets = [packet for packet in packets if not packet.is_discard]  # cut away by an edit list
        # AVI tells when frames are decoded, not when they are shown: with B-frames its times belong to other frames.
        can_seek = container.format.name != "avi" and all(packet.pts is not None for packet in packets)
        times = sorted({packet.pts if can_seek else packet.dts for packet in packets} - {None})
        if not times:
            raise BadSampleError(f"video {path} holds no frames with a time; expected at least one")
        return np.array(times), float(stream.time_base), can_seek


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream; what the decoder cannot read becomes a `BadSampleError`."""
    av = require("av", extra="video")
    try:
        with av.open(str(path)) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise BadSampleError(f"video {path} holds no video stream")
            yield container, stream
    except av.FFmpegError as error:
        raise BadSampleError(f"video {path} cannot be read: {error}") from error
