"""Bootstrap intervals, comparisons and tables: against official scores, and against drawing questions one by one."""

import json
from pathlib import Path

import numpy as np
import pytest

from spa3r_hf.benchmarks import load_benchmark
from spa3r_hf.benchmarks_questions import Question
from spa3r_hf.benchmarks_scores import NOT_MEANS, official_means, score_benchmark
from spa3r_hf.evaluation_comparison import compare, comparison_text
from spa3r_hf.evaluation_report import write_report
from spa3r_hf.evaluation_run import group_by_scene, share_out
from spa3r_hf.evaluation_scores import evaluate_answers, intervals, questions_behind, resampled
from spa3r_hf.evaluation_store import Answer
from spa3r_hf.evaluation_tables import PUBLISHED, columns, score_chart, score_table


for package in ("datasets", "evaluate", "matplotlib"):
    pytest.importorskip(package)
FIXTURES = Path(__file__).parent / "fixtures"
TYPES = {
    "vsi_bench": [
        *("object_counting", "object_abs_distance", "object_rel_direction_easy", "object_rel_direction_medium"),
        *("object_rel_direction_hard", "route_planning"),
    ],
    "cv_bench": ["Count", "Relation", "Depth"],
    "spar_bench": ["depth_prediction_oc", "view_change_infer", "position_matching", "spatial_imagination_oc"],
    "viewspatial_bench": ["one", "two"],
}
SOURCES = {"cv_bench": ["ADE20K", "COCO", "Omni3D"]}


def some_rows(benchmark: str, count: int = 60, seed: int = 0) -> tuple[list[str], list[str], np.ndarray]:
    rng = np.random.default_rng(seed)
    types = [str(rng.choice(TYPES[benchmark])) for _ in range(count)]
    sources = [str(rng.choice(SOURCES.get(benchmark, ["any"]))) for _ in range(count)]
    return types, sources, rng.integers(0, 11, count) / 10


@pytest.mark.parametrize("benchmark", TYPES)
def test_resampled_scores_begin_with_the_official_ones(benchmark):
    types, sources, scores = some_rows(benchmark)
    expected = official_means(benchmark, scores, types, sources)
    means = resampled(benchmark, scores, types, sources)
    assert means.keys() == expected.keys() and "overall" in means
    for name, values in means.items():
        assert values.shape == (5001,) and values[0] == pytest.approx(expected[name], abs=1e-9)
    # Linear: also of differences, which may be negative.
    other = some_rows(benchmark, seed=1)[2]
    difference = resampled(benchmark, other - scores, types, sources)
    for name, value in official_means(benchmark, other, types, sources).items():
        assert difference[name][0] == pytest.approx(value - expected[name], abs=1e-9)


def overall_of(benchmark: str, scores: np.ndarray, types: list[str], sources: list[str]) -> float:
    if benchmark != "vsi_bench":
        return official_means(benchmark, scores, types, sources)["overall"]
    of_type = {name: 100 * scores[np.array(types) == name].mean() for name in TYPES["vsi_bench"]}
    directions = [of_type.pop(f"object_rel_direction_{level}") for level in ("easy", "medium", "hard")]
    return float(np.mean([*of_type.values(), np.mean(directions)]))


@pytest.mark.parametrize("benchmark", TYPES)
def test_intervals_are_those_of_drawing_questions(benchmark):
    types, sources, scores = some_rows(benchmark, count=120)
    ends = intervals(resampled(benchmark, scores, types, sources))
    rng = np.random.default_rng(5)
    keys = np.array(types if benchmark == "vsi_bench" else [f"{a}|{b}" for a, b in zip(types, sources, strict=True)])
    draws = []
    for _ in range(1500):
        drawn = scores.copy()
        for key in np.unique(keys):
            drawn[keys == key] = rng.choice(scores[keys == key], (keys == key).sum())
        draws.append(overall_of(benchmark, drawn, types, sources))
    low, high = np.percentile(draws, [2.5, 97.5])
    assert abs(ends["ci95_low.overall"] - low) < 0.12 * (high - low)
    assert abs(ends["ci95_high.overall"] - high) < 0.12 * (high - low)
    assert ends == intervals(resampled(benchmark, scores, types, sources))  # a fixed seed


