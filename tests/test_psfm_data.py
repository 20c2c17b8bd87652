from collections.abc import Sequence
from itertools import islice

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from PIL import Image
from torch.utils.data import DataLoader

from spa3r_hf.errors import BadSampleError
from spa3r_hf.image_processing_spa3r import Spa3RImageProcessor
from spa3r_hf.psfm_data import (
    PSFMBatchSampler,
    PSFMDataset,
    StreamingPSFMDataset,
    collate_scenes,
    sample_view_mask,
    sample_views,
)
from spa3r_hf.scenes import Scene


PROCESSOR = Spa3RImageProcessor(size=28)
FOCAL = 20.0


class GreyImages(Sequence):
    """View v of scene s is grey of level 20 s + v, so that pixels tell where they come from; some cannot be opened."""

    def __init__(self, scene: int, num_views: int, size: tuple[int, int], damaged: bool):
        self.scene, self.num_views, self.size, self.damaged = scene, num_views, size, damaged

    def __len__(self):
        return self.num_views

    def __getitem__(self, index):
        if self.damaged:
            raise BadSampleError(f"scene '{self.scene}', view {index}: damaged")
        return Image.new("RGB", self.size, (20 * self.scene + index,) * 3)


def make_scenes(
    num_scenes=5, num_views=15, size=(42, 28), frame_step=(1, 3), damaged=(), cameras=False
) -> list[Scene]:
    extrinsics = intrinsics = None
    if cameras:
        extrinsics = np.tile(np.eye(4)[:3], (num_views, 1, 1))
        extrinsics[:, 0, 3] = np.arange(num_views)
        intrinsics = np.tile([[FOCAL, 0, size[0] / 2], [0, FOCAL, size[1] / 2], [0, 0, 1]], (num_views, 1, 1))
    return [
        Scene(str(s), GreyImages(s, num_views, size, s in damaged), frame_step, extrinsics, intrinsics)
        for s in range(num_scenes)
    ]


class Stream:
    """What `StreamedScenes` is, from a list."""

    def __init__(self, scenes):
        self.scenes, self.epoch = scenes, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for scene in self.scenes:
            yield lambda scene=scene: scene


def views_in(pixel_values: torch.Tensor) -> list[tuple[int, int]]:
    """(scene, view) of each picture of (V, 3, H, W) pixels of `GreyImages`."""
    return [divmod(round(level * 255), 20) for level in pixel_values[:, 0, 0, 0].tolist()]


def scenes_in(batch: dict) -> list[int]:
    return [views_in(pixel_values)[0][0] for pixel_values in batch["pixel_values"]]


# --- views and masks


def test_views_are_evenly_spaced_and_use_the_whole_range():
    steps, starts = set(), set()
    for seed in range(300):
        views = sample_views(30, 4, (2, 6), np.random.default_rng(seed))
        (step,) = set(np.diff(views))
        assert len(views) == 4 and views[0] >= 0 and views[-1] < 30
        steps.add(step)
        starts.add(views[0])
    assert steps == {2, 3, 4, 5, 6} and starts >= set(range(12)) and max(starts) > 20


@pytest.mark.parametrize(
    "num_available, num_views, expected", [(10, 4, {2, 3}), (7, 4, {2}), (5, 4, {1}), (4, 4, {1})]
)
def test_short_scenes_get_the_steps_that_fit(num_available, num_views, expected):
    draws = [sample_views(num_available, num_views, (2, 6), np.random.default_rng(seed)) for seed in range(100)]
    assert {int(np.diff(views)[0]) for views in draws} == expected
    assert {int(views[0]) for views in draws} >= {0} and max(views[-1] for views in draws) == num_available - 1


def test_scene_of_too_few_pictures_is_named():
    scenes = make_scenes(num_views=3)
    with pytest.raises(BadSampleError, match="scene '1' has 3 pictures; expected at least 4"):
        PSFMDataset(scenes, PROCESSOR)[0, 1, 4]


@pytest.mark.parametrize("num_views", range(4, 13))
@pytest.mark.parametrize("mask_ratio", [0.25, 0.5, 0.75])
def test_mask_counts(num_views, mask_ratio):
    masks = np.array([sample_view_mask(num_views, mask_ratio, np.random.default_rng(seed)) for seed in range(200)])
    assert masks.dtype == bool and not masks[:, 0].any()
    num_context = int(num_views * (1 - mask_ratio))
    assert (masks.sum(1) == num_views - num_context).all()
    if num_context > 1:  # every other view is context now and then
        assert (~masks[:, 1:]).any(0).all()
        share = (num_context - 1) / (num_views - 1)
        np.testing.assert_allclose((~masks[:, 1:]).mean(0), share, atol=0.15)


