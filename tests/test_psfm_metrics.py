import math

import numpy as np
import pytest
import torch
from tiny_models import scene_pixels, some_cameras, tiny_spa3r
from torch import Tensor

from spa3r_hf.modeling_spa3r import Spa3RDecoderOutput, Spa3RForPreTrainingOutput
from spa3r_hf.psfm_metrics import evaluate_psfm, mean_features, nearest_context_view


def batch_of(num_scenes: int = 2, num_views: int = 4, seed: int = 0) -> dict[str, Tensor]:
    extrinsics, intrinsics = some_cameras(num_scenes, num_views, seed)
    view_mask = torch.tensor([[False, True, False, True]]).repeat(num_scenes, 1)
    view_mask[0] = torch.tensor([False, False, True, True])
    pixel_values = scene_pixels(num_scenes, num_views, 28, 28, seed)
    return {
        "pixel_values": pixel_values,
        "view_mask": view_mask,
        "extrinsics": extrinsics,
        "intrinsics": intrinsics,
    }


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def smooth_l1(a: np.ndarray, b: np.ndarray) -> float:
    apart = np.abs(a - b)
    return float(np.where(apart < 1, apart**2 / 2, apart - 0.5).mean())


def camera_nearest_to(extrinsics: np.ndarray, view: int, context: list[int]) -> int:
    centres = -np.einsum("vji,vj->vi", extrinsics[:, :, :3], extrinsics[:, :, 3])
    apart = np.linalg.norm(centres[:, None] - centres, axis=-1)
    traces = np.einsum("vij,wij->vw", extrinsics[:, :, :3], extrinsics[:, :, :3])
    turned = np.arccos(np.clip((traces - 1) / 2, -1, 1))
    total = apart / apart.mean() + turned / turned.mean()
    return min(context, key=lambda other: total[view, other])


@pytest.mark.parametrize("depth_probe", [False, True])
def test_scores_are_those_of_loops(depth_probe):
    model = tiny_spa3r(depth_probe=depth_probe)
    batches = [batch_of(seed=0), batch_of(3, seed=1)]
    means = mean_features(model, batches[:1])
    with torch.no_grad():
        outputs = [model(**batch) for batch in batches]
    expected: dict[tuple[str, str], list[float]] = {}
    for kind in ("geometric", "semantic"):
        mean = outputs[0][f"{kind}_target"].double().mean((0, 1, 2)).numpy()
        assert np.allclose(means[kind], mean, atol=1e-6)
        for batch, output in zip(batches, outputs, strict=True):
            target, predicted = (output[f"{kind}_{name}"].double().numpy() for name in ("target", "prediction"))
            with torch.no_grad():
                others = model.decode(
                    torch.stack([output.latents[i - 1] for i in range(len(target))]),
                    output.extrinsics,
                    output.intrinsics,
                    (28, 28),
                )[f"{kind}_prediction"].numpy()
            for scene, mask in enumerate(batch["view_mask"].tolist()):
                context = [view for view in range(4) if not mask[view]]
                for view in set(range(4)) - set(context):
                    nearest = camera_nearest_to(output.extrinsics[scene].double().numpy(), view, context)
                    for patch, truth in enumerate(target[scene, view]):
                        guesses = {
                            "model": predicted[scene, view, patch],
                            "nearest_context": target[scene, nearest, patch],
                            "other_scene": others[scene, view, patch],
                            "mean": mean,
                        }
                        for name, guess in guesses.items():
                            found = {"cosine": cosine(guess, truth), "l1": smooth_l1(guess, truth)}
                            if name != "mean":
                                found["centred_cosine"] = cosine(guess - mean, truth - mean)
                            for key, value in found.items():
                                expected.setdefault((name, f"{kind}_{key}"), []).append(value)

    scores = evaluate_psfm(model, batches, means)
    assert scores["num_scenes"] == 5 and scores["num_target_views"] == 10
    named = {"model": scores, **scores["baselines"]}
    assert set(named) == {"model", "nearest_context", "other_scene", "mean"}
    for (name, key), values in expected.items():
        assert named[name][key] == pytest.approx(np.mean(values), abs=2e-5), (name, key)
    assert "geometric_centred_cosine" not in scores["baselines"]["mean"]
    if depth_probe:
        masks = [batch["view_mask"] for batch in batches]
        errors = [
            ((output.depth_prediction - output.depth_target).abs() / output.depth_target)[mask].flatten()
            for output, mask in zip(outputs, masks, strict=True)
        ]
        assert scores["depth_abs_rel"] == pytest.approx(torch.cat(errors).mean().item(), rel=1e-5)


