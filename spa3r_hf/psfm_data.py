"""Scenes to training batches for Predictive Spatial Field Modeling (paper section 3): views, masks, batches.

Every draw is a pure function of (seed, epoch, index or step), so neither the number of workers and processes nor an
interruption changes what is trained on.
"""

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .errors import BadSampleError
from .image_processing_spa3r import Spa3RImageProcessor
from .modeling_spa3r import num_context_views
from .scenes import Scene, SceneDataset, StreamedScenes


# The last number of a seed says what is drawn, so that no two kinds of draw share a stream.
_SAMPLE, _STEP, _ORDER = range(3)


def sample_views(
    num_available: int, num_views: int, frame_step: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Draws evenly spaced views: a step in `frame_step` (both ends included), then a start.

    A scene too short for the drawn range gets the part of the range that fits, at least the longest step that does.

    Args:
        num_available: Pictures of the scene.
        num_views: V, at least 2.
        frame_step: Lowest and highest step, in pictures, at least 1.

    Returns:
        (V,) int64 indices, ascending; the first is the sample's view 0, which is always context.

    Raises:
        ValueError: `num_views` is less than 2.
        BadSampleError: The scene has too few pictures.
    """
    if num_views < 2:
        raise ValueError(f"num_views is {num_views}; expected at least 2")
    if num_available < num_views:
        raise BadSampleError(f"{num_available} pictures; expected at least {num_views}, the number of views drawn")
    longest = (num_available - 1) // (num_views - 1)
    low, high = (min(step, longest) for step in frame_step)
    step = rng.integers(low, high, endpoint=True)
    start = rng.integers(num_available - step * (num_views - 1))
    return start + step * np.arange(num_views)


def sample_view_mask(num_views: int, mask_ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Draws which views are targets: view 0 stays context, and so do int(V * (1 - mask_ratio)) - 1 of the others.

    Returns:
        (V,) bool, True = target.

    Raises:
        ValueError: No context or no target view would be left.
    """
    num_context = num_context_views(num_views, mask_ratio)
    mask = np.ones(num_views, dtype=bool)
    mask[0] = False
    mask[1 + rng.permutation(num_views - 1)[: num_context - 1]] = False
    return mask


class _PSFMSamples:
    """How a scene becomes a sample; shared by the map-style and the streaming dataset."""

    def __init__(
        self,
        processor: Spa3RImageProcessor,
        seed: int = 0,
        mask_ratio: float = 0.5,
        on_bad_sample: Literal["raise", "skip"] = "raise",
    ):
        if on_bad_sample not in ("raise", "skip"):
            raise ValueError(f"on_bad_sample is {on_bad_sample!r}; expected 'raise' or 'skip'")
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio is {mask_ratio}; expected a number between 0 and 1")
        self.processor = processor
        self.seed = seed
        self.mask_ratio = mask_ratio
        self.on_bad_sample = on_bad_sample

    def sample(self, open_scene: Callable[[], Scene], epoch: int, index: int, num_views: int) -> dict[str, Any]:
        try:
            return self._sample(open_scene(), epoch, index, num_views)
        except BadSampleError as error:
            if self.on_bad_sample == "raise":
                raise
            return {"bad_sample": str(error)}

    def _sample(self, scene: Scene, epoch: int, index: int, num_views: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, epoch, index, _SAMPLE))
        try:
            views = sample_views(len(scene.images), num_views, scene.frame_step, rng)
        except BadSampleError as error:
            raise BadSampleError(f"scene {scene.name!r} has {error}") from None
        return load_sample(scene, views, sample_view_mask(num_views, self.mask_ratio, rng), self.processor)


def load_sample(
    scene: Scene, views: np.ndarray, view_mask: np.ndarray, processor: Spa3RImageProcessor
) -> dict[str, Any]:
    """Opens views (V,) of a scene: a sample as `PSFMDataset` gives it, with `view_mask` (V,), True = target.

    Raises:
        BadSampleError: A picture cannot be used.
    """
    images = [scene.images[view] for view in views.tolist()]
    intrinsics = None if scene.intrinsics is None else scene.intrinsics[views]
    try:
        features = processor.preprocess(images, intrinsics=intrinsics, return_tensors="pt")
    except ValueError as error:
        raise BadSampleError(f"scene {scene.name!r}, pictures {views.tolist()}: {error}") from error
    sample = {key: value[0] for key, value in features.items()}
    sample["view_mask"] = torch.from_numpy(view_mask)
    if scene.extrinsics is not None:
        sample["extrinsics"] = torch.from_numpy(scene.extrinsics[views]).float()
    sample["scene_name"] = scene.name
    return sample


