"""
Measure what sharing a scene among its questions saves, and what seeking saves in decoding its video.

    python training/benchmark_answers.py                                   # a few minutes on one CPU core
    python training/benchmark_answers.py --questions 4 --frames 8 --video_seconds 10 --skip_spa3_vlm    # a quick look
    python training/benchmark_answers.py --device cuda --dtype bfloat16

- Answers: questions about one video of --frames frames, one by one (`reuse=False`: each decodes the video, encodes the
  scene and reads all its tokens) and together (`reuse=True`). Weights are random, and all answers have 16 tokens, the
  most there is to be done; they have to be the same both ways.
- Decoding: --frames frames evenly over a 640 x 480 mp4, by decoding it from start to end, and by `VideoFrames`, with
  its opening; pixels have to be the same. With a key frame every second, as phones film, and with x264's own settings,
  250 frames apart. `VideoFrames` uses several threads, the decoder from start to end one, as is PyAV's default.

Seconds are of the wall clock: the median of --repeats runs, which take turns; answers are timed once.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from spa3r_hf import Spa3AdapterConfig, Spa3RConfig, Spa3RModel, Spa3VLM, Spa3VLMProcessor, get_spa3_vlm
from spa3r_hf.model_card import markdown_table
from spa3r_hf.nano_vlm import nano_vlm_config, train_tokenizer
from spa3r_hf.scene_answers import SceneAnswerer
from spa3r_hf.video import VideoFrames, frame_times


REPOSITORY = Path(__file__).resolve().parent.parent
FRAMES_PER_SECOND = 24
HEIGHT, WIDTH = 480, 640
IMAGE_SIZE = 168  # 6 x 4 visual tokens a frame
KEY_FRAMES = {"a key frame a second": {"g": str(FRAMES_PER_SECOND)}, "x264's key frames (250)": {}}
OBJECTS = ("chair", "table", "sofa", "lamp", "bed", "door", "window", "plant", "shelf", "stove")


# --- what is measured


def write_walk(path: Path, seconds: float, options: dict[str, str]) -> None:
    """A camera gliding over a surface with detail of all sizes, as H.264 in mp4, `HEIGHT` x `WIDTH`."""
    generator = np.random.default_rng(0)
    surface = np.zeros((2 * HEIGHT, 3 * WIDTH, 3))
    for scale in (4, 16, 64):
        coarse = generator.integers(0, 256, (2 * HEIGHT // scale, 3 * WIDTH // scale, 3), dtype=np.uint8)
        surface += np.asarray(Image.fromarray(coarse).resize((3 * WIDTH, 2 * HEIGHT), Image.Resampling.BICUBIC)) / 3
    pixels, num_frames = surface.astype(np.uint8), round(seconds * FRAMES_PER_SECOND)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"preset": "veryfast", **options})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for angle in np.linspace(0, 2 * np.pi, num_frames):
            x, y = int(WIDTH * (1 + np.sin(3 * angle))), int(HEIGHT / 2 * (1 + np.cos(2 * angle)))
            view = np.ascontiguousarray(pixels[y : y + HEIGHT, x : x + WIDTH])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        container.mux(stream.encode())


def questions_about_a_room(number: int) -> list[str]:
    """With the prompts of VSI-Bench, of its lengths."""
    ends = ("Please answer the question using a single word or phrase.",)
    starts = (
        "How many {0}(s) are in this room?",
        "Measuring from the closest point of each object, what is the distance between the {0} and the {1} (in meters)"
        "?",
        "What is the length of the longest dimension (length, width, or height) of the {0}, measured in centimeters?",
    )
    texts = []
    for index in range(number):
        words = OBJECTS[index % len(OBJECTS)], OBJECTS[(3 * index + 1) % len(OBJECTS)]
        texts.append("\n".join(("These are frames of a video.", starts[index % len(starts)].format(*words), *ends)))
    return texts


def build_vlm(tokenizer: Any, device: str, dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL's architecture with random weights: 12 layers of width 384, a vision tower of 6 of width 256."""
    settings = nano_vlm_config(tokenizer).to_dict()
    for name in ("layer_types", "max_window_layers"):
        settings["text_config"].pop(name, None)
    text = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 6}
    vision = {"hidden_size": 256, "out_hidden_size": 384, "intermediate_size": 704, "depth": 6, "num_heads": 8}
    config = Qwen2_5_VLConfig(
        **settings
        | {"text_config": settings["text_config"] | text | {"rope_parameters": {**ROPE}}}
        | {"vision_config": settings["vision_config"] | vision}
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    # Scores as far apart as those of a trained model; an answer never ends by itself.
    with torch.no_grad():
        model.lm_head.weight.normal_()
    model.generation_config.eos_token_id = None
    return model.to(device=device, dtype=dtype)


ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}


def add_spatial_encoder(vlm: Qwen2_5_VLForConditionalGeneration, device: str) -> Spa3VLM:
    """Spa3R at nano size, and an adapter."""
    encoder = Spa3RModel(Spa3RConfig.from_pretrained(REPOSITORY / "hub_configs" / "spa3r-nano")).float().eval()
    return get_spa3_vlm(vlm, encoder.to(device), Spa3AdapterConfig()).eval()


# --- how


