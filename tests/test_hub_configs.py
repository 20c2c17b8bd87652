"""The folders of hub_configs load, and the nano models do what their cards say."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

from spa3r_hf import Spa3RForPreTraining, Spa3RModel, Spa3RVGGTModel


HUB_CONFIGS = Path(__file__).resolve().parent.parent / "hub_configs"


@pytest.fixture(scope="module")
def measured():
    pytest.importorskip("embreex")
    from spa3r_hf.nano_family import measure_nano

    return measure_nano(HUB_CONFIGS)


def test_the_nano_models_load_and_share_one_backbone():
    model = AutoModel.from_pretrained(HUB_CONFIGS / "spa3r-nano")
    whole = AutoModelForPreTraining.from_pretrained(HUB_CONFIGS / "spa3r-nano")
    backbone = AutoModel.from_pretrained(HUB_CONFIGS / "vggt-nano")
    assert isinstance(model, Spa3RModel) and isinstance(whole, Spa3RForPreTraining)
    assert isinstance(backbone, Spa3RVGGTModel)
    assert sum(parameter.numel() for parameter in backbone.parameters()) <= 10e6
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, model.backbone.state_dict()[key])
    teacher = AutoModel.from_pretrained(HUB_CONFIGS / "dinov3-rooms-nano")
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, whole.semantic_teacher.state_dict()[key])
    for name in ("spa3r-nano", "vggt-nano"):
        assert AutoImageProcessor.from_pretrained(HUB_CONFIGS / name).size == 112
    family = ("spa3r-nano", "vggt-nano", "dinov3-rooms-nano")
    weights = [path for name in family for path in (HUB_CONFIGS / name).rglob("*.safetensors")]
    assert sum(path.stat().st_size for path in weights) < 25e6


def test_the_shipped_numbers_still_hold(measured):
    """Float16 weights, other machines and thread counts: half a percent of a cosine, one percent of the rest."""
    shipped = json.loads((HUB_CONFIGS / "spa3r-nano" / "check.json").read_text())
    for name, tolerance in (("geometry", 0.02), ("semantic", 0.02), ("psfm", 0.01), ("unseen_depth", 0.01)):
        found = measured[name].get("model", measured[name])
        expected = shipped[name].get("model", shipped[name])
        for key, value in expected.items():
            if isinstance(value, float) and "median" not in key:
                assert found[key] == pytest.approx(value, abs=tolerance), f"{name} {key}"


def test_the_backbone_knows_cameras_and_depth(measured):
    model, baseline = measured["geometry"]["model"], measured["geometry"]["baseline"]
    assert model["rotation_median"] < 0.7 * baseline["rotation_median"]
    assert model["auc_30"] > baseline["auc_30"]
    assert model["depth_abs_rel"] < 0.8 * baseline["depth_abs_rel"]


def test_the_semantic_teacher_knows_more_than_pixels_show(measured):
    assert measured["semantic"]["model"]["accuracy"] > measured["semantic"]["pixels"]["accuracy"] + 0.1


def test_unseen_views_are_predicted_better_than_by_any_baseline(measured):
    scores = measured["psfm"]
    # How much better, at least, than another scene's latents.
    for kind, margin in (("geometric", 0.08), ("semantic", 0.02)):
        assert scores[f"{kind}_cosine"] > scores["baselines"]["mean"][f"{kind}_cosine"] + 0.1
        for metric in ("cosine", "centred_cosine"):
            key = f"{kind}_{metric}"
            assert scores[key] > scores["baselines"]["nearest_context"][key] + 0.1
            assert scores[key] > scores["baselines"]["other_scene"][key] + margin