@pytest.mark.parametrize("num_views, mask_ratio", [(3, 0.75), (4, 0.0), (4, 0.9)])
def test_masks_without_context_or_target_are_refused(num_views, mask_ratio):
    with pytest.raises(ValueError, match="expected at least 1 context and 1 target view"):
        sample_view_mask(num_views, mask_ratio, np.random.default_rng(0))


# --- samples


def test_a_sample_is_a_pure_function_of_its_key():
    keys = [(epoch, index, num_views) for epoch in (0, 3) for index in (0, 4, 7) for num_views in (4, 6)]
    first = {key: PSFMDataset(make_scenes(cameras=True), PROCESSOR, seed=1)[key] for key in keys}
    dataset = PSFMDataset(make_scenes(cameras=True), PROCESSOR, seed=1)
    for key in reversed(keys):
        again = dataset[key]
        assert again.keys() == first[key].keys() and again["scene_name"] == str(key[1] % 5)
        for name, value in again.items():
            assert (
                torch.equal(value, first[key][name]) if isinstance(value, torch.Tensor) else value == first[key][name]
            )

    def drawn(seed, epoch):
        dataset = PSFMDataset(make_scenes(), PROCESSOR, seed=seed)
        samples = [dataset[epoch, index, 6] for index in range(5)]
        return [(views_in(sample["pixel_values"]), sample["view_mask"].tolist()) for sample in samples]

    assert drawn(0, 0) == drawn(0, 0) and drawn(0, 0) != drawn(0, 1) and drawn(0, 0) != drawn(1, 0)


def test_cameras_are_those_of_the_drawn_views():
    sample = PSFMDataset(make_scenes(cameras=True, size=(56, 42)), PROCESSOR)[0, 2, 5]
    views = views_in(sample["pixel_values"])
    assert {scene for scene, _ in views} == {2}
    assert sample["extrinsics"][:, 0, 3].tolist() == [view for _, view in views]
    assert sample["pixel_values"].shape == (5, 3, 28, 28)  # 56 x 42 resized to 28 x 21, to 28 x 28 in patches
    np.testing.assert_allclose(sample["intrinsics"][0], [[FOCAL / 2, 0, 14], [0, FOCAL * 2 / 3, 14], [0, 0, 1]])
    assert sample["extrinsics"].dtype == sample["intrinsics"].dtype == torch.float32
    assert "extrinsics" not in PSFMDataset(make_scenes(), PROCESSOR)[0, 2, 5]


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="on_bad_sample is 'ignore'"):
        PSFMDataset(make_scenes(), PROCESSOR, on_bad_sample="ignore")
    with pytest.raises(ValueError, match="mask_ratio is 1.5"):
        PSFMDataset(make_scenes(), PROCESSOR, mask_ratio=1.5)
    with pytest.raises(ValueError, match="0 scenes"):
        PSFMDataset([], PROCESSOR)


# --- batches


def test_pictures_of_different_sizes_are_cropped_and_intrinsics_follow():
    wide = PSFMDataset(make_scenes(size=(56, 14), cameras=True), Spa3RImageProcessor(size=56))[0, 0, 4]
    tall = PSFMDataset(make_scenes(size=(28, 42), cameras=True), Spa3RImageProcessor(size=28))[0, 1, 4]
    tall["pixel_values"] = torch.rand(tall["pixel_values"].shape)
    before = tall["intrinsics"].clone()
    batch = collate_scenes([wide, tall])
    assert batch["pixel_values"].shape == (2, 4, 3, 14, 28)
    assert torch.equal(batch["pixel_values"][1], tall["pixel_values"][:, :, 7:21])
    np.testing.assert_allclose(batch["intrinsics"][0, 0], [[FOCAL, 0, 28 - 14], [0, FOCAL, 7], [0, 0, 1]])
    np.testing.assert_allclose(
        batch["intrinsics"][1], tall["intrinsics"] - torch.tensor([[0, 0, 0], [0, 0, 7], [0] * 3])
    )
    assert torch.equal(tall["intrinsics"], before)
    assert batch["extrinsics"].shape == (2, 4, 3, 4) and batch["view_mask"].shape == (2, 4)
    assert batch["bad_samples"] == []


def test_bad_samples_stop_training_unless_they_are_skipped():
    keys = [(0, index, 4) for index in range(3)]
    with pytest.raises(BadSampleError, match="scene '1', view .* damaged"):
        dataset = PSFMDataset(make_scenes(damaged={1}), PROCESSOR)
        [dataset[key] for key in keys]
    dataset = PSFMDataset(make_scenes(damaged={1}), PROCESSOR, on_bad_sample="skip")
    batch = collate_scenes([dataset[key] for key in keys])
    assert scenes_in(batch) == [0, 2] and batch["view_mask"].shape == (2, 4)
    assert len(batch["bad_samples"]) == 1 and "scene '1'" in batch["bad_samples"][0]
    assert collate_scenes([dataset[0, 1, 4]]) == {"bad_samples": batch["bad_samples"]}


