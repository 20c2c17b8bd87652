"""
Ask a Spa3-VLM a question about a scene: pictures, a folder of them, or a video.

    python training/ask.py --media photographs/kitchen --question "How many chairs are in this room?"
    python training/ask.py --media room.mp4 --question "How large is this room in square meters?" --max_frames 16
    python training/ask.py --media a.jpg b.jpg --question "..." --adapter outputs/spa3_vlm

The adapter's folder or Hub repo names its VLM and its spatial encoder. All media are one scene. The VLM answers with
the adapter, and without it, from the same pictures.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from spa3r_hf import Spa3VLM, Spa3VLMProcessor
from spa3r_hf.media_spa3_vlm import read_conversation
from spa3r_hf.scenes import VIDEO_SUFFIXES


REPOSITORY = Path(__file__).resolve().parent.parent
NANO = REPOSITORY / "hub_configs" / "spa3-vlm-nano"
MAKE_NANO = (
    "python training/build_nano_vlm.py && python training/run_spa3_vlm.py --variants cross_attention, then --adapter "
    "outputs/spa3_vlm/cross_attention"
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--media", nargs="+", required=True, help="pictures, folders of pictures, videos: one scene")
    parser.add_argument("--question", required=True)
    parser.add_argument("--adapter", default=str(NANO), help="folder or Hub repo")
    parser.add_argument("--without_adapter", action="store_true", help="ask the VLM alone")
    parser.add_argument("--max_frames", type=int, help="of a folder or a video; default: the processor's")
    parser.add_argument("--max_new_tokens", type=int, default=16)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def load(args: argparse.Namespace) -> tuple[Spa3VLM, Spa3VLMProcessor]:
    """The model, on its device, and its processor; of a folder that is missing, the error says how it is made."""
    if args.adapter == str(NANO) and not NANO.is_dir():
        raise FileNotFoundError(f"there is no {NANO}; make one: {MAKE_NANO}")
    frames: dict[str, Any] = {}
    if args.max_frames is not None:
        own = Spa3VLMProcessor.from_pretrained(args.adapter)
        frames = {"max_frames": args.max_frames, "min_frames": min(own.min_frames, args.max_frames)}
    processor = Spa3VLMProcessor.from_pretrained(args.adapter, **frames)
    model = Spa3VLM.from_pretrained(args.adapter, dtype=args.dtype)
    return model.to(args.device), processor


def conversation_about(media: list[str], question: str) -> list[dict[str, Any]]:
    kinds = ["video" if Path(path).is_dir() or path.lower().endswith(VIDEO_SUFFIXES) else "image" for path in media]
    content = [{"type": kind, kind: path} for kind, path in zip(kinds, media, strict=True)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def answer(model: Spa3VLM, processor: Spa3VLMProcessor, inputs: dict[str, Any], max_new_tokens: int) -> str:
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() or "(nothing)"


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    disable_progress_bar()
    try:
        model, processor = load(args)
        conversation = conversation_about(args.media, args.question)
        views = read_conversation(conversation, processor.frame_sampling, "the question").views
        inputs = processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(args.device)
    except (OSError, ValueError) as error:
        sys.exit(f"ask.py: error: {error}")
    print(f"{len(views)} frames: {', '.join(view.name for view in views)}")
    if not args.without_adapter:
        start = time.perf_counter()
        said = answer(model, processor, dict(inputs), args.max_new_tokens)
        print(f"with the adapter:    {said or '(nothing)'}    ({time.perf_counter() - start:.2f} s)")
    with model.disable_adapter():
        start = time.perf_counter()
        said = answer(model, processor, dict(inputs), args.max_new_tokens)
        print(f"without the adapter: {said or '(nothing)'}    ({time.perf_counter() - start:.2f} s)")


if __name__ == "__main__":
    main()
