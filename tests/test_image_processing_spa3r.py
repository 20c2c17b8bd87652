import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoImageProcessor

from spa3r_hf.image_processing_spa3r import Spa3RImageProcessor


GOLDEN = load_file(Path(__file__).parent / "fixtures" / "preprocessing_reference.safetensors")
SIZES = {"landscape": 70, "portrait": 70, "rgba": 70, "odd": 84, "full_size": 518}


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture
def processor() -> Spa3RImageProcessor:
    return Spa3RImageProcessor(size=28)


@pytest.mark.parametrize("key", sorted(key for key in GOLDEN if ".output." in key))
def test_agrees_with_the_release(key):
    case, _, mode = key.split(".")
    processor = Spa3RImageProcessor(size=SIZES[case], mode=mode)
    pixel_values = processor([GOLDEN[f"{case}.input"]])["pixel_values"]
    # Bit for bit: the fixture holds the original float output times 255, which was whole everywhere.
    np.testing.assert_array_equal(pixel_values[0, 0], GOLDEN[key] / np.float32(255))


def test_every_form_of_one_scene_gives_the_same_pixels(processor):
    views = [picture(20, 30, seed=seed) for seed in range(2)]
    first = [view.transpose(2, 0, 1) for view in views]
    forms = {
        "PIL": [Image.fromarray(view) for view in views],
        "(H, W, 3) uint8": views,
        "(3, H, W) uint8": first,
        "(3, H, W) float": [view / 255 for view in first],
        "tensors": [torch.from_numpy(view) for view in first],
        "float16 tensors": [torch.from_numpy(view / 255).half() for view in first],
        "int64 tensors": [torch.from_numpy(view).long() for view in views],
        "mixed": [Image.fromarray(views[0]), torch.from_numpy(first[1])],
        "(V, 3, H, W)": np.stack(first),
        "(V, H, W, 3)": np.stack(views),
        "(B, V, 3, H, W) tensor": torch.from_numpy(np.stack(first))[None],
        "batch of lists": [views],
        "batch of arrays": [np.stack(first)],
        "tuple": tuple(views),
    }
    expected = processor(forms["PIL"])["pixel_values"]
    assert expected.shape == (1, 2, 3, 14, 28) and expected.dtype == np.float32
    for name, form in forms.items():
        np.testing.assert_array_equal(processor(form)["pixel_values"], expected, err_msg=name)


def test_batches_keep_the_order_of_scenes_and_views(processor):
    scenes = [[picture(20, 30, seed=2 * b + v) for v in range(2)] for b in range(3)]
    batch = processor(scenes, return_tensors="pt")["pixel_values"]
    assert isinstance(batch, torch.Tensor) and batch.shape == (3, 2, 3, 14, 28)
    for b, scene in enumerate(scenes):
        np.testing.assert_array_equal(batch[b], processor(scene)["pixel_values"][0])


def test_lone_picture_is_a_scene_of_one_view(processor):
    assert processor(Image.fromarray(picture(28, 28)))["pixel_values"].shape == (1, 1, 3, 28, 28)
    assert processor(picture(28, 28))["pixel_values"].shape == (1, 1, 3, 28, 28)


def test_grey_pictures_become_rgb_and_transparent_ones_lie_on_white(processor):
    grey = picture(28, 28, 1)
    rgb = np.repeat(grey, 3, axis=-1)
    transparent = np.concatenate([rgb, np.zeros_like(grey)], axis=-1)
    palette = Image.fromarray(rgb).convert("P")
    palette.info["transparency"] = bytes(256)  # every colour fully transparent
    views = [rgb, grey, grey[..., 0], Image.fromarray(grey[..., 0]), transparent, palette]
    pixels = processor(views)["pixel_values"][0]
    np.testing.assert_array_equal(pixels[:4], np.broadcast_to(pixels[0], (4, 3, 28, 28)))
    assert (pixels[4:] == 1).all()


