"""Single frames of video files, exactly those a sequential decoder would give."""

from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import BadSampleError
from .optional import require


# That decode one video, each from another key frame on.
_NUM_THREADS = 4


class VideoFrames(Sequence[Image.Image]):
    """The frames of a video file in order of presentation, as upright RGB pictures, each decoded when asked for.

    Opening reads the container's packets without decoding them, so that the number of frames is known also where the
    header lacks it, and the times also where the frame rate varies. A frame costs a seek to the key frame before it
    and decoding from there on (in AVI, from the start), without what no other frame needs; its pixels are those of
    decoding from the start. `pictures` gives several frames for less than each alone.

    Attributes:
        seconds: (num_frames,) float64, presentation time of each frame, ascending (AVI: up to a few frames off).

    Raises:
        BadSampleError: The file is no video, or is damaged or truncated.
        FileNotFoundError: There is no such file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        status = self.path.stat()
        self._times, self._key_times, time_base, self._can_seek = frame_times(
            self.path, status.st_size, status.st_mtime_ns
        )
        self.seconds = self._times * time_base

    def __len__(self) -> int:
        return len(self._times)

    def __getitem__(self, index: int) -> Image.Image:  # type: ignore[override]  # no slices
        return self.pictures([index])[0]

    def pictures(self, indices: Sequence[int]) -> list[Image.Image]:
        """The frames of these numbers, in the order asked for; between two key frames nothing is decoded twice."""
        indices = [range(len(self))[index] for index in indices]
        found = self._seek(sorted(set(indices))) if self._can_seek else {}
        if missed := set(indices) - found.keys():
            found |= self._decode_from_start(missed)
        return [found[index] for index in indices]

    def _seek(self, indices: Sequence[int]) -> dict[int, Image.Image]:
        """Index -> picture, without frames that the container's seeking misses (MPEG-TS often goes too far)."""
        groups: dict[int, dict[int, int]] = {}  # those after one key frame: time -> index
        for index in indices:
            time = int(self._times[index])
            groups.setdefault(int(np.searchsorted(self._key_times, time, side="right")), {})[time] = index
        shares = [list(groups.values())[start::_NUM_THREADS] for start in range(min(len(groups), _NUM_THREADS))]
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            return {index: picture for found in pool.map(self._seek_groups, shares) for index, picture in found}

    def _seek_groups(self, groups: Sequence[dict[int, int]]) -> list[tuple[int, Image.Image]]:
        found = []
        with _open(self.path) as (container, stream):
            for wanted in groups:
                container.seek(min(wanted), stream=stream)
                for frame in _decode_for(container, stream, wanted):
                    if frame.pts in wanted and not frame.is_corrupt:
                        found.append((wanted[frame.pts], _upright(frame)))
                    if frame.pts is not None and frame.pts >= max(wanted):
                        break
        return found

    def _decode_from_start(self, indices: set[int]) -> dict[int, Image.Image]:
        found: dict[int, Image.Image] = {}
        with _open(self.path) as (container, stream):
            for index, frame in enumerate(islice(container.decode(stream), max(indices) + 1)):
                if index in indices and not frame.is_corrupt:
                    found[index] = _upright(frame)
        if damaged := indices - found.keys():
            index = min(damaged)
            raise BadSampleError(f"video {self.path}: frame {index} (time {self.seconds[index]:.3f} s) is damaged")
        return found


def _decode_for(container: Any, stream: Any, times: Container[int]) -> Iterator[Any]:
    """Frames from here on; of those that no other frame needs, only the ones of the given times."""
    for packet in container.demux(stream):
        stream.codec_context.skip_frame = "DEFAULT" if packet.pts in times else "NONREF"
        yield from packet.decode()


def _upright(frame: Any) -> Image.Image:
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)  # phones film sideways
    return Image.fromarray(np.ascontiguousarray(pixels))


@lru_cache(maxsize=256)
def frame_times(path: Path, size: int, modified: int) -> tuple[np.ndarray, np.ndarray, float, bool]:
    """Times of the frames, and of key frames, in units of the time base; that in seconds; whether they can be sought.

    `size` and `modified` belong to the key of the cache: a file written anew is read anew.
    """
    with _open(path) as (container, stream):
        # The packet that flushes the decoder at the end has no size. None is kept: together they hold the whole file.
        packets = [
            (packet.pts, packet.dts, packet.is_keyframe, packet.is_corrupt, packet.is_discard)
            for packet in container.demux(stream)
            if packet.size
        ]
        if any(is_corrupt for *_, is_corrupt, _ in packets) or len(packets) < stream.frames:
            raise BadSampleError(
                f"video {path} is truncated: {len(packets)} frames; expected {stream.frames} by its header, all whole"
            )
        shown = [(pts, dts) for pts, dts, *_, is_discard in packets if not is_discard]  # not cut away by an edit list
        # AVI tells when frames are decoded, not when they are shown: with B-frames its times belong to other frames.
        can_seek = container.format.name != "avi" and all(pts is not None for pts, _ in shown)
        times = sorted({pts if can_seek else dts for pts, dts in shown} - {None})
        if not times:
            raise BadSampleError(f"video {path} holds no frames with a time; expected at least one")
        key_times = sorted(pts for pts, _, is_key, *_ in packets if is_key) if can_seek else []
        return np.array(times), np.array(key_times), float(stream.time_base), can_seek


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
