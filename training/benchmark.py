"""
Measure Spa3R's speed and memory: encoding against the number of views, and a training step in either masking mode; and
Spa3-VLM's, see `benchmark_spa3_vlm.py`, which can also be run alone.

    python training/benchmark.py                                    # some minutes on two CPU cores
    python training/benchmark.py --size nano
    python training/benchmark.py --size base --image_size 518 392 --dtype bfloat16 --device cuda

Weights are random: they change no time and no byte. "Keeping all layers" is this very code, asked to return the tokens
of every backbone layer, as the original release does; it is not the release, whose own code is not measured here.

- Seconds: median of `--repeats` runs after one warm-up; the variants of a pair take turns.
- Memory: peak of the tensors that a run adds to what was allocated before it (weights, and for a training step the
  optimizer's state). CPU: sum of all allocations and releases that torch's allocator tells its profiler, in one run
  that is not timed; buffers inside the BLAS are not seen. CUDA: `max_memory_allocated`.
- FLOPs: counted by `FlopCounterMode`, 2 per multiply-add of matrix products, convolutions and attention. Efficiency is
  FLOPs / seconds over the matmul rate of the machine.
"""

import argparse
import functools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from benchmark_parts import build_model, machine_rates, measure
from benchmark_spa3_vlm import bench_spa3_vlm, spa3_vlm_tables
from torch import Tensor

from spa3r_hf import Spa3RForPreTraining


@contextmanager
def keeping_all_layers(model: Spa3RForPreTraining) -> Iterator[None]:
    """Within it the backbone returns the tokens of all its layers, whatever is read of them."""
    backbone = model.spa3r.backbone
    layers = range(backbone.config.num_hidden_layers)
    backbone.forward = functools.partial(backbone.forward, output_layers=layers)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del backbone.forward


