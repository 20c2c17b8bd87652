"""
Measure Spa3R's speed and memory: encoding against the number of views, and a training step in either masking mode.

    python training/benchmark.py                                    # a few minutes on two CPU cores
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
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from spa3r_hf import Spa3RConfig, Spa3RForPreTraining


REPOSITORY = Path(__file__).resolve().parent.parent
# VGGT-1B's and Spa3R's numbers of layers and latents at 3/8 of their widths: what two CPU cores can bear.
REDUCED: dict[str, Any] = {
    "backbone_config": {
        **{"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "image_size": 112},
        **{"use_point_head": False, "camera_num_attention_heads": 6},
        **{"dpt_hidden_size": 96, "dpt_out_channels": (96, 192, 384, 384)},
    },
    "semantic_config": {
        **{"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 6},
        "num_register_tokens": 4,
    },
    **{"hidden_size": 288, "num_attention_heads": 6, "intermediate_size": 1152, "semantic_image_size": 64},
}


def build_model(size: str, device: str, dtype: torch.dtype) -> Spa3RForPreTraining:
    """A model with random weights and the depth probe on: "nano" and "base" of hub_configs, or "reduced"."""
    if size == "reduced":
        settings = REDUCED
    else:
        settings = json.loads((REPOSITORY / "hub_configs" / f"spa3r-{size}" / "config.json").read_text())
    backbone = dict(settings["backbone_config"], use_depth_head=True)
    if backbone.get("num_hidden_layers", 24) < 24:
        backbone |= {"dpt_layers": (0, 1, 2, backbone["num_hidden_layers"] - 1)}
        backbone |= {"dpt_hidden_size": 32, "dpt_out_channels": (32, 32, 64, 64)}
    torch.manual_seed(0)
    with torch.device(device):
        model = Spa3RForPreTraining(Spa3RConfig(**{**settings, "backbone_config": backbone, "depth_probe": True}))
    return model.to(dtype=dtype)  # type: ignore[call-arg]  # the library wraps it


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def machine_rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a large matrix product, and bytes/s that a copy reads and writes: the best of a few runs."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(2**28 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matmul = min(seconds_of(lambda: a @ b, device) for _ in range(6))
    copy = min(seconds_of(lambda: target.copy_(source), device) for _ in range(6))
    return {"matmul_flops_per_s": 2 * side**3 / matmul, "copy_bytes_per_s": 2 * source.numel() / copy}


def _cpu_attention_flops(query, key, value, *args, out_val=None, **kwargs) -> int:
    (batch, heads, length, width), keys, value_width = query, key[2], value[3]
    return 2 * batch * heads * length * keys * (width + value_width)


def _cpu_attention_backward_flops(grad, query, key, value, *args, out_val=None, **kwargs) -> int:
    # Scores again, and four products for the gradients of queries, keys, values and weights.
    (batch, heads, length, width), keys, value_width = query, key[2], value[3]
    return 2 * batch * heads * length * keys * (3 * width + 2 * value_width)


def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of one run. torch counts its attention kernels for CUDA; those for the CPU are added."""
    kernels = torch.ops.aten
    cpu_kernels = {
        kernels._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
        kernels._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=cpu_kernels) as counter:
        run()
    return counter.get_total_flops()


def trace(run: Callable[[], Any], device: str) -> dict[str, int]:
    """Peak of extra memory in one run, its attention calls, and the bytes of the masks that they were given."""
    if device == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize(device)
        peak = torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=device == "cpu", record_shapes=True) as profiler:
        run()
    if device == "cpu":
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        total = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            total += event.nbytes()
            peak = max(peak, total)
    calls = [event for event in profiler.events() if event.name == "aten::scaled_dot_product_attention"]
    # The fourth input is the mask; no mask has no shape. Masks are counted at one byte an element: at least that.
    masks = [call.input_shapes[3] for call in calls]
    return {
        "peak_bytes": peak,
        "attention_calls": len(calls),
        "mask_bytes": sum(math.prod(shape) for shape in masks if shape),
    }


def measure(runs: dict[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds, FLOPs, memory and attention calls of each of `runs`, which take turns."""
    results: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        results[name] = {"flops": count_flops(run), **trace(run, device)}  # these are the warm-up, too
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run, device))
    for name in runs:
        results[name]["seconds"] = statistics.median(seconds[name])
    return results


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
    if args.output_json:
        settings = {key: value for key, value in vars(args).items() if key != "output_json"} | {"device_name": device}
        report = {"settings": settings, **rates, "encoding": encoding, "training": training, "ratios": comparison}
        args.output_json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