class PSFMDataset(_PSFMSamples, Dataset[dict[str, Any]]):
    """Samples for pre-training, one for each key (epoch, index, num_views); the scene is index % len(scenes).

    A sample holds `pixel_values` (V, 3, H, W) float32 in [0, 1], `view_mask` (V,) bool, True = target, `scene_name`,
    and for a scene with cameras `extrinsics` (V, 3, 4), camera <- world, and `intrinsics` (V, 3, 3), pixels of
    `pixel_values`, both float32. With `on_bad_sample="skip"` a sample that cannot be read is
    `{"bad_sample": message}`; see `collate_scenes`.

    Args:
        scenes: Where samples come from.
        processor: Prepares the pictures.
        seed: Of all draws.
        mask_ratio: Share of target views, see `sample_view_mask`.
        on_bad_sample: What a `BadSampleError` does: `"raise"`, or `"skip"` the sample.
    """

    def __init__(
        self,
        scenes: SceneDataset,
        processor: Spa3RImageProcessor,
        seed: int = 0,
        mask_ratio: float = 0.5,
        on_bad_sample: Literal["raise", "skip"] = "raise",
    ):
        super().__init__(processor, seed, mask_ratio, on_bad_sample)
        if not len(scenes):
            raise ValueError("there are 0 scenes; expected at least 1")
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Any]:
        epoch, index, num_views = key
        return self.sample(partial(self.scenes.__getitem__, index % len(self.scenes)), epoch, index, num_views)