def test_how_many_questions_a_score_depends_on():
    types, sources, _ = some_rows("cv_bench")
    counts = questions_behind("cv_bench", types, sources)
    assert counts["overall"] == 60 and counts["2D"] == sum(source != "Omni3D" for source in sources)
    assert counts["Depth"] == types.count("Depth") and counts["COCO"] == sources.count("COCO")
    types, sources, _ = some_rows("vsi_bench")
    counts = questions_behind("vsi_bench", types, sources)
    assert counts["object_rel_direction"] == sum(name.startswith("object_rel_direction") for name in types)
    assert counts["object_rel_direction.hard"] == types.count("object_rel_direction_hard")


def test_means_are_those_of_the_metric():
    questions = load_benchmark("vsi_bench", FIXTURES / "vsi_bench_answers.parquet")
    answers = [("ABCD"[index % 4] if question.options else str(index % 7)) for index, question in enumerate(questions)]
    scores = score_benchmark("vsi_bench", questions, answers)
    types, sources = [question.question_type for question in questions], [question.source for question in questions]
    means = official_means("vsi_bench", scores.scores, types, sources)
    assert means == {name: value for name, value in scores.summary.items() if not name.startswith(NOT_MEANS)}
    ours, theirs = intervals(resampled("vsi_bench", scores.scores, types, sources)), scores.summary
    for name in means:
        width = theirs[f"ci95_high.{name}"] - theirs[f"ci95_low.{name}"]
        for side in ("ci95_low", "ci95_high"):
            assert abs(ours[f"{side}.{name}"] - theirs[f"{side}.{name}"]) <= 0.08 * width


# --- comparisons


def some_questions(count: int) -> list[Question]:
    types = [TYPES["vsi_bench"][index % 6] for index in range(count)]
    return [
        Question(str(i), f"scene {i // 4}", "scannet", kind, "?", f"prompt {i}", () if i % 6 < 2 else ("A. x", "B. y"),
                 "10" if i % 6 < 2 else "A")
        for i, kind in enumerate(types)
    ]  # fmt: skip


def evaluated(folder: Path, questions, outputs, **settings) -> Path:
    answers = {q.id: Answer(q.id, output) for q, output in zip(questions, outputs, strict=True)}
    evaluation = evaluate_answers("vsi_bench", questions, answers)
    write_report(folder, evaluation, {"settings": settings}, folder.name, "made up", True)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """Two evaluations, whose questions are hard or easy for both; of 120 and 90 questions, 60 in common."""
    folder, rng = tmp_path_factory.mktemp("pair"), np.random.default_rng(0)
    questions = some_questions(150)
    is_easy = rng.random(150) < 0.5
    outputs = [("A" if easy else "B") if q.options else ("10" if easy else "20")
               for q, easy in zip(questions, is_easy, strict=True)]  # fmt: skip
    better = [
        "A" if q.options and rng.random() < 0.1 else output for q, output in zip(questions, outputs, strict=True)
    ]
    one = evaluated(folder / "one", questions[:120], outputs[:120], frames={"max_frames": 8}, dtype="float32")
    two = evaluated(folder / "two", questions[60:], better[60:], frames={"max_frames": 16}, dtype="float32")
    return one, two


def test_comparison(pair):
    comparison = compare(*pair)
    assert comparison.num_questions == (120, 90, 60) and comparison.names == ("one", "two")
    assert comparison.differing == {"frames.max_frames": (8, 16)}
    rows = [{row["id"]: row for row in map(json.loads, (folder / "predictions.jsonl").open())} for folder in pair]
    common = sorted(rows[0].keys() & rows[1].keys())
    types = [rows[0][key]["question_type"] for key in common]
    scores = [np.array([of[key]["score"] for key in common]) for of in rows]
    means = [official_means("vsi_bench", values, types, types) for values in scores]
    for name, score in comparison.scores.items():
        assert (score.first, score.second) == (means[0][name], means[1][name])
        assert score.difference == pytest.approx(score.second - score.first)
        assert score.low - 1e-9 <= score.difference <= score.high + 1e-9
    overall = comparison.scores["overall"]
    unpaired = [intervals(resampled("vsi_bench", values, types, types)) for values in scores]
    width = np.hypot(*(ends["ci95_high.overall"] - ends["ci95_low.overall"] for ends in unpaired))
    assert 0 < overall.high - overall.low < 0.6 * width  # what makes a question hard drops out
    text = comparison_text(comparison)
    assert "Over the 60 questions that both have (of 120 and 90)" in text
    assert "- frames.max_frames: 8 and 16" in text and "dtype" not in text
    assert text.index("Obj. Count") < text.index("Avg.") < text.index("object_rel_direction.easy")


