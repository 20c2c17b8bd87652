import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import scene_pixels, tiny_spa3r
from transformers import AutoModel, AutoModelForPreTraining

from spa3r_hf import Spa3RForPreTraining, Spa3RModel
from spa3r_hf.checkpoint_spa3r import last_checkpoint, save_frozen, save_trained, trained_keys


TRAINED = ("spa3r.encoder.", "decoder.", "geometric_head.", "semantic_head.", "depth_head.")


@pytest.fixture(scope="module")
def model():
    return tiny_spa3r(depth_probe=True)


@pytest.fixture
def folder(model, tmp_path):
    save_frozen(model, tmp_path)
    save_trained(model, tmp_path / "checkpoint-3", tmp_path)
    save_trained(model, tmp_path, tmp_path)
    return tmp_path


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(model, folder):
    everything = set(model.state_dict())
    trained = {key for key in everything if key.startswith(TRAINED)}
    assert trained == trained_keys(model) and everything - trained
    for path in (folder, folder / "checkpoint-3"):
        assert set(load_file(path / "model-trained.safetensors")) == trained
        assert not (path / "model.safetensors").exists()
    assert set(load_file(folder / "model-frozen.safetensors")) == everything - trained
    assert len(list(folder.rglob("model-frozen.safetensors"))) == 1
    weight_map = json.loads((folder / "checkpoint-3" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map) == everything
    assert set(weight_map.values()) == {"model-trained.safetensors", "../model-frozen.safetensors"}
    with safe_open(folder / "checkpoint-3" / "model-trained.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", [".", "checkpoint-3"])
def test_every_class_loads_every_weight(model, folder, name):
    pixels = scene_pixels(2, 3)
    with torch.no_grad():
        latents = model.spa3r(pixels).latents
    for loader in (Spa3RForPreTraining, AutoModelForPreTraining, Spa3RModel, AutoModel):
        loaded, info = loader.from_pretrained(folder / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        is_whole = loader in (Spa3RForPreTraining, AutoModelForPreTraining)
        expected = model if is_whole else model.spa3r
        assert type(loaded) is type(expected) and not loaded.training
        for key, value in expected.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key
        with torch.no_grad():
            assert torch.equal((loaded.spa3r if is_whole else loaded)(pixels).latents, latents)


def test_a_checkpoint_without_its_frozen_weights_says_where_they_were_expected(folder, model, tmp_path_factory):
    alone = tmp_path_factory.mktemp("alone")
    shutil.copytree(folder / "checkpoint-3", alone / "checkpoint-3")
    with pytest.raises(FileNotFoundError, match=r"checkpoint-3/\.\./model-frozen\.safetensors"):
        Spa3RModel.from_pretrained(alone / "checkpoint-3")
    shutil.copy(folder / "model-frozen.safetensors", alone)
    Spa3RModel.from_pretrained(alone / "checkpoint-3")
    with pytest.raises(FileNotFoundError, match="nowhere.*expected the frozen weights that save_frozen writes"):
        save_trained(model, alone, alone / "nowhere")


def test_the_last_checkpoint_is_the_last_whole_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint to resume from; expected .*checkpoint-<step>"):
        last_checkpoint(tmp_path / "nowhere")
    for name in ("checkpoint-5", "checkpoint-20", "checkpoint-100", "checkpoint-120", "checkpoint-best"):
        (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError):
        last_checkpoint(tmp_path)
    for name in ("checkpoint-5", "checkpoint-100", "checkpoint-20"):
        (tmp_path / name / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-120" / "trainer_state.json").touch()  # killed while writing
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
