"""What strangers may upload: refused with a message, within the memory that is promised."""

import io
import os
import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spa3r_hf.upload_limits import (
    DEFAULT_LIMITS,
    UploadLimits,
    check_images,
    check_name,
    check_prompt,
    check_video,
    shown_name,
)


# In a fresh process: how far the peak of resident memory goes up, in bytes.
MEASURE = """
import sys
from pathlib import Path
from PIL import JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from spa3r_hf import upload_limits
if sys.argv[1] == "check_video":
    import av

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])

function, argument = getattr(upload_limits, sys.argv[1]), eval(sys.argv[2])
limits = upload_limits.UploadLimits(**eval(sys.argv[3]))
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
try:
    kept = function(argument, limits)
    message = "accepted"
except ValueError as error:
    message = str(error)
print(status("VmHWM") - before, limits.memory_bound, message)
"""


def measure(function: str, argument, **limits) -> tuple[int, int, str]:
    """Bytes that a check took, the bound, and its message."""
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, function, repr(argument), repr(limits)], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    used, bound, message = process.stdout.strip().split(" ", 2)
    return int(used), int(bound), message


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of so many grey pixels, all of them there, in about a thousandth of the bytes."""
    compressor = zlib.compressobj(9)
    rows = b"".join(compressor.compress(bytes(1 + width)) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = (png_chunk(b"IHDR", header), png_chunk(b"IDAT", rows), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def picture(width=40, height=30, mode="RGB", seed=0) -> Image.Image:
    size = (height, width, len(Image.new(mode, (1, 1)).getbands()))
    pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if size[2] == 1 else pixels, mode)


# --- pictures


# Pillow says what it thinks of damaged metadata and of large pictures.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_of_each_kind_are_opened_by_content(tmp_path, kind):
    path = tmp_path / "no_suffix"
    picture().save(path, kind)
    (opened,) = check_images([str(path)])
    assert opened.mode == "RGB" and opened.size == (40, 30)
    with Image.open(path) as reference:
        assert np.array_equal(np.asarray(opened), np.asarray(reference.convert("RGB")))


def test_pictures_are_upright_and_at_most_so_large(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    half = Image.new("RGB", (400, 200), "red")
    half.paste("blue", (200, 0, 400, 200))
    half.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    (opened,) = check_images([tmp_path / "turned.jpg"], UploadLimits(max_side=100))
    assert opened.size == (50, 100)
    top, bottom = np.asarray(opened, dtype=float)[[20, 80], 25]
    assert top[0] > 200 > 100 > top[2] and bottom[2] > 200 > 100 > bottom[0]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_pictures_of_every_mode_become_rgb(tmp_path, mode):
    path = tmp_path / "picture"
    picture(300, 200, "RGBA").convert(mode).save(path, "JPEG" if mode == "CMYK" else "PNG")
    (opened,) = check_images([path], UploadLimits(max_side=90))
    assert opened.mode == "RGB" and opened.size == (90, 60)


def test_pictures_of_phones_that_hold_several(tmp_path):
    """MPO: a JPEG with others behind it; the first counts."""
    picture(60, 40).save(tmp_path / "stereo.jpg", "MPO", save_all=True, append_images=[picture(60, 40, seed=1)])
    (opened,) = check_images([tmp_path / "stereo.jpg"])
    assert opened.size == (60, 40) and opened.mode == "RGB"


def test_pictures_of_16_bits_are_refused(tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)).save(tmp_path / "depth.png")
    with pytest.raises(ValueError, match="'depth.png' has pixels of kind I;16.*; expected 8 bits a channel"):
        check_images([tmp_path / "depth.png"])


def test_transparent_parts_are_white(tmp_path):
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    picture.save(tmp_path / "a.png")
    picture.convert("P").save(tmp_path / "b.png", transparency=picture.convert("P").getpixel((0, 0)))
    for opened in check_images([tmp_path / "a.png", tmp_path / "b.png"]):
        assert opened.getpixel((3, 3)) == (255, 255, 255)


SVG = '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)" width="8" height="8"/>'


@pytest.mark.parametrize(
    "content",
    [
        SVG,
        "<!DOCTYPE html><html><body><script>alert(1)</script></body></html>",
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\x00\x00\x01\x00" + bytes(60),
        b"GIF89a" + bytes(60),
        b"PK\x03\x04" + bytes(60),
    ],
    ids=["svg", "html", "eps", "ico", "gif", "zip"],
)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".svg"])
def test_what_only_poses_as_a_picture_is_refused(tmp_path, content, suffix):
    path = write(tmp_path / f"photo{suffix}", content)
    with pytest.raises(ValueError, match=rf"'photo{suffix}' is no picture; expected JPEG, PNG, WEBP") as caught:
        check_images([path])
    assert "<" not in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_svg_behind_a_picture_is_the_picture_only(tmp_path):
    """Nothing of the file but its pixels goes on."""
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    (opened,) = check_images([write(tmp_path / "a.png", buffer.getvalue() + SVG.encode())])
    assert opened.size == (40, 30) and not opened.info.get("svg")


def test_decompression_bombs_are_refused_by_their_header(tmp_path):
    for width, height in ((6000, 5000), (10_000, 10_000), (30_000, 30_000)):
        path = write(tmp_path / "bomb.png", png_bomb(width, 1))
        content = bytearray(path.read_bytes())
        content[20:24] = struct.pack(">I", height)  # promises more rows than there are
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"bomb.png.*{width * height}.*expected at most 25000000"):
            check_images([path])


@pytest.mark.parametrize("cut", [0.02, 0.5, 0.95])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_pictures_are_refused(tmp_path, kind, cut):
    picture(200, 200).save(tmp_path / "whole", kind)
    content = (tmp_path / "whole").read_bytes()
    with pytest.raises(ValueError, match="'cut' is (damaged|no picture)"):
        check_images([write(tmp_path / "cut", content[: int(cut * len(content))])])


def test_random_damage_is_a_value_error_or_a_picture(tmp_path):
    generator = np.random.default_rng(0)
    refused = 0
    for kind in ("JPEG", "PNG", "WEBP"):
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 3, "a description"
        picture(64, 48).save(tmp_path / "whole", kind, exif=exif)
        whole = np.frombuffer((tmp_path / "whole").read_bytes(), dtype=np.uint8)
        for _ in range(150):
            damaged = whole.copy()
            places = generator.integers(0, min(len(whole), generator.choice([60, 200, len(whole)])), 4)
            damaged[places] = generator.integers(0, 256, 4)
            try:
                (opened,) = check_images([write(tmp_path / "damaged", damaged.tobytes())])
                assert opened.mode == "RGB" and max(opened.size) <= 1024
            except ValueError as error:
                assert "'damaged'" in str(error)
                refused += 1
    assert refused > 30


def test_many_scans_are_refused(tmp_path):
    picture(64, 64).save(tmp_path / "a.jpg", progressive=True)
    content = (tmp_path / "a.jpg").read_bytes()
    assert check_images([tmp_path / "a.jpg"])
    start = content.index(b"\xff\xda")
    scan = content[start : content.index(b"\xff\xda", start + 2)]
    path = write(tmp_path / "b.jpg", content[:start] + 5000 * scan + content[start:])
    with pytest.raises(ValueError, match="'b.jpg' has 50.. scans; expected a JPEG of at most 100"):
        check_images([path])


def test_number_and_size_of_files(tmp_path):
    picture().save(tmp_path / "a.png")
    # None of the 10,000 exists: they are counted before any is touched.
    for number in (0, 33, 10_000):
        with pytest.raises(ValueError, match=f"^{number} files; expected 1 to 32 pictures"):
            check_images([tmp_path / f"{index}.png" for index in range(number)])
    assert len(check_images([tmp_path / "a.png"] * 32)) == 32
    size = (tmp_path / "a.png").stat().st_size
    with pytest.raises(ValueError, match=f"'a.png' has {size} bytes; expected 1 to {size - 1}"):
        check_images([tmp_path / "a.png"], UploadLimits(max_file_bytes=size - 1))
    with pytest.raises(ValueError, match="'empty' has 0 bytes"):
        check_images([write(tmp_path / "empty", b"")])


def test_a_picture_is_refused_before_any_is_decoded(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="'gone.png' cannot be opened"):
        check_images([tmp_path / "a.png", tmp_path / "gone.png"])


# --- where files may be


def test_files_outside_the_folder_are_refused(tmp_path):
    root = tmp_path / "uploads"
    root.mkdir()
    for path in (root / "a.png", tmp_path / "secret.png", tmp_path / "uploads_of_others.png"):
        picture().save(path)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    assert check_images([root / "a.png"], root=root)
    for bad, message in (
        (root / ".." / "secret.png", r"has '\.\.' in its path"),
        ("uploads/../../etc/passwd", r"'passwd' has '\.\.'"),
        ("..\\..\\windows\\a.png", r"'a\.png' has '\.\.'"),
        (tmp_path / "secret.png", "outside the upload folder"),
        (tmp_path / "uploads_of_others.png", "outside the upload folder"),
        (root / "link.png", "outside the upload folder"),
        ("/etc/passwd", "outside the upload folder"),
        (root / "folder.png", "no regular file"),
        (root / "pipe.png", "no regular file"),
        (f"{root}/a.png\0.jpg", "cannot be opened"),
        (root / ("a" * 5000), "cannot be opened"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            check_images([bad], root=root)
        assert "secret" not in str(caught.value).replace("'secret.png'", "") and len(str(caught.value)) < 200
    for bad in (root / "link.png", "/dev/zero"):
        with pytest.raises(ValueError, match="no regular file"):
            check_images([bad])


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "/etc/passwd", "a/b", "a\\b", "C:a", ".ssh", "a\0b", "a\nb", "a\ud800", "é" * 128, "<b>"],
)
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(ValueError, match="cannot be the name of a file"):
        check_name(name)


def test_plain_names_are_kept():
    for name in ("a.png", "Küche 2 (neu).JPG", "图.webp", "a..b"):
        assert check_name(name) == name


def test_names_are_shown_without_anything_html_reads():
    assert shown_name("/tmp/x/<img src=x onerror=alert(1)>.png") == "'_img src_x onerror_alert(1)_.png'"
    assert shown_name("a/../b&amp;\"'.png") == "'b_amp___.png'"
    assert len(shown_name("x" * 10_000 + ".png")) < 70


# --- prompts


def test_prompts():
    assert check_prompt("  How many chairs?\n") == "How many chairs?"
    assert check_prompt("Wie groß?\n\tA: 1 m²\r\n") == "Wie groß?\n\tA: 1 m²"
    with pytest.raises(ValueError, match="the prompt has 102400 characters; expected at most 2000"):
        check_prompt("a" * 102_400)
    with pytest.raises(ValueError, match="the prompt has 2001 characters"):
        check_prompt(" " * 2001)
    assert len(check_prompt("é" * 2000)) == 2000
    for text, message in ((" \n", "empty"), ("a\0b", "U\\+0000"), ("a\x1b[2J", "U\\+001B"), ("\ud83d", "U\\+D83D")):
        with pytest.raises(ValueError, match=message):
            check_prompt(text)
    with pytest.raises(ValueError, match="the prompt is a NoneType"):
        check_prompt(None)


def test_limits_are_one_or_more():
    for name, value in (("max_files", 0), ("max_seconds", -1.0), ("max_seconds", float("nan"))):
        with pytest.raises(ValueError, match=f"{name} = {value}; expected 1 or more"):
            UploadLimits(**{name: value})


# --- videos


def write_video(path: Path, times, size=(64, 48), codec="libx264", container=None) -> Path:
    """Frames shown at the given times, in seconds."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), index % 256, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), stream.codec_context.time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska", "webm"])