def test_exif_orientation_is_applied(processor):
    view = Image.fromarray(picture(20, 30))
    turned = view.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # shown turned 90 degrees clockwise
    np.testing.assert_array_equal(processor([turned])["pixel_values"], processor([view])["pixel_values"])


def test_crop_mode_cuts_to_the_lowest_picture_around_the_centre():
    processor = Spa3RImageProcessor(size=56)
    low, high = picture(28, 56), picture(56, 56, seed=1)
    together = processor([[low, low], [high, low]])["pixel_values"]
    assert together.shape == (2, 2, 3, 28, 56)
    np.testing.assert_array_equal(together[1, 0], high.transpose(2, 0, 1)[:, 14:42] / np.float32(255))
    np.testing.assert_array_equal(together[0, 1], low.transpose(2, 0, 1) / np.float32(255))


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("height, width", [(40, 60), (90, 50), (50, 91)])
def test_intrinsics_follow_the_pixels(mode, height, width):
    """A bright dot seen at (u, v) stays where the new intrinsics project its ray."""
    u, v = 0.4 * width, 0.45 * height
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    dot = np.exp(-((columns - u) ** 2 + (rows - v) ** 2) / (2 * 4**2))
    intrinsics = np.array([[[50.0, 0, 0.5 * width], [0, 60.0, 0.55 * height], [0, 0, 1]]])
    ray = np.linalg.inv(intrinsics[0]) @ [u, v, 1]

    output = Spa3RImageProcessor(size=112, mode=mode)([dot], intrinsics=intrinsics)
    pixels, camera = output["pixel_values"][0, 0, 0], output["intrinsics"][0, 0]
    assert output["intrinsics"].dtype == np.float32 and output["intrinsics"].shape == (1, 1, 3, 3)
    weights = np.where(pixels < 1, pixels, 0) ** 2  # without the white border
    columns, rows = np.meshgrid(np.arange(pixels.shape[1]) + 0.5, np.arange(pixels.shape[0]) + 0.5)
    centre = (weights * columns).sum() / weights.sum(), (weights * rows).sum() / weights.sum()
    np.testing.assert_allclose(centre, (camera @ ray)[:2], atol=0.05)


def test_intrinsics_are_neither_changed_nor_mixed_up(processor):
    intrinsics = np.tile(np.diag([10.0, 10.0, 1.0]), (2, 3, 1, 1))
    intrinsics[1, 2, 0, 2] = 7
    before = intrinsics.copy()
    scenes = [[picture(56, 56)] * 3] * 2
    adjusted = processor(scenes, intrinsics=torch.from_numpy(intrinsics), return_tensors="pt")["intrinsics"]
    assert adjusted.shape == (2, 3, 3, 3) and adjusted[1, 2, 0, 2] == 3.5 and adjusted[0, 0, 0, 0] == 5
    np.testing.assert_array_equal(intrinsics, before)


VIEW = picture(28, 28)


@pytest.mark.parametrize(
    "images, message",
    [
        ([VIEW, picture(28, 28, 2)], r"scene 0, view 1 has shape \(28, 28, 2\).*expected 1, 3 or 4 channels"),
        (np.zeros((2, 3, 5, 28, 28), np.uint8), r"scene 0, view 0 has shape \(5, 28, 28\)"),
        ([picture(3, 40)], r"view 0 has shape \(3, 40, 3\), which could have its channels first or last"),
        ([VIEW, VIEW / 255 * np.nan], r"view 1 has values from nan to nan; expected floats in \[0, 1\]"),
        ([VIEW, VIEW.astype(float)], r"view 1 has values from 0.0 to 255.0; expected floats in \[0, 1\]"),
        ([VIEW.astype(int) - 1], r"view 0 has values from -1 to 254; expected integers 0..255"),
        ([VIEW > 3], "view 0 has data type bool"),
        ([Image.new("I;16", (28, 28))], "view 0 has PIL mode 'I;16'; expected 8 bits"),
        ([VIEW, "room/1.jpg"], "scene 0, view 1 is a str; expected a PIL picture"),
        ([[VIEW, VIEW], [VIEW]], "scene 1 has 1 views; expected 2"),
        ([[], []], "scene 0 has 0 views; expected at least 1"),
        ([[VIEW], VIEW], "item 1 of images is one picture and item 0 a scene"),
        ([], "images is empty"),
        ("room", "images is a str"),
        (np.zeros((1, 1, 1, 3, 28, 28), np.uint8), r"images has shape \(1, 1, 1, 3, 28, 28\)"),
        ([VIEW, picture(2, 200)], "scene 0, view 1 is 200 x 2 pixels"),
        ([np.zeros((0, 28, 3), np.uint8)], r"view 0 has shape \(0, 28, 3\)"),
    ],
)
def test_unusable_pictures_are_named(processor, images, message):
    with pytest.raises(ValueError, match=message):
        processor(images)


