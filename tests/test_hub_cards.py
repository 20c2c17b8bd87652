"""The cards of `hub_configs`: metadata that the Hub takes, licences said plainly, and numbers that were measured."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, SpaceCard, metadata_load
from loopback_hub import metadata_errors

from spa3r_hf.model_card import at


HUB_CONFIGS = Path(__file__).resolve().parent.parent / "hub_configs"
SPACES = {"space": {"sdk": "gradio"}, "vsi_bench": {"sdk": "static"}}
# Folders that hold weights trained here, from nothing.
NANO = ("spa3r-nano", "vggt-nano", "dinov3-rooms-nano", "nano-vlm", "spa3-vlm-nano")
PIPELINE_TAGS = ("image-feature-extraction", "depth-estimation", "image-text-to-text")
FOLDERS = sorted(folder.name for folder in HUB_CONFIGS.iterdir() if folder.is_dir())
MODELS = [name for name in FOLDERS if name not in SPACES]
WITH_RESULTS = [name for name in MODELS if "model-index" in (metadata_load(HUB_CONFIGS / name / "README.md") or {})]


def text_of(name: str) -> str:
    return (HUB_CONFIGS / name / "README.md").read_text()


def test_what_users_are_to_meet_is_there():
    assert {"spa3r-base", "spa3r-nano", "vggt-nano", "dinov3-rooms-nano", "vsi_bench"} <= set(FOLDERS)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_hub_takes_the_metadata(name):
    kind = "space" if name in SPACES else "model"
    assert metadata_errors(text_of(name), kind) == []
    card = (SpaceCard if kind == "space" else ModelCard)(text_of(name))
    assert card.data.to_dict()["license"]
    # What is parsed can be written again, and says the same.
    again = type(card)(f"---\n{card.data.to_yaml()}\n---\n{card.text}")
    assert again.data.to_dict() == card.data.to_dict()


@pytest.mark.parametrize("name", SPACES)
def test_spaces_say_what_runs_them(name):
    data = metadata_load(HUB_CONFIGS / name / "README.md")
    assert {"title", "emoji", "colorFrom", "colorTo", "app_file", "license"} <= data.keys()
    assert data["sdk"] == SPACES[name]["sdk"] and (HUB_CONFIGS / name / data["app_file"]).is_file()
    if data["sdk"] == "gradio":
        assert re.fullmatch(r"\d+\.\d+(\.\d+)?", str(data["sdk_version"]))


@pytest.mark.parametrize("name", MODELS)
def test_models_say_what_they_are(name):
    data = metadata_load(HUB_CONFIGS / name / "README.md")
    assert data["pipeline_tag"] in PIPELINE_TAGS and data["library_name"] in ("transformers", "spa3r_hf")
    assert "spa3r" in data["tags"] and len(data["tags"]) == len(set(data["tags"]))
    for model in (
        [data.get("base_model", [])] if isinstance(data.get("base_model"), str) else data.get("base_model", [])
    ):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", model)


@pytest.mark.parametrize("name", MODELS)
def test_licences_are_said_plainly(name):
    text = text_of(name)
    section = text[text.index("\n## Licence\n") :]
    assert re.search(r"commercial", section, re.IGNORECASE) and "MIT" in section
    if name in NANO:
        assert metadata_load(HUB_CONFIGS / name / "README.md")["license"] == "mit"
        assert "**Commercial use** of these weights is permitted: MIT" in section
    if name == "spa3r-base":
        for source, licence in (
            ("facebook/VGGT-1B", "CC BY-NC 4.0"),
            ("facebook/VGGT-1B-Commercial", "VGGT Licence"),
            ("DINOv3", "DINOv3 Licence"),
            ("ScanNet", "non-commercial research"),
            ("ScanNet++", "non-commercial research"),
        ):
            rows = [line for line in section.splitlines() if line.startswith("|") and source in line]
            assert rows and any(licence in row for row in rows), source
    if "qwen" in name:
        assert "Qwen Research Licence" in section and "**No commercial use**" in section


@pytest.mark.parametrize("name", MODELS)
def test_cards_show_nothing_of_the_machine(name):
    for path in [HUB_CONFIGS / name / "README.md", *(HUB_CONFIGS / name).glob("*.json")]:
        assert not re.search(r"/(tmp|root|home|work|Users)/", path.read_text()), path
    assert f'from_pretrained("{name}")' in text_of(name) or name == "spa3r-base"


@pytest.mark.parametrize("name", MODELS)
def test_pictures_that_a_card_shows_are_there(name):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text_of(name)):
        assert (HUB_CONFIGS / name / target).is_file(), target


@pytest.mark.parametrize("name", WITH_RESULTS)
def test_results_are_those_of_the_runs_own_file(name):
    measured = json.loads((HUB_CONFIGS / name / "eval.json").read_text())
    card = ModelCard(text_of(name))
    assert card.data.model_name == name and card.data.eval_results
    for result in card.data.eval_results:
        path = result.metric_args["path"]
        assert result.metric_value == round(at(measured, path), 4), path
        assert result.task_type and result.dataset_name and path.endswith(result.metric_type)


def test_cards_without_a_file_of_scores_claim_none():
    for name in MODELS:
        if not (HUB_CONFIGS / name / "eval.json").exists():
            assert name not in WITH_RESULTS
        else:
            assert name in WITH_RESULTS, f"{name} has scores, and a card without model-index"


def test_paths_in_scores():
    scores = {"a": {"b.c": 1, "d": {"e": 2}}, "a.b": 3, "x": 0}
    found = {"a.b.c": 1, "a.d.e": 2, "a.b": 3, "x": 0, "a.x": None, "a.b.c.d": None, "y": None}
    assert {path: at(scores, path) for path in found} == found
