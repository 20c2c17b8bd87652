import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import evaluate
import numpy as np
import pyarrow.parquet as pq
import pytest


FIXTURES = Path(__file__).parent / "fixtures"
METRIC = Path(__file__).parents[1] / "hub_configs" / "vsi_bench"
CASES = [json.loads(line) for line in (FIXTURES / "vsi_bench_metric_cases.jsonl").read_text().splitlines()]
GOLDEN = json.loads((FIXTURES / "vsi_bench_metric_aggregates.json").read_text())
PARSINGS = {"lmms_eval": "lmms_eval_0_7_3_unrounded", "original": "thinking_in_space"}


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return evaluate.load(str(METRIC), cache_dir=str(tmp_path_factory.mktemp("metrics")))


@pytest.fixture(scope="module")
def whole_benchmark():
    """Of the published annotations, all but the questions."""
    return pq.read_table(FIXTURES / "vsi_bench_answers.parquet").to_pylist()


def columns(rows, predictions=None):
    return {
        "predictions": [row["prediction"] for row in rows] if predictions is None else predictions,
        "references": [row["ground_truth"] for row in rows],
        "question_types": [row["question_type"] for row in rows],
    }


def constant(rows, letter, number):
    return [letter if row["options"] else number for row in rows]


@pytest.mark.parametrize("parsing", PARSINGS)
def test_every_golden_case_agrees(metric, parsing):
    assert len(CASES) == 150
    for case in CASES:
        result = metric.compute(**columns([case]), number_parsing=parsing)
        score = result[case["question_type"].replace("direction_", "direction.")]
        # Where a reference raises an error there is no score: 0.
        assert score == pytest.approx(100 * (case[f"score_{parsing}"] or 0), abs=1e-10), case
        assert result["overall"] == score


@pytest.mark.parametrize("parsing", PARSINGS)
@pytest.mark.parametrize("golden", GOLDEN["aggregates"], ids=lambda golden: golden["name"])
def test_every_golden_aggregate_agrees(metric, golden, parsing):
    rows = [GOLDEN["docs"][index] for index in golden["doc_indices"]]
    result = metric.compute(**columns(rows), number_parsing=parsing)
    expected = golden[PARSINGS[parsing]]
    tasks = [name for name in result if "." not in name and name not in ("overall", "numerical", "multiple_choice")]
    if "error" in expected:  # the reference cannot do without this level; ours can
        level = "easy" if golden["name"] == "no_easy" else "medium"
        assert f"object_rel_direction.{level}" not in result and "object_rel_direction" not in result
        present = [result[task] for task in tasks] + [
            result[key] for key in result if key.startswith("object_rel_dir")
        ]
        assert result["overall"] == pytest.approx(np.mean(present))
        return
    scale = 100 if parsing == "lmms_eval" else 1
    scores = {
        name.split("_MRA")[0].removesuffix("_accuracy"): x for name, x in expected.items() if "tabulated" not in name
    }
    assert set(scores) == {"overall", *tasks}
    for name, score in scores.items():
        assert result[name] == pytest.approx(scale * score, rel=1e-12), name
    assert sum(count for name, count in result.items() if name.startswith("count.")) == len(rows)


@pytest.mark.parametrize(
    "golden", GOLDEN["full_benchmark_constant_answer"], ids=lambda golden: golden["prediction_mca"]
)
def test_constant_answers_to_the_whole_benchmark(metric, whole_benchmark, golden):
    answers = constant(whole_benchmark, golden["prediction_mca"], golden["prediction_na"])
    start = time.perf_counter()
    result = metric.compute(**columns(whole_benchmark, answers))
    assert time.perf_counter() - start < 2
    expected = golden["lmms_eval_0_7_3_unrounded"]
    for name, score in expected.items():
        assert result[name.split("_MRA")[0].removesuffix("_accuracy")] == pytest.approx(100 * score, rel=1e-12)
    assert round(result["overall"] / 100, 6) == {"A": 0.261729, "B": 0.224223}[golden["prediction_mca"]]
    assert result["overall"] == pytest.approx((result["numerical"] + result["multiple_choice"]) / 2)
    counts = {name: count for name, count in result.items() if name.startswith("count.")}
    assert sum(counts.values()) == 5130 and counts["count.object_rel_direction"] == 217 + 378 + 373


