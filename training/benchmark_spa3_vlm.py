"""
Measure Spa3-VLM: questions per second about one scene, the adapter's size, and the memory of a training step.

    python training/benchmark_spa3_vlm.py                           # a few minutes on two CPU cores
    python training/benchmark_spa3_vlm.py --size nano
    python training/benchmark_spa3_vlm.py --size base --image_size 518 392 --dtype bfloat16 --device cuda

Weights are random. `--size`: "base" is Qwen2.5-VL-3B's and Spa3R's; "reduced" has 3/8 of their widths, a third of the
VLM's layers and a small vocabulary; "nano" is the nano models'. `benchmark_answers.py` goes on from here: questions
that share the VLM's own reading of the scene as well.

- Questions per second: each with an answer of 16 tokens, from ready pixels. The scene is encoded for every question,
  or once for all of them (`spatial_latents`); answers have to be the same.
- The adapter: built at Qwen2.5-VL-3B's width (2048, 16 heads; latents of 768) and saved.
- Memory of a step (forward, backward, AdamW) of one sample, encoding its scene. Weights and the optimizer's state are
  counted tensor by tensor, so the frozen parts once; the peak of gradients and activations is measured as in
  `benchmark.py`.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmark_parts import build_model, seconds_of, trace
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from spa3r_hf import Spa3AdapterConfig, Spa3VLM, get_spa3_vlm
from spa3r_hf.adapter_spa3_vlm import build_adapter
from spa3r_hf.checkpoint_spa3_vlm import ADAPTER_WEIGHTS_NAME, write_adapter
from spa3r_hf.latent_cache import SceneEncoder
from spa3r_hf.model_card import markdown_table
from spa3r_hf.spa3_vlm_arguments import LORA_TARGETS
from spa3r_hf.spa3_vlm_trainer import answer_loss, choose_trained


QWEN_3B = {"hidden_size": 2048, "num_attention_heads": 16, "spatial_hidden_size": 768}
NUM_VIEWS, NUM_QUESTIONS, QUESTION_TOKENS, ANSWER_TOKENS = 8, 4, 32, 16
IMAGE, VIDEO, START, END = 2000, 2001, 2002, 2003
NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": True}
PATCH, MERGED = 14, 28  # pixels of a patch, and of a visual token, each way
# Of the language model and of the vision tower.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": (
        {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
        | {"vocab_size": 151936},
        {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16, "out_hidden_size": 2048},
    ),
    "reduced": (
        {"hidden_size": 768, "intermediate_size": 4128, "num_hidden_layers": 12, "num_attention_heads": 6}
        | {"vocab_size": 2048},
        {"hidden_size": 480, "intermediate_size": 1284, "depth": 11, "num_heads": 6, "out_hidden_size": 768},
    ),
    "nano": (
        {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
        | {"vocab_size": 2048},
        {"hidden_size": 96, "intermediate_size": 256, "depth": 3, "num_heads": 4, "out_hidden_size": 128},
    ),
}


def build_spa3_vlm(size: str, device: str, dtype: torch.dtype, lora: bool = False) -> Spa3VLM:
    """With random weights, a fresh adapter, and answers that never end by themselves."""
    text, vision = SIZES[size]
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    sections = [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16]  # [16, 24, 24] of 64, as Qwen's
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    tokens: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    tokens |= {"vision_start_token_id": START, "vision_end_token_id": END}
    config = Qwen2_5_VLConfig(
        text_config={**text, **NO_ENDS, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={**vision, "patch_size": PATCH, "fullatt_block_indexes": [vision["depth"] - 1]},
        tie_word_embeddings=True,
        **tokens,
    )
    torch.manual_seed(0)
    with torch.device(device):
        vlm = Qwen2_5_VLForConditionalGeneration(config).eval()
    nn.Module.to(vlm, dtype)
    vlm.generation_config.eos_token_id = None
    encoder = build_model(size, device, dtype).spa3r
    settings = {"r": 16, "lora_alpha": 32, "target_modules": LORA_TARGETS} if lora else None
    return get_spa3_vlm(vlm, encoder, Spa3AdapterConfig(lora_config=settings))


def scene_and_questions(image_size: tuple[int, int], number: int, device: str, dtype: torch.dtype) -> Any:
    """The views of a scene, (1, V, 3, H, W), and the VLM's inputs for some questions about it."""
    generator = torch.Generator().manual_seed(0)
    height, width = (side // MERGED * 2 for side in image_size)  # in patches
    views = torch.rand(1, NUM_VIEWS, 3, *image_size, generator=generator).to(device, dtype)
    patches = torch.randn(NUM_VIEWS * height * width, 3 * 2 * PATCH**2, generator=generator).to(device, dtype)
    picture = [START, *[IMAGE] * (height * width // 4), END]
    inputs = []
    for _ in range(number):
        words = torch.randint(100, 1900, (QUESTION_TOKENS,), generator=generator).tolist()
        ids = torch.tensor([picture * NUM_VIEWS + words], device=device)
        inputs.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": (ids == IMAGE).int(),
                "pixel_values": patches,
                "image_grid_thw": torch.tensor([[1, height, width]] * NUM_VIEWS, device=device),
            }
        )
    return views, inputs


@torch.no_grad()
def bench_reuse(model: Spa3VLM, image_size: tuple[int, int], device: str, repeats: int) -> list[dict[str, Any]]:
    """Questions per second about one scene, encoded for each of them, and once."""
    model.eval()
    views, questions = scene_and_questions(image_size, NUM_QUESTIONS, device, model.vlm.dtype)
    answers: dict[str, list[Tensor]] = {}

    def ask(name: str, **scene: Any) -> None:
        options: dict[str, Any] = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False, **scene}
        answers[name] = [model.generate(**question, **options) for question in questions]

    runs = {
        "encoded for each question": lambda: ask("each", spatial_pixel_values=views),
        "encoded once": lambda: ask("once", spatial_latents=model.get_spatial_latents(views)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 + repeats):  # the first is the warm-up
        for name, run in runs.items():
            seconds[name].append(seconds_of(run, device))
    if any(not torch.equal(*pair) for pair in zip(*answers.values(), strict=True)):
        raise RuntimeError("answers differ between a scene that is encoded for each question and one encoded once")
    best = {name: sorted(times[1:])[len(times[1:]) // 2] for name, times in seconds.items()}
    return [
        {"variant": name, "questions": NUM_QUESTIONS, "seconds": time, "questions_per_second": NUM_QUESTIONS / time}
        for name, time in best.items()
    ]


def bench_adapter() -> list[dict[str, Any]]:
    """Parameters and file size of the adapter at Qwen2.5-VL-3B's width, of each way of integration and type."""
    rows = []
    for integration in ("cross_attention", "append"):
        config = Spa3AdapterConfig(integration=integration, **QWEN_3B)  # type: ignore[arg-type]
        for dtype in (torch.float32, torch.bfloat16):
            adapter = build_adapter(config).to(dtype)
            with tempfile.TemporaryDirectory() as folder:
                write_adapter(Path(folder), config, adapter.state_dict(), {})
                size = (Path(folder) / ADAPTER_WEIGHTS_NAME).stat().st_size
            parameters = sum(parameter.numel() for parameter in adapter.parameters())
            name = str(dtype).removeprefix("torch.")
            rows.append({"integration": integration, "dtype": name, "parameters": parameters, "file_bytes": size})
    return rows


def bench_sft(size: str, image_size: tuple[int, int], device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Memory of a training step: one row for each choice of what is trained."""
    rows = []
    for trained in ("adapter", "lora", "language_model"):
        model = build_spa3_vlm(size, device, dtype, lora=trained == "lora").train()
        choose_trained(model, trained)  # type: ignore[arg-type]
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5)
        encoder, model.spatial_encoder = SceneEncoder(model.spatial_encoder), None
        views, (inputs,) = scene_and_questions(image_size, 1, device, dtype)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -ANSWER_TOKENS:] = inputs["input_ids"][:, -ANSWER_TOKENS:]

        def step() -> None:
            batch = encoder.complete({**inputs, "spatial_pixel_values": list(views)})  # noqa: B023
            answer_loss(model(**batch).logits, labels)[0].backward()  # noqa: B023
            optimizer.step()  # noqa: B023
            optimizer.zero_grad()  # noqa: B023

        step()  # the optimizer makes its state
        states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        row: dict[str, Any] = {
            "trained": trained,
            "trained_parameters": sum(parameter.numel() for parameter in parameters),
            "frozen_bytes": num_bytes([*frozen, *encoder.encoder.parameters()]),
            "trained_bytes": num_bytes(parameters),
            "optimizer_bytes": num_bytes(states),
            "step_peak_bytes": trace(step, device)["peak_bytes"],
        }
        row["total_bytes"] = sum(value for name, value in row.items() if name.endswith("_bytes"))
        rows.append(row)
    return rows


def num_bytes(tensors: Any) -> int:
    """Of tensors, those that share their storage counted once."""
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def bench_spa3_vlm(
    size: str, image_size: tuple[int, int], device: str, dtype: torch.dtype, repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """All of it: `reuse`, `adapter` and `sft`, a list of rows each."""
    return {
        "reuse": bench_reuse(build_spa3_vlm(size, device, dtype), image_size, device, repeats),
        "adapter": bench_adapter(),
        "sft": bench_sft(size, image_size, device, dtype),
    }


def spa3_vlm_tables(report: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown."""
    reuse = [
        [row["variant"], f"{row['seconds']:.2f}", f"{row['questions_per_second']:.2f}"] for row in report["reuse"]
    ]
    adapter = [
        [row["integration"], row["dtype"], f"{row['parameters'] / 1e6:.2f} M", f"{row['file_bytes'] / 1e6:.1f}"]
        for row in report["adapter"]
    ]
    columns = ("frozen_bytes", "trained_bytes", "optimizer_bytes", "step_peak_bytes", "total_bytes")
    sft = [
        [row["trained"], f"{row['trained_parameters'] / 1e6:.2f} M", *(f"{row[name] / 1e6:.0f}" for name in columns)]
        for row in report["sft"]
    ]
    titles = ["frozen MB", "trained MB", "optimizer MB", "gradients and activations MB", "sum MB"]
    return "\n\n".join(
        (
            f"{NUM_QUESTIONS} questions about one scene of {NUM_VIEWS} views",
            markdown_table(["the scene is", "seconds", "questions per second"], reuse),
            "The adapter at Qwen2.5-VL-3B's width",
            markdown_table(["integration", "type", "parameters", "file MB"], adapter),
            "Memory of a training step",
            markdown_table(["trained", "parameters", *titles], sft),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="reduced")
    parser.add_argument("--image_size", type=int, nargs=2, default=[112, 112], metavar=("H", "W"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output_json", type=Path)
    args = parser.parse_args()
    if args.repeats < 1 or min(args.image_size) < MERGED:
        parser.error(f"expected --repeats of at least 1, and an --image_size of at least {MERGED} pixels each way")
    report = bench_spa3_vlm(args.size, tuple(args.image_size), args.device, getattr(torch, args.dtype), args.repeats)
    print(spa3_vlm_tables(report))
    if args.output_json:
        args.output_json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
