"""What visitors may bring to the Space, good and bad, and a tiny Spa3-VLM to answer them."""

import json
import struct
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image


SPACE = Path(__file__).resolve().parent.parent / "hub_configs" / "space"
NANO = SPACE.parent / "spa3r-nano"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script><rect width="9" height="9"/></svg>'
HTML = b"<!DOCTYPE html><html><body><img src=x onerror=alert(1)></body></html>"

# A Space's modules are imported as they are where it runs: from their own folder.
sys.path.insert(0, str(SPACE))
import app  # noqa: E402
import ask  # noqa: E402
import handlers  # noqa: E402
import make_examples  # noqa: E402
import scenes  # noqa: E402


__all__ = ["app", "ask", "handlers", "make_examples", "scenes"]


def photographs(folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (160, 120)) -> list[Path]:
    """JPEG files of coloured noise, (width, height) pixels."""
    generator, paths = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        paths.append(folder / f"photo_{seed}_{number}.jpg")
        coarse.resize(size, Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def decompression_bomb(path: Path, side: int = 30_000) -> Path:
    """A PNG of a few kilobytes that says it has `side` x `side` pixels."""
    rows = zlib.compress(b"\0" * 100_000)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks:
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    path.write_bytes(data)
    return path


def video(path: Path, seconds: float, num_frames: int = 24) -> Path:
    """An MP4 file whose frames are evenly spread over so many seconds."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(num_frames):
            pixels = np.full((64, 96, 3), 10 * number % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(1000 * seconds * number / (num_frames - 1)), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def tiny_spa3_vlm(folder: Path) -> Path:
    """An adapter's folder, its VLM beside it: random, but pictures and scenes matter to it."""
    from tiny_vlms import disturb
    from transformers import AutoModel, AutoModelForImageTextToText

    from spa3r_hf import Spa3AdapterConfig, Spa3RImageProcessor, Spa3VLMProcessor, get_spa3_vlm
    from spa3r_hf.nano_vlm import fresh_nano_vlm, save_nano_vlm, train_tokenizer

    examples = json.loads((SPACE / "examples" / "examples.json").read_text())
    tokenizer = train_tokenizer([each["prompt"] for example in examples for each in example["questions"]], 400)
    torch.manual_seed(0)
    fresh = fresh_nano_vlm(tokenizer)
    with torch.no_grad():
        for parameter in fresh.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # so that pictures matter
    save_nano_vlm(folder / "nano-vlm", fresh, tokenizer)
    vlm = AutoModelForImageTextToText.from_pretrained(folder / "nano-vlm", dtype=torch.float32)
    encoder = AutoModel.from_pretrained(NANO, dtype=torch.float32)
    adapter = folder / "spa3-vlm-nano"
    disturb(get_spa3_vlm(vlm, encoder, Spa3AdapterConfig())).save_pretrained(adapter)
    processor = Spa3VLMProcessor.from_vlm(folder / "nano-vlm", Spa3RImageProcessor(size=112), max_frames=12)
    processor.save_pretrained(adapter)
    return adapter