def test_tasks_without_questions_are_absent(metric):
    rows = [{"prediction": "4", "ground_truth": "4", "question_type": "object_counting"}]
    rows += [{"prediction": "A", "ground_truth": "B", "question_type": "object_rel_direction_hard"}]
    result = metric.compute(**columns(rows[:1]))
    assert {name for name in result if "." not in name} == {"overall", "numerical", "object_counting"}
    assert result["overall"] == 100 and result["count.object_counting"] == 1
    result = metric.compute(**columns(rows[1:]))
    assert result["overall"] == result["multiple_choice"] == result["object_rel_direction.hard"] == 0
    assert metric.compute(**columns(rows))["overall"] == 50


def test_intervals_are_those_of_resampled_questions(metric):
    scores = np.array([1.0] * 30 + [0.0] * 70)
    rows = [{"ground_truth": "A", "question_type": "route_planning"} for _ in scores]
    answers = ["A" if score else "B" for score in scores]
    result = metric.compute(**columns(rows, answers))
    draws = np.random.default_rng(5).choice(scores, (20000, 100)).mean(1)
    low, high = 100 * np.percentile(draws, [2.5, 97.5])
    assert result["ci95_low.route_planning"] == pytest.approx(low, abs=1.01)
    assert result["ci95_high.route_planning"] == pytest.approx(high, abs=1.01)
    assert result["ci95_low.overall"] == result["ci95_low.route_planning"]
    # The mean of two tasks varies less than either, and nothing varies where all answers are right.
    rows += [{"ground_truth": "A", "question_type": "object_rel_distance"} for _ in scores]
    both = metric.compute(**columns(rows, answers * 2))
    assert both["ci95_high.overall"] - both["ci95_low.overall"] < 0.8 * (high - low)
    right = metric.compute(**columns(rows, ["A"] * 200))
    assert right["ci95_low.overall"] == right["ci95_high.overall"] == 100


def test_the_same_result_again_and_in_any_order(metric, whole_benchmark):
    rows = whole_benchmark[::7]
    answers = constant(rows, "A", "2")
    result = metric.compute(**columns(rows, answers))
    assert metric.compute(**columns(rows, answers)) == result
    assert metric.compute(**columns(rows[::-1], answers[::-1])) == pytest.approx(result, rel=1e-12)


NOT_ANSWERS = [
    None,
    math.nan,
    "",
    "   ",
    "x" * 10_000,
    "二",
    "أربعة",
    "\ud800",
    True,
    b"4",
    [4],
    {},
    object(),
    10**400,
]


@pytest.mark.parametrize("parsing", PARSINGS)
def test_no_prediction_raises(metric, parsing):
    for prediction in [*NOT_ANSWERS, "9" * 10_000, "hundred " * 1250, "-" * 10_000, math.inf]:
        result = metric.compute(
            predictions=[prediction, prediction],
            references=["4", "A"],
            question_types=["object_counting", "route_planning"],
            number_parsing=parsing,
        )
        assert result["overall"] == 0, repr(prediction)[:50]
        assert result["unparseable.object_counting"] == result["unparseable.route_planning"] == 1, repr(prediction)[
            :50
        ]


