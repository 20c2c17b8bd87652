import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("av")

BENCHMARK = Path(__file__).resolve().parent.parent / "training" / "benchmark_answers.py"


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(BENCHMARK), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_a_small_run_compares_what_is_equal(tmp_path):
    path = tmp_path / "report.json"
    process = run_benchmark(
        *("--questions", "3", "--frames", "3", "--video_seconds", "2", "--repeats", "1"),
        *("--skip_spa3_vlm", "--output_json", str(path)),
    )
    assert process.returncode == 0, process.stderr
    report = json.loads(path.read_text())
    (answers,) = report["answers"].values()
    assert (answers["questions"], answers["frames"], answers["equal_answers"]) == (3, 3, 3)
    assert answers["ratio"] == pytest.approx(answers["seconds_together"] / answers["seconds_one_by_one"])
    assert len(report["decoding"]) == 2
    for decoding in report["decoding"].values():
        assert decoding["same_pixels"] and decoding["frames"] == 3
        assert decoding["ratio"] == pytest.approx(decoding["seconds_seeking"] / decoding["seconds_sequential"])
    lines = process.stdout.splitlines()
    (row,) = [line for line in lines if line.startswith("| Qwen2.5-VL's architecture")]
    assert "| 3 of 3 |" in " ".join(row.split())
    assert sum(line.endswith("| yes |") or line.endswith(" yes |") for line in lines) == 2


def test_arguments_out_of_range_are_refused():
    process = run_benchmark("--questions", "1")
    assert process.returncode == 2 and "--questions and --frames of at least 2" in process.stderr
