"""The scripts of `training/examples`, one for each use: each does what it says, on the shipped nano models."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_spa3r
from transformers import AutoModel

from spa3r_hf import Spa3RForPreTraining, Spa3RImageProcessor, Spa3VLM


REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = REPOSITORY / "training" / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def run(name: str, *arguments, capsys) -> str:
    """What an example prints, called with these arguments in the repository's root."""
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    capsys.readouterr()
    module.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Photographs of a place, `photos`, and a tiny Spa3R, `spa3r`."""
    work = tmp_path_factory.mktemp("examples")
    (work / "photos").mkdir()
    canvas = np.random.default_rng(0).integers(0, 256, (8, 20, 3), dtype=np.uint8)
    wide = np.asarray(Image.fromarray(canvas).resize((400, 160), Image.Resampling.BICUBIC))
    for view in range(8):
        Image.fromarray(wide[:150, 20 * view : 20 * view + 200]).save(work / "photos" / f"{view}.jpg")
    tiny_spa3r().save_pretrained(work / "spa3r")
    Spa3RImageProcessor(size=28).save_pretrained(work / "spa3r")
    return work


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_short_and_say_how_they_are_used(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) < 60
    assert f"python training/examples/{name}.py" in text


def test_there_is_one_for_each_use():
    assert NAMES == [
        "adapter_on_another_vlm",
        "evaluate_on_vsi_bench",
        "finetune_on_my_data",
        "latents_for_my_photos",
        "query_a_novel_view",
    ]


def test_latents_for_my_photos(work, tmp_path, capsys):
    """With the shipped nano model, as it is called without options."""
    output = tmp_path / "latents.safetensors"
    said = run("latents_for_my_photos", work / "photos", "--output", output, capsys=capsys)
    latents = load_file(output)["latents"]
    assert said.startswith("6 views of photos -> latents (1, 32, 128)") and latents.shape == (1, 32, 128)
    run("latents_for_my_photos", work / "photos", "--num_views", 2, "--output", output, capsys=capsys)
    assert latents.isfinite().all() and not torch.allclose(load_file(output)["latents"], latents, atol=1e-3)


def test_query_a_novel_view(work, tmp_path, capsys):
    """The view that is asked for changes with the camera; the others do not."""
    pictures = []
    for yaw, forward in ((0, 0), (40, 0.3)):
        output = tmp_path / f"{yaw}.png"
        options = ("--yaw", yaw, "--forward", forward, "--output", output)
        said = run("query_a_novel_view", work / "photos", *options, capsys=capsys)
        assert said.startswith(f"4 views of photos, turned by {yaw} degrees")
        pictures.append(np.asarray(Image.open(output)).astype(int))
    changed = np.abs(pictures[0] - pictures[1]).max(-1) > 2
    columns = np.flatnonzero(changed.any(0))
    assert len(columns) and columns.min() > 0.7 * changed.shape[1]


def test_finetune_on_my_data(work, tmp_path, capsys):
    output = tmp_path / "finetuned"
    options = ("--model", work / "spa3r", "--output_dir", output, "--max_steps", 2, "--views", 4)
    said = run("finetune_on_my_data", work / "photos", *options, capsys=capsys)
    assert said.count("nearest context view") == 2 and "before, on scene: views never trained on" in said
    before, after = (Spa3RForPreTraining.from_pretrained(folder).state_dict() for folder in (work / "spa3r", output))
    moved = {key.split(".")[0] for key, value in after.items() if not torch.equal(value, before[key])}
    frozen = all(torch.equal(after[key], before[key]) for key in after if "backbone" in key or "teacher" in key)
    assert frozen and {"spa3r", "decoder"} <= moved


def test_evaluate_on_vsi_bench(work, tmp_path, capsys):
    pytest.importorskip("evaluate")
    pytest.importorskip("embreex")
    said = run("evaluate_on_vsi_bench", "--rooms_dir", tmp_path / "rooms", "--limit", 6, capsys=capsys)
    assert re.fullmatch(r"with the scene: [\d.]+ of 100, over 6 questions\nwithout: [\d.]+ of 100, .*\n", said)


def test_adapter_on_another_vlm(work, tmp_path, capsys):
    output = tmp_path / "adapter"
    question = "How many chair(s) are in this room?"
    said = run(
        "adapter_on_another_vlm", work / "photos", question, 4, "--output_dir", output, "--steps", 2, capsys=capsys
    )
    assert re.fullmatch(re.escape(question) + ".*", said.splitlines()[-1])
    again, fresh = Spa3VLM.from_pretrained(output), AutoModel.from_pretrained("hub_configs/spa3r-nano")
    assert again.adapter.mlp.fc2.weight.abs().sum() > 0  # zeros, before it was trained
    assert again.adapter_config.base_model_name_or_path == "hub_configs/nano-vlm"
    assert all(
        torch.equal(value, fresh.state_dict()[key]) for key, value in again.spatial_encoder.state_dict().items()
    )
