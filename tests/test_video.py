from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import spa3r_hf.video as video_module
from spa3r_hf.errors import BadSampleError
from spa3r_hf.video import VideoFrames


av = pytest.importorskip("av")

NUM_FRAMES = 40
GROUPS = {"g": "10", "bf": "2"}  # key frames and B-frames, so that decoding order is not presentation order


def write_video(path: Path, codec="libx264", milliseconds=None, options=GROUPS, fast_start=False) -> Path:
    """A camera sliding over noise: 64 x 48, 30 frames a second or presented at the given times."""
    canvas = np.random.default_rng(0).integers(0, 256, (48 + NUM_FRAMES, 64 + 2 * NUM_FRAMES, 3), dtype=np.uint8)
    container_options = {"movflags": "faststart"} if fast_start else {}
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(NUM_FRAMES):
            pixels = np.ascontiguousarray(canvas[i : i + 48, 2 * i : 2 * i + 64])
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if milliseconds is not None:
                frame.pts, frame.time_base = int(milliseconds[i]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decode_sequentially(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


UNEVEN = np.cumsum(np.random.default_rng(1).integers(5, 90, NUM_FRAMES))


@pytest.mark.parametrize(
    "name, settings",
    [
        ("plain.mp4", {}),
        ("open_gop.mp4", {"options": GROUPS | {"x264-params": "open-gop=1:keyint=10"}}),
        ("variable_rate.mp4", {"milliseconds": UNEVEN}),
        ("no_frame_count.mkv", {"milliseconds": UNEVEN}),
        (
            "hidden_frames.webm",
            {"codec": "libvpx-vp9", "options": {"g": "10", "cpu-used": "8", "lag-in-frames": "16"}},
        ),
        ("stream.ts", {}),
        ("wrong_times.avi", {}),
    ],
)
def test_single_frames_are_those_of_sequential_decoding(tmp_path, name, settings):
    path = write_video(tmp_path / name, **settings)
    expected = decode_sequentially(path)
    video = VideoFrames(path)
    assert len(video) == len(expected) == len(video.seconds) == NUM_FRAMES
    for index in (17, 0, 39, 9, 10, 11, 38, -2):  # any order, around key frames
        np.testing.assert_array_equal(np.asarray(video[index]), expected[index], err_msg=f"frame {index}")
    for indices in ([5, 31, 6, 17, 5, -1, 29, 30, 0], range(NUM_FRAMES), []):
        pictures = [np.asarray(picture) for picture in video.pictures(indices)]
        assert len(pictures) == len(indices)
        for index, pixels in zip(indices, pictures, strict=True):
            np.testing.assert_array_equal(pixels, expected[index], err_msg=f"frame {index}")
    with pytest.raises(IndexError):
        video[NUM_FRAMES]


def test_no_more_is_decoded_than_needed(tmp_path, monkeypatch):
    """Key frames every 10 frames, and between them frames that no other needs."""
    video = VideoFrames(
        write_video(tmp_path / "plain.mp4", options=GROUPS | {"x264-params": "b-pyramid=none:scenecut=0"})
    )
    decoded: list[int] = []
    decode = video_module._decode_for

    def count(container, stream, times):
        for frame in decode(container, stream, times):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_module, "_decode_for", count)
    pictures = video.pictures([12, 14, 31])
    # 10 is a key frame; then b-frames in pairs, 13, 16 and 19 the others. Of those: 10, 12, 13, 14, 16; 30, 31, 33.
    assert len(decoded) < 9 and len(pictures) == 3


def test_times_are_those_of_the_file(tmp_path):
    even = VideoFrames(write_video(tmp_path / "even.mp4"))
    np.testing.assert_allclose(even.seconds, np.arange(NUM_FRAMES) / 30, atol=1e-3)
    uneven = VideoFrames(write_video(tmp_path / "uneven.mp4", milliseconds=UNEVEN))
    np.testing.assert_allclose(np.diff(uneven.seconds), np.diff(UNEVEN) / 1000, atol=1e-3)


def test_pictures_filmed_sideways_are_upright(tmp_path):
    path = write_video(tmp_path / "phone.mp4")
    expected = np.rot90(decode_sequentially(path)[3], -1)  # a phone held upright: shown turned clockwise
    data = bytearray(path.read_bytes())
    matrix = np.array([0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000], ">i4").tobytes()
    turned = np.array([0, 0x10000, 0, -0x10000, 0, 0, 48 << 16, 0, 0x40000000], ">i4").tobytes()
    track = data.index(b"tkhd")
    start = data.index(matrix, track)
    data[start : start + len(matrix)] = turned
    path.write_bytes(data)
    assert VideoFrames(path)[3].size == (48, 64)
    np.testing.assert_array_equal(np.asarray(VideoFrames(path)[3]), expected)


def test_damaged_files_are_named(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", fast_start=True).read_bytes()
    for name, data in {"empty.mp4": b"", "text.mp4": b"no video", "headless.mp4": whole[600:]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadSampleError, match=f"{name} cannot be read"):
            VideoFrames(tmp_path / name)
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadSampleError, match=r"cut.mp4 is truncated: \d+ frames; expected 40"):
        VideoFrames(tmp_path / "cut.mp4")
    with pytest.raises(FileNotFoundError, match="missing.mp4"):
        VideoFrames(tmp_path / "missing.mp4")


def test_sound_is_no_video(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(BadSampleError, match="sound.mp4 holds no video stream"):
        VideoFrames(path)


def test_a_file_written_anew_is_read_anew(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    assert len(VideoFrames(path)) == NUM_FRAMES
    path.write_bytes(b"")
    with pytest.raises(BadSampleError, match="cannot be read"):
        VideoFrames(path)