def test_the_other_way_round_and_with_itself(pair):
    there, back, same = compare(*pair), compare(*reversed(pair)), compare(pair[0] / "results.json", pair[0])
    assert there.scores["overall"].difference == pytest.approx(-back.scores["overall"].difference)
    assert all(score.low == score.difference == score.high == 0 for score in same.scores.values())
    assert "| one (first) | one (second) |" in " ".join(comparison_text(same).split())


def test_comparisons_that_make_no_sense(pair, tmp_path):
    questions = some_questions(6)
    evaluated(tmp_path / "elsewhere", [Question(**{**vars(q), "id": f"x{q.id}"}) for q in questions], ["A"] * 6)
    with pytest.raises(ValueError, match="have no questions in common"):
        compare(pair[0], tmp_path / "elsewhere")
    evaluated(tmp_path / "changed", [Question(**{**vars(q), "ground_truth": "B"}) for q in questions if q.options],
              ["A"] * 4)  # fmt: skip
    with pytest.raises(ValueError, match="id 2 is .*'ground_truth': 'A'.* but .*'ground_truth': 'B'"):
        compare(pair[0], tmp_path / "changed")
    facts = json.loads((pair[0] / "results.json").read_text()) | {"benchmark": "cv_bench"}
    evaluated(tmp_path / "other", questions, ["A"] * 6)
    (tmp_path / "other" / "results.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="is of vsi_bench, .* of cv_bench"):
        compare(pair[0], tmp_path / "other")


# --- tables, charts, shares


def test_published_rows_agree_with_themselves():
    """The means of a row are the means of its tasks, where these are known, to the digit that is printed."""
    for row in PUBLISHED["vsi_bench"]:
        tasks = [row.scores[key] for key in list(columns("vsi_bench", {}))[:8] if key in row.scores]
        if tasks:
            assert len(tasks) == 8 and row.scores["overall"] == pytest.approx(np.mean(tasks), abs=0.06)
        else:
            mean = (row.scores["numerical"] + row.scores["multiple_choice"]) / 2
            assert row.scores["overall"] == pytest.approx(mean, abs=0.11)
    (row,) = PUBLISHED["cv_bench"]
    assert row.scores["overall"] == pytest.approx((row.scores["2D"] + row.scores["3D"]) / 2, abs=0.06)


@pytest.mark.parametrize("benchmark", TYPES)
def test_tables_and_charts_of_all_benchmarks(benchmark):
    types, sources, scores = some_rows(benchmark)
    summary = official_means(benchmark, scores, types, sources) | intervals(
        resampled(benchmark, scores, types, sources)
    )
    lines = score_table(benchmark, "some model", {"official": summary}).splitlines()
    assert lines[2].startswith("| some model (measured)") and f"{summary['overall']:.1f}" in lines[2]
    assert len({line.count("|") for line in lines}) == 1
    assert any("58.6" in line or "75.6" in line or "58.4" in line or "43.9" in line for line in lines[5:])
    for with_published in (True, False):
        assert score_chart(benchmark, "some model", summary, with_published).width > 500


def test_a_chart_shows_its_bars():
    summary = {"overall": 50.0, "object_counting": 100.0, "route_planning": 0.0}
    summary |= {f"{side}.{name}": value for side in ("ci95_low", "ci95_high") for name, value in list(summary.items())}
    pixels = np.asarray(score_chart("vsi_bench", "x", summary, False)).reshape(-1, 3)
    blue, orange = ((pixels == colour).all(1).sum() for colour in ((0, 114, 178), (213, 94, 0)))
    assert blue == pytest.approx(2 * orange, rel=0.02)  # a whole bar and half a bar


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_scenes_are_shared_out(count):
    questions = [Question(str(i), f"scene {i % 5}", "", "t", "", "", (), "1", (f"{i % 5}.mp4",)) for i in range(23)]
    scenes = group_by_scene(questions)
    assert [len(scene) for scene in scenes] == [5, 5, 5, 4, 4]
    shares = share_out(scenes, count)
    assert len(shares) == count
    asked = [question.id for share in shares for scene in share for question in scene]
    assert sorted(asked, key=int) == [question.id for question in questions]
    loads = [sum(map(len, share)) for share in shares]
    assert max(loads) - min(loads) <= 5
