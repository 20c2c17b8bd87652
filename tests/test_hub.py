"""Round trips through a Hub on loopback, with the real clients, in fresh processes with empty caches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from loopback_hub import OWNER, LoopbackHub, Repo, metadata_errors
from PIL import Image
from safetensors.torch import save_file
from tiny_models import scene_pixels, tiny_spa3r_config, tiny_vggt_config

from spa3r_hf import Spa3RImageProcessor


for module in ("accelerate", "embreex", "evaluate", "peft"):
    pytest.importorskip(module)
TESTS = Path(__file__).resolve().parent
GATED = ("facebook/dinov3-vitl16-pretrain-lvd1689m", "facebook/VGGT-1B-Commercial")
RESULTS = {
    "benchmark": "vsi_bench",
    "data": "5 questions",
    "scores": {"lmms_eval": {"overall": 41.23456, "object_rel_direction.easy": 50.0, "count.object_counting": 5}},
}


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        for name in GATED:
            hub.repos["model", name] = Repo(gated=True)
            hub.repos["model", name].commit({"config.json": b'{"model_type": "dinov3_vit"}'}, "main")
        yield hub


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """What the processes share."""
    root = tmp_path_factory.mktemp("hub")
    save_file({"pixels": scene_pixels(num_views=2)}, root / "pixels.safetensors")
    (root / "app").mkdir()
    (root / "app" / "README.md").write_text("---\ntitle: Demo\nsdk: gradio\napp_file: app.py\n---\n")
    (root / "app" / "app.py").write_text("print('a demo')\n")
    (root / "results").mkdir()
    (root / "results" / "results.json").write_text(json.dumps(RESULTS))
    (root / "large").mkdir()
    (root / "large" / "model.safetensors").write_bytes(b"content" * 100_000)
    (root / "large" / "notes.md").write_text("from_pretrained")
    return root


def run(hub: LoopbackHub, root: Path, session: str, home: str, token: str | None = None, **settings: str) -> str:
    """A session of `hub_sessions` in a process of its own, whose cache is in `home`; what it prints."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    environment = {**kept, **hub.environment(root / home, token), "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    code = f"import hub_sessions, pathlib; hub_sessions.{session}(pathlib.Path({str(root)!r}))"
    process = subprocess.run(
        [sys.executable, "-c", code], env={**environment, **settings}, cwd=root, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-6000:]
    return process.stdout


@pytest.fixture(scope="module")
def pushed(hub, root) -> str:
    return run(hub, root, "push", "push", OWNER)