def test_nearest_context_view_weighs_distance_and_angle():
    extrinsics = torch.eye(3, 4).repeat(1, 4, 1, 1)
    extrinsics[0, :, 0, 3] = -torch.tensor([0.0, 1.0, 3.0, 0.4])  # centres on a line
    context_only = torch.tensor([[False, False, True, True]])
    assert nearest_context_view(extrinsics, context_only).tolist() == [[0, 1, 1, 0]]
    # View 0 is the nearest to view 3, but looks elsewhere; view 1 looks the same way.
    turn = math.radians(170)
    rotation = torch.tensor(
        [[math.cos(turn), 0, math.sin(turn)], [0, 1, 0], [-math.sin(turn), 0, math.cos(turn)]], dtype=torch.float32
    )
    extrinsics[0, 0] = torch.cat((rotation, torch.zeros(3, 1)), dim=1)
    assert nearest_context_view(extrinsics, context_only).tolist() == [[0, 1, 1, 1]]


class Oracle(torch.nn.Module):
    """Knows the truth, unless it is asked with the latents of another scene."""

    def __init__(self, target: Tensor):
        super().__init__()
        self.target = target

    def forward(self, pixel_values, view_mask, extrinsics, intrinsics):
        num_scenes = len(view_mask)
        target = self.target[:num_scenes]
        return Spa3RForPreTrainingOutput(
            loss=torch.tensor(0.0),
            latents=torch.arange(num_scenes).float()[:, None, None],
            geometric_target=target,
            geometric_prediction=2 * target,
            view_mask=view_mask,
            extrinsics=extrinsics,
            intrinsics=intrinsics,
        )

    def decode(self, latents, extrinsics, intrinsics, image_size):
        assert image_size == (28, 28)
        return Spa3RDecoderOutput(geometric_prediction=self.target[latents[:, 0, 0].long()])


def test_a_perfect_predictor_scores_one_and_the_wrong_scene_does_not():
    generator = torch.Generator().manual_seed(0)
    oracle = Oracle(torch.randn(2, 4, 4, 6, generator=generator))
    means = {"geometric": torch.zeros(6)}
    scores = evaluate_psfm(oracle, [batch_of()], means)
    assert scores["geometric_cosine"] == pytest.approx(1)
    assert scores["geometric_centred_cosine"] == pytest.approx(1)
    assert scores["geometric_l1"] > 0  # twice the truth
    assert not any(key.startswith("semantic") for key in scores)
    # Rolled by one: scene 1 is decoded from the latents of scene 0, and the other way round.
    mask = batch_of()["view_mask"]
    crossed = torch.cosine_similarity(oracle.target.flip(0), oracle.target, dim=-1)[mask].mean().item()
    assert scores["baselines"]["other_scene"]["geometric_cosine"] == pytest.approx(crossed, abs=1e-6)


def test_one_scene_has_no_other():
    oracle = Oracle(torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(0)))
    scores = evaluate_psfm(oracle, [batch_of(1)], {"geometric": torch.zeros(6)})
    assert set(scores["baselines"]) == {"mean", "nearest_context"}
    assert scores["num_scenes"] == 1 and scores["num_target_views"] == 2


def test_camera_distances_are_between_target_and_nearest_context():
    batch = batch_of(1)
    extrinsics = torch.eye(3, 4).repeat(1, 4, 1, 1)
    extrinsics[0, :, 2, 3] = -torch.tensor([0.0, 1.0, 1.5, 4.0])
    batch["extrinsics"] = extrinsics  # views 0 and 1 are context
    scores = evaluate_psfm(Oracle(torch.randn(1, 4, 4, 6)), [batch], {"geometric": torch.zeros(6)})
    expected = {"units_mean": 1.75, "units_max": 3.0, "degrees_mean": 0.0, "degrees_max": 0.0}
    assert scores["camera_distance"] == pytest.approx(expected, abs=0.05)


def test_mean_feature_weighs_every_patch_alike():
    targets = [torch.ones(1, 2, 3, 2), torch.zeros(3, 4, 5, 2)]
    outputs = iter([Spa3RForPreTrainingOutput(geometric_target=target) for target in targets])
    means = mean_features(lambda **batch: next(outputs), [{}, {}])
    assert means.keys() == {"geometric"} and torch.allclose(means["geometric"], torch.full((2,), 6 / 66))