def test_videos_of_each_kind_are_told_by_content(tmp_path, container):
    codec = "libvpx" if container == "webm" else "libx264"
    path = write_video(tmp_path / "no_suffix", np.arange(20) / 10, codec=codec, container=container)
    num_frames, seconds = check_video(path)
    assert num_frames == 20 and seconds == pytest.approx(1.9, abs=0.01)


def test_a_two_hour_video_is_refused(tmp_path):
    """Told by its header, or, where that lies, by its packets."""
    path = write_video(tmp_path / "long.mkv", np.arange(0, 7201, 60))
    with pytest.raises(ValueError, match="'long.mkv' lasts 72.. seconds or more; expected at most 120"):
        check_video(path)
    content = path.read_bytes()
    place = content.index(b"\x44\x89\x88") + 3  # Matroska's Duration: 8 bytes, in milliseconds
    content = content[:place] + struct.pack(">d", 5000.0) + content[place + 8 :]
    with pytest.raises(ValueError, match="'liar.mkv' lasts 1[28]0 seconds or more; expected at most 120"):
        check_video(write(tmp_path / "liar.mkv", content))
    with pytest.raises(ValueError, match="'long.mkv' lasts"):
        check_video(path, UploadLimits(max_seconds=7000))
    assert check_video(path, UploadLimits(max_seconds=8000))[1] == pytest.approx(7200, abs=1)


