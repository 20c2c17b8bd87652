"""What is installed from a wheel, without the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).resolve().parent.parent
SCORE = """
import spa3r_hf
from spa3r_hf.benchmarks_scores import vsi_bench_metric

metric = vsi_bench_metric()
types = ["object_rel_distance", "object_counting"]
print(spa3r_hf.__file__, metric.__file__, *metric.score_answers(["B", "2"], ["A", "2"], types)[1], sep="\\n")
"""


def test_a_wheel_has_the_metric_of_vsi_bench(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("evaluate")
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("spa3r_hf", "hub_configs/vsi_bench"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('wheels')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    shutil.rmtree(source)
    environment = os.environ | {"PYTHONPATH": str(target)}
    result = subprocess.run(
        [sys.executable, "-c", SCORE], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    package, metric, *scores = result.stdout.splitlines()
    assert package == str(target / "spa3r_hf" / "__init__.py")
    assert metric == str(target / "spa3r_hf" / "vsi_bench" / "vsi_bench.py")
    assert [float(score) for score in scores] == [0, 1]