@pytest.fixture(scope="module")
def trained(hub, root, pushed) -> str:
    """Two steps of each training script, with --push_to_hub."""
    tiny_spa3r_config().save_pretrained(root / "tiny")
    Spa3RImageProcessor(size=28).save_pretrained(root / "tiny")
    tiny_vggt_config().save_pretrained(root / "tiny-vggt")
    generator = np.random.default_rng(0)
    for scene in range(5):
        (root / "scenes" / str(scene)).mkdir(parents=True)
        for view in range(4):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "scenes" / str(scene) / f"{view}.png")
    turns = [{"from": "human", "value": "<video> w20"}, {"from": "gpt", "value": "w30"}]
    (root / "records.json").write_text(json.dumps([{"conversations": turns, "video": "scenes/0"}] * 4))
    each = {"use_cpu": True, "max_steps": 2, "save_steps": 1, "push_to_hub": True}
    rooms = {"cache_dir": root / "rooms", "num_rooms": 2, "num_eval_rooms": 1, "eval_views": 2, "images_per_batch": 4}
    rooms |= {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": "{}", "dataloader_num_workers": 0}
    psfm = {"config_name": root / "tiny", "data_dir": root / "scenes", "max_views": 4, "images_per_batch": 8}
    vlm = {"vlm_name_or_path": "org/vlm", "spatial_encoder_name_or_path": "org/spa3r", "data": root / "records.json"}
    settings = {
        "run_psfm.py": {**psfm, "hub_model_id": "org/trained-psfm", "hub_private_repo": True},
        "run_geometry.py": {"config_name": root / "tiny-vggt", "hub_model_id": "org/trained-geometry", **rooms},
        "run_spa3_vlm.py": {**vlm, "hub_model_id": "org/trained-adapter", "train": "lora", "max_frames": 4},
    }
    runs = {
        name: [
            str(word)
            for pair in ({**each, **own, "output_dir": root / name}).items()
            for word in (f"--{pair[0]}", pair[1])
        ]
        for name, own in settings.items()
    }
    (root / "runs.json").write_text(json.dumps(runs))
    return run(hub, root, "train", "train", OWNER)


def test_everything_arrives_whole(hub, pushed):
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "modeling_spa3r.py"} <= set(
        hub.files("org/spa3r")
    )
    assert hub.repos["model", "org/private"].private and not hub.repos["model", "org/spa3r"].private
    assert {"main", "second", "v1"} == set(hub.repos["model", "org/spa3r"].refs)
    adapter = hub.files("org/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "processing_spa3_vlm.py"} <= set(adapter)
    assert json.loads(adapter["adapter_config.json"])["base_model_name_or_path"] == "org/vlm"
    assert "exit 2" in pushed and "nothing is no folder with files; expected one to upload" in pushed


def test_a_folder_stands_on_its_own(hub, pushed):
    local = hub.files("org/local")
    config = json.loads(local["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["spatial_encoder_name_or_path"]) == (
        "./vlm",
        "./spatial_encoder",
    )
    assert {"vlm/model.safetensors", "spatial_encoder/model.safetensors", "spatial_encoder/modeling_spa3r.py"} <= set(
        local
    )
    nano = hub.files("org/vggt-nano")
    assert "model.safetensors" in nano and "model.safetensors.index.json" not in nano
    assert b'from_pretrained("org/vggt-nano")' in nano["README.md"]
    assert b'evaluate.load("org/vsi_bench")' in hub.files("org/vsi_bench", "space")["README.md"]
    assert hub.files("org/app", "space")["app.py"] == b"print('a demo')\n"


def test_results_go_to_the_card_of_the_model(hub, pushed):
    files = hub.files("org/adapter")
    assert json.loads(files["evaluation/results/results.json"]) == RESULTS
    card = ModelCard(files["README.md"].decode())
    found = {result.metric_args["path"]: result.metric_value for result in card.data.eval_results}
    assert found == {"scores.lmms_eval.overall": 41.2346, "scores.lmms_eval.object_rel_direction.easy": 50.0}


def test_an_interrupted_upload_is_not_seen_and_goes_on(hub, root, pushed):
    assert "interrupted: " in pushed
    before = hub.files("org/large")
    assert before["model.safetensors"] == b"content" * 100_000  # of the first, which was interrupted once
    output = run(hub, root, "push_again", "push", OWNER)
    assert hub.files("org/large")["model.safetensors"] == b"another" * 100_000
    assert "without token: " in output


def test_training_scripts_push(hub, root, trained):
    assert hub.repos["model", "org/trained-psfm"].private
    for name in ("psfm", "geometry", "adapter"):
        files = hub.files(f"org/trained-{name}")
        card = ModelCard(files["README.md"].decode())
        assert f'from_pretrained("org/trained-{name}")' in card.text and "## Licence" in card.text
        assert metadata_errors(files["README.md"].decode(), "model") == []
        assert str(root) not in card.text and str(root) not in files["run.json"].decode()
        assert not any(file.startswith(("checkpoint-", "runs/", ".")) for file in files if file != ".gitattributes")
        assert len(hub.repos["model", f"org/trained-{name}"].commits) == 2  # made, and pushed once, with its card
    found = ModelCard(hub.files("org/trained-geometry")["README.md"].decode()).data.eval_results
    scores = json.loads(hub.files("org/trained-geometry")["eval.json"])
    assert {result.metric_args["path"]: result.metric_value for result in found} == {
        f"2_views.model.{key}": round(value, 4) for key, value in scores["2_views"]["model"].items()
    }
    assert ModelCard(hub.files("org/trained-adapter")["README.md"].decode()).data.base_model == [
        "org/vlm",
        "org/spa3r",
    ]
    assert "modeling_spa3r.py" in hub.files("org/trained-psfm")


def test_a_fresh_process_loads_everything(hub, root, trained):
    run(hub, root, "pull", "pull")
    # Of a large file that was cut off only the rest was sent again.
    assert [request for request in hub.requests if "vggt-nano" in request and "bytes=" in request]
    # Once more from the cache alone, without the Hub.
    number = len(hub.requests)
    run(hub, root, "pull", "pull", HF_HUB_OFFLINE="1", HF_EVALUATE_OFFLINE="1")
    assert len(hub.requests) == number


def test_the_code_comes_with_the_models(hub, root, pushed):
    run(hub, root, "bare", "bare")


def test_what_cannot_be_read(hub, root, pushed):
    run(hub, root, "refused", "refused")
    said = json.loads((root / "said.json").read_text())
    for name in ("private", "missing"):
        repo = {"private": "org/private", "missing": "org/nowhere"}[name]
        assert repo in said[name] and "no token is set" in said[name] and "hf auth login" in said[name]
    assert "org/private" in said["by transformers"] and "token" in said["by transformers"]
    assert "third" in said["revision"] or "no such revision" in said["revision"]
    for name, licence in ((GATED[0], "DINOv3 Licence"), (GATED[1], "VGGT Licence")):
        message = said[name.split("/")[1]]
        assert f"{name} is gated" in message and licence in message and f"huggingface.co/{name}" in message
    *_, line, code = said["script"].splitlines()
    assert code == "exit 2" and line.startswith("run_psfm.py: error: ") and "the DINOv3 Licence (https://" in line
    # Half of the weights had arrived: nothing of it was taken for them.
    assert said["left"] == [len(hub.files("org/vggt")["config.json"])]
    assert "org/vggt" in said["interrupted"] and "model.safetensors" in said["from the cache"]