def test_pictures_the_processor_refuses_are_bad_samples():
    dataset = PSFMDataset(make_scenes(size=(400, 2)), PROCESSOR)
    with pytest.raises(BadSampleError, match=r"scene '3', pictures \[.*\]: scene 0, view 0 is 400 x 2 pixels"):
        dataset[0, 3, 4]


def test_other_errors_are_never_skipped():
    class Broken(GreyImages):
        def __getitem__(self, index):
            raise KeyError("a mistake in the program")

    scenes = [Scene("0", Broken(0, 15, (42, 28), False), (1, 3))]
    with pytest.raises(KeyError):
        PSFMDataset(scenes, PROCESSOR, on_bad_sample="skip")[0, 0, 4]
    with pytest.raises(ValueError, match="expected at least 1 context"):
        PSFMDataset(make_scenes(), PROCESSOR, mask_ratio=0.9, on_bad_sample="skip")[0, 0, 4]


def test_scenes_with_and_without_cameras_do_not_mix():
    samples = [
        PSFMDataset(make_scenes(cameras=cameras), PROCESSOR)[0, index, 4] for index, cameras in ((0, 1), (3, 0))
    ]
    with pytest.raises(ValueError, match="scene '0' has cameras and scene '3' has none"):
        collate_scenes(samples)


# --- the batch sampler


def epoch_of(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return list(sampler)


def test_batches_keep_to_the_budget_and_steps_to_one_number_of_views():
    sampler = PSFMBatchSampler(1000, images_per_batch=24, views=(4, 12), batches_per_step=3, seed=5)
    seen = set()
    for epoch in range(3):
        batches = epoch_of(sampler, epoch)
        assert len(batches) == len(sampler) and len(batches) % 3 == 0
        for start in range(0, len(batches), 3):
            (num_views,) = {key[2] for batch in batches[start : start + 3] for key in batch}
            assert {len(batch) for batch in batches[start : start + 3]} == {24 // num_views}
            seen.add(num_views)
        assert {key[0] for batch in batches for key in batch} == {epoch}
    assert seen == set(range(4, 13))
    assert all(len(batch) == 1 for batch in PSFMBatchSampler(50, images_per_batch=2))


def test_an_epoch_is_close_to_one_pass_and_repeats_nothing():
    sampler = PSFMBatchSampler(300, images_per_batch=24, batches_per_step=2, seed=1)
    orders = []
    for epoch in range(5):
        indices = [key[1] for batch in epoch_of(sampler, epoch) for key in batch]
        assert len(set(indices)) == len(indices) and 200 < len(indices) < 400
        assert len(set(indices) & set(range(300))) == min(300, len(indices))  # a second pass starts after the first
        orders.append(indices)
    assert len({tuple(order) for order in orders}) == 5 and orders[0][:300] != sorted(orders[0][:300])
    assert [key[1] for batch in epoch_of(sampler, 0) for key in batch] == orders[0]


@pytest.mark.parametrize("num_samples", [1, 7])
def test_few_scenes_still_make_whole_steps(num_samples):
    sampler = PSFMBatchSampler(num_samples, images_per_batch=24, batches_per_step=4)
    batches = epoch_of(sampler)
    assert len(batches) == len(sampler) == 4
    indices = [key[1] for batch in batches for key in batch]
    assert len(set(indices)) == len(indices) and {index % num_samples for index in indices} == set(range(num_samples))


@pytest.mark.parametrize("even_batches", [True, False])
def test_two_processes_see_what_two_accumulation_steps_would(even_batches):
    def make():
        return PSFMBatchSampler(200, images_per_batch=24, batches_per_step=2, seed=3)

    alone = epoch_of(make(), 1)
    shards = [BatchSamplerShard(make(), 2, process, even_batches=even_batches) for process in range(2)]
    for shard in shards:
        shard.batch_sampler.set_epoch(1)
    assert [len(shard) for shard in shards] == [len(alone) // 2] * 2
    parts = [list(shard) for shard in shards]
    assert parts[0] == alone[0::2] and parts[1] == alone[1::2]


def test_accelerate_and_workers_change_nothing():
    from accelerate import Accelerator

    def batches(num_workers):
        dataset = PSFMDataset(make_scenes(damaged={3}), PROCESSOR, seed=2, on_bad_sample="skip")
        sampler = PSFMBatchSampler(len(dataset), 12, views=(4, 6), batches_per_step=2, seed=2)
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_scenes, num_workers=num_workers)
        return sampler, Accelerator(cpu=True).prepare(loader)

    for epoch in (0, 2):
        results = []
        for num_workers in (0, 2):
            sampler, loader = batches(num_workers)
            loader.set_epoch(epoch)
            results.append(list(loader))
            assert len(results[-1]) == len(loader) == len(sampler)
        for one, other in zip(*results, strict=True):
            assert one.keys() == other.keys() and one["bad_samples"] == other["bad_samples"]
            for key in one.keys() - {"bad_samples"}:
                assert torch.equal(one[key], other[key])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"images_per_batch": 0}, "images_per_batch is 0"),
        ({"batches_per_step": 0}, "batches_per_step is 0"),
        ({"views": (1, 4)}, r"views is \(1, 4\); expected 2 <= lowest <= highest"),
        ({"views": (6, 4)}, r"views is \(6, 4\)"),
    ],
)
def test_sampler_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PSFMBatchSampler(**{"num_samples": 10, "images_per_batch": 24} | settings)


