import io
import json
import os
import stat
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from spa3r_hf.benchmarks import download_media, fingerprint, load_benchmark, with_media
from spa3r_hf.benchmarks_scores import score_benchmark, vsi_bench_metric
from spa3r_hf.errors import BadSampleError


FIXTURES = Path(__file__).parent / "fixtures"
COUNT = {
    "id": 3,
    "dataset": "scannet",
    "scene_name": "scene0011_00",
    "question_type": "object_counting",
    "question": "How many chair(s) are in this room?",
    "ground_truth": "4",
    "options": None,
}
ROUTE = {
    "id": 20,
    "dataset": "arkitscenes",
    "scene_name": "41069025",
    "question_type": "route_planning",
    "question": "Which way?",
    "ground_truth": "B",
    "options": ["A. Turn Left", "B. Turn Right"],
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def write_jsonl(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(list(rows)).to_parquet(path)
    return path


def ids(questions) -> list[str]:
    return [question.id for question in questions]


# VSI-Bench


def test_prompts_are_those_of_the_reference(tmp_path):
    count, route = load_benchmark("vsi_bench", write_jsonl(tmp_path / "rows.jsonl", [COUNT, ROUTE]))
    assert count.prompt == (
        "These are frames of a video.\n"
        "How many chair(s) are in this room?\n"
        "Please answer the question using a single word or phrase."
    )
    assert route.prompt == (
        "These are frames of a video.\n"
        "Which way?\n"
        "Options:\n"
        "A. Turn Left\n"
        "B. Turn Right\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (count.id, count.source, count.ground_truth, count.options) == ("3", "scannet", "4", ())
    assert (count.scene, count.media) == ("scannet/scene0011_00", ("scannet/scene0011_00.mp4",))
    assert route.options == ("A. Turn Left", "B. Turn Right") and route.ground_truth == "B"


@pytest.mark.parametrize(
    ("letter", "number", "overall"), [("A", "2", 0.261729), ("B", "1.5", 0.224223)], ids=["A/2", "B/1.5"]
)
def test_constant_answers_score_as_known(letter, number, overall):
    """Over the published annotations, without their questions."""
    questions = load_benchmark("vsi_bench", FIXTURES / "vsi_bench_answers.parquet")
    assert len(questions) == 5130 and len({question.scene for question in questions}) == 288
    answers = [letter if question.options else number for question in questions]
    result = score_benchmark("vsi_bench", questions, answers)
    assert round(result.summary["overall"] / 100, 6) == overall
    assert result.scores.shape == (5130,) and result.parsed[0] == float(number)
    # The functions and the `evaluate` metric are one.
    metric = vsi_bench_metric().VSIBench(keep_in_memory=True)
    assert result.summary == metric.compute(
        predictions=answers,
        references=[question.ground_truth for question in questions],
        question_types=[question.question_type for question in questions],
    )


def test_parts_of_vsi_bench(tmp_path):
    rows = [{**COUNT, "id": number, "pruned": number % 3 == 0} for number in (10, 9, 2, 100)]
    debiased, pruned = [row for row in rows if not row["pruned"]], [row for row in rows if row["pruned"]]
    hub, whole = tmp_path / "hub", tmp_path / "whole"
    write_parquet(hub / "test_debiased.parquet", debiased)
    write_parquet(hub / "test_pruned.parquet", pruned)
    write_jsonl(hub / "test.jsonl", rows)
    write_parquet(whole / "test-00000-of-00001.parquet", rows)
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    for source in (hub, whole, file):
        assert ids(load_benchmark("vsi_bench", source)) == ["2", "9", "10", "100"]
        assert ids(load_benchmark("vsi_bench", source, config="debiased")) == ["2", "10", "100"]
        assert ids(load_benchmark("vsi_bench", source, config="pruned")) == ["9"]
    (hub / "test_pruned.parquet").unlink()
    (hub / "test.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="holds none of the files of full"):
        load_benchmark("vsi_bench", hub)  # half of it would pass for all
    plain = write_jsonl(tmp_path / "plain.jsonl", [COUNT])
    with pytest.raises(ValueError, match="has no column 'pruned'"):
        load_benchmark("vsi_bench", plain, config="debiased")


def test_the_hub_is_asked_for_the_configuration(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([ROUTE, COUNT])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert ids(load_benchmark("vsi_bench", config="debiased", revision="abc")) == ["3", "20"]
    load_benchmark("vsi_bench", "someone/rooms")
    assert asked == [
        (("nyu-visionx/VSI-Bench", "debiased"), {"split": "test", "revision": "abc"}),
        (("someone/rooms", "full"), {"split": "test", "revision": None}),
    ]


def test_only_the_zips_needed_are_downloaded(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "spa3r_hf.benchmarks.snapshot_download", lambda *args, **kwargs: asked.append(kwargs) or tmp_path
    )
    questions = load_benchmark("vsi_bench", write_jsonl(tmp_path / "rows.jsonl", [COUNT, {**COUNT, "id": 5}]))
    assert download_media("vsi_bench", questions, revision="abc") == tmp_path
    assert asked == [{"repo_type": "dataset", "revision": "abc", "allow_patterns": ["scannet.zip"]}]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({**ROUTE, "options": None}, "id 20: a multiple-choice question without options"),
        ({**ROUTE, "options": []}, "id 20: a multiple-choice question without options"),
        ({**ROUTE, "ground_truth": "C"}, r"id 20: ground truth 'C'; expected the letter of one of its options"),
        ({**COUNT, "ground_truth": "four"}, "id 3 .*ground truth 'four'; expected a number"),
        ({**COUNT, "ground_truth": None}, "id 3 .*ground truth 'None'; expected a number"),
        ({**COUNT, "ground_truth": "0"}, "id 3: ground truth '0'; expected a positive number"),
        ({**COUNT, "ground_truth": ""}, "id 3: ground truth ''; expected a positive number"),
        ({**COUNT, "question_type": "counting"}, "id 3: question type 'counting'; expected one of"),
        ({**COUNT, "id": 7}, "1 ids occur more than once, as id 7"),
        ({**COUNT, "question": None}, "row 1: .*expected the columns of vsi_bench"),
        ({"id": 3}, "row 1: KeyError.*expected the columns of vsi_bench"),
        (["id", 3], "row 1: .*expected the columns of vsi_bench"),
    ],
)
def test_bad_rows_are_named(tmp_path, bad, message):
    file = write_jsonl(tmp_path / "rows.jsonl", [{**COUNT, "id": 7}, bad])
    with pytest.raises(ValueError, match=message):
        load_benchmark("vsi_bench", file)


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match="benchmark = 'vsi'; expected one of"):
        load_benchmark("vsi")
    with pytest.raises(ValueError, match="config = 'half' of vsi_bench; expected one of"):
        load_benchmark("vsi_bench", tmp_path, config="half")
    with pytest.raises(FileNotFoundError, match="none of the files of full"):
        load_benchmark("vsi_bench", tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist; expected a folder, a file or a repo id"):
        load_benchmark("vsi_bench", tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no questions"):
        load_benchmark("vsi_bench", write_jsonl(tmp_path / "empty.jsonl", []))
    cut = tmp_path / "cut.jsonl"
    cut.write_text(json.dumps(COUNT) + "\n" + json.dumps(ROUTE)[:30])
    with pytest.raises(ValueError, match="cut.jsonl, line 2"):
        load_benchmark("vsi_bench", cut)
    with pytest.raises(ValueError, match="expected a .parquet, .jsonl or .json file"):
        load_benchmark("vsi_bench", Path(__file__))


def test_fingerprint_is_of_the_data(tmp_path):
    def of(*rows):
        return fingerprint(load_benchmark("vsi_bench", write_jsonl(tmp_path / "rows.jsonl", rows)))

    whole = of(COUNT, ROUTE)
    assert of(ROUTE, COUNT) == whole and len(whole) == 64
    parquet = write_parquet(tmp_path / "rows.parquet", [COUNT, ROUTE])
    assert fingerprint(load_benchmark("vsi_bench", parquet)) == whole
    assert fingerprint(reversed(load_benchmark("vsi_bench", parquet))) == whole
    changes = [{"ground_truth": "5"}, {"question": "?"}, {"id": 4}, {"scene_name": "scene0"}]
    others = [of(ROUTE), *(of({**COUNT, **change}, ROUTE) for change in changes)]
    assert len({whole, *others}) == len(others) + 1


# Media


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def questions(tmp_path):
    rows = [COUNT, ROUTE, {**COUNT, "id": 4}]
    return load_benchmark("vsi_bench", write_jsonl(tmp_path / "annotations" / "rows.jsonl", rows))


def test_videos_come_from_folders_and_zips(tmp_path, questions):
    folder, cache_dir = tmp_path / "videos", tmp_path / "cache"
    (folder / "arkitscenes").mkdir(parents=True)
    (folder / "arkitscenes" / "41069025.mp4").write_bytes(b"extracted")
    noise = os.urandom(3000)
    archive = make_zip(folder / "scannet.zip", {"scannet/scene0011_00.mp4": noise, "scannet/other.mp4": b"other"})
    found = with_media(questions, folder, cache_dir)
    assert [question.video.read_bytes() for question in found] == [noise, noise, b"extracted"]
    assert found[2].video == folder / "arkitscenes" / "41069025.mp4"
    assert [path.name for path in cache_dir.rglob("*.mp4")] == ["scene0011_00.mp4"]  # and not the other
    # Found again, not extracted again; of a changed zip the new one.
    found[0].video.write_bytes(b"as it was")
    assert with_media(questions, folder, cache_dir)[0].video.read_bytes() == b"as it was"
    make_zip(archive, {"scannet/scene0011_00.mp4": b"changed"})
    assert with_media(questions, folder, cache_dir)[0].video.read_bytes() == b"changed"
    assert with_media(questions[:1], archive, cache_dir)[0].video.read_bytes() == b"changed"


def test_missing_videos_are_named_at_once(tmp_path):
    rows = [{**COUNT, "id": index, "scene_name": f"scene{index:02}"} for index in range(14)]
    questions = load_benchmark("vsi_bench", write_jsonl(tmp_path / "rows.jsonl", rows))
    folder = tmp_path / "videos"
    (folder / "scannet").mkdir(parents=True)
    (folder / "scannet" / "scene00.mp4").write_bytes(b"video")
    (folder / "scannet" / "scene01.mp4").write_bytes(b"")
    make_zip(folder / "scannet.zip", {"scannet/scene02.mp4": b"video", "scannet/scene03.mp4": b""})
    with pytest.raises(FileNotFoundError) as raised:
        with_media(questions, folder, tmp_path / "cache")
    message = str(raised.value)
    assert message.startswith("12 of 14 media files are missing or empty") and message.endswith("and 2 more")
    named = [f"scannet/scene{index:02}.mp4" in message for index in range(14)]
    assert named == [index in (1, *range(3, 12)) for index in range(14)]
    assert not (tmp_path / "cache").exists()
    with pytest.raises(FileNotFoundError, match="media folder .* does not exist"):
        with_media(questions, tmp_path / "nowhere")


def test_truncated_and_damaged_zips_are_refused(tmp_path, questions):
    noise = os.urandom(5000)
    archive = make_zip(tmp_path / "scannet.zip", {"scannet/scene0011_00.mp4": noise})
    whole = archive.read_bytes()
    archive.write_bytes(whole[:3000])
    with pytest.raises(BadSampleError, match="scannet.zip cannot be read: .*expected a whole zip"):
        with_media(questions[:1], tmp_path, tmp_path / "cache")
    damaged = bytearray(whole)
    damaged[2000:2010] = bytes(10)
    archive.write_bytes(damaged)
    with pytest.raises(BadSampleError, match="scannet.zip cannot be read: Bad CRC-32"):
        with_media(questions[:1], tmp_path, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]  # no half a video
    archive.write_bytes(whole)
    assert with_media(questions[:1], tmp_path, tmp_path / "cache")[0].video.read_bytes() == noise


@pytest.mark.parametrize(
    "name", ["../evil.mp4", "scannet/../../evil.mp4", "/tmp/evil.mp4", "..\\evil.mp4", "C:/evil.mp4"]
)
def test_zips_that_lead_elsewhere_are_refused(tmp_path, questions, name):
    make_zip(tmp_path / "scannet.zip", {"scannet/scene0011_00.mp4": b"video", name: b"evil"})
    with pytest.raises(BadSampleError, match="is refused: member .*evil.mp4' leads out of its folder"):
        with_media(questions[:1], tmp_path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_links_in_zips_and_names_that_lead_elsewhere_are_refused(tmp_path, questions):
    link = zipfile.ZipInfo("scannet/scene0011_00.mp4")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "scannet.zip", "w") as archive:
        archive.writestr(link, "/etc/hostname")
    with pytest.raises(BadSampleError, match="is refused: member 'scannet/scene0011_00.mp4' is a link"):
        with_media(questions[:1], tmp_path, tmp_path / "cache")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{**COUNT, "scene_name": "../../etc/hostname"}])
    with pytest.raises(ValueError, match="media file 'scannet/../../etc/hostname.mp4'; expected a relative name"):
        with_media(load_benchmark("vsi_bench", rows), tmp_path)


# The other benchmarks


def encoded_picture(colour: int) -> dict[str, object]:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (colour, 0, 0)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def cv_row(idx: int, source: str, answer: str, **changes):
    row = {
        "idx": idx,
        "type": "3D" if source == "Omni3D" else "2D",
        "task": "Depth" if source == "Omni3D" else "Count",
        "filename": f"{source}/{idx}.png",
        "question": "How many?",
        "choices": ["0", "3", "1"],
        "answer": answer,
        "prompt": "How many? Select from the following choices.\n(A) 0\n(B) 3\n(C) 1",
        "source": source,
    }
    return row | changes


CV_ROWS = [
    cv_row(0, "ADE20K", "(A)"),
    cv_row(1, "ADE20K", "(B)"),
    cv_row(2, "COCO", "(A)"),
    cv_row(3, "Omni3D", "(C)"),
]


def test_cv_bench_from_parquet_with_pictures(tmp_path):
    rows = [{**row, "image": encoded_picture(10 * index)} for index, row in enumerate(CV_ROWS)]
    features = datasets.Dataset.from_list(rows[:1]).features | {"image": datasets.Image()}
    for name, part in (("test_2d", rows[:3]), ("test_3d", rows[3:])):
        datasets.Dataset.from_list(part, features=datasets.Features(features)).to_parquet(tmp_path / f"{name}.parquet")
    questions = load_benchmark("cv_bench", tmp_path)
    assert ids(questions) == ["0", "1", "2", "3"] and ids(load_benchmark("cv_bench", tmp_path, config="3D")) == ["3"]
    last = questions[3]
    assert last.prompt.startswith(CV_ROWS[0]["prompt"] + "\n") and (last.ground_truth, last.question_type) == (
        "C",
        "Depth",
    )
    assert last.media == () and with_media(questions, tmp_path)[3].images == last.images
    assert len(last.images) == 1 and last.images[0].getpixel((0, 0)) == (30, 0, 0)


def test_cv_bench_from_jsonl_with_a_picture_folder(tmp_path):
    write_jsonl(tmp_path / "test_2d.jsonl", CV_ROWS[:3])
    write_jsonl(tmp_path / "test_3d.jsonl", CV_ROWS[3:])
    (tmp_path / "img" / "Omni3D").mkdir(parents=True)
    Image.new("RGB", (4, 3), (7, 0, 0)).save(tmp_path / "img" / "Omni3D" / "3.png")
    questions = load_benchmark("cv_bench", tmp_path)
    (last,) = with_media(questions[3:], tmp_path)
    assert last.media == ("img/Omni3D/3.png",) and last.images[0].getpixel((0, 0)) == (7, 0, 0)
    with pytest.raises(FileNotFoundError, match="3 of 4 media files are missing"):
        with_media(questions, tmp_path)
    write_jsonl(tmp_path / "test_2d.jsonl", [cv_row(8, "Flickr", "(A)")])
    with pytest.raises(ValueError, match="idx 8: source 'Flickr'; expected one of"):
        load_benchmark("cv_bench", tmp_path)


def test_cv_bench_score(tmp_path):
    questions = load_benchmark("cv_bench", write_jsonl(tmp_path / "rows.jsonl", CV_ROWS))
    result = score_benchmark("cv_bench", questions, ["A", "(A)", "(a) 0", "C."])
    assert result.scores.tolist() == [1, 0, 1, 1] and result.parsed == ["A", "A", "A", "C"]
    expected = {"overall": 87.5, "2D": 75, "3D": 100, "ADE20K": 50, "COCO": 100, "Omni3D": 100, "Depth": 100}
    assert {name: result.summary[name] for name in expected} == expected
    assert result.summary["Count"] == pytest.approx(200 / 3) and result.summary["count.Count"] == 3
    part = score_benchmark("cv_bench", questions[:2], ["A", "B"]).summary
    assert part["overall"] == part["2D"] == 100 and "3D" not in part and "COCO" not in part
    # Neither an article nor the text of another option is an answer.
    answers = ["A chair is closest, so the answer is B", "(A) 3", None, ""]
    bad = score_benchmark("cv_bench", questions, answers)
    assert bad.parsed == [None] * 4 and bad.summary["unparseable.Count"] == 3 and bad.summary["overall"] == 0


def spar_row(task: str, answer: str):
    return {
        "id": 0,
        "img_type": "multi_view",
        "format_type": "fill",
        "task": task,
        "source": "scannet",
        "image": ["scannet/a.png", "scannet/b.png"],
        "question": "Where?",
        "answer": answer,
    }


def test_spar_bench_score(tmp_path):
    cases = [  # task, answer, prediction, score
        ("depth_prediction_oc", "2.0", "It is 2.0 m, not 5", 1.0),
        ("depth_prediction_oc", "2.0", "about 1 or 2", 0.1),
        ("distance_prediction_oo_mv", "2.0", "about 1 or 2", 1.0),
        ("distance_prediction_oo_mv", "2.0", "far", 0.0),
        ("obj_spatial_relation_oo", "B", "b. behind", 1.0),
        ("obj_spatial_relation_oo", "B", "", 0.0),
        ("spatial_imagination_oc", "B", "A", 0.0),
        ("position_matching", "A", "(A)", 0.0),
        ("view_change_infer", "move_left:1,rotate_up:10", "move_right:-1,rotate_up:10", 1.0),
        # 4 of 5 axes right; the third is off by 1 / 2 of the answer: one of ten thresholds
        ("view_change_infer", "move_forward:1", "move_forward:2", 0.82),
        ("view_change_infer", "move_forward:1", "forwards", 0.0),
    ]
    file = write_jsonl(tmp_path / "rows.jsonl", [spar_row(task, answer) for task, answer, _, _ in cases])
    questions = load_benchmark("spar_bench", file)
    result = score_benchmark("spar_bench", questions, [prediction for _, _, prediction, _ in cases])
    np.testing.assert_allclose(result.scores, [score for *_, score in cases])
    tasks = {"depth_prediction_oc": 55, "distance_prediction_oo_mv": 50, "obj_spatial_relation_oo": 50}
    tasks |= {"spatial_imagination_oc": 0, "position_matching": 0, "view_change_infer": 100 * 1.82 / 3}
    means = {name: score for name, score in result.summary.items() if "." not in name}
    assert means == pytest.approx(
        tasks
        | {
            "overall": sum(tasks.values()) / 6,
            "low": 52.5,
            "middle": 100 * 1.82 / 6,
            "high": 25,
        }
    )
    assert (
        result.summary["unparseable.view_change_infer"] == result.summary["unparseable.obj_spatial_relation_oo"] == 1
    )
    assert score_benchmark("spar_bench", questions, [None] * len(cases)).summary["overall"] == 0


def test_spar_bench_rows(tmp_path):
    names = write_jsonl(
        tmp_path / "test.jsonl",
        [
            spar_row("depth_prediction_oc", "2.0"),
            spar_row("position_matching", "A"),
            spar_row("view_change_infer", "a:1"),
        ],
    )
    number, letter, change = load_benchmark("spar_bench", tmp_path)
    assert number.media == ("scannet/a.png", "scannet/b.png") and number.scene == letter.scene
    assert number.prompt == "\nWhere?\nPlease answer the question using a single word or phrase."
    assert (
        letter.prompt.startswith("\nWhere?\nThe values represent the bounding box") and change.prompt == "\nWhere?\n\n"
    )
    row = spar_row("position_matching", "A") | {"image": [encoded_picture(1), encoded_picture(2)]}
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [row])  # comes before the JSONL file
    (question,) = load_benchmark("spar_bench", tmp_path)
    assert question.media == () and [picture.getpixel((0, 0))[0] for picture in question.images] == [1, 2]
    for bad, message in (
        (spar_row("depth_prediction_oc", "far"), "row 0 .*ground truth 'far'; expected a number"),
        (spar_row("view_change_infer", "left"), "row 0 .*view change 'left'"),
        (spar_row("position_matching", " "), "row 0 .*expected an option's letter"),
        (spar_row("guessing", "A"), "row 0 .*task 'guessing'; expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            load_benchmark("spar_bench", write_jsonl(names, [bad]))


def test_viewspatial_bench(tmp_path):
    row = {
        "question_type": "Camera perspective - Relative Direction",
        "image_path": ["ViewSpatial-Bench/scannetv2_val/scene0011_00/original_images/280.jpg"],
        "question": "Where is the counter?",
        "answer": "A. right",
        "choices": "A. right\nB. front-up\nC. back-left\nD. front",
    }
    person = row | {"question_type": "Person perspective - Relative Direction", "answer": "D. front"}
    (tmp_path / "ViewSpatial-Bench.json").write_text(json.dumps([row, person, person]))
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3)).save(buffer, "JPEG")
    make_zip(tmp_path / "scannetv2_val.zip", {"scannetv2_val/scene0011_00/original_images/280.jpg": buffer.getvalue()})
    questions = with_media(load_benchmark("viewspatial_bench", tmp_path), tmp_path, tmp_path / "cache")
    assert questions[0].images[0].size == (4, 3) and questions[0].scene == questions[2].scene
    assert questions[0].prompt == (
        "Question: Where is the counter?\n"
        "Choices: A. right\nB. front-up\nC. back-left\nD. front\n"
        "Reply only to the corresponding option.\nAnswer:"
    )
    result = score_benchmark("viewspatial_bench", questions, ["(a) right", "B or so.\nThe answer is D", "front"])
    assert result.parsed == ["A", "D", None] and result.scores.tolist() == [1, 1, 0]
    assert result.summary["overall"] == pytest.approx(200 / 3)
    assert result.summary["Person perspective - Relative Direction"] == 50
    assert result.summary["unparseable.Person perspective - Relative Direction"] == 1


def test_score_needs_an_answer_for_each_question(questions):
    with pytest.raises(ValueError, match="1 predictions for 3 questions"):
        score_benchmark("vsi_bench", questions, ["A"])
    with pytest.raises(ValueError, match="benchmark = 'mmlu'; expected one of"):
        score_benchmark("mmlu", questions, ["A"] * 3)
    with pytest.raises(ValueError, match="number_parsing = 'strict'"):
        score_benchmark("vsi_bench", questions, ["A"] * 3, number_parsing="strict")