def bench_encoding(
    model: Spa3RForPreTraining, views: list[int], pixels_of: Callable[[int], Tensor], device: str, repeats: int
) -> list[dict[str, Any]]:
    """One row for each number of views and variant."""
    model.eval()
    config = model.config.backbone_config
    rows = []
    for num_views in views:
        pixels = pixels_of(num_views)
        num_tokens = num_views * (config.num_prefix_tokens + math.prod(pixels.shape[-2:]) // config.patch_size**2)
        layer_bytes = num_tokens * config.feature_size * pixels.element_size()

        @torch.no_grad()
        def encode(pixels: Tensor = pixels) -> None:
            model.spa3r(pixels)

        def encode_keeping_all(encode: Callable[[], None] = encode) -> None:
            with keeping_all_layers(model):
                encode()

        results = measure({"ours": encode, "keeping all layers": encode_keeping_all}, device, repeats)
        for variant, kept in (("ours", 1), ("keeping all layers", config.num_hidden_layers)):
            kept_bytes = kept * layer_bytes
            rows.append(
                {"views": num_views, "variant": variant, "layers_kept": kept, "kept_bytes": kept_bytes}
                | results[variant]
            )
    return rows


def bench_training(
    model: Spa3RForPreTraining, pixels: Tensor, device: str, repeats: int, learning_rate: float = 1e-4
) -> list[dict[str, Any]]:
    """One row for each masking mode: forward, backward and AdamW, depth probe on."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    num_views = pixels.shape[1]
    view_mask = (torch.arange(num_views, device=pixels.device) >= num_views // 2)[None]  # half, as in the paper
    num_passes = 0

    def count_pass(*_: Any) -> None:
        nonlocal num_passes
        num_passes += 1

    def step(mode: Literal["asymmetric", "two_pass"]) -> None:
        model.config.masking_mode = mode
        model(pixels, view_mask=view_mask).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def two_pass() -> None:
        with keeping_all_layers(model):
            step("two_pass")

    runs = {"asymmetric": lambda: step("asymmetric"), "two-pass, keeping all layers": two_pass}
    step("asymmetric")  # the optimizer makes its state
    passes = {}
    hook = model.spa3r.backbone.register_forward_hook(count_pass)
    for name, run in runs.items():
        num_passes = 0
        run()
        passes[name] = num_passes
    hook.remove()
    results = measure(runs, device, repeats)
    return [
        {"views": num_views, "variant": name, "backbone_passes": passes[name]} | result
        for name, result in results.items()
    ]


def table(rows: list[dict[str, Any]], rate: float) -> str:
    """Markdown, one line a row; a column that the first row does not have is left out."""
    columns: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
        "views": ("views", lambda row: str(row["views"])),
        "variant": ("variant", lambda row: row["variant"]),
        "seconds": ("seconds", lambda row: f"{row['seconds']:.3f}"),
        "peak_bytes": ("peak extra MB", lambda row: f"{row['peak_bytes'] / 1e6:.1f}"),
        "layers_kept": ("layers kept", lambda row: str(row["layers_kept"])),
        "kept_bytes": ("kept MB", lambda row: f"{row['kept_bytes'] / 1e6:.1f}"),
        "backbone_passes": ("backbone passes", lambda row: str(row["backbone_passes"])),
        "attention_calls": ("attention calls", lambda row: str(row["attention_calls"])),
        "mask_bytes": ("mask bytes", lambda row: str(row["mask_bytes"])),
        "flops": ("GFLOP", lambda row: f"{row['flops'] / 1e9:.1f}"),
        "efficiency": ("of matmul rate", lambda row: f"{row['flops'] / row['seconds'] / rate:.0%}"),
    }
    shown = [column for key, column in columns.items() if key in rows[0] or key == "efficiency"]
    lines = [[title for title, _ in shown], ["---"] * len(shown), *([text(row) for _, text in shown] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ratios(encoding: list[dict[str, Any]], training: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours over the other variant: time, memory and FLOPs, for each pair of rows."""
    pairs = [("encoding", encoding[i], encoding[i + 1]) for i in range(0, len(encoding), 2)]
    pairs.append(("training step", training[0], training[1]))
    return [
        {"what": what, "views": ours["views"]}
        | {key: ours[key] / other[key] for key in ("seconds", "peak_bytes", "flops")}
        for what, ours, other in pairs
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["reduced", "nano", "base"], default="reduced")
    parser.add_argument("--views", type=int, nargs="+", default=[4, 8, 16, 24], help="numbers of views to encode")
    parser.add_argument("--train_views", type=int, default=8, help="views of the training step's scene")
    parser.add_argument("--image_size", type=int, nargs=2, default=[112, 112], metavar=("H", "W"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output_json", type=Path)
    args = parser.parse_args()
    if min(args.views) < 1 or args.train_views < 2 or args.repeats < 1:
        parser.error("expected --views and --repeats of at least 1, and --train_views of at least 2")
    return args


def main() -> None:
    args = parse_args()
    dtype = getattr(torch, args.dtype)
    model = build_model(args.size, args.device, dtype)

    def pixels_of(num_views: int) -> Tensor:
        generator = torch.Generator().manual_seed(num_views)
        return torch.rand(1, num_views, 3, *args.image_size, generator=generator).to(args.device, dtype)

    rates = machine_rates(args.device, dtype)
    encoding = bench_encoding(model, args.views, pixels_of, args.device, args.repeats)
    training = bench_training(model, pixels_of(args.train_views), args.device, args.repeats)
    comparison = ratios(encoding, training)

    spa3_vlm = bench_spa3_vlm(args.size, tuple(args.image_size), args.device, dtype, args.repeats)

    rate = rates["matmul_flops_per_s"]
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    height, width = args.image_size
    print(f"{args.size}, {height} x {width}, {args.dtype}, {device}, torch {torch.__version__}: matmul", end=" ")
    print(f"{rate / 1e9:.0f} GFLOP/s, copy {rates['copy_bytes_per_s'] / 1e9:.1f} GB/s\n")
    print(f"Encoding\n\n{table(encoding, rate)}\n")
    print(f"Training step\n\n{table(training, rate)}\n")
    print("Ours over the other variant\n\n| what | views | time | peak extra memory | FLOPs |")
    print("| --- | --- | --- | --- | --- |")
    for row in comparison:
        numbers = (f"{row[key]:.2f}" for key in ("seconds", "peak_bytes", "flops"))
        print(f"| {row['what']} | {row['views']} | {' | '.join(numbers)} |")
    print(f"\n{spa3_vlm_tables(spa3_vlm)}")
    if args.output_json:
        settings = {key: value for key, value in vars(args).items() if key != "output_json"} | {"device_name": device}
        report = {"settings": settings, **rates, "encoding": encoding, "training": training, "ratios": comparison}
        report["spa3_vlm"] = spa3_vlm
        args.output_json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
