"""A scene's field: what it is made of, cameras in between, and what is drawn of it."""

from dataclasses import astuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from tiny_models import scene_pixels, tiny_spa3r

from spa3r_hf import Spa3RImageProcessor
from spa3r_hf.camera_spa3r import check_cameras
from spa3r_hf.feature_field import (
    MAP_SIZE,
    MOST_POINTS,
    ORBIT_FRAMES,
    ORBIT_SIZE,
    Camera,
    FieldModel,
    cloud_of,
    cosine,
    draw_from,
    draw_map,
    orbit_cameras,
    write_cloud,
    write_orbit,
)
from spa3r_hf.visualization import feature_basis


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    pixels = (255 * scene_pixels(1, count, 28, 42, seed)[0]).byte().movedim(1, -1).numpy()
    return [Image.fromarray(view) for view in pixels]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> FieldModel:
    folder = tmp_path_factory.mktemp("model")
    tiny_spa3r().save_pretrained(folder)
    Spa3RImageProcessor(size=42).save_pretrained(folder)
    return FieldModel(folder)


@pytest.fixture(scope="module")
def field(model):
    return model.read(pictures(3))


# --- cameras


def seen_from(camera: Camera, point: tuple[float, float, float]) -> np.ndarray:
    """A point of the world, x right, y down, z forward, in the camera's own axes."""
    return camera.extrinsics() @ np.array([*point, 1.0])


def test_a_camera_that_was_not_moved_is_the_first_view():
    np.testing.assert_array_equal(Camera().extrinsics(), np.eye(3, 4))


@pytest.mark.parametrize(
    ("camera", "point", "expected"),
    [
        (Camera(yaw=90), (1, 0, 0), (0, 0, 1)),  # who turns right has in front what was at the right
        (Camera(yaw=-90), (-1, 0, 0), (0, 0, 1)),
        (Camera(yaw=30), (0, 0, 1), (-0.5, 0, 3**0.5 / 2)),  # and at the left what was in front
        (Camera(pitch=90), (0, -1, 0), (0, 0, 1)),  # up is -y
        (Camera(pitch=30), (0, 0, 1), (0, 0.5, 3**0.5 / 2)),
        (Camera(forward=2), (0, 0, 5), (0, 0, 3)),
        (Camera(right=2), (2, 0, 1), (0, 0, 1)),
        (Camera(up=2), (0, -2, 1), (0, 0, 1)),
        (Camera(yaw=90, forward=1, right=1), (3, 0, 1), (0, 0, 2)),  # moves are along the first view's axes
        (Camera(yaw=180, pitch=45), (0, -1, -1), (0, 0, 2**0.5)),
    ],
)
def test_sliders_mean_what_they_say(camera, point, expected):
    np.testing.assert_allclose(seen_from(camera, point), expected, atol=1e-12)


def test_every_setting_is_a_camera_and_back():
    rng = np.random.default_rng(0)
    for _ in range(50):
        camera = Camera(*rng.uniform(-170, 170, 1), *rng.uniform(-85, 85, 1), *rng.uniform(-1, 1, 3))
        extrinsics = camera.extrinsics()
        check_cameras(torch.tensor(extrinsics)[None, None], torch.eye(3)[None, None], (1, 1))
        np.testing.assert_allclose(astuple(Camera.of(extrinsics)), astuple(camera), atol=1e-9)
        # Upright: its right is level.
        assert abs(extrinsics[0, 1]) < 1e-12


def test_the_roll_of_a_camera_is_lost_and_nothing_else():
    camera = Camera(20, -10, 0.3, 0.2, -0.1)
    roll = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
    np.testing.assert_allclose(astuple(Camera.of(roll @ camera.extrinsics())), astuple(camera), atol=1e-9)


def test_an_orbit_keeps_its_centre_and_closes(field):
    start = Camera(15, -5, 0.1, 0.2, 0.3)
    cameras = orbit_cameras(field, start, 12)
    np.testing.assert_allclose(cameras[0], start.extrinsics(), atol=1e-12)
    reach = np.median(field.context.depth)
    first = start.extrinsics()
    centre = first[:, :3].T @ (np.array([0, 0, reach]) - first[:, 3])
    for camera in cameras:
        np.testing.assert_allclose(camera[:, :3] @ centre + camera[:, 3], [0, 0, reach], atol=1e-6)
    apart = np.linalg.norm(np.diff(cameras, axis=0, append=cameras[:1]), axis=(1, 2))
    assert 0 < apart.min() and apart.max() < 4 * apart.min()


# --- what the models say