def collate_scenes(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stacks samples of equally many views; larger pictures are centre-cropped to the lowest height and width.

    Bad samples make the batch smaller, nothing takes their place. Their messages are the list `bad_samples`, which the
    trainer has to take out, count and log before the model sees the batch. A batch of bad samples only has no other
    key; see `PSFMTrainer.compute_loss` for what becomes of it.

    Returns:
        `pixel_values` (B, V, 3, H, W), `view_mask` (B, V), when the scenes have cameras `extrinsics` (B, V, 3, 4) and
        `intrinsics` (B, V, 3, 3), and `bad_samples`.

    Raises:
        ValueError: Some scenes of the batch have cameras, others do not.
    """
    good = [sample for sample in samples if "bad_sample" not in sample]
    batch: dict[str, Any] = {"bad_samples": [sample["bad_sample"] for sample in samples if "bad_sample" in sample]}
    if not good:
        return batch
    have_cameras = ["extrinsics" in sample for sample in good]
    if any(have_cameras) and not all(have_cameras):
        with_cameras, without = (good[have_cameras.index(has)]["scene_name"] for has in (True, False))
        raise ValueError(
            f"scene {with_cameras!r} has cameras and scene {without!r} has none; expected all or none: give all of "
            "them cameras, or open them with use_cameras=False"
        )
    height, width = (min(sample["pixel_values"].shape[axis] for sample in good) for axis in (-2, -1))
    good = [_centre_crop(sample, height, width) for sample in good]
    keys = ["pixel_values", "view_mask"] + ["extrinsics", "intrinsics"] * all(have_cameras)
    return batch | {key: torch.stack([sample[key] for sample in good]) for key in keys}


def _centre_crop(sample: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    pixel_values = sample["pixel_values"]
    top, left = (pixel_values.shape[-2] - height) // 2, (pixel_values.shape[-1] - width) // 2
    cropped = sample | {"pixel_values": pixel_values[..., top : top + height, left : left + width]}
    if "intrinsics" in sample:
        shift = torch.tensor([[0.0, 0.0, left], [0.0, 0.0, top], [0.0, 0.0, 0.0]])
        cropped["intrinsics"] = sample["intrinsics"] - shift
    return cropped


class _StepPlan:
    """How many views and samples the batches of each optimizer step have.

    Every step draws one number of views, the same for all its batches, so that all processes do equal work and
    N processes see what N accumulation steps would.
    """

    def __init__(self, images_per_batch: int, views: tuple[int, int], batches_per_step: int, seed: int):
        low, high = views
        if not 2 <= low <= high:
            raise ValueError(f"views is {views}; expected 2 <= lowest <= highest")
        for name, value in (("images_per_batch", images_per_batch), ("batches_per_step", batches_per_step)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        self.images_per_batch = images_per_batch
        self.views = views
        self.batches_per_step = batches_per_step
        self.seed = seed

    def num_views(self, epoch: int, step: int) -> int:
        return int(np.random.default_rng((self.seed, epoch, step, _STEP)).integers(*self.views, endpoint=True))

    def num_samples(self, num_views: int) -> int:
        """Samples in a batch: as many as the budget of images holds, but one at the least."""
        return max(1, self.images_per_batch // num_views)

    def mean_samples_per_step(self) -> float:
        low, high = self.views
        return self.batches_per_step * float(np.mean([self.num_samples(v) for v in range(low, high + 1)]))


class PSFMBatchSampler:
    """Batches of keys (epoch, index, num_views) for `PSFMDataset`, at most `images_per_batch` images each.

    Every optimizer step draws one number of views for all its `batches_per_step` batches. Samples come in a
    permutation that is drawn anew every epoch. An epoch is a fixed number of steps, round(num_samples / mean samples a
    step): since the samples of a step vary, an epoch may leave a few scenes out, or go on into a second permutation
    (whose indices continue at `num_samples`, so that no sample comes twice alike).

    Batches are whole steps, so `accelerate` deals them out evenly: batch i to process i % num_processes. `batch_size`
    is None because batches vary in size (accelerate drops batches of another size than it is told), `drop_last` is
    True because nothing is to be filled up.

    Args:
        num_samples: Samples in an epoch, usually the number of scenes.
        images_per_batch: Budget of one batch in images; a batch holds at least one sample even if that is over it.
        views: Lowest and highest number of views a sample, both included.
        batches_per_step: Accumulation steps x processes.
        seed: Of all draws.

    Raises:
        ValueError: A number out of range.
    """

    batch_size = None
    drop_last = True

    def __init__(
        self,
        num_samples: int,
        images_per_batch: int,
        views: tuple[int, int] = (4, 12),
        batches_per_step: int = 1,
        seed: int = 0,
    ):
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; expected at least 1")
        self.num_samples = num_samples
        self.plan = _StepPlan(images_per_batch, views, batches_per_step, seed)
        self.steps_per_epoch = max(1, round(num_samples / self.plan.mean_samples_per_step()))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches in an epoch, the same for every epoch."""
        return self.steps_per_epoch * self.plan.batches_per_step

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch = self.epoch
        indices = self._indices(epoch)
        for step in range(self.steps_per_epoch):
            num_views = self.plan.num_views(epoch, step)
            for _ in range(self.plan.batches_per_step):
                yield [(epoch, next(indices), num_views) for _ in range(self.plan.num_samples(num_views))]

    def _indices(self, epoch: int) -> Iterator[int]:
        start = 0
        while True:
            rng = np.random.default_rng((self.plan.seed, epoch, start, _ORDER))
            yield from (start + rng.permutation(self.num_samples)).tolist()
            start += self.num_samples


class StreamingPSFMDataset(_PSFMSamples, IterableDataset[dict[str, Any]]):
    """Batches for pre-training from a stream of scenes, for `DataLoader(dataset, batch_size=None)`.

    The scenes are taken in the order of the stream and grouped as `PSFMBatchSampler` groups keys; batches are those of
    `collate_scenes`. Every process reads the whole stream but opens only the pictures of its own batches, those with
    i % num_processes == process_index; so the loader must not be split again by `accelerator.prepare`. Workers of a
    loader share the batches in the same way, so their number changes nothing. A step that the stream ends in is
    dropped, and the stream begins anew, in its next epoch's order, without end: the trainer needs `max_steps`.

    Args:
        scenes: The stream.
        processor, seed, mask_ratio, on_bad_sample: See `PSFMDataset`.
        images_per_batch, views, batches_per_step: See `PSFMBatchSampler`.
        process_index, num_processes: By default those that torchrun tells its processes (RANK, WORLD_SIZE).
    """

    def __init__(
        self,
        scenes: StreamedScenes,
        processor: Spa3RImageProcessor,
        images_per_batch: int,
        views: tuple[int, int] = (4, 12),
        batches_per_step: int = 1,
        seed: int = 0,
        mask_ratio: float = 0.5,
        on_bad_sample: Literal["raise", "skip"] = "raise",
        process_index: int | None = None,
        num_processes: int | None = None,
    ):
        super().__init__(processor, seed, mask_ratio, on_bad_sample)
        self.scenes = scenes
        self.plan = _StepPlan(images_per_batch, views, batches_per_step, seed)
        self.process_index = int(os.environ.get("RANK", 0)) if process_index is None else process_index
        self.num_processes = int(os.environ.get("WORLD_SIZE", 1)) if num_processes is None else num_processes
        if batches_per_step % self.num_processes:
            raise ValueError(
                f"batches_per_step is {batches_per_step}; expected a multiple of the {self.num_processes} processes"
            )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        num_batches = 0  # of all processes and workers, so far
        for epoch in count():
            self.scenes.set_epoch(epoch)
            before = num_batches
            num_batches = yield from self._epoch(epoch, before)
            if num_batches == before:
                raise ValueError("the stream ends before one step is complete; expected more scenes, or fewer a step")

    def _epoch(self, epoch: int, first_batch: int) -> Generator[dict[str, Any], None, int]:
        """Yields this process's and worker's batches of one pass over the stream; returns the next one's first."""
        worker = get_worker_info()
        worker_index, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        stream = enumerate(self.scenes)
        for step in count():
            num_views = self.plan.num_views(epoch, step)
            num_samples = self.plan.num_samples(num_views)
            # Still encoded pictures: of the step, this worker keeps only what it is to open.
            own: dict[int, list[Callable[[], dict[str, Any]]]] = {}
            for position in range(self.plan.batches_per_step * num_samples):
                try:
                    index, open_scene = next(stream)
                except StopIteration:
                    return first_batch
                batch = first_batch + position // num_samples
                if batch % self.num_processes == self.process_index:
                    if batch // self.num_processes % num_workers == worker_index:
                        own.setdefault(batch, []).append(partial(self.sample, open_scene, epoch, index, num_views))
            for load_samples in own.values():
                yield collate_scenes([load() for load in load_samples])
            first_batch += self.plan.batches_per_step
        raise AssertionError  # count() does not end
