import numpy as np
import pytest
from PIL import Image

from spa3r_hf import Spa3RImageProcessor
from spa3r_hf.errors import BadSampleError
from spa3r_hf.psfm_splits import batches_of, hold_out_scenes, hold_out_views, split_scenes
from spa3r_hf.scenes import LazyImages, Scene, StreamedScenes


PROCESSOR = Spa3RImageProcessor(size=28, patch_size=14)


def scene(name: str = "a", num_images: int = 8, cameras: bool = False, seed: int = 0) -> Scene:
    generator = np.random.default_rng(seed)
    images = [Image.fromarray(generator.integers(0, 256, (28, 28, 3), dtype=np.uint8)) for _ in range(num_images)]
    if not cameras:
        return Scene(name, images, (1, 2))
    extrinsics = np.tile(np.eye(3, 4), (num_images, 1, 1))
    extrinsics[:, 0, 3] = np.arange(num_images)
    intrinsics = np.tile(np.array([[20.0, 0, 14], [0, 20, 14], [0, 0, 1]]), (num_images, 1, 1))
    return Scene(name, images, (1, 2), extrinsics, intrinsics)


def names(samples) -> list[str]:
    return [sample["scene_name"] for sample in samples]


def test_a_quarter_of_the_scenes_is_held_out_at_most():
    scenes = [scene(str(i), seed=i) for i in range(12)]
    split = split_scenes(scenes, PROCESSOR, num_held_out=8)
    held_out = names(split.eval_samples)
    trained = [split.train[i].name for i in range(len(split.train))]
    assert len(held_out) == 3 and sorted(held_out + trained, key=int) == [str(i) for i in range(12)]
    assert set(names(split.mean_samples)) == set(trained)
    assert split.smallest_scene == 8 and not split.has_cameras and split.bad_samples == []
    again = split_scenes(scenes, PROCESSOR, num_held_out=8)
    for one, other in zip(split.eval_samples, again.eval_samples, strict=True):
        assert (one["pixel_values"] == other["pixel_values"]).all() and (one["view_mask"] == other["view_mask"]).all()
    assert names(split_scenes(scenes, PROCESSOR, num_held_out=2).eval_samples) == ["3", "9"]


def test_other_scenes_may_be_held_out():
    split = split_scenes([scene("a")], PROCESSOR, held_out=[scene("b", 5, cameras=True)], num_views=6)
    assert names(split.eval_samples) == ["b"] and split.train[0].name == "a" and split.has_cameras
    assert split.eval_samples[0]["pixel_values"].shape[0] == 5


@pytest.mark.parametrize(("num_images", "num_views", "held_out"), [(5, 8, 1), (8, 8, 2), (25, 8, 4), (25, 30, 6)])
def test_of_one_scene_views_are_held_out(num_images, num_views, held_out):
    whole = scene("a", num_images, cameras=True)
    split = split_scenes([whole], PROCESSOR, num_views=num_views)
    (sample,) = split.eval_samples
    mask = sample["view_mask"].numpy()
    num_views = len(mask)
    assert mask.sum() == held_out and not mask[: num_views - held_out].any()
    # The place of a view tells which it is.
    centres = np.stack([extrinsics[0, 3] for extrinsics in sample["extrinsics"].numpy()]).astype(int)
    assert len(set(centres)) == num_views
    train = split.train[0]
    trained = train.extrinsics[:, 0, 3].astype(int)
    assert len(train.images) == len(trained) == num_images - num_images // 4
    assert set(centres[~mask]) <= set(trained) and not set(centres[mask]) & set(trained)
    for index, view in enumerate(trained):
        assert train.images[index] is whole.images[view]
    assert split.smallest_scene == len(trained)


def test_too_few_pictures_are_named():
    with pytest.raises(BadSampleError, match="scene 'a' has 4 pictures; expected at least 4 to train on"):
        split_scenes([scene("a", 4)], PROCESSOR)
    scenes = [scene("a"), scene("short", 3), scene("b"), scene("c"), scene("d")]
    with pytest.raises(BadSampleError, match="scene 'short' has 3 pictures; expected at least 4"):
        split_scenes(scenes, PROCESSOR)
    split = split_scenes(scenes, PROCESSOR, on_bad_sample="skip")
    assert split.bad_samples == ["scene 'short' has 3 pictures; expected at least 4"]
    assert [train.name for train in split.train] == ["a", "c", "d"] and split.smallest_scene == 8
    assert split_scenes(scenes, PROCESSOR, min_views=3).smallest_scene == 3


