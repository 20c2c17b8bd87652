import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load

from spa3r_hf.geometry_report import write_geometry_card
from spa3r_hf.licences import describe_sources
from spa3r_hf.model_card import (
    at,
    evaluation_index,
    hub_ids,
    markdown_table,
    measured,
    psfm_table,
    write_psfm_card,
    write_teacher_card,
)
from spa3r_hf.spa3_vlm_report import write_spa3_vlm_report


KEYS = [f"{kind}_{key}" for kind in ("geometric", "semantic") for key in ("cosine", "centred_cosine", "l1")]


def scores_of(**changes):
    def values(start: float) -> dict[str, float]:
        return {key: start + 0.01 * i for i, key in enumerate(KEYS)}

    mean = {key: value for key, value in values(0.3).items() if "centred" not in key}
    return {
        **values(0.512345),
        "loss": 1.5,
        "baselines": {"nearest_context": values(0.4), "mean": mean, "other_scene": values(0.2)},
        "camera_distance": {"units_mean": 0.51, "units_max": 1.24, "degrees_mean": 33.0, "degrees_max": 71.0},
        "num_scenes": 4,
        "num_target_views": 16,
        **changes,
    }


def run_of(**changes):
    return {
        "name": "someone/spa3r-rooms",
        "command": "python training/run_psfm.py --max_steps 3",
        "data": "procedural rooms 0 to 7",
        "held_out": "scenes never trained on",
        "num_train_scenes": 8,
        "cameras": "from the data",
        "notes": ["The backbone has random weights."],
        "bad_samples": {},
        "steps": 3,
        "seed": 1,
        "parameters": 4_230_000,
        "trained_parameters": 1_500_000,
        "seconds": 90.0,
        "hardware": "2 CPU cores",
        "processes": 1,
        "versions": {"spa3r_hf": "0.1.0", "torch": "2.13.0"},
        **changes,
    }


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_table_has_a_row_for_each_baseline():
    header, rule, *rows = rows_of(psfm_table(scores_of()))
    assert [row[0] for row in rows] == ["Spa3R", "nearest context view", "mean feature", "another scene's latents"]
    assert header[1:3] == ["geometric cosine", "geometric, centred"] and all(set(cell) <= set("-:") for cell in rule)
    columns = ["geometric_cosine", "geometric_centred_cosine", "semantic_cosine", "semantic_centred_cosine"]
    assert rows[0][1:5] == [f"{scores_of()[key]:.3f}" for key in columns]
    assert rows[2][2] == "-"  # nothing of the mean is left without the mean
    scores = scores_of(baselines={"mean": scores_of()["baselines"]["mean"]})
    scores = {key: value for key, value in scores.items() if not key.startswith("semantic")}
    header, _, *rows = rows_of(psfm_table(scores))
    assert [row[0] for row in rows] == ["Spa3R", "mean feature"] and len(header) == 4


def test_columns_line_up():
    table = markdown_table(["a", "long header"], [["a long cell", "1"], ["b", "22"]])
    assert table.splitlines() == [
        "| a           | long header |",
        "|-------------|------------:|",
        "| a long cell |           1 |",
        "| b           |          22 |",
    ]


def test_the_card_holds_the_measured_numbers(tmp_path):
    scores = scores_of()
    write_psfm_card(tmp_path, scores, run_of())
    metadata = metadata_load(tmp_path / "README.md")
    assert metadata["pipeline_tag"] == "image-feature-extraction" and "spa3r" in metadata["tags"]
    card = ModelCard.load(tmp_path / "README.md")
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        key: round(scores[key], 4) for key in KEYS
    }
    assert {result.dataset_name for result in card.data.eval_results} == {"procedural rooms 0 to 7, held out"}
    assert psfm_table(scores) in card.text and "> The backbone has random weights." in card.text
    for fact in ("someone/spa3r-rooms", "1.50 M of 4.23 M", "8 / 4", "2 CPU cores", "\npython training/run_psfm.py"):
        assert fact in card.text
    assert metadata["license"] == "mit" and "**Commercial use** of these weights is permitted: MIT" in card.text
    words = " ".join(card.text.split())
    assert "On 16 target views of 4 scenes never trained on." in words and "0.51 units (at most 1.24)" in words
    assert "left out" not in words and not re.search(r"\n{4,}", card.text)
    assert "![predictions](pictures/scene_0.png)" in card.text


def test_the_card_names_what_was_left_out(tmp_path):
    bad = {"scene 'a', view 3 (a/3.jpg) cannot be opened": 12, "scene 'b' has 2 pictures": 1}
    write_psfm_card(tmp_path, scores_of(), run_of(bad_samples=bad, notes=[]))
    text = (tmp_path / "README.md").read_text()
    items = [line for line in text.splitlines() if line.startswith("- left out")]
    assert items == [f"- left out {times} times: {message}" for message, times in bad.items()]
    # A list needs an empty line before it, or it is part of the table.
    assert "\n\n- left out 12 times" in text


