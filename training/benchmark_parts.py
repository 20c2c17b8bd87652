"""What the benchmarks share: models with random weights, and how seconds, FLOPs and memory are measured."""

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
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