class Damaged(list):
    def __getitem__(self, index):
        if index == 2:
            raise BadSampleError("scene 'damaged' cannot be opened")
        return super().__getitem__(index)


@pytest.mark.parametrize("held_out", [True, False])
def test_scenes_that_cannot_be_opened_are_bad_samples(held_out):
    damaged = Damaged(scene(str(i)) for i in range(5))  # scene 2 is the one held out
    scenes, options = (
        (damaged, {"held_out": [scene("other")]}) if not held_out else ([scene("x")], {"held_out": damaged})
    )
    with pytest.raises(BadSampleError, match="'damaged' cannot be opened"):
        split_scenes(scenes, PROCESSOR, **options)
    split = split_scenes(scenes, PROCESSOR, on_bad_sample="skip", **options)
    assert split.bad_samples == ["scene 'damaged' cannot be opened"]
    assert len(split.eval_samples if held_out else split.train) == 4


def test_pictures_that_cannot_be_read_are_left_out_of_the_evaluation():
    damaged = Scene("damaged", LazyImages([b"no picture"] * 8, "damaged"), (1, 1))
    held_out = [scene("a"), damaged]
    with pytest.raises(BadSampleError, match="scene 'damaged', view"):
        split_scenes([scene()], PROCESSOR, held_out=held_out)
    split = split_scenes([scene()], PROCESSOR, held_out=held_out, on_bad_sample="skip")
    assert names(split.eval_samples) == ["a"] and len(split.bad_samples) == 1
    with pytest.raises(BadSampleError, match="no scene is left.*'damaged'"):
        split_scenes([scene()], PROCESSOR, held_out=[damaged], on_bad_sample="skip")


def test_the_first_scenes_of_a_stream_are_held_out():
    datasets = pytest.importorskip("datasets")

    def rows():
        for index in range(6):
            # Scene 1 is too short.
            yield {"name": str(index), "images": scene(num_images=1 if index == 1 else 6, seed=index).images}

    features = datasets.Features({"name": datasets.Value("string"), "images": datasets.List(datasets.Image())})
    stream = StreamedScenes(datasets.IterableDataset.from_generator(rows, features=features))
    split = split_scenes(stream, PROCESSOR, num_held_out=3, on_bad_sample="skip")
    assert names(split.eval_samples) == ["0", "2"] and names(split.mean_samples) == ["3", "4", "5"]
    assert isinstance(split.train, StreamedScenes) and [open_scene().name for open_scene in split.train] == list("345")
    assert split.bad_samples == ["scene '1' has 1 pictures; expected at least 4"] and split.smallest_scene is None


def test_batches_are_even_and_of_two_at_least():
    sample = split_scenes([scene()], PROCESSOR, held_out=[scene()]).eval_samples[0]
    sizes = {n: [len(batch["view_mask"]) for batch in batches_of([sample] * n)] for n in (1, 2, 4, 5, 9)}
    assert sizes == {1: [1], 2: [2], 4: [4], 5: [2, 3], 9: [3, 3, 3]}
    assert batches_of([sample])[0].keys() == {"pixel_values", "view_mask"}


@pytest.mark.parametrize("count", [1, 3, 4])
def test_held_out_scenes_are_spread(count):
    scenes = [scene(str(i), 1) for i in range(5)]
    train, held_out = hold_out_scenes(scenes, count)
    assert len(held_out) == count and len(train) == 5 - count
    assert sorted(one.name for one in (*train, *held_out)) == list("01234")
    for wrong in (0, 5):
        with pytest.raises(ValueError, match=f"{wrong} of 5 scenes are to be held out; expected 1 to 4"):
            hold_out_scenes(scenes, wrong)


def test_context_comes_first_in_held_out_views():
    train, views, mask = hold_out_views(scene("a", 12), 4, 4, 0.5)
    assert len(train.images) == 9 and mask.tolist() == [False, False, True, True]
    assert len(set(views.tolist())) == 4