def seconds_of(run: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def reuse_benchmark(
    model: Any, processor: Spa3VLMProcessor, video: Path, prompts: Sequence[str], batch_size: int, device: str
) -> dict[str, Any]:
    """Seconds for all questions one by one and together, and how many of the answers are the same."""
    variants = {reuse: SceneAnswerer(model, processor, batch_size=batch_size, reuse=reuse) for reuse in (False, True)}
    for answerer in variants.values():
        answerer.answer(video, prompts[:2])  # warm-up
    alone, expected = seconds_of(lambda: variants[False].answer(video, prompts), device)
    together, answers = seconds_of(lambda: variants[True].answer(video, prompts), device)
    return {
        "questions": len(prompts),
        "frames": answers[0].num_frames,
        "seconds_one_by_one": alone,
        "seconds_together": together,
        "ratio": together / alone,
        "equal_answers": sum(left == right for left, right in zip(answers, expected, strict=True)),
    }


def decoding_benchmark(video: Path, num_frames: int, repeats: int) -> dict[str, Any]:
    """Seconds for some frames by decoding all of the video and by seeking, and whether the pixels are the same."""
    indices = np.linspace(0, len(VideoFrames(video)) - 1, num_frames).round().astype(int).tolist()

    def from_start_to_end() -> list[np.ndarray]:
        with av.open(str(video)) as container:
            frames = enumerate(container.decode(video=0))
            return [frame.to_ndarray(format="rgb24") for index, frame in frames if index in wanted]

    def by_seeking() -> list[np.ndarray]:
        frame_times.cache_clear()
        return [np.asarray(picture) for picture in VideoFrames(video).pictures(indices)]

    wanted = set(indices)
    seconds: dict[str, list[float]] = {"seconds_sequential": [], "seconds_seeking": []}
    for _ in range(repeats):
        sequential, expected = seconds_of(from_start_to_end)
        seeking, frames = seconds_of(by_seeking)
        seconds["seconds_sequential"].append(sequential)
        seconds["seconds_seeking"].append(seeking)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "frames": len(indices),
        **medians,
        "ratio": medians["seconds_seeking"] / medians["seconds_sequential"],
        "same_pixels": np.array_equal(expected, frames),
    }


def answers_table(results: dict[str, dict[str, Any]]) -> str:
    header = ["", "one by one", "together", "ratio", "equal answers"]
    rows = [
        [
            name,
            f"{result['seconds_one_by_one']:.1f} s",
            f"{result['seconds_together']:.1f} s",
            f"{result['ratio']:.3f}",
            f"{result['equal_answers']} of {result['questions']}",
        ]
        for name, result in results.items()
    ]
    return markdown_table(header, rows)


def decoding_table(results: dict[str, dict[str, Any]]) -> str:
    header = ["", "from start to end", "by seeking", "ratio", "same pixels"]
    rows = [
        [
            name,
            f"{result['seconds_sequential']:.2f} s",
            f"{result['seconds_seeking']:.2f} s",
            f"{result['ratio']:.2f}",
            "yes" if result["same_pixels"] else "no",
        ]
        for name, result in results.items()
    ]
    return markdown_table(header, rows)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--video_seconds", type=float, default=90.0)
    parser.add_argument("--batch_size", type=int, default=10, help="questions answered at once")
    parser.add_argument("--skip_spa3_vlm", action="store_true", help="measure the VLM alone")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="of decoding")
    parser.add_argument("--output_json", type=Path)
    args = parser.parse_args(argv)
    if args.questions < 2 or args.frames < 2 or args.video_seconds < 1 or args.batch_size < 1 or args.repeats < 1:
        parser.error(
            "expected --questions and --frames of at least 2, and --video_seconds, --batch_size and --repeats of 1"
        )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    prompts = questions_about_a_room(args.questions)
    tokenizer = train_tokenizer(prompts)
    processor = Spa3VLMProcessor(
        Qwen2VLImageProcessorPil(), tokenizer, tokenizer.chat_template, spatial_options={"size": IMAGE_SIZE}
    )
    processor.min_frames = processor.max_frames = args.frames
    vlm = build_vlm(tokenizer, args.device, getattr(torch, args.dtype))
    size = sum(parameter.numel() for parameter in vlm.parameters())
    models: dict[str, Callable[[], Any]] = {f"Qwen2.5-VL's architecture, {size / 1e6:.0f} M": lambda: vlm}
    if not args.skip_spa3_vlm:
        models["the same as Spa3-VLM, nano Spa3R"] = lambda: add_spatial_encoder(vlm, args.device)
    answers, decoding = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder, "walk.mp4")
        for name, options in KEY_FRAMES.items():
            write_walk(video, args.video_seconds, options)
            decoding[name] = decoding_benchmark(video, args.frames, args.repeats)
        for name, build in models.items():
            answers[name] = reuse_benchmark(build(), processor, video, prompts, args.batch_size, args.device)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.questions} questions about {args.frames} frames of a video ({machine}, {args.dtype})\n")
    print(f"{answers_table(answers)}\n")
    print(f"{args.frames} frames of a video of {args.video_seconds:g} s, {WIDTH} x {HEIGHT}\n")
    print(decoding_table(decoding))
    if args.output_json:
        report = {"machine": machine, "dtype": args.dtype, "answers": answers, "decoding": decoding}
        args.output_json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