def test_truncated_picture_is_named(processor, tmp_path):
    path = tmp_path / "cut.jpg"
    Image.fromarray(picture(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:-800])
    with pytest.raises(ValueError, match="scene 0, view 1 cannot be decoded"):
        processor([VIEW, Image.open(path)])


@pytest.mark.parametrize(
    "intrinsics, message",
    [
        (np.eye(3), r"shape \(3, 3\); expected \(1, 2, 3, 3\)"),
        (np.ones((3, 3, 3)), r"shape \(3, 3, 3\); expected \(1, 2, 3, 3\)"),
        ([np.eye(3), np.full((3, 3), np.inf)], "scene 0, view 1"),
    ],
)
def test_unusable_intrinsics_are_refused(processor, intrinsics, message):
    with pytest.raises(ValueError, match=message):
        processor([VIEW, VIEW], intrinsics=intrinsics)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"size": 100}, ValueError, "size is 100; expected a positive multiple of patch_size = 14"),
        ({"size": 0}, ValueError, "size is 0"),
        ({"size": {"height": 518}}, ValueError, "size is {'height': 518}"),
        ({"patch_size": -14}, ValueError, "patch_size is -14"),
        ({"mode": "stretch"}, ValueError, "mode is 'stretch'; expected one of"),
        ({"sise": 70}, TypeError, r"no option \['sise'\]; its options are size, mode, patch_size"),
    ],
)
def test_unusable_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Spa3RImageProcessor(**options)
    with pytest.raises(TypeError, match="unexpected keyword"):
        Spa3RImageProcessor()([VIEW], mod="pad")


def test_saves_and_loads(tmp_path):
    processor = Spa3RImageProcessor(size=84, mode="pad", patch_size=12)
    processor.save_pretrained(tmp_path)
    loaded = Spa3RImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert Spa3RImageProcessor.from_pretrained(tmp_path, mode="crop", size=24).mode == "crop"
    with pytest.raises(ValueError, match="size is 25"):
        Spa3RImageProcessor.from_pretrained(tmp_path, size=25)


def test_auto_class_finds_it(tmp_path):
    Spa3RImageProcessor(size=84).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is Spa3RImageProcessor and loaded.size == 84


def test_exported_code_runs_without_the_package(tmp_path):
    """A saved folder holds the code; a process that cannot see spa3r_hf loads it with trust_remote_code."""
    exporting = f"""
from spa3r_hf import Spa3RImageProcessor
Spa3RImageProcessor(size=84).save_pretrained({str(tmp_path / "saved")!r})
"""
    subprocess.run([sys.executable, "-c", exporting], check=True, cwd=Path(__file__).parents[1])
    loading = f"""
import sys
sys.modules["spa3r_hf"] = None
import numpy as np
from transformers import AutoImageProcessor
processor = AutoImageProcessor.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
assert processor.size == 84
assert processor([np.zeros((84, 84, 3), np.uint8)])["pixel_values"].shape == (1, 1, 3, 84, 84)
processor.save_pretrained({str(tmp_path / "again")!r})
"""
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", loading], check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "again" / "image_processing_spa3r.py").exists()
