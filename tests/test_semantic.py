"""Training of the semantic teacher: what patches show, probes, and the command line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, DINOv3ViTConfig


pytest.importorskip("embreex")
from spa3r_hf.geometry_data import RoomGeometryDataset, room_batch_sampler  # noqa: E402  # needs the rooms
from spa3r_hf.psfm_data import PSFMBatchSampler  # noqa: E402
from spa3r_hf.rooms import generate_room  # noqa: E402
from spa3r_hf.rooms_rendering import RoomRenderer  # noqa: E402
from spa3r_hf.rooms_walks import PIXEL_CATEGORIES, RoomWalks  # noqa: E402
from spa3r_hf.semantic_trainer import PatchCategoryModel, patch_category_shares, probe_categories  # noqa: E402


REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = {
    **{"model_type": "dinov3_vit", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_register_tokens": 1, "image_size": 28, "patch_size": 14},
}


def test_shares_are_counted_patch_by_patch():
    categories = torch.randint(0, len(PIXEL_CATEGORIES), (2, 3, 28, 42), generator=torch.Generator().manual_seed(0))
    shares = patch_category_shares(categories.byte(), patch_size=14)
    assert shares.shape == (2, 3, 6, len(PIXEL_CATEGORIES))
    patch = categories[1, 2, 14:, 28:]  # the last of the second row
    expected = torch.bincount(patch.flatten(), minlength=len(PIXEL_CATEGORIES)) / 14**2
    torch.testing.assert_close(shares[1, 2, 5], expected)


def test_every_pixel_has_the_category_of_what_it_shows():
    walks = RoomWalks([3], num_views=6, image_size=(42, 42))
    walk = walks[0]
    room = generate_room(3)
    views = RoomRenderer(room).render(walk.extrinsics, walk.intrinsics, (42, 42))
    for thing in room.objects:
        seen = walk.categories[views.instance_ids == thing.instance_id]
        assert (seen == PIXEL_CATEGORIES.index(thing.category)).all()
    structure = walk.categories[views.instance_ids == 0]
    assert set(np.unique(structure)) <= {0, 1, 2} and (structure == 1).any()
    up = views.normals[..., 2] > 0.9
    assert (walk.categories[up & (views.instance_ids == 0)] == PIXEL_CATEGORIES.index("floor")).all()


def test_walks_are_rendered_once_and_kept(tmp_path):
    walks = RoomWalks([5, 6], num_views=4, image_size=(28, 28), cache_dir=tmp_path)
    first = walks[0]
    (path,) = tmp_path.rglob("*.npz")
    time = path.stat().st_mtime_ns
    again = RoomWalks([5], num_views=4, image_size=(28, 28), cache_dir=tmp_path)[0]
    assert path.stat().st_mtime_ns == time
    fresh = RoomWalks([5], num_views=4, image_size=(28, 28))[0]
    for name in ("rgb", "depth", "categories", "extrinsics", "intrinsics"):
        assert (getattr(first, name) == getattr(again, name)).all()
        assert (getattr(first, name) == getattr(fresh, name)).all()
    other = RoomWalks([5], num_views=4, image_size=(28, 28), fields_of_view=(50, 50), cache_dir=tmp_path)[0]
    assert (other.intrinsics != first.intrinsics).any()
    with pytest.raises(ValueError, match="0 rooms"):
        RoomWalks([])


def test_settings_that_no_walk_can_serve_are_refused_before_training():
    walks = RoomWalks(range(5), num_views=6)
    sampler = room_batch_sampler(RoomGeometryDataset(walks, seed=3), 12, (2, 6), 2)
    assert list(sampler) == list(PSFMBatchSampler(5, 12, (2, 6), batches_per_step=2, seed=3))
    with pytest.raises(ValueError, match=r"views is \(2, 7\); expected at most 6, the views of a walk"):
        room_batch_sampler(RoomGeometryDataset(walks), 12, (2, 7), 2)
    for step in ((3,), (4, 1), (0, 1)):
        with pytest.raises(ValueError, match="rooms: frame_step is .*; expected 1 <= lowest <= highest"):
            RoomGeometryDataset(walks, frame_step=step)
    with pytest.raises(ValueError, match="num_views is 1; expected at least 2"):
        RoomGeometryDataset(walks)[0, 0, 1]


def test_a_probe_reads_off_what_the_features_hold():
    class Telling(PatchCategoryModel):
        def features(self, pixel_values):  # the answer itself, drowned in what does not matter
            shares = patch_category_shares(self.categories[pixel_values.shape[0]], 14)
            return torch.cat((shares, torch.randn(*shares.shape[:-1], 8)), dim=-1)

    torch.manual_seed(0)
    dataset = RoomGeometryDataset(RoomWalks(range(8), num_views=6, image_size=(56, 56)), frame_step=(1, 1))
    batches = dataset.batches(4, size=5)
    model = Telling(DINOv3ViTConfig(**CONFIG)).eval()
    model.categories = {len(batch["categories"]): batch["categories"] for batch in batches}
    scores = probe_categories(model, [[batches[0]], [batches[1]]])
    assert scores["model"]["accuracy"] > scores["pixels"]["accuracy"]
    assert scores["model"]["accuracy"] > scores["constant"]["accuracy"] > scores["constant"]["mean_class_accuracy"]


def test_run_semantic_leaves_a_teacher_that_loads(tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps(CONFIG))
    command = [sys.executable, "training/run_semantic.py", "--config_name", str(tmp_path / "config"), "--use_cpu"]
    command += ["--max_steps", "2", "--num_rooms", "3", "--num_eval_rooms", "2", "--images_per_batch", "8"]
    command += ["--dataloader_num_workers", "0", "--save_steps", "1", "--cache_dir", str(tmp_path / "rooms")]
    folder = tmp_path / "teacher"
    subprocess.run([*command, "--output_dir", str(folder)], cwd=REPOSITORY, check=True, capture_output=True)
    model = AutoModel.from_pretrained(folder)
    assert model(torch.zeros(1, 3, 28, 28)).last_hidden_state.shape == (1, 2 + 4, 16)
    scores = json.loads((folder / "eval.json").read_text())
    assert scores.keys() == {"model", "pixels", "constant"}
    card = (folder / "README.md").read_text()
    assert f"{scores['model']['accuracy']:.3f}" in card and "python training/run_semantic.py" in card
    last = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    assert last["global_step"] == 2

    command[command.index("--config_name") + 1] = "hub_configs/vggt-nano"
    wrong = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert "is a 'spa3r_vggt'; expected 'dinov3_vit'" in wrong.stderr