def test_the_field_is_that_of_the_context_views_alone(model, field):
    pixels = model.processor(pictures(3), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(field.latents, model.model.spa3r(pixels).latents)
    assert field.image_size == (28, 42)
    assert field.context.features["geometric"].shape == (3, 2, 3, 64)
    assert field.context.features["semantic"].shape == (3, 2, 3, 16)
    assert field.context.depth.shape == (3, 28, 42) and field.context.pixels.shape == (3, 28, 42, 3)


def test_a_held_out_view_is_what_the_teachers_say_of_a_target(model, field):
    views = pictures(5)
    seen = model.look_at(views[:3], views[4])
    pixels = model.processor([*views[:3], views[4]], return_tensors="pt")["pixel_values"]
    teachers = model.model.teach(pixels, torch.tensor([[False, False, False, True]]))
    for kind in ("geometric", "semantic"):
        expected = teachers[f"{kind}_target"][0, 3].reshape(2, 3, -1).half().numpy()
        np.testing.assert_array_equal(seen.features[kind][0], expected)
    np.testing.assert_array_equal(seen.extrinsics[0], teachers.extrinsics[0, 3])
    np.testing.assert_array_equal(seen.intrinsics[0], teachers.intrinsics[0, 3])
    # What the context views' features are does not depend on it.
    alone, beside = field.context.features["geometric"][2], teachers.geometric_target[0, 2].reshape(2, 3, -1)
    np.testing.assert_allclose(alone, beside, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["geometric", "semantic"])
def test_a_prediction_is_the_decoders(model, field, kind):
    camera, lens = Camera(10, 5, 0.1, 0.2, 0.3).extrinsics(), field.context.intrinsics[0]
    predicted = model.predict(field, camera[None], lens[None], kind)
    cameras = torch.tensor(camera).float()[None, None], torch.tensor(lens)[None, None]
    with torch.no_grad():
        expected = model.model.decode(field.latents, *cameras, (28, 42))[f"{kind}_prediction"]
    np.testing.assert_array_equal(predicted.reshape(1, 1, 6, -1), expected)
    elsewhere = model.predict(field, Camera(-40).extrinsics()[None], lens[None], kind)
    assert np.abs(elsewhere - predicted).max() > 1e-3


def test_a_model_without_semantics_has_one_kind(tmp_path):
    tiny_spa3r(targets=["geometric"]).save_pretrained(tmp_path)
    Spa3RImageProcessor(size=42).save_pretrained(tmp_path)
    model = FieldModel(tmp_path)
    assert model.kinds == ["geometric"] and list(model.read(pictures(1)).context.features) == ["geometric"]


# --- pictures of it


def test_similarity_of_maps():
    maps = np.random.default_rng(0).normal(size=(2, 3, 8))
    assert cosine(maps, 3 * maps) == pytest.approx(1, abs=1e-6)
    assert cosine(maps, -maps) == pytest.approx(-1, abs=1e-6)


def test_a_map_has_the_colours_of_its_basis():
    features = np.random.default_rng(0).normal(size=(4, 6, 8)).astype(np.float32)
    basis = feature_basis(features)
    picture = np.asarray(draw_map(basis, features, 6 * 31))
    assert picture.shape == (4 * 31, 6 * 31, 3)
    centres = picture[15::31, 15::31].astype(int)
    assert np.abs(centres - basis.to_rgb(features)).max() <= 6  # bicubic, at the patches' centres


def test_the_cloud_has_a_point_for_each_pixel_where_it_was_seen(field):
    cloud = cloud_of(field)
    assert cloud.points.shape == (3 * 28 * 42, 3)
    np.testing.assert_array_equal(cloud.colours.reshape(3, 28, 42, 3), np.rint(255 * field.context.pixels))
    for view in range(3):
        points = cloud.points.reshape(3, 28, 42, 3)[view]
        seen = points @ field.context.extrinsics[view, :, :3].T + field.context.extrinsics[view, :, 3]
        np.testing.assert_allclose(seen[..., 2], field.context.depth[view], rtol=1e-4)
        pixels = (seen / seen[..., 2:]) @ field.context.intrinsics[view].T
        np.testing.assert_allclose(pixels[..., 0], np.tile(np.arange(42) + 0.5, (28, 1)), atol=1e-2)
    features = cloud_of(field, "semantic")
    np.testing.assert_array_equal(features.points, cloud.points)
    assert (features.colours != cloud.colours).any()


def test_large_clouds_are_thinned(field, monkeypatch, tmp_path):
    monkeypatch.setattr("spa3r_hf.feature_field.MOST_POINTS", 400)
    thin, whole = cloud_of(field), 3 * 28 * 42
    assert len(thin.points) == len(thin.colours) == len(thin.sides) <= 400 < whole < MOST_POINTS
    assert thin.faces.max() < len(thin.points)


def test_files_for_browsers(model, field, tmp_path):
    # A level surface, for a random model sees edges everywhere.
    field.context.depth[:] = 1.0
    write_cloud(field, tmp_path / "cloud.glb", "geometric")
    assert (tmp_path / "cloud.glb").read_bytes()[:4] == b"glTF"
    done = []
    write_orbit(model, field, Camera(), "semantic", tmp_path / "orbit.gif", lambda now, **_: done.append(now))
    frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(Image.open(tmp_path / "orbit.gif"))]
    assert len(frames) == ORBIT_FRAMES and frames[0].shape == (ORBIT_SIZE * 2 // 3, 2 * ORBIT_SIZE + 8, 3)
    assert (frames[0] != frames[6]).any()
    assert done == [(frame, ORBIT_FRAMES) for frame in range(ORBIT_FRAMES)]
    assert draw_from(field, Camera().extrinsics()).size == (MAP_SIZE, 224)