def test_two_frames_two_hours_apart_are_too_long(tmp_path):
    path = write_video(tmp_path / "slides.mp4", [0, 7200])
    with pytest.raises(ValueError, match="'slides.mp4' lasts 7[0-9]+ seconds or more; expected at most 120"):
        check_video(path)


def test_frames_that_are_too_many_or_too_large(tmp_path):
    path = write_video(tmp_path / "a.mp4", np.arange(40) / 30)
    with pytest.raises(ValueError, match="'a.mp4' has (40|31) frames or more; expected at most 30"):
        check_video(path, UploadLimits(max_video_frames=30))
    with pytest.raises(ValueError, match="'a.mp4' has frames of 64 x 48 pixels; expected at most 3000 in all"):
        check_video(path, UploadLimits(max_video_pixels=3000))
    with pytest.raises(ValueError, match="'a.mp4' has [0-9]+ bytes; expected 1 to 100"):
        check_video(path, UploadLimits(max_video_bytes=100))


def test_frames_larger_than_the_header_says(tmp_path):
    path = write_video(tmp_path / "a.mkv", np.arange(3) / 30, size=(640, 480))
    content = path.read_bytes()
    header = b"\xb0\x82" + struct.pack(">H", 640) + b"\xba\x82" + struct.pack(">H", 480)
    assert content.count(header) == 1
    content = content.replace(header, b"\xb0\x82" + struct.pack(">H", 64) + b"\xba\x82" + struct.pack(">H", 48))
    with pytest.raises(ValueError, match="'liar.mkv' (cannot be read|has frames of 640 x 480)"):
        check_video(write(tmp_path / "liar.mkv", content), UploadLimits(max_video_pixels=100_000))


