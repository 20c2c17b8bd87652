"""The ablations of PSFM: teachers' answers kept on disk, variants, tables, and the command line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_spa3r

from spa3r_hf import Spa3RForPreTraining


pytest.importorskip("embreex")
from spa3r_hf.geometry_data import RoomGeometryDataset, room_batches  # noqa: E402  # needs the rooms
from spa3r_hf.psfm_ablation import (  # noqa: E402
    ABLATIONS,
    TeacherCache,
    all_variants,
    build_variant,
    train_variant,
    variant_id,
)
from spa3r_hf.psfm_ablation_report import ablation_report, verdict  # noqa: E402
from spa3r_hf.psfm_metrics import unseen_depth  # noqa: E402
from spa3r_hf.rooms_walks import RoomWalks  # noqa: E402


REPOSITORY = Path(__file__).resolve().parent.parent
SIZE = (28, 28)


@pytest.fixture(scope="module")
def base() -> Spa3RForPreTraining:
    return tiny_spa3r(semantic_image_size=32)


@pytest.fixture(scope="module")
def dataset() -> RoomGeometryDataset:
    return RoomGeometryDataset(RoomWalks(range(2), num_views=12, image_size=SIZE), frame_step=(1, 2))


def test_every_question_has_the_base_among_its_variants():
    variants = all_variants()
    assert variants["base"] == {} and len(variants) == 10
    for ablation in ABLATIONS.values():
        assert sum(changes == {} for changes in ablation.variants.values()) == 1
        assert ablation.published.keys() <= ablation.variants.keys()


def test_learning_from_kept_answers_is_learning_from_pictures(base, dataset, tmp_path):
    cache = TeacherCache(tmp_path, base, dataset, num_views=4, num_batches=2, batch_size=2)
    teachers = next(cache.batches(seed=0))
    batch = np.random.default_rng(0).permutation(2)[0]
    samples = [dataset[batch * 2 // 2, batch * 2 + i, 4] for i in range(2)]
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    with torch.no_grad():
        kept, whole = base.learn(teachers, SIZE), base(pixels, view_mask=teachers.view_mask)
    torch.testing.assert_close(kept.loss, whole.loss, rtol=5e-3, atol=0)  # answers are kept in float16
    torch.testing.assert_close(kept.extrinsics, whole.extrinsics)


def test_kept_answers_are_not_asked_for_again(base, dataset, tmp_path):
    first = TeacherCache(tmp_path, base, dataset, num_views=4, num_batches=2, batch_size=2)
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    again = TeacherCache(tmp_path, base, dataset, num_views=4, num_batches=2, batch_size=2)
    assert len(times) == 2 and [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())] == times
    assert torch.equal(next(first.batches(1)).depth_target, next(again.batches(1)).depth_target)


def test_a_variant_shares_teachers_and_learns(base, dataset, tmp_path):
    model = build_variant(base, {"num_latents": 3, "targets": ["geometric"]}, seed=0)
    assert model.semantic_head is None and model.spa3r.encoder.queries.shape[1] == 3
    frozen = {name: value.clone() for name, value in model.spa3r.backbone.state_dict().items()}
    assert all(torch.equal(value, base.spa3r.backbone.state_dict()[name]) for name, value in frozen.items())
    cache = TeacherCache(tmp_path, base, dataset, num_views=4, num_batches=2, batch_size=2)
    losses = train_variant(model, cache, SIZE, steps=12, seed=0)
    assert len(losses) == 12 and np.mean(losses[-3:]) < np.mean(losses[:3])
    assert all(torch.equal(value, frozen[name]) for name, value in model.spa3r.backbone.state_dict().items())
    twin = build_variant(base, {"num_latents": 3, "targets": ["geometric"]}, seed=0)
    assert train_variant(twin, cache, SIZE, steps=12, seed=0) == losses


def test_a_variant_that_diverges_says_so(base, dataset, tmp_path):
    cache = TeacherCache(tmp_path, base, dataset, num_views=4, num_batches=1, batch_size=2)
    model = build_variant(base, {}, seed=0)
    with torch.no_grad():
        model.decoder.norm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        train_variant(model, cache, SIZE, steps=2, seed=0)


def test_depth_of_unseen_views_is_compared_after_median_scaling(base, dataset):
    batches = room_batches(dataset, 4)
    scores = unseen_depth(base, batches)
    assert scores.keys() == {"probe_abs_rel", "backbone_abs_rel"}
    for batch in batches:
        batch["depth"] = 100 * batch["depth"]
    assert unseen_depth(base, batches) == pytest.approx(scores, rel=1e-4)


def results_with(scores_of_variant: dict[str, list[float]]):
    """Runs of the mask-ratio variants whose spatial probes all have the given values."""
    results = {}
    for label, values in scores_of_variant.items():
        changes = ABLATIONS["mask ratio"].variants[label]
        results[variant_id(changes)] = [{"changes": changes, "scores": {"probe room size": value}} for value in values]
    return results


def test_the_verdict_follows_the_numbers():
    question = ABLATIONS["mask ratio"]
    text = verdict(question, results_with({"25 %": [0.1, 0.11], "50 %": [0.5, 0.51], "75 %": [0.9, 0.91]}))
    assert "50 % over 25 %: paper +1.1, here +0.400 ± 0.007: agrees" in text
    assert "50 % over 75 %: paper +0.5, here -0.400 ± 0.007: differs" in text
    text = verdict(question, results_with({"25 %": [0.4, 0.6], "50 %": [0.45, 0.6], "75 %": [0.5, 0.6]}))
    assert text.count("cannot be told apart here") == 2
    assert "Too few seeds" in verdict(question, results_with({"25 %": [0.1], "50 %": [0.5], "75 %": [0.9]}))
    assert "no downstream score" in verdict(ABLATIONS["latents"], {})


def test_the_command_stops_continues_and_tabulates(base, tmp_path):
    base.save_pretrained(tmp_path / "model")
    command = [sys.executable, "training/ablate_psfm.py", "--model_name_or_path", str(tmp_path / "model")]
    command += ["--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "rooms"), "--steps", "1"]
    command += ["--num_rooms", "2", "--num_eval_rooms", "2", "--num_probe_rooms", "42", "--num_test_rooms", "12"]

    def run(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *more], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)

    first = run("--seeds", "1", "--num_processes", "1")
    assert first.returncode == 0, first.stderr
    files = sorted(path.name for path in (tmp_path / "out").glob("*_seed*.json"))
    assert len(files) == 10
    scores = json.loads((tmp_path / "out" / "base_seed0.json").read_text())["scores"]
    assert {"geometric_cosine", "depth probe_abs_rel", "probe room size", "invariance retrieval"} <= scores.keys()
    assert (tmp_path / "out" / "ablations.png").exists()

    # One run is lost: it alone is made again, and comes out the same.
    lost = tmp_path / "out" / "base_seed0.json"
    lost.unlink()
    second = run("--seeds", "1", "--num_processes", "1")
    assert "1 runs to make" in second.stderr
    assert json.loads(lost.read_text())["scores"] == scores
    report = (tmp_path / "out" / "ablations.md").read_text()
    assert report == ablation_report(tmp_path / "out")
    assert report.count("pooled backbone") == len(ABLATIONS) and "Too few seeds" in report

    other = run("--seeds", "1", "--steps", "2")
    assert other.returncode and "holds results with other steps" in other.stderr
