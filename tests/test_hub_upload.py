"""Folders made to stand on their own before they are sent."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_spa3r
from transformers import AutoModel

from spa3r_hf import Spa3RImageProcessor
from spa3r_hf.checkpoint_spa3r import save_frozen, save_trained
from spa3r_hf.hub_upload import complete_folder, push_folder, push_results


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_sent_without_its_checkpoints_and_left_as_it_is(tmp_path):
    run = tmp_path / "run"
    model = tiny_spa3r()
    save_frozen(model, run)
    save_trained(model, run, run)
    save_trained(model, run / "checkpoint-3", run)
    Spa3RImageProcessor(size=28).save_pretrained(run)
    (run / "runs").mkdir()
    for name in ("runs/events", "training_args.bin", ".hidden", "notes.tmp"):
        (run / name).write_text("x")
    (run / "README.md").write_text("# A card\n")
    before = contents(run)
    target = complete_folder(run, tmp_path / "copy")
    assert contents(run) == before
    sent = contents(target)
    assert not [name for name in sent if name.startswith((".", "runs", "checkpoint", "training_args", "notes"))]
    assert {"model-frozen.safetensors", "model-trained.safetensors", "modeling_spa3r.py", "README.md"} <= set(sent)

    # A checkpoint's frozen weights are in the folder above it.
    alone = complete_folder(run / "checkpoint-3", tmp_path / "alone")
    assert "model.safetensors" in contents(alone) and not list(alone.glob("*index*"))
    assert contents(run) == before
    for key, value in AutoModel.from_pretrained(alone).state_dict().items():
        assert torch.equal(value, model.spa3r.state_dict()[key])


def test_what_a_folder_refers_to_has_to_be_there(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    index = {"metadata": {}, "weight_map": {"a": "../gone/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"gone/model.safetensors, where model.safetensors.index.json has"):
        complete_folder(folder, tmp_path / "copy")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/nowhere/vlm"}))
    with pytest.raises(FileNotFoundError, match="base_model_name_or_path = /nowhere/vlm of .* does not exist"):
        complete_folder(adapter, tmp_path / "copy2")


def test_an_adapter_takes_its_parts_along(tmp_path):
    for name in ("vlm", "adapter"):
        (tmp_path / name).mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "vlm" / "model.safetensors")
    names = {"base_model_name_or_path": "../vlm", "spatial_encoder_name_or_path": "org/spa3r", "other": 1}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(names))
    target = complete_folder(tmp_path / "adapter", tmp_path / "copy")
    assert json.loads((target / "adapter_config.json").read_text()) == {**names, "base_model_name_or_path": "./vlm"}
    assert load_file(target / "vlm" / "model.safetensors")["a"] == 1
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) == names


def test_weights_spread_over_folders_are_put_together(tmp_path):
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
    save_file({"a": torch.zeros(2), "unused": torch.zeros(1)}, tmp_path / "own" / "part.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "other" / "part.safetensors")
    weight_map = {"a": "part.safetensors", "b": "../other/part.safetensors"}
    (tmp_path / "own" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    target = complete_folder(tmp_path / "own", tmp_path / "copy")
    assert set(contents(target)) == {"model.safetensors"}
    found = load_file(target / "model.safetensors")
    assert found.keys() == {"a", "b"} and found["b"].tolist() == [1, 1, 1]


def test_nothing_is_sent_of_what_cannot_be_sent(tmp_path):
    for push in (push_folder, push_results):
        for folder in (tmp_path / "nothing", tmp_path):
            with pytest.raises(FileNotFoundError, match="is no folder with files; expected"):
                push(folder, "org/x")
    (tmp_path / "app.py").write_text("")
    with pytest.raises(ValueError, match="README.md does not say the Space's sdk; expected `sdk: gradio`"):
        push_folder(tmp_path, "org/x", repo_type="space")
    (tmp_path / "README.md").write_text("---\ntitle: x\n---\n")
    with pytest.raises(ValueError, match="does not say the Space's sdk"):
        push_folder(tmp_path, "org/x", repo_type="space")