# --- streams


def make_stream(num_processes=1, process_index=0, damaged=(), num_scenes=12, **settings) -> StreamingPSFMDataset:
    defaults = {"images_per_batch": 4, "views": (2, 4), "batches_per_step": 2, "seed": 1}
    return StreamingPSFMDataset(
        Stream(make_scenes(num_scenes, damaged=damaged)),
        PROCESSOR,
        **defaults | settings,
        num_processes=num_processes,
        process_index=process_index,
    )


def flat(batches, num_batches=None):
    """What is in the batches; of a stream, which has no end, in the first so many."""
    batches = batches if num_batches is None else islice(batches, num_batches)
    return [(scenes_in(batch), batch["pixel_values"].tolist(), batch["view_mask"].tolist()) for batch in batches]


def test_stream_batches_follow_the_rule_of_the_sampler():
    batches = list(islice(make_stream(), 4))
    scenes = [scene for batch in batches for scene in scenes_in(batch)]
    assert scenes == list(range(len(scenes)))
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert first["pixel_values"].shape == second["pixel_values"].shape
        assert len(first["view_mask"]) == 4 // first["pixel_values"].shape[1]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_stream_is_the_same_for_any_number_of_processes_and_workers():
    alone = flat(make_stream(), 16)  # of more than two epochs
    parts = [flat(make_stream(num_processes=2, process_index=process), 8) for process in range(2)]
    assert parts[0] == alone[0::2] and parts[1] == alone[1::2]
    for num_workers in (1, 2):
        assert flat(DataLoader(make_stream(), batch_size=None, num_workers=num_workers), 16) == alone
    second = make_stream(num_processes=2, process_index=1)
    assert flat(DataLoader(second, batch_size=None, num_workers=3), 8) == parts[1]


def test_stream_begins_anew_with_other_views():
    stream = make_stream()
    batches = flat(stream, 16)
    assert stream.scenes.epoch >= 2
    starts = [i for i, (scenes, _, _) in enumerate(batches) if 0 in scenes]
    assert len(starts) >= 2 and batches[starts[0]] != batches[starts[1]]
    assert flat(make_stream(), 16) == batches


def test_stream_of_too_few_scenes_for_a_step():
    with pytest.raises(ValueError, match="ends before one step is complete"):
        next(iter(make_stream(num_scenes=1)))


def test_stream_skips_or_raises():
    with pytest.raises(BadSampleError, match="scene '2'"):
        list(islice(make_stream(damaged={2}), 4))
    batches = list(islice(make_stream(damaged={2}, on_bad_sample="skip"), 4))
    bad = [message for batch in batches for message in batch["bad_samples"]]
    assert len(bad) == 1 and "scene '2'" in bad[0]


def test_stream_needs_whole_rounds_of_processes():
    with pytest.raises(ValueError, match="batches_per_step is 2; expected a multiple of the 3 processes"):
        make_stream(num_processes=3)


def test_streamed_dataset_reaches_every_worker_whole():
    """A `datasets` stream would deal its shards out to the workers, and the order would depend on their number."""
    datasets = pytest.importorskip("datasets")
    from spa3r_hf.scenes import StreamedScenes

    rows = {"images": [[Image.new("RGB", (28, 28), (20 * s + v,) * 3) for v in range(4)] for s in range(8)]}
    features = datasets.Features({"images": datasets.List(datasets.Image())})
    dataset = datasets.Dataset.from_dict(rows, features=features).to_iterable_dataset(num_shards=4)

    def batches(num_workers):
        stream = StreamingPSFMDataset(StreamedScenes(dataset), PROCESSOR, images_per_batch=8, views=(2, 4))
        return flat(DataLoader(stream, batch_size=None, num_workers=num_workers), 2)

    assert batches(0) == batches(2)
