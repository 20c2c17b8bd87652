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


def test_arguments_out_of_range_are_refused():
    process = run_benchmark("--train_views", "1")
    assert process.returncode == 2 and "--train_views of at least 2" in process.stderr
