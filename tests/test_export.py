"""Saved folders carry their code: they load with `trust_remote_code` where this package is not installed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import scene_pixels, tiny_spa3r
from transformers.dynamic_module_utils import get_imports

from spa3r_hf import Spa3RImageProcessor


MODULES = {
    *("camera_spa3r.py", "configuration_spa3r.py", "configuration_spa3r_vggt.py", "layers_spa3r.py"),
    *("modeling_spa3r.py", "modeling_spa3r_vggt.py", "modeling_spa3r_vggt_heads.py"),
}
# Runs in a fresh process; `None` in `sys.modules` makes an import fail even where the package is installed.
LOAD = """
import sys
sys.modules["spa3r_hf"] = None
try:
    import spa3r_hf
    raise SystemExit("spa3r_hf can be imported: this test would show nothing")
except ImportError:
    pass

from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining
from transformers.models.auto.image_processing_auto import AutoImageProcessor

root = Path(sys.argv[1])
pixels = load_file(root / "pixels.safetensors")["pixels"]
results = {}
for name in ("pre_training", "encoder", "backbone"):
    folder = root / name
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(model.config).__name__ == type(config).__name__
    assert "transformers_modules" in type(model).__module__ and processor.size == 42, type(model)
    with torch.no_grad():
        results[name] = (model(pixels).last_hidden_state if name == "backbone" else model(pixels).latents).contiguous()
        if name != "backbone":
            whole = AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=True)
            results[name + "_whole"] = whole.spa3r(pixels).latents.contiguous()
            assert type(whole).__name__ == "Spa3RForPreTraining" and whole(pixels).loss.isfinite()
    views = [[view.permute(1, 2, 0).mul(255).byte().numpy() for view in scene] for scene in pixels]
    assert processor(views, return_tensors="pt")["pixel_values"].shape == (2, 2, 3, 28, 42)
    model.save_pretrained(root / (name + "_again"))
save_file(results, root / "results.safetensors")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders saved from each model class, each with an image processor."""
    path = tmp_path_factory.mktemp("export")
    model = tiny_spa3r()
    pixels = scene_pixels(num_views=2)
    save_file({"pixels": pixels}, path / "pixels.safetensors")
    for name, part in {"pre_training": model, "encoder": model.spa3r, "backbone": model.spa3r.backbone}.items():
        part.save_pretrained(path / name)
        Spa3RImageProcessor(size=42).save_pretrained(path / name)
    with torch.no_grad():
        expected = {
            "encoder": model.spa3r(pixels).latents.contiguous(),
            "backbone": model.spa3r.backbone(pixels).last_hidden_state.contiguous(),
        }
    save_file(expected, path / "expected.safetensors")
    return path


def test_folders_are_flat_and_complete(root):
    for name in ("pre_training", "encoder", "backbone"):
        saved = {path.name for path in (root / name).iterdir()}
        code = {file for file in saved if file.endswith(".py")}
        backbone_only = {file for file in MODULES if "vggt" in file or file.startswith(("camera", "layers"))}
        assert code == (backbone_only if name == "backbone" else MODULES) | {"image_processing_spa3r.py"}
        assert saved - code == {"config.json", "model.safetensors", "preprocessor_config.json"}


def test_code_asks_for_nothing_but_the_core_packages(root):
    core = {"PIL", "huggingface_hub", "numpy", "torch", "transformers", "typing_extensions"}
    for path in (root / "pre_training").glob("*.py"):
        third_party = set(get_imports(path)) - sys.stdlib_module_names
        assert third_party <= core, path.name


def test_auto_map_names_every_class(root):
    own = {
        "AutoConfig": "configuration_spa3r.Spa3RConfig",
        "AutoModel": "modeling_spa3r.Spa3RModel",
        "AutoModelForPreTraining": "modeling_spa3r.Spa3RForPreTraining",
    }
    vggt = {
        "AutoConfig": "configuration_spa3r_vggt.Spa3RVGGTConfig",
        "AutoModel": "modeling_spa3r_vggt.Spa3RVGGTModel",
    }
    for name, expected in {"pre_training": own, "encoder": own, "backbone": vggt}.items():
        assert json.loads((root / name / "config.json").read_text())["auto_map"] == expected


def test_fresh_process_without_the_package(root, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    environment.pop("PYTHONPATH", None)
    process = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, str(root)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    results, expected = load_file(root / "results.safetensors"), load_file(root / "expected.safetensors")
    assert torch.equal(results["backbone"], expected["backbone"])
    for name in ("pre_training", "pre_training_whole", "encoder", "encoder_whole"):
        assert torch.equal(results[name], expected["encoder"]), name
    # What was loaded this way can be saved again, code and all.
    for name in ("pre_training", "encoder", "backbone"):
        again = {path.name for path in (root / f"{name}_again").iterdir()}
        assert again == {path.name for path in (root / name).iterdir()} - {
            "image_processing_spa3r.py",
            "preprocessor_config.json",
        }
