import re

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load

from spa3r_hf.model_card import markdown_table, psfm_table, write_psfm_card


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
    for fact in ("someone/spa3r-rooms", "1.50 M of 4.23 M", "8 / 4", "2 CPU cores", "`python training/run_psfm.py"):
        assert fact in card.text
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
