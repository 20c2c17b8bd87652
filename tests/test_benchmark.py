import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARK = Path(__file__).resolve().parent.parent / "training" / "benchmark.py"


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(BENCHMARK), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Tables that a tiny run prints, and the report that it writes."""
    path = tmp_path_factory.mktemp("benchmark") / "report.json"
    process = run_benchmark(
        *("--size", "nano", "--views", "1", "8", "--train_views", "4", "--image_size", "56", "56"),
        *("--repeats", "1", "--output_json", str(path)),
    )
    assert process.returncode == 0, process.stderr
    return process.stdout, json.loads(path.read_text())


def test_layers_that_nobody_reads_cost_memory_and_no_flops(result):
    _, report = result
    assert [row["views"] for row in report["encoding"]] == [1, 1, 8, 8]
    for ours, all_layers in (report["encoding"][:2], report["encoding"][2:]):
        assert (ours["layers_kept"], all_layers["layers_kept"]) == (1, 5)
        # (camera token, 4 registers, 4 x 4 patches) x (frame, global) x 192 channels x 4 bytes
        assert ours["kept_bytes"] == ours["views"] * 21 * 2 * 192 * 4
        assert all_layers["kept_bytes"] == 5 * ours["kept_bytes"]
        assert ours["flops"] == all_layers["flops"] > 0
        assert ours["kept_bytes"] < ours["peak_bytes"] <= all_layers["peak_bytes"]
    few, many = report["encoding"][0], report["encoding"][2]
    assert many["peak_bytes"] > few["peak_bytes"]
    # 3 + 2 * 5 blocks of the backbone, 3 of the encoder.
    assert few["attention_calls"] == many["attention_calls"] == 16


def test_asymmetric_step_passes_the_backbone_once_and_makes_no_mask(result):
    _, report = result
    asymmetric, two_pass = report["training"]
    assert (asymmetric["backbone_passes"], two_pass["backbone_passes"]) == (1, 2)
    # The asymmetric pass asks twice in each of its 5 global blocks; the other mode runs 3 + 2 * 5 blocks once more.
    assert two_pass["attention_calls"] - asymmetric["attention_calls"] == 13 - 5
    assert asymmetric["flops"] < two_pass["flops"]
    assert all(row["mask_bytes"] == 0 for row in report["encoding"] + report["training"])


def test_ratios_are_those_of_the_rows(result):
    stdout, report = result
    assert [row["what"] for row in report["ratios"]] == ["encoding", "encoding", "training step"]
    asymmetric, two_pass = report["training"]
    for key in ("seconds", "peak_bytes", "flops"):
        assert report["ratios"][2][key] == pytest.approx(asymmetric[key] / two_pass[key])
    assert report["matmul_flops_per_s"] > 0 and report["copy_bytes_per_s"] > 0
    for heading in ("Encoding", "Training step", "Ours over the other variant"):
        assert heading in stdout
    assert stdout.count("\n| --- ") == 3 and "keeping all layers" in stdout


def test_reused_latents_answer_as_many_questions(result):
    stdout, report = result
    each, once = report["spa3_vlm"]["reuse"]
    assert each["questions"] == once["questions"] == 4
    for row in (each, once):
        assert row["questions_per_second"] == pytest.approx(row["questions"] / row["seconds"])
    assert "4 questions about one scene of 8 views" in stdout and "| encoded once " in stdout


def test_the_adapters_size_is_what_its_layers_have(result):
    """At width 2048 with 16 heads of 128 channels, of latents of 768."""

    def linear(inputs: int, outputs: int) -> int:
        return (inputs + 1) * outputs

    projection = linear(768, 2048) + linear(2048, 2048)
    adapter = projection + 4 * linear(2048, 2048) + 2 * 2 * 128 + 2 * 2048
    adapter += linear(2048, 512) + linear(512, 2048) + linear(2048, 2048)
    expected = {"cross_attention": adapter, "append": projection}
    rows = result[1]["spa3_vlm"]["adapter"]
    assert [(row["integration"], row["dtype"]) for row in rows] == [
        (integration, dtype) for integration in expected for dtype in ("float32", "bfloat16")
    ]
    for row in rows:
        size = {"float32": 4, "bfloat16": 2}[row["dtype"]] * row["parameters"]
        assert row["parameters"] == expected[row["integration"]]
        assert size < row["file_bytes"] < size + 4000  # the names


def test_frozen_parts_are_counted_once(result):
    rows = {row["trained"]: row for row in result[1]["spa3_vlm"]["sft"]}
    assert list(rows) == ["adapter", "lora", "language_model"]
    # Training more of the same model: what is trained is no longer frozen.
    weights = {name: row["frozen_bytes"] + row["trained_bytes"] for name, row in rows.items()}
    assert weights["adapter"] == weights["language_model"] < weights["lora"]
    for row in rows.values():
        assert row["trained_bytes"] == 4 * row["trained_parameters"]
        assert row["optimizer_bytes"] == 2 * row["trained_bytes"]  # AdamW
        assert row["step_peak_bytes"] > row["trained_bytes"]  # their gradients, and activations
        parts = ("frozen_bytes", "trained_bytes", "optimizer_bytes", "step_peak_bytes")
        assert row["total_bytes"] == sum(row[part] for part in parts)
    assert rows["adapter"]["trained_parameters"] < rows["lora"]["trained_parameters"]
    assert rows["lora"]["total_bytes"] < rows["language_model"]["total_bytes"]


def test_arguments_out_of_range_are_refused():
    process = run_benchmark("--train_views", "1")
    assert process.returncode == 2 and "--train_views of at least 2" in process.stderr