def test_what_only_poses_as_a_video_is_refused(tmp_path):
    secret = write_video(tmp_path / "secret.mkv", np.arange(3) / 30)
    picture().save(tmp_path / "still.mp4", "PNG")
    for name, content in (
        ("page.mp4", "<html>"),
        ("list.mp4", f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n"),
        ("concat.mp4", f"ffconcat version 1.0\nfile {secret}\n"),
        ("drawing.mp4", SVG),
        ("still.mp4", (tmp_path / "still.mp4").read_bytes()),
        ("cut.mp4", write_video(tmp_path / "whole.mp4", np.arange(30) / 30).read_bytes()[:-700]),
    ):
        with pytest.raises(ValueError, match=f"'{name}' cannot be read as a video .*; expected MP4"):
            check_video(write(tmp_path / name, content))
    for bad in (tmp_path, tmp_path / "gone.mp4", tmp_path / ".." / "a.mp4", "/dev/zero"):
        with pytest.raises(ValueError, match="cannot be opened|no regular file|in its path"):
            check_video(bad)


# --- memory


on_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc")


@on_linux
def test_memory_stays_below_the_bound_that_is_stated(tmp_path):
    assert DEFAULT_LIMITS.memory_bound < 800e6
    canvas = picture(70, 70, "RGBA").resize((2000, 2000), Image.Resampling.BILINEAR)
    kinds = {
        "png": (canvas, {"format": "PNG", "compress_level": 1}),
        "cmyk": (canvas.convert("CMYK"), {"format": "JPEG", "progressive": True, "subsampling": 0, "quality": 95}),
        "webp": (canvas, {"format": "WEBP", "lossless": True, "method": 0, "quality": 0}),
    }
    for name, (content, options) in kinds.items():
        content.save(tmp_path / name, **options)
    paths = [str(tmp_path / name) for name in kinds] * 5
    used, bound, message = measure(
        "check_images", paths, max_pixels=2000 * 2000, max_files=15, max_side=512, max_video_pixels=1
    )
    assert message == "accepted" and bound > used > 20e6, (used, bound)


@on_linux
def test_bombs_cost_next_to_nothing(tmp_path):
    bomb = str(write(tmp_path / "bomb.png", png_bomb(20_000, 8_000)))  # 160 MB once decoded, 160 kB as a file
    used, bound, message = measure("check_images", [bomb] * 32)
    assert "bomb.png" in message and "160000000 pixels; expected at most 25000000" in message
    assert used < 20e6 < bound


@on_linux
def test_a_long_video_is_not_held(tmp_path):
    """120 s of noise, 30 MB: packets are looked at and let go."""
    av = pytest.importorskip("av")
    path = tmp_path / "noise.mkv"
    noise = np.random.default_rng(0).integers(0, 256, (8, 240, 320, 3), dtype=np.uint8)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mjpeg", rate=10, options={"qmin": "1", "qmax": "2"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuvj420p"
        for index in range(600):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(noise[index % 8], format="rgb24")))
        output.mux(stream.encode())
    size = path.stat().st_size
    assert size > 30e6
    used, bound, message = measure("check_video", str(path), max_video_pixels=320 * 240)
    assert message == "accepted" and used < size / 2 and used < bound + 10e6, (used, bound, size)