def test_what_is_unparseable_is_counted(metric):
    rows = [
        ("object_counting", "4", "about 4", 0),
        ("object_counting", "4", "many", 1),
        ("object_counting", "4", 4, 0),
        ("object_counting", "4", np.float32(4), 0),
        ("object_counting", "0", "4", 1),  # no relative error to zero
        ("route_planning", "A", "(A)", 1),
        ("route_planning", "A", "b. left", 0),
        ("route_planning", "A", 1, 1),
    ]
    types, truths, answers, unparseable = zip(*rows, strict=True)
    result = metric.compute(predictions=answers, references=truths, question_types=types)
    assert result["unparseable.object_counting"] == sum(unparseable[:5])
    assert result["unparseable.route_planning"] == sum(unparseable[5:])
    assert result["object_counting"] == pytest.approx(60) and result["route_planning"] == 0


def test_adding_one_by_one_and_in_batches(metric, whole_benchmark):
    rows = whole_benchmark[::50]
    given = columns(rows, constant(rows, "A", "2"))
    result = metric.compute(**given)
    for prediction, reference, question_type in zip(*given.values(), strict=True):
        metric.add(prediction=prediction, reference=reference, question_types=question_type)
    assert metric.compute() == result
    for start in range(0, len(rows), 25):
        metric.add_batch(**{name: np.array(column[start : start + 25]) for name, column in given.items()})
    assert metric.compute() == result


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"references": ["4", "four"]}, r"row 1 \(object_counting\): ground truth 'four'; expected a number"),
        ({"references": ["4", None]}, r"row 1 \(object_counting\): ground truth None; expected a number"),
        ({"references": ["4", "-1"]}, "row 1 .*ground truth '-1'; expected a number from 0 up"),
        ({"references": ["nan", "4"]}, "row 0 .*ground truth 'nan'"),
        ({"question_types": ["object_counting", "counting"]}, "row 1: question type 'counting'; expected one of"),
        ({"question_types": ["route_planning"] * 2}, "row 0 .*ground truth '4'; expected an option's letter"),
        ({"predictions": ["4"]}, "expected equally many: row 1 is incomplete"),
        ({"references": ["4"]}, "expected equally many: row 1 is incomplete"),
        ({"question_types": None}, "question_types"),
        ({"number_parsing": "lenient"}, "number_parsing = 'lenient'; expected one of"),
    ],
)
def test_bad_references_are_named(metric, bad, message):
    good = {"predictions": ["4", "4"], "references": ["4", "4"], "question_types": ["object_counting"] * 2}
    with pytest.raises(ValueError, match=message):
        metric.compute(**(good | bad))
    assert metric.compute(**good)["overall"] == 100  # nothing of the bad rows is left


def test_rows_are_numbered_over_batches(metric):
    metric.add_batch(predictions=["4"] * 3, references=["4"] * 3, question_types=["object_counting"] * 3)
    with pytest.raises(ValueError, match="row 3 .*ground truth 'x'"):
        metric.add(prediction="4", reference="x", question_types="object_counting")
    assert metric.compute()["count.object_counting"] == 3


PROCESS = """
import json, sys
sys.modules["spa3r_hf"] = sys.modules["transformers"] = None  # neither can be imported
import evaluate
folder, cache_dir, given = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
metric = evaluate.load(folder, cache_dir=cache_dir, num_process=2, process_id=1, experiment_id="test")
assert metric.compute(**given) is None
"""


def test_two_processes_and_no_other_package(metric, tmp_path):
    # The folder by itself, as it stands on the Hub.
    folder = shutil.copytree(METRIC, tmp_path / "vsi_bench", ignore=shutil.ignore_patterns("__pycache__"))
    rows = GOLDEN["docs"]
    first, second = columns(rows[:20]), columns(rows[20:])
    arguments = [str(folder), str(tmp_path), json.dumps(second)]
    with subprocess.Popen([sys.executable, "-c", PROCESS, *arguments]) as process:
        main = evaluate.load(
            str(METRIC), cache_dir=str(tmp_path), num_process=2, process_id=0, experiment_id="test", timeout=60
        )
        result = main.compute(**first)
        assert process.wait(60) == 0
    assert result == metric.compute(**columns(rows))
