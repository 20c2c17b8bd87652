"""The evaluation script, through its command line, on tiny models and small videos."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from loopback_hub import LoopbackHub, Repo
from PIL import Image
from tiny_models import tiny_spa3r
from tiny_processors import tiny_vlm_folder
from tiny_vlms import disturb, tiny_vlm
from transformers import AutoModel, AutoModelForImageTextToText

from spa3r_hf import Spa3AdapterConfig, Spa3RImageProcessor, Spa3VLM, Spa3VLMProcessor, get_spa3_vlm
from spa3r_hf.errors import BadSampleError
from spa3r_hf.rooms_benchmark import write_video
from spa3r_hf.scene_answers import SceneAnswerer


for package in ("av", "datasets", "evaluate", "matplotlib"):
    pytest.importorskip(package)
SCRIPT = Path(__file__).parents[1] / "training" / "run_vsi_bench.py"
FIXTURES = Path(__file__).parent / "fixtures"
# Same order of sums in every run: what is compared below is compared to the letter.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
DIRECTIONS = tuple(f"object_rel_direction_{level}" for level in ("easy", "medium", "hard"))
NUMBERS = ("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation")
TYPES = (*NUMBERS, "object_rel_distance", *DIRECTIONS, "route_planning", "obj_appearance_order")
SCENES = ("scannet/scene0011_00", "scannet/scene0030_02", "arkitscenes/41069025", "scannetpp/09c1414f1b")
CONSTANT = ["--answers", "constant:A/2"]


def row(number: int, scene: str, question_type: str, **changes) -> dict:
    dataset, name = scene.split("/")
    is_number = question_type in NUMBERS
    return {
        **{"id": number, "dataset": dataset, "scene_name": name, "question_type": question_type},
        "question": f"w{10 + number} w{11 + 3 * number % 60} ?",
        "ground_truth": str(40 + number) if is_number else "AB"[number % 2],
        "options": None if is_number else ["A. w20", "B. w21", "C. w22"],
        **changes,
    }


# Scene by scene in turn; ids with gaps.
ROWS = [row(2 * index + 1, SCENES[index % 4], TYPES[index % 10]) for index in range(30)]


def write_rows(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """`vlm`, `encoder`, `adapter` of both, and `data`: VSI-Bench's layout with four videos and 30 questions."""
    work = tmp_path_factory.mktemp("vsi_bench")
    tiny_vlm("qwen2_5_vl").save_pretrained(work / "vlm")
    tiny_vlm_folder("qwen2_5_vl", work / "vlm")
    tiny_spa3r().spa3r.save_pretrained(work / "encoder")
    Spa3RImageProcessor(size=28).save_pretrained(work / "encoder")
    vlm = AutoModelForImageTextToText.from_pretrained(work / "vlm")
    encoder = AutoModel.from_pretrained(work / "encoder")
    disturb(get_spa3_vlm(vlm, encoder, Spa3AdapterConfig())).save_pretrained(work / "adapter")
    processor = Spa3VLMProcessor.from_vlm(work / "vlm", work / "encoder", min_frames=3, max_frames=3)
    processor.save_pretrained(work / "adapter")
    for seed, scene in enumerate(SCENES):
        pixels = np.random.default_rng(seed).integers(0, 256, (12, 6, 8, 3), dtype=np.uint8)
        path = work / "data" / f"{scene}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, pixels.repeat(8, 1).repeat(8, 2), 4)
    write_rows(work / "data" / "test.jsonl", ROWS)
    return work


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("run_vsi_bench", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules["run_vsi_bench"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def quick_charts(monkeypatch):
    """One test looks at a chart; drawing it takes longer than all else."""
    monkeypatch.setattr("spa3r_hf.evaluation_report.score_chart", lambda *_: Image.new("RGB", (4, 4)))


def flags(work: Path, output: Path, **options) -> list[str]:
    settings = {"adapter": work / "adapter", "source": work / "data", "output_dir": output, "use_cpu": True, **options}
    return [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(work, script) -> Path:
    """A run of the adapter that was never interrupted."""
    script.main(flags(work, work / "finished"))
    return work / "finished"


def start(arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def without_load(monkeypatch, script) -> None:
    def load(*args):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(script.EvaluatedModel, "load", load)


def test_what_a_run_leaves(finished, work):
    names = {path.name for path in finished.iterdir()}
    assert names == {"answers", "settings.json", "predictions.jsonl", "results.json", "table.md", "chart.png"}
    rows = predictions(finished)
    assert [item["id"] for item in rows] == [str(item["id"]) for item in ROWS]
    model = Spa3VLM.from_pretrained(work / "adapter")
    answerer = SceneAnswerer(model, Spa3VLMProcessor.from_pretrained(work / "adapter"), reuse=False)
    for item, given in zip(rows[::7], ROWS[::7], strict=True):
        assert item["output"] == answerer.answer(work / "data" / f"{item['scene']}.mp4", [item["prompt"]])[0].text
        assert item["num_frames"] == 3 and item["question_type"] == given["question_type"]
        assert item["scene"] == f"{given['dataset']}/{given['scene_name']}"
        assert item["prompt"].startswith("These are frames of a video.\n" + given["question"])
    assert len({item["output"] for item in rows}) > 5  # the model sees what it is asked
    # The numbers that the words of the tiny vocabulary have, to one way of reading, and not to the other.
    counting = [item for item in rows if item["question_type"] == "object_counting"]
    assert all(item["parsed"] == float(re.search(r"\d+", item["output"])[0]) for item in counting)
    assert any(item["score"] for item in rows) and not any(item["score_original_parsing"] for item in rows)

    facts = results(finished)
    assert facts["questions"] == 30 and facts["scenes"] == 4 and facts["failed"] == 0 and facts["asked_now"] == 30
    assert facts["overall"] == facts["scores"]["lmms_eval"]["overall"] != facts["scores"]["original"]["overall"]
    mean = 100 * np.mean([item["score"] for item in counting])
    assert facts["scores"]["lmms_eval"]["object_counting"] == pytest.approx(mean)
    assert "ci95_low.overall" in facts["scores"]["lmms_eval"] and facts["frames_seen"] == {"fewest": 3, "most": 3}
    settings = facts["settings"]
    assert [settings[part]["id"] for part in ("vlm", "adapter", "spatial_encoder")] == ["vlm", "adapter", "encoder"]
    assert all(settings[part]["revision"].startswith("sha256:") for part in ("vlm", "adapter", "spatial_encoder"))
    assert (settings["dtype"], settings["attn_implementation"], settings["max_new_tokens"]) == ("float32", "sdpa", 16)
    assert settings["frames"] == {"seconds_per_frame": 2.0, "min_frames": 3, "max_frames": 3}
    assert settings["pixels"] == {"size": 28, "mode": "crop", "patch_size": 14}
    assert len(settings["data_fingerprint"]) == len(settings["prompts_sha256"]) == 64
    assert {"torch", "transformers", "evaluate", "spa3r_hf"} <= facts["versions"].keys() and facts["seed"] == 0
    assert facts["seconds"] >= facts["seconds_asking"] > 0 and facts["machine"]["device"] == "CPU"
    assert str(work) not in json.dumps(facts)  # a private path would go out with the results

    header, _, measured, interval, counts, original, *published = (
        (finished / "table.md").read_text().splitlines()[2:13]
    )
    names = ["Obj. Count", "Abs. Dist.", "Obj. Size", "Room Size", "Rel. Dist.", "Rel. Dir.", "Route Plan"]
    names += ["Appr. Order", "Avg.", "Numerical", "Multiple choice"]
    assert [cell.strip() for cell in header.strip("|").split("|")][1:] == names
    assert f" {facts['overall']:.1f} " in measured and "adapter (measured" in measured and "95 %" in interval
    assert [cell.strip() for cell in counts.strip("|").split("|")][-3:] == ["30", "12", "18"]
    published = [line for line in published if line.startswith("|")]
    assert published and all("(published, arXiv" in line for line in published)
    spa3_vlm = next(line for line in published if line.startswith("| Spa3-VLM-4B"))
    assert [cell.strip() for cell in spa3_vlm.strip("|").split("|")][1:] == ["-"] * 8 + ["58.6", "60.4", "56.8"]
    with Image.open(finished / "chart.png") as chart:
        pixels = np.asarray(chart.convert("RGB"))
    assert pixels.shape[1] > 1000 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


def test_a_finished_run_is_only_scored_again(finished, work, script, monkeypatch, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    without_load(monkeypatch, script)
    (tmp_path / "copy" / "predictions.jsonl").unlink()
    script.main(flags(work, tmp_path / "copy"))
    assert predictions(tmp_path / "copy") == predictions(finished)
    assert results(tmp_path / "copy")["asked_now"] == 0
    script.main(flags(work, tmp_path / "copy", limit=7))  # the answers to others stay
    assert predictions(tmp_path / "copy") == predictions(finished)[:7]


def test_reuse_and_batches_change_no_answer(finished, work, script, tmp_path):
    script.main([*flags(work, tmp_path / "alone", limit=9), "--no_reuse"])
    script.main(flags(work, tmp_path / "small", limit=9, batch_size=2))
    assert predictions(tmp_path / "alone") == predictions(tmp_path / "small") == predictions(finished)[:9]


def test_a_vlm_without_its_adapter(finished, work, script, tmp_path):
    script.main([*flags(work, tmp_path / "without", limit=9), "--no_adapter"])
    script.main(flags(work, tmp_path / "vlm", limit=9, adapter=None, vlm=work / "vlm", image_size=28, max_frames=4))
    without, alone = (results(tmp_path / name) for name in ("without", "vlm"))
    assert without["name"] == "adapter, VLM alone" and alone["name"] == "vlm"
    for facts in (without, alone):
        assert facts["settings"]["adapter"] is None and facts["settings"]["spatial_encoder"] is None
    assert alone["frames_seen"] == {"fewest": 4, "most": 4} and without["frames_seen"] == {"fewest": 3, "most": 3}
    outputs = [[item["output"] for item in predictions(folder)] for folder in (tmp_path / "without", finished)]
    assert outputs[0] != outputs[1][:9]
    # On another VLM, and with the encoder named, an adapter is the same.
    shutil.copytree(work / "vlm", tmp_path / "vlm_copy")
    options = {"vlm": tmp_path / "vlm_copy", "spatial_encoder_name_or_path": work / "encoder"}
    script.main(flags(work, tmp_path / "moved", limit=9, **options))
    assert predictions(tmp_path / "moved") == predictions(finished)[:9]


def test_another_family(work, script, tmp_path):
    tiny_vlm("idefics3").save_pretrained(tmp_path / "idefics3")
    tiny_vlm_folder("idefics3", tmp_path / "idefics3")
    script.main(flags(work, tmp_path / "out", adapter=None, vlm=tmp_path / "idefics3", image_size=28, limit=5))
    assert len({item["output"] for item in predictions(tmp_path / "out")}) > 1


# --- killed, resumed, shared among processes

SLOW = """
import importlib.util, sys, time

specification = importlib.util.spec_from_file_location("run_vsi_bench", {script!r})
module = importlib.util.module_from_spec(specification)
sys.modules["run_vsi_bench"] = module
specification.loader.exec_module(module)
answer = module.SceneAnswerer.answer

def logged(self, video, prompts):
    with open({log!r}, "a") as log:
        log.write("".join(prompt.split("\\n")[1] + "\\n" for prompt in prompts))
    given = answer(self, video, prompts)
    time.sleep({seconds})
    return given

module.SceneAnswerer.answer = logged
module.main(sys.argv[1:])
"""


def slow(folder: Path, seconds: float) -> tuple[Path, Path]:
    """A program that is the script, but slow, and the file where it notes what the model is asked."""
    driver, log = folder / f"slow_{seconds}.py", folder / f"asked_{seconds}.txt"
    driver.write_text(SLOW.format(script=str(SCRIPT), log=str(log), seconds=seconds))
    return driver, log


def test_killed_and_resumed(finished, work, tmp_path):
    part = tmp_path / "out" / "answers" / "part-00000.jsonl"
    driver, _ = slow(tmp_path, 5)
    process = start([str(driver), *flags(work, tmp_path / "out")])
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = part.read_bytes()
    kept = {json.loads(line)["id"] for line in before.splitlines()}
    assert before.endswith(b"\n") and 0 < len(kept) < 30 and not (tmp_path / "out" / "results.json").exists()
    with part.open("ab") as file:  # as a kill in the midst of writing would leave it
        file.write(b'{"id": "59", "output": "w1')

    driver, log = slow(tmp_path, 0)
    output = finish(start([str(driver), *flags(work, tmp_path / "out")]))
    assert part.read_bytes().startswith(before)
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == (finished / "predictions.jsonl").read_bytes()
    questions = {str(item["id"]): item["question"] for item in ROWS}
    assert sorted(log.read_text().splitlines()) == sorted(text for key, text in questions.items() if key not in kept)
    assert results(tmp_path / "out")["asked_now"] == 30 - len(kept)
    assert re.search(r"30/30 \[\S+ gone, \S+ left, +[\d.]+ questions/s\]", output), output


def test_two_processes_are_one(finished, work, script, tmp_path):
    finish(start([str(SCRIPT), *flags(work, tmp_path / "out", num_processes=2)]))
    parts = sorted((tmp_path / "out" / "answers").iterdir())
    shares = [[json.loads(line)["id"] for line in part.read_text().splitlines()] for part in parts]
    assert [len(share) for share in shares] in ([15, 15], [16, 14], [14, 16])
    scenes = {str(item["id"]): item["scene_name"] for item in ROWS}
    assert not {scenes[key] for key in shares[0]} & {scenes[key] for key in shares[1]}
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == (finished / "predictions.jsonl").read_bytes()
    assert results(tmp_path / "out")["processes"] == 2
    # One process goes on where two were stopped.
    lines = parts[1].read_text().splitlines(keepends=True)
    parts[1].write_text("".join(lines[:5]) + lines[5][:9])
    script.main(flags(work, tmp_path / "out"))
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == (finished / "predictions.jsonl").read_bytes()
    assert results(tmp_path / "out")["asked_now"] == len(lines) - 5


def test_answers_of_other_settings_or_data_are_not_mixed(finished, work, script, monkeypatch, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    without_load(monkeypatch, script)
    with pytest.raises(FileExistsError, match=r"max_new_tokens = 16, now 4; expected .* another --output_dir"):
        script.main(flags(work, tmp_path / "out", max_new_tokens=4))
    with pytest.raises(FileExistsError, match=r"frames.max_frames = 3, now 5"):
        script.main(flags(work, tmp_path / "out", max_frames=5))
    shutil.copytree(work / "adapter", tmp_path / "retrained")
    Spa3VLM.from_pretrained(work / "adapter").save_pretrained(tmp_path / "retrained")
    script.main(flags(work, tmp_path / "out", adapter=tmp_path / "retrained"))  # the same weights in another place
    disturb(Spa3VLM.from_pretrained(work / "adapter"), seed=4).save_pretrained(tmp_path / "retrained")
    with pytest.raises(FileExistsError, match=r"answers with adapter = 'sha256:\w+', now 'sha256:\w+'; expected"):
        script.main(flags(work, tmp_path / "out", adapter=tmp_path / "retrained"))
    revised = [*ROWS[:-1], ROWS[-1] | {"ground_truth": "C"}]
    source = write_rows(tmp_path / "revised.jsonl", revised)
    with pytest.raises(FileExistsError, match=r"data_fingerprint = '\w+', now '\w+'; expected"):
        script.main(flags(work, tmp_path / "out", source=source, media_dir=work / "data"))
    with pytest.raises(FileExistsError, match=r"answers = None, now 'constant:A/2'"):
        script.main([*flags(work, tmp_path / "out"), *CONSTANT])
    assert predictions(tmp_path / "out") == predictions(finished)
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(FileExistsError, match="holds answers without settings.json"):
        script.main(flags(work, tmp_path / "out"))


# --- videos that cannot be used


@pytest.fixture
def data(work, tmp_path, monkeypatch) -> Path:
    """A copy of the data, for damage; what comes out of zips goes to a folder of this test."""
    monkeypatch.setattr("spa3r_hf.benchmarks_media.HF_HOME", str(tmp_path / "home"))
    return shutil.copytree(work / "data", tmp_path / "data")


def zipped(data: Path) -> dict[str, Path]:
    """The videos of each source moved into a zip of its own."""
    archives = {}
    for dataset in ("scannet", "arkitscenes", "scannetpp"):
        archives[dataset] = data / f"{dataset}.zip"
        with zipfile.ZipFile(archives[dataset], "w") as archive:
            for path in (data / dataset).iterdir():
                archive.write(path, f"{dataset}/{path.name}")
        shutil.rmtree(data / dataset)
    return archives


def ids_of(*scenes: str) -> set[str]:
    return {str(item["id"]) for item in ROWS if f"{item['dataset']}/{item['scene_name']}" in scenes}


def assert_counted(folder: Path, finished: Path, failed: set[str], reason: str) -> None:
    """Those that failed are named and score 0; the others are as ever."""
    expected = {item["id"]: item for item in predictions(finished)}
    for item in predictions(folder):
        if item["id"] in failed:
            assert (item["output"], item["parsed"], item["score"]) == (None, None, 0.0)
            assert re.search(reason, item["error"]), item["error"]
        else:
            assert item == expected[item["id"]]
    facts = results(folder)
    assert facts["failed"] == len(failed) and facts["questions"] == 30
    assert {key for failure in facts["failures"] for key in failure["ids"]} == failed
    assert f"{len(failed)} could not be asked and count as wrong" in (folder / "table.md").read_text()


@pytest.mark.parametrize("damage", ["corrupt", "truncated", "empty"])
def test_a_damaged_video(finished, work, script, data, damage, tmp_path, caplog):
    video = data / f"{SCENES[1]}.mp4"
    content = video.read_bytes()
    video.write_bytes({"corrupt": b"no video", "truncated": content[:-400], "empty": b""}[damage])
    error = FileNotFoundError if damage == "empty" else BadSampleError
    with pytest.raises(error, match="scene0030_02"):
        script.main(flags(work, tmp_path / "out", source=data))
    script.main(flags(work, tmp_path / "out", source=data, on_bad_sample="skip"))
    assert_counted(tmp_path / "out", finished, ids_of(SCENES[1]), "is empty" if damage == "empty" else r"video .*mp4")
    if damage == "corrupt":  # once it is mended, its questions are asked, and no others
        video.write_bytes(content)
        script.main(flags(work, tmp_path / "out", source=data))
        assert predictions(tmp_path / "out") == predictions(finished)
        assert results(tmp_path / "out")["asked_now"] == len(ids_of(SCENES[1]))


def test_videos_in_zips(finished, work, script, data, tmp_path):
    archives = zipped(data)
    script.main(flags(work, tmp_path / "whole", source=data))
    assert predictions(tmp_path / "whole") == predictions(finished)
    # The list of what a zip holds is at its end: without it, its videos may as well be in there.
    shutil.rmtree(tmp_path / "home")
    content = archives["scannet"].read_bytes()
    archives["scannet"].write_bytes(content[: len(content) // 2])
    with pytest.raises(BadSampleError, match=r"scannet.zip cannot be read: .*truncated download\?"):
        script.main(flags(work, tmp_path / "truncated", source=data))
    script.main(flags(work, tmp_path / "truncated", source=data, on_bad_sample="skip"))
    assert_counted(tmp_path / "truncated", finished, ids_of(*SCENES[:2]), r"scannet.zip cannot be read")
    # A bit that has changed inside.
    shutil.rmtree(tmp_path / "home")
    place = content.index(b"scene0030_02") + 200
    archives["scannet"].write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
    with pytest.raises(BadSampleError, match=r"scannet.zip cannot be read: Bad CRC-32"):
        script.main(flags(work, tmp_path / "flipped", source=data))
    script.main(flags(work, tmp_path / "flipped", source=data, on_bad_sample="skip"))
    assert_counted(tmp_path / "flipped", finished, ids_of(SCENES[1]), "Bad CRC-32")


@pytest.mark.parametrize("on_bad_sample", ["raise", "skip"])
def test_a_zip_that_leads_out_of_its_folder_is_refused(work, script, data, on_bad_sample, tmp_path):
    archives = zipped(data)
    with zipfile.ZipFile(archives["scannetpp"], "a") as archive:
        archive.writestr("../../escaped.mp4", b"evil")
    with pytest.raises(BadSampleError, match=r"refused: member '../../escaped.mp4' leads out of its folder"):
        script.main(flags(work, tmp_path / "out", source=data, on_bad_sample=on_bad_sample))
    assert not list(tmp_path.rglob("escaped.mp4")) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("on_bad_sample", ["raise", "skip"])
def test_missing_videos_are_named_before_anything_runs(work, script, data, monkeypatch, on_bad_sample, tmp_path):
    without_load(monkeypatch, script)
    for scene in SCENES[1:3]:
        (data / f"{scene}.mp4").unlink()
    with pytest.raises(
        FileNotFoundError, match="2 of 4 media files .*(scene0030_02.*41069025|41069025.*scene0030_02)"
    ):
        script.main(flags(work, tmp_path / "out", source=data, on_bad_sample=on_bad_sample))


# --- rows that cannot be used, and answers of all sorts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question_type": "route_planning", "ground_truth": "B"}, "id 7: a multiple-choice question without options"),
        ({"ground_truth": "many"}, r"id 7 \(object_counting\): ground truth 'many'; expected a number"),
        ({"ground_truth": "-1"}, "id 7 .*'-1'"),
        ({"ground_truth": "nan"}, "id 7 .*'nan'"),
        ({"id": 9}, "1 ids occur more than once, as id 9"),
        ({"question_type": "object_colour"}, "id 7: question type 'object_colour'"),
    ],
)
def test_bad_rows(work, script, changes, message, tmp_path):
    bad = row(7, SCENES[0], "object_counting") | changes
    source = write_rows(tmp_path / "rows.jsonl", [bad, row(9, SCENES[0], "object_counting")])
    with pytest.raises(ValueError, match=message):
        script.main(["--source", str(source), "--output_dir", str(tmp_path / "out"), *CONSTANT])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("answers", "overall"), [("A/2", 0.261729), ("B/1.5", 0.224223)])
def test_anchors_over_all_of_vsi_bench(script, answers, overall, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    without_load(monkeypatch, script)
    source = str(FIXTURES / "vsi_bench_answers.parquet")
    script.main(["--answers", f"constant:{answers}", "--source", source])
    (folder,) = (tmp_path / "outputs" / "vsi_bench").iterdir()
    facts = results(folder)
    assert round(facts["overall"] / 100, 6) == overall and len(predictions(folder)) == facts["questions"] == 5130
    assert facts["scores"]["original"]["overall"] == facts["overall"] and facts["settings"]["answers"][-3:] in answers


def test_answers_of_somebody_else(script, tmp_path):
    rows = [row(number, SCENES[0], "object_counting") | {"ground_truth": "4"} for number in range(1, 11)]
    rows.append(row(11, SCENES[0], "route_planning"))
    source = write_rows(tmp_path / "rows.jsonl", rows)
    given = [
        None,
        float("nan"),
        "x" * 10_000,
        "四",
        "четыре",
        "four",
        4,
        "4.0 chairs",
        {"a": 1},
        "9" * 400,
        "\ud800 B",
    ]
    file = write_rows(tmp_path / "theirs.jsonl", [{"id": i, "prediction": x} for i, x in enumerate(given, start=1)])
    base = ["--source", str(source), "--output_dir", str(tmp_path / "out")]
    script.main([*base, "--answers", str(file)])
    rows = predictions(tmp_path / "out")
    assert [item["score"] for item in rows] == [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert [item["score_original_parsing"] for item in rows] == [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert rows[2]["output"] == "x" * 10_000 and rows[3]["output"] == "四" and rows[0]["output"] is None
    scores = results(tmp_path / "out")["scores"]
    assert scores["lmms_eval"]["unparseable.object_counting"] == 7 and scores["lmms_eval"]["object_counting"] == 30
    # What was written can be scored again.
    script.main(
        ["--source", str(source), "--output_dir", str(tmp_path / "again"), "--answers"]
        + [str(tmp_path / "out" / "predictions.jsonl")]
    )
    assert [item["score"] for item in predictions(tmp_path / "again")] == [item["score"] for item in rows]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"id": 1, "prediction": "1"}] * 2, "line 2: id 1 occurs a second time"),
        ([{"id": 99, "prediction": "1"}], "1 ids that no question has, such as .'99'"),
        ([{"id": 1}], r"line 1 has the keys \['id'\]; expected id, and one of"),
        ([[1, 2]], "line 1 is '.1, 2.'; expected a JSON object"),
        ([{"id": 1, "prediction": "1"}], "no answer to 29 of 30 questions, such as .'3', '5', '7'"),
    ],
)
def test_answers_that_cannot_be_used(work, script, lines, message, tmp_path):
    file = write_rows(tmp_path / "theirs.jsonl", lines)
    base = ["--source", str(work / "data"), "--output_dir", str(tmp_path / "out"), "--answers"]
    with pytest.raises(ValueError, match=message):
        script.main([*base, str(file)])
    if "29 of 30" in message:
        script.main([*base, str(file), "--on_bad_sample", "skip"])
        assert results(tmp_path / "out")["failed"] == 29
    for answers, error in ((str(tmp_path / "none.jsonl"), FileNotFoundError), ("constant:A", ValueError)):
        with pytest.raises(error, match="constant:"):
            script.main([*base, answers])


def test_a_subset_has_absent_tasks(work, script, tmp_path):
    script.main(["--source", str(work / "data"), "--output_dir", str(tmp_path / "out"), "--limit", "7", *CONSTANT])
    summary = results(tmp_path / "out")["scores"]["lmms_eval"]
    assert not {"route_planning", "obj_appearance_order", "object_rel_direction"} & summary.keys()
    measured = (tmp_path / "out" / "table.md").read_text().splitlines()[4]
    cells = [cell.strip() for cell in measured.strip("|").split("|")][1:]
    assert cells[6:8] == ["absent", "absent"] and cells[5].endswith("(medium)") and cells[8] != "absent"
    with pytest.raises(ValueError, match="limit = 0"):
        script.main(["--source", str(work / "data"), "--limit", "0", *CONSTANT])


# --- from the Hub


def test_repos_are_noted_with_their_commits(finished, work, tmp_path):
    settings = json.loads((work / "adapter" / "adapter_config.json").read_text())
    settings |= {"base_model_name_or_path": "org/vlm", "spatial_encoder_name_or_path": "org/encoder"}
    named = {"adapter_config.json": json.dumps(settings).encode()}
    with LoopbackHub() as hub:
        commits = {}
        for part in ("vlm", "encoder", "adapter"):
            files = {path.name: path.read_bytes() for path in (work / part).iterdir() if path.is_file()}
            repo = hub.repos["model", f"org/{part}"] = Repo()
            commits[part] = repo.commit(files | (named if part == "adapter" else {}), "main")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        environment = {**kept, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}

        def run(*arguments: str) -> subprocess.CompletedProcess:
            argv = flags(work, tmp_path / "out", adapter="org/adapter", limit=5)
            command = [sys.executable, str(SCRIPT), *argv, *arguments]
            return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

        process = run()
        assert process.returncode == 0, process.stderr
        assert predictions(tmp_path / "out") == predictions(finished)[:5]
        parts = results(tmp_path / "out")["settings"]
        expected = {"vlm": "vlm", "adapter": "adapter", "spatial_encoder": "encoder"}
        for part, name in expected.items():
            assert parts[part] == {"id": f"org/{name}", "revision": commits[name]}
        # Another revision of the adapter, if only its card.
        repo = hub.repos["model", "org/adapter"]
        other = repo.commit({**repo.commits[commits["adapter"]], "README.md": b"better"}, "next")
        process = run("--adapter_revision", "next")
        assert f"adapter.revision = '{commits['adapter']}', now '{other}'" in process.stderr


# --- comparing


def test_compare(script, finished, work, capsys, tmp_path):
    source, folders = str(FIXTURES / "vsi_bench_answers.parquet"), [tmp_path / name for name in ("one", "two")]
    for folder, answers in zip(folders, ("A/2", "B/1.5"), strict=True):
        script.main(["--answers", f"constant:{answers}", "--source", source, "--output_dir", str(folder)])
    capsys.readouterr()
    script.main(["--compare", *map(str, folders)])
    text = (folders[1] / "comparison.md").read_text()
    assert capsys.readouterr().out == text
    cells = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in text.splitlines()[2:]
        if line.startswith("|")
    }
    assert cells[""][:3] == ["constant:A/2", "constant:B/1.5", "difference"]
    assert cells["Avg."][:3] == ["26.2", "22.4", "-3.8"] and cells["Avg."][4] == "5130"
    low, high = map(float, cells["Avg."][3].split(" to "))
    assert low < -3.7507 < high < 0
    assert cells["Obj. Count"][4] == "565" and cells["object_rel_direction.hard"][4] == "373"
    assert "Over the 5130 questions that both have (of 5130 and 5130)" in text
    assert "- answers: constant:A/2 and constant:B/1.5" in text

    script.main(
        ["--answers", "constant:A/2", "--source", source, "--limit", "600", "--output_dir", str(tmp_path / "l")]
    )
    script.main(["--compare", str(folders[0]), str(tmp_path / "l"), "--output_dir", str(tmp_path / "c")])
    text = (tmp_path / "c" / "comparison.md").read_text()
    assert "Over the 600 questions that both have (of 5130 and 600)" in text and "+0.0 to +0.0" in text
    with pytest.raises(ValueError, match="id 1 is .* expected evaluations on the same data"):
        script.main(["--compare", str(finished), str(folders[0])])
    with pytest.raises(FileNotFoundError, match="expected the folder of an evaluation"):
        script.main(["--compare", str(finished), str(work)])
    with pytest.raises(ValueError, match="expected two output folders"):
        script.main(["--compare", str(finished)])


# --- the neighbours, and the default


def test_benchmarks_of_pictures(work, script, tmp_path):
    for index in range(4):
        path = tmp_path / "img" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    rows = [
        {
            **{"idx": index, "type": "2D", "task": "Count", "filename": f"{index}.png", "source": "ADE20K"},
            **{"question": "How many?", "choices": ["w1", "w2"], "answer": "(A)", "prompt": f"w{20 + index} (A) (B)"},
        }
        for index in range(4)
    ]
    source = write_rows(tmp_path / "test.jsonl", rows)
    script.main(flags(work, tmp_path / "cv", source=source, benchmark="cv_bench"))
    facts = results(tmp_path / "cv")
    assert facts["benchmark"] == "cv_bench" and facts["frames_seen"] == {"fewest": 1, "most": 1}
    assert facts["scores"].keys() == {"official"} and "ci95_high.2D" in facts["scores"]["official"]
    assert "| Spa3-VLM-4B (published, arXiv 2602.21186) | 72.9 |" in re.sub(
        " +", " ", (tmp_path / "cv" / "table.md").read_text()
    )
    views = [
        {
            "question_type": "Camera",
            "image_path": [f"img/{i}.png" for i in range(4)],
            "question": "w30 ?",
            "choices": "A. w1\nB. w2",
            "answer": "B. w2",
        }
    ]
    source = write_rows(tmp_path / "views.jsonl", views)
    script.main(flags(work, tmp_path / "views", source=source, benchmark="viewspatial_bench"))
    facts = results(tmp_path / "views")
    assert facts["frames_seen"] == {"fewest": 4, "most": 4}  # all pictures are seen, however few frames of a video
    script.main(flags(work, tmp_path / "two", source=source, benchmark="viewspatial_bench", max_frames=3))
    assert results(tmp_path / "two")["frames_seen"] == {"fewest": 3, "most": 3}


def test_the_default(work, script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "NANO", tmp_path / "spa3-vlm-nano")
    small = partial(script.room_benchmark, image_size=(48, 64))
    monkeypatch.setattr(script, "room_benchmark", small)
    argv = ["--num_rooms", "3", "--num_questions", "20", "--num_workers", "1"]
    with pytest.raises(FileNotFoundError, match=r"training/build_nano_vlm.py.*training/run_spa3_vlm.py"):
        script.main(argv)
    shutil.copytree(work / "adapter", tmp_path / "spa3-vlm-nano")
    script.main(argv)
    folder = tmp_path / "outputs" / "vsi_bench" / "spa3-vlm-nano_rooms"
    assert len(predictions(folder)) == 20 and {item["source"] for item in predictions(folder)} == {"rooms"}
    assert results(folder)["frames_seen"] == {"fewest": 3, "most": 3}
    assert "the published rows are no comparison" in (folder / "table.md").read_text()
    videos = list((tmp_path / "outputs" / "room_videos").rglob("*.mp4"))
    assert len(videos) == 3
    made = {path: path.stat().st_mtime_ns for path in videos}
    script.main([*argv, *CONSTANT])
    assert made == {path: path.stat().st_mtime_ns for path in videos}
    assert len(predictions(tmp_path / "outputs" / "vsi_bench" / "constant_A_2_rooms")) == 20