@pytest.mark.parametrize("name", ["a: b", "it's", "#1", "0x10"])
def test_metadata_survive_odd_names(tmp_path, name):
    write_psfm_card(tmp_path, scores_of(), run_of(name=name, data=name))
    _, head, _ = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["model-index"][0]["name"] == name


def test_licences_follow_what_a_model_is_made_of(tmp_path):
    teachers = ["facebook/VGGT-1B", "facebook/dinov3-vitl16-pretrain-lvd1689m"]
    run = run_of(teachers=teachers, sources=describe_sources(["/data/scannet", *teachers]), data="scannet")
    write_psfm_card(tmp_path, scores_of(), run)
    metadata, text = metadata_load(tmp_path / "README.md"), (tmp_path / "README.md").read_text()
    assert metadata["base_model"] == teachers and metadata["license"] == "other"
    assert {"license_name", "license_link"} <= metadata.keys()
    assert "**No commercial use** of these weights: ScanNet and VGGT-1B do not permit it." in text
    assert "DINOv3 Licence (https://ai.meta.com" in text and "/data/scannet" not in text


def test_the_card_of_a_teacher(tmp_path):
    scores = {f"{views}_views": {name: {"auc_30": 0.1 * views} for name in ("model", "baseline")} for views in (2, 4)}
    write_geometry_card(tmp_path, scores, run_of(name="vggt-x", held_out="3 rooms"))
    card = ModelCard.load(tmp_path / "README.md")
    found = {result.metric_args["path"]: result.metric_value for result in card.data.eval_results}
    assert found == {"2_views.model.auc_30": 0.2, "4_views.model.auc_30": 0.4}
    assert card.data.license == "mit" and card.data.pipeline_tag == "depth-estimation"
    assert "pictures/" not in card.text and 'from_pretrained("vggt-x")' in card.text
    write_teacher_card(
        tmp_path, run_of(), summary="A.", use="b", results="", tags=["c"], pipeline_tag="image-text-to-text"
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert "## Results" not in card.text and card.data.eval_results is None and card.data.tags == ["spa3r", "c"]


def test_the_card_of_an_adapter(tmp_path):
    own = {"overall": 31.23456, "object_counting": 12.0, "ci95_low.overall": 20.0, "count.object_counting": 4}
    run = run_of(
        **{"vlm": "Qwen/Qwen2.5-VL-3B-Instruct", "spatial_encoder": "/somewhere/else/spa3r", "trained": "adapter"},
        **{"loss": 0.5, "data": ["10 of 40 records of vsi_590k.jsonl an epoch"]},
        adapter={
            **{"integration": "append", "spatial_features": "latents"},
            **{"base_model_name_or_path": "/somewhere/else/vlm", "spatial_encoder_name_or_path": None},
        },
    )
    write_spa3_vlm_report(tmp_path, run, "a table", own)
    metadata, text = metadata_load(tmp_path / "README.md"), (tmp_path / "README.md").read_text()
    assert metadata["base_model"] == ["Qwen/Qwen2.5-VL-3B-Instruct"] and metadata["base_model_relation"] == "adapter"
    assert "license" not in metadata  # vsi_590k.jsonl and spa3r are not known
    assert "**No commercial use** of these weights: Qwen2.5-VL-3B does not permit it." in text
    assert "/somewhere" not in text + (tmp_path / "run.json").read_text()
    results = metadata["model-index"][0]["results"][0]["metrics"]
    assert {(metric["type"], metric["value"]) for metric in results} == {
        ("overall", 31.2346),
        ("object_counting", 12.0),
    }
    assert json.loads((tmp_path / "eval.json").read_text()) == own


def test_scores_say_where_they_stand():
    scores = {"a": {"b.c": 0.123456}, "x": 1.0}
    (result,) = measured(scores, {"a.b.c": "name", "a.d": "absent"}, task="t", data="d")
    assert (result.metric_value, result.metric_type, result.metric_args) == (0.1235, "b.c", {"path": "a.b.c"})
    assert at(scores, "a.b.c") == 0.123456 and at(scores, "a.b") is None and at(scores, "x.y") is None


def test_the_index_of_an_evaluation():
    results = {"benchmark": "vsi_bench", "data": "rooms", "scores": {"lmms_eval": {"overall": 50.0, "count.a": 3}}}
    (entry,) = evaluation_index(results, "org/x")["model-index"]
    assert entry["name"] == "org/x" and entry["results"][0]["dataset"]["name"] == "vsi_bench: rooms"
    assert [metric["value"] for metric in entry["results"][0]["metrics"]] == [50.0]


def test_only_hub_ids_are_base_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "vlm").mkdir(parents=True)
    names = ["org/name", "outputs/vlm", "/tmp/x", "nano", None, "org/name", "a/b/c"]
    assert hub_ids(names) == ["org/name"]
