import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spa3r_hf.errors import BadSampleError
from spa3r_hf.scenes import (
    DatasetScenes,
    FolderScenes,
    Scene,
    StreamedScenes,
    VideoScenes,
    check_scene_cameras,
    open_scenes,
    scannetpp_scenes,
)


def write_photos(folder: Path, names=("1.jpg", "2.jpg", "10.jpg"), size=(40, 30)) -> Path:
    """Pictures of one grey level each, 10 times their place in `names`."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", size, (10 * i,) * 3).save(folder / name)
    return folder


def levels(scene: Scene) -> list[int]:
    return [image.getpixel((5, 5))[0] for image in scene.images]


def make_cameras(num_views: int) -> tuple[np.ndarray, np.ndarray]:
    """Poses, world <- camera, and intrinsics."""
    angles = np.linspace(0.1, 1.5, num_views)
    poses = np.tile(np.eye(4), (num_views, 1, 1))
    poses[:, 0, 0] = poses[:, 2, 2] = np.cos(angles)
    poses[:, 0, 2] = np.sin(angles)
    poses[:, 2, 0] = -np.sin(angles)
    poses[:, :3, 3] = np.random.default_rng(0).normal(size=(num_views, 3))
    return poses, np.tile([[50.0, 0, 20], [0, 50, 15], [0, 0, 1]], (num_views, 1, 1))


def test_folder_of_photographs_is_one_scene_in_natural_order(tmp_path):
    folder = write_photos(tmp_path / "attic")
    (folder / "notes.txt").write_text("not a picture")
    (folder / "._1.jpg").write_bytes(b"what macOS leaves behind")
    scenes = open_scenes(folder)
    assert len(scenes) == 1 and scenes[0].name == "attic" and scenes[0].extrinsics is None
    assert levels(scenes[0]) == [0, 10, 20]
    assert open_scenes(folder, frame_step=(3, 7))[0].frame_step == (3, 7)


def test_folder_of_folders_is_many_scenes_and_tells_what_it_leaves_out(tmp_path, caplog):
    for name in ("room10", "room9"):
        write_photos(tmp_path / name)
    (tmp_path / "calibration").mkdir()
    with caplog.at_level("WARNING"):
        scenes = open_scenes(tmp_path)
    assert [scene.name for scene in scenes] == ["room9", "room10"]
    assert "1 of 3 folders" in caplog.text and "calibration" in caplog.text


def test_pictures_are_opened_only_when_asked_for(tmp_path):
    folder = write_photos(tmp_path / "a")
    (folder / "2.jpg").write_bytes(b"")
    scene = open_scenes(folder)[0]
    assert len(scene.images) == 3 and scene.images[2].size == (40, 30)
    with pytest.raises(BadSampleError, match=r"scene 'a', view 1 \(.*2.jpg\) cannot be opened"):
        scene.images[1]


def test_truncated_pictures_are_refused(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("cut.jpg", "cut.png"):
        Image.fromarray(noise).save(folder / name)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    scene = open_scenes(folder)[0]
    for view in (0, 1):
        with pytest.raises(BadSampleError, match=rf"scene 'a', view {view} \(.*cut.*\) cannot be"):
            scene.images[view]


def test_pictures_are_upright_rgb(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    Image.new("L", (40, 30), 7).save(folder / "grey.png")
    Image.new("RGBA", (40, 30), (0, 0, 0, 0)).save(folder / "transparent.png")
    turned = Image.new("RGB", (40, 30))
    turned.getexif()[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=turned.getexif())
    images = open_scenes(folder)[0].images
    assert [image.mode for image in images] == ["RGB"] * 3
    assert [image.getpixel((0, 0)) for image in images][:2] == [(7, 7, 7), (255, 255, 255)]
    assert images[2].size == (30, 40)


def test_cameras_beside_the_photographs(tmp_path):
    folder = write_photos(tmp_path / "a")
    poses, intrinsics = make_cameras(3)
    np.savez(folder / "cameras.npz", poses=poses, intrinsics=intrinsics)
    scene = open_scenes(folder)[0]
    for view in range(3):
        np.testing.assert_allclose(
            np.vstack([scene.extrinsics[view], [0, 0, 0, 1]]) @ poses[view], np.eye(4), atol=1e-9
        )
    np.testing.assert_array_equal(scene.intrinsics, intrinsics)
    assert open_scenes(folder, use_cameras=False)[0].extrinsics is None


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p, k: (p[:2], k), r"poses have shape \(2, 4, 4\); expected \(3, 4, 4\)"),
        (lambda p, k: (p[:, :3], k), r"poses have shape \(3, 3, 4\)"),
        (lambda p, k: (p, k[:, :2]), r"intrinsics have shape \(3, 2, 3\); expected \(3, 3, 3\)"),
        (lambda p, k: (p * 1.01, k), "view 0 has a rotation that is not orthonormal with determinant 1: extrinsics"),
        (lambda p, k: (p * [-1, 1, 1, 1], k), "view 0 has a rotation that is not orthonormal with determinant 1"),
        (lambda p, k: (np.concatenate([p[:2], p[2:] + np.inf]), k), "view 2 has numbers that are not finite"),
        (lambda p, k: (p, k * [[-1, 1, 1]]), "view 0 has a focal length that is not above 0"),
        (lambda p, k: (p, np.linalg.inv(k).swapaxes(1, 2)), "last row of the intrinsics that is not 0, 0, 1"),
    ],
)
def test_impossible_cameras_are_named(tmp_path, change, message):
    folder = write_photos(tmp_path / "a")
    poses, intrinsics = change(*make_cameras(3))
    np.savez(folder / "cameras.npz", poses=poses, intrinsics=intrinsics)
    with pytest.raises(BadSampleError, match=message) as error:
        open_scenes(folder)[0]
    assert "cameras.npz" in str(error.value)


def test_unreadable_camera_files_are_named(tmp_path):
    folder = write_photos(tmp_path / "a")
    np.savez(folder / "cameras.npz", poses=np.eye(4))
    with pytest.raises(BadSampleError, match="cameras.npz cannot be read: .*intrinsics"):
        open_scenes(folder)[0]
    for data in (b"", b"PK\x03\x04"):
        (folder / "cameras.npz").write_bytes(data)
        with pytest.raises(BadSampleError, match="cameras.npz cannot be read"):
            open_scenes(folder)[0]


def test_cameras_of_a_scene_are_checked_more_closely():
    poses, intrinsics = make_cameras(5)
    extrinsics = np.linalg.inv(poses)[:, :3]
    check_scene_cameras(extrinsics.astype(np.float32), intrinsics.astype(np.float32), 5, "test")
    check_scene_cameras(extrinsics[::-1], intrinsics, 5, "test")
    check_scene_cameras(extrinsics * (1 + 4e-4), intrinsics, 5, "test")
    with pytest.raises(BadSampleError, match="^test: the camera of view 0 has a rotation that is not orthonormal"):
        check_scene_cameras(extrinsics * (1 + 6e-4), intrinsics, 5, "test")
    for wrong in (np.linalg.inv(poses), extrinsics[0]):
        with pytest.raises(BadSampleError, match=r"^test: extrinsics have shape \(.*4\); expected \(5, 3, 4\)"):
            check_scene_cameras(wrong, intrinsics, 5, "test")


def test_scenes_check_themselves():
    for step in ((4, 2), (0, 2), (3,)):
        with pytest.raises(ValueError, match=re.escape(f"scene 'a': frame_step is {step}; expected 1 <= lowest <=")):
            Scene("a", [], step)
    with pytest.raises(BadSampleError, match="only one of extrinsics and intrinsics"):
        Scene("a", [], (1, 1), extrinsics=np.zeros((0, 3, 4)))


def test_scannet(tmp_path):
    for name in ("scene0001_00", "scene0000_00"):
        write_photos(tmp_path / name / "color", ("0.jpg", "20.jpg", "100.jpg"))
        (tmp_path / name / "pose").mkdir()
    scenes = open_scenes(tmp_path)
    assert [scene.name for scene in scenes] == ["scene0000_00", "scene0001_00"]
    assert scenes[1].frame_step == (2, 6) and levels(scenes[1]) == [0, 10, 20]


def test_scannetpp(tmp_path):
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "nvs_sem_train.txt").write_text("0a7c\n09c1\n")
    (tmp_path / "splits" / "nvs_sem_val.txt").write_text("27dd\n")
    for name in ("0a7c", "09c1", "other"):
        write_photos(tmp_path / "data" / name / "dslr" / "undistorted_images")
    scenes = open_scenes(tmp_path)
    assert [scene.name for scene in scenes] == ["0a7c", "09c1"] and scenes[0].frame_step == (20, 60)
    with pytest.raises(FileNotFoundError, match="1 of 1 scenes of split 'val' are missing.*27dd"):
        open_scenes(tmp_path, split="val")
    with pytest.raises(FileNotFoundError, match="nvs_sem_test.txt"):
        scannetpp_scenes(tmp_path, "test")


def test_videos(tmp_path):
    from test_video import NUM_FRAMES, write_video

    write_video(tmp_path / "b10.mp4")
    write_video(tmp_path / "b9.mkv")
    scenes = open_scenes(tmp_path)
    assert [scene.name for scene in scenes] == ["b9.mkv", "b10.mp4"]
    assert len(scenes[0].images) == NUM_FRAMES and scenes[0].images[3].size == (64, 48)
    assert isinstance(open_scenes(tmp_path / "b9.mkv"), VideoScenes)


@pytest.fixture(scope="module")
def dataset():
    datasets = pytest.importorskip("datasets")
    poses, intrinsics = make_cameras(4)
    rows = {
        "name": [f"room{i}" for i in range(3)],
        "images": [[Image.new("RGB", (20, 10), (50 * i + j,) * 3) for j in range(4)] for i in range(3)],
        "extrinsics": [np.linalg.inv(poses)[:, :3].tolist()] * 3,
        "intrinsics": [intrinsics.tolist()] * 3,
    }
    features = {
        "name": datasets.Value("string"),
        "images": datasets.List(datasets.Image()),
        "extrinsics": datasets.List(datasets.List(datasets.List(datasets.Value("float64")))),
        "intrinsics": datasets.List(datasets.List(datasets.List(datasets.Value("float64")))),
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.mark.parametrize("form", ["saved", "parquet", "parquet in data/"])
def test_datasets(tmp_path, dataset, form, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    if form == "saved":
        dataset.save_to_disk(folder)
    else:
        (folder / "data").mkdir(parents=True)
        dataset.to_parquet(folder / ("train.parquet" if form == "parquet" else "data/train-00000.parquet"))
    scenes = open_scenes(folder)
    assert isinstance(scenes, DatasetScenes) and len(scenes) == 3
    assert scenes[2].name == "room2" and levels(scenes[2]) == [100, 101, 102, 103]
    assert scenes[2].extrinsics.shape == (4, 3, 4) and scenes[2].intrinsics[0, 0, 0] == 50
    assert open_scenes(folder, use_cameras=False)[2].extrinsics is None

    stream = open_scenes(folder, streaming=True)
    assert isinstance(stream, StreamedScenes)
    assert [levels(open_scene()) for open_scene in stream] == [levels(scene) for scene in scenes]


def test_damaged_rows_do_not_end_a_stream(dataset):
    datasets = pytest.importorskip("datasets")
    rows = dataset.cast_column("images", datasets.List(datasets.Image(decode=False))).to_dict()
    rows["images"][1][2] = {"bytes": b"damaged", "path": None}
    rows["intrinsics"][0] = rows["intrinsics"][0][:2]
    damaged = datasets.Dataset.from_dict(rows, features=dataset.features)
    scenes = list(StreamedScenes(damaged.to_iterable_dataset()))
    with pytest.raises(BadSampleError, match=r"scene 'room0': intrinsics have shape \(2, 3, 3\)"):
        scenes[0]()
    with pytest.raises(BadSampleError, match="scene 'room1', view 2 cannot be opened"):
        scenes[1]().images[2]
    assert levels(scenes[2]()) == [100, 101, 102, 103]


@pytest.mark.parametrize("images", [None, [None], [{"bytes": None, "path": None}]])
def test_rows_without_pictures_are_bad_samples(dataset, images):
    datasets = pytest.importorskip("datasets")
    rows = dataset.cast_column("images", datasets.List(datasets.Image(decode=False))).to_dict()
    rows["images"][1] = images
    scenes = DatasetScenes(datasets.Dataset.from_dict(rows, features=dataset.features))
    assert levels(scenes[0])[:2] == [0, 1]
    with pytest.raises(BadSampleError, match="scene 'room1': images has empty entries; expected pictures"):
        scenes[1]


def test_wrong_columns_are_named(dataset):
    with pytest.raises(ValueError, match=r"column 'pictures' is None; expected List\(Image\(\)\).*'images'"):
        DatasetScenes(dataset, "pictures")
    with pytest.raises(ValueError, match="column 'name' is Value"):
        DatasetScenes(dataset, "name")


def test_unknown_layouts_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").touch()
    for path in (tmp_path / "empty", tmp_path / "text.txt"):
        with pytest.raises(FileNotFoundError, match="holds no scenes; expected a folder of photographs.*ScanNet"):
            open_scenes(path)
    with pytest.raises(FileNotFoundError, match="missing does not exist; expected a folder of photographs"):
        open_scenes(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no/such does not exist, nor on the Hub .*expected a folder of photo"):
        open_scenes("no/such")
    with pytest.raises(ValueError, match="cannot be streamed; expected a dataset"):
        open_scenes(write_photos(tmp_path / "photos"), streaming=True)


def test_empty_scene_is_named(tmp_path):
    folder = write_photos(tmp_path / "a")
    scenes = FolderScenes({"a": folder})
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(BadSampleError, match=r"scene 'a': .* holds no pictures; expected some of"):
        scenes[0]


def test_rooms_are_scenes_with_exact_cameras():
    pytest.importorskip("embreex")
    from spa3r_hf.rooms import generate_room
    from spa3r_hf.rooms_rendering import render_views
    from spa3r_hf.scenes_rooms import RoomScenes

    scenes = RoomScenes(range(3, 5), num_views=6, image_size=(28, 42))
    scene = pickle.loads(pickle.dumps(scenes))[1]
    assert len(scenes) == 2 and scene.name == "room 4" and len(scene.images) == 6
    views = render_views(generate_room(4), scene.extrinsics, scene.intrinsics, (28, 42))
    for view in (4, 1):
        np.testing.assert_array_equal(np.asarray(scene.images[view]), views.rgb[view])
    assert RoomScenes([3], num_views=6, image_size=(28, 42), use_cameras=False)[0].extrinsics is None
