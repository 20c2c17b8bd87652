"""Training of the geometry backbone: losses, scores, data and the command line."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spa3r_hf.camera_spa3r import cameras_to_pose_encoding, quaternion_to_rotation
from spa3r_hf.feature_scale import feature_spread
from spa3r_hf.geometry_losses import (
    CONFIDENCE_WEIGHT,
    MATCH_LAYERS,
    MATCH_WEIGHT,
    SceneGeometry,
    dense_loss,
    geometry_losses,
    match_loss,
    patch_matches,
)
from spa3r_hf.geometry_metrics import area_under_curve, relative_pose_errors
from spa3r_hf.modeling_spa3r_vggt import Spa3RVGGTModel, Spa3RVGGTOutput


REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def batch():
    pytest.importorskip("embreex")
    from spa3r_hf.geometry_data import RoomGeometryDataset
    from spa3r_hf.rooms_walks import RoomWalks

    rooms = RoomGeometryDataset(RoomWalks(range(2), num_views=8, image_size=(28, 42)))
    samples = [rooms[0, index, 3] for index in range(2)]
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def geometry_of(batch) -> SceneGeometry:
    return SceneGeometry.from_metric(batch["extrinsics"], batch["intrinsics"], batch["depth"])


def test_geometry_is_in_the_first_camera_and_of_unit_distance(batch):
    geometry = geometry_of(batch)
    torch.testing.assert_close(geometry.extrinsics[:, 0], torch.eye(4)[:3].expand(2, 3, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(geometry.points.norm(dim=-1).mean((1, 2, 3)), torch.ones(2))
    # Other units and another world frame make no difference.
    rotation = quaternion_to_rotation(torch.tensor([0.1, -0.4, 0.3, 0.8]))
    extrinsics = torch.cat((batch["extrinsics"][..., :3] @ rotation, batch["extrinsics"][..., 3:]), dim=-1)
    extrinsics[..., 3] *= 100
    other = SceneGeometry.from_metric(extrinsics, batch["intrinsics"], 100 * batch["depth"])
    for name in ("extrinsics", "depth", "points"):
        torch.testing.assert_close(getattr(other, name), getattr(geometry, name), atol=1e-4, rtol=1e-4)


def test_a_perfect_prediction_loses_nothing_and_a_worse_one_more(batch):
    geometry = geometry_of(batch)
    pose = cameras_to_pose_encoding(geometry.extrinsics, geometry.intrinsics, (28, 42))
    ones = torch.ones_like(geometry.depth)

    def losses(noise: float):
        generator = torch.Generator().manual_seed(0)

        def noisy(values):
            return values + noise * torch.randn(values.shape, generator=generator)

        output = Spa3RVGGTOutput(
            pose_encodings=(noisy(pose), noisy(pose)),
            depth=noisy(geometry.depth[..., None]),
            depth_confidence=ones,
            points=noisy(geometry.points),
            points_confidence=ones,
        )
        return geometry_losses(output, geometry, (28, 42))

    perfect, near, far = losses(0), losses(0.01), losses(0.1)
    assert set(perfect) == {"camera", "depth", "depth_gradient", "points", "points_gradient"}
    for name in perfect:
        assert perfect[name] == pytest.approx(0, abs=1e-6) and near[name] < far[name], name


def test_confidence_pays_where_the_error_is_below_its_weight():
    target = torch.zeros(1, 1, 4, 4, 1)
    confidence = torch.full((1, 1, 4, 4), 3.0, requires_grad=True)
    for error, sign in ((CONFIDENCE_WEIGHT / 3 / 2, -1), (CONFIDENCE_WEIGHT / 3 * 2, 1)):
        value, _ = dense_loss(target + error, confidence, target)
        (gradient,) = torch.autograd.grad(value, confidence)
        assert (gradient.sign() == sign).all()


def test_matches_are_where_the_same_colours_are():
    from spa3r_hf.geometry_data import RoomGeometryDataset
    from spa3r_hf.rooms_walks import RoomWalks

    rooms = RoomGeometryDataset(RoomWalks(range(2), num_views=24, image_size=(112, 112)), frame_step=(1, 1))
    batch = rooms.batches(3)[0]
    following = torch.tensor([1, 2, 0])
    matches, seen = patch_matches(geometry_of(batch), 14, following)
    assert matches.shape == seen.shape == (2, 3, 64) and 0.2 < seen.float().mean() < 0.95
    pixels = batch["pixel_values"]
    colours = torch.nn.functional.avg_pool2d(pixels.flatten(0, 1), 14).flatten(2).mT.unflatten(0, (2, 3))
    there = colours[:, following]
    matched = (colours - torch.take_along_dim(there, matches[..., None], dim=2)).abs()[seen].mean()
    assert matched < 0.6 * (colours - there).abs()[seen].mean()
    # A view matches itself patch by patch.
    matches, seen = patch_matches(geometry_of(batch), 14, torch.arange(3))
    assert seen.all() and (matches == torch.arange(64)).all()


def test_the_match_loss_wants_attention_on_the_match(batch):
    geometry = geometry_of(batch)
    num_views, num_prefix = 3, 2
    size = num_prefix + geometry.depth[0, 0].numel() // 14**2
    views = torch.arange(num_views)
    right = torch.full((2, 3, num_views, size, num_views, size), 1e-3)
    for step in (1, 2):
        others = (views + step) % num_views
        matches, _ = patch_matches(geometry, 14, others)
        for scene in range(2):
            for view, other in enumerate(others.tolist()):
                patches = num_prefix + torch.arange(size - num_prefix)
                # The first head looks into the first view alone, the second into all others.
                heads = [0, 1] if other == 0 else [1]
                for head in heads:
                    right[scene, head, view, patches, other, num_prefix + matches[scene, view]] = 1.0
    right = right.flatten(4).flatten(2, 3)
    right = right / right.sum(-1, keepdim=True)
    layers = max(MATCH_LAYERS) + 1
    good = match_loss((right,) * layers, geometry, num_prefix, 14)
    poor = match_loss((torch.full_like(right, 1 / right.shape[-1]),) * layers, geometry, num_prefix, 14)
    assert poor == pytest.approx(MATCH_WEIGHT * math.log(right.shape[-1]), rel=1e-4)
    assert good < 0.3 * poor


def test_relative_pose_errors_of_known_turns(batch):
    truth = geometry_of(batch).extrinsics
    rotation, translation, baseline = relative_pose_errors(truth, truth)
    assert rotation.shape == (2, 3) and rotation.max() < 0.1
    assert translation[baseline > 0.05].max() < 0.5
    angle = torch.tensor(20.0).deg2rad()
    turn = quaternion_to_rotation(torch.stack((angle * 0, angle * 0, (angle / 2).sin(), (angle / 2).cos())))
    turned = truth.clone()
    turned[:, 2] = turn @ truth[:, 2]  # the third camera rolls by 20 degrees: pairs (0, 2) and (1, 2) are off by that
    rotation, _, _ = relative_pose_errors(turned, truth)
    torch.testing.assert_close(rotation, torch.tensor([[0.0, 20.0, 20.0]] * 2), atol=0.1, rtol=0)


def test_area_under_curve_is_the_mean_share_below_whole_degrees():
    assert area_under_curve(torch.tensor([0.5, 40.0])) == pytest.approx(0.5)
    assert area_under_curve(torch.tensor([14.5])) == pytest.approx(16 / 30)


def test_run_geometry_resumes_and_its_backbone_loads(tmp_path):
    pytest.importorskip("embreex")
    from spa3r_hf.geometry_data import RoomGeometryDataset, split_walks

    config = {
        **{"model_type": "spa3r_vggt", "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2},
        **{"intermediate_size": 32, "image_size": 28, "patch_embedding": "dinov2", "camera_num_attention_heads": 2},
        **{"camera_num_hidden_layers": 1, "dpt_hidden_size": 8, "dpt_out_channels": [8, 8, 8, 8]},
        "dpt_layers": [0, 0, 1, 1],
    }
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps(config))

    def run(folder: str, steps: int, *more: str, check: bool = True) -> str:
        command = [sys.executable, "training/run_geometry.py", "--config_name", str(tmp_path / "config")]
        command += ["--max_steps", str(steps), "--num_rooms", "3", "--num_eval_rooms", "2", "--images_per_batch", "8"]
        command += ["--eval_views", "2", "--save_steps", "2", "--lr_scheduler_type", "constant", "--use_cpu"]
        command += ["--dataloader_num_workers", "0", "--output_dir", str(tmp_path / folder), *more]
        command += ["--cache_dir", str(tmp_path / "rooms")]
        lr_scheduler_kwargs = ["--lr_scheduler_kwargs", "{}"]
        command += lr_scheduler_kwargs
        return subprocess.run(command, cwd=REPOSITORY, check=check, capture_output=True, text=True).stderr

    run("whole", 4)
    run("parts", 2)
    run("parts", 4, "--resume_from_checkpoint", "last")
    whole, parts = (Spa3RVGGTModel.from_pretrained(tmp_path / folder).state_dict() for folder in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    scores = json.loads((tmp_path / "whole" / "eval.json").read_text())["2_views"]
    assert scores["model"].keys() == scores["baseline"].keys() >= {"auc_30", "depth_abs_rel", "point_error"}
    facts, commands = (json.loads((tmp_path / "parts" / name).read_text()) for name in ("run.json", "commands.json"))
    assert facts["steps"] == 4 and facts["command"] == "; ".join(entry["command"] for entry in commands)
    assert facts["seconds"] == pytest.approx(sum(entry["seconds"] for entry in commands), abs=1)
    assert len(commands) == 2 and all(entry["seconds"] > 0 for entry in commands)
    views = RoomGeometryDataset(split_walks("validation", 2, (28, 28), tmp_path / "rooms")).batches(4)[0]
    backbone = Spa3RVGGTModel.from_pretrained(tmp_path / "whole").eval()
    assert feature_spread(backbone, views["pixel_values"]) == pytest.approx(1, abs=1e-3)

    message = run("diverged", 4, "--learning_rate", "1e30", "--save_steps", "1", check=False)
    assert "FloatingPointError: the loss is nan at step 2" in message and "try a lower learning rate" in message
    assert (tmp_path / "diverged" / "checkpoint-1").is_dir() and not (tmp_path / "diverged" / "eval.json").exists()
