"""What a PSFM run trains on and what it is evaluated on."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from math import ceil
from typing import Any, Literal

import numpy as np
from torch.utils.data import Subset

from .errors import BadSampleError
from .image_processing_spa3r import Spa3RImageProcessor
from .modeling_spa3r import num_context_views
from .psfm_data import PSFMDataset, collate_scenes, load_sample
from .scenes import Scene, SceneDataset, StreamedScenes


# Scenes whose sizes are looked up, and samples whose mean feature stands for the training set's.
_FEW_SCENES, _NUM_MEAN_SAMPLES = 64, 16
# Held-out views are drawn alike in every run, whatever its seed.
_EVAL_SEED = 12345


@dataclass(frozen=True)
class PSFMSplit:
    """
    Attributes:
        train: Scenes to train on.
        eval_samples: Samples to evaluate on, as `PSFMDataset` gives them, equally many views each.
        mean_samples: Samples of the training scenes, for the mean feature.
        held_out: What the evaluation samples are, in words.
        has_cameras: Whether the samples have cameras.
        smallest_scene: Fewest pictures of a training scene, where there are few enough scenes to look; else None.
        bad_samples: What was left out of the samples, in words.
    """

    train: SceneDataset | StreamedScenes
    eval_samples: list[dict[str, Any]]
    mean_samples: list[dict[str, Any]]
    held_out: str
    has_cameras: bool
    smallest_scene: int | None
    bad_samples: list[str]


def split_scenes(
    scenes: SceneDataset | StreamedScenes,
    processor: Spa3RImageProcessor,
    *,
    held_out: SceneDataset | None = None,
    num_held_out: int = 8,
    num_views: int = 8,
    min_views: int = 4,
    mask_ratio: float = 0.5,
    on_bad_sample: Literal["raise", "skip"] = "raise",
) -> PSFMSplit:
    """
    Hold out scenes to evaluate on or, where there is one scene only, some of its views.

    Args:
        scenes: All there are.
        processor: Prepares the pictures.
        held_out: Other scenes to evaluate on; None: some of `scenes`.
        num_held_out: How many of `scenes`, at most a quarter of them; of a stream, its first.
        num_views: Views of an evaluation sample, context and target; fewer where scenes have fewer.
        min_views: Fewest pictures of a scene, as far as scenes are looked at here.
        mask_ratio, on_bad_sample: See `PSFMDataset`.

    Raises:
        BadSampleError: A scene cannot be used (unless skipped), or none can.
    """
    bad_samples: list[str] = []

    def usable(open_scenes: Iterable[Callable[[], Scene]]) -> list[Scene]:
        found = []
        for open_scene in open_scenes:
            try:
                scene = open_scene()
                if len(scene.images) < min_views:
                    raise BadSampleError(
                        f"scene {scene.name!r} has {len(scene.images)} pictures; expected at least {min_views}"
                    )
                found.append(scene)
            except BadSampleError as error:
                if on_bad_sample == "raise":
                    raise
                bad_samples.append(str(error))
        return found

    def draw(of: list[Scene]) -> list[dict[str, Any]]:
        if not of:
            return []
        views = min(num_views, *(len(scene.images) for scene in of))
        dataset = PSFMDataset(of, processor, _EVAL_SEED, mask_ratio, on_bad_sample)
        samples = [dataset[0, index, views] for index in range(len(of))]
        bad_samples.extend(sample["bad_sample"] for sample in samples if "bad_sample" in sample)
        return [sample for sample in samples if "bad_sample" not in sample]

    train: SceneDataset | StreamedScenes
    smallest_scene = None
    what = "scenes never trained on"
    if isinstance(scenes, StreamedScenes):
        first, train = scenes.split(num_held_out)
        eval_samples = draw(usable(first))
        mean_samples = draw(usable(islice(train, _NUM_MEAN_SAMPLES)))
    elif held_out is None and len(scenes) == 1:
        scene, views, view_mask = hold_out_views(scenes[0], num_views, min_views, mask_ratio)
        train, what = [scene], "scene: views never trained on"
        eval_samples = [load_sample(scenes[0], views, view_mask, processor)]
        mean_samples = draw([scene])
        smallest_scene = len(scene.images)
    else:
        rest = scenes
        if held_out is None:
            rest, held_out = hold_out_scenes(scenes, max(1, min(num_held_out, len(scenes) // 4)))
        eval_samples = draw(usable(_openers(held_out, len(held_out))))
        few = len(rest) <= _FEW_SCENES
        some = usable(_openers(rest, len(rest) if few else _NUM_MEAN_SAMPLES))
        mean_samples = draw(some[:_NUM_MEAN_SAMPLES])
        train = some if few else rest
        if some and few:
            smallest_scene = min(len(scene.images) for scene in some)

    if not eval_samples or not mean_samples:
        raise BadSampleError(f"no scene is left to train or to evaluate on; left out were {bad_samples}")
    has_cameras = "extrinsics" in eval_samples[0]
    return PSFMSplit(train, eval_samples, mean_samples, what, has_cameras, smallest_scene, bad_samples)


def hold_out_scenes(scenes: SceneDataset, num_held_out: int) -> tuple[SceneDataset, SceneDataset]:
    """
    Split scenes into those to train on and `num_held_out` evenly spaced ones to evaluate on.

    Raises:
        ValueError: There would be none left of one of them.
    """
    if not 1 <= num_held_out < len(scenes):
        raise ValueError(f"{num_held_out} of {len(scenes)} scenes are to be held out; expected 1 to {len(scenes) - 1}")
    held_out = _evenly_spaced(len(scenes), num_held_out)
    rest = np.setdiff1d(np.arange(len(scenes)), held_out)
    return Subset(scenes, rest.tolist()), Subset(scenes, held_out.tolist())  # type: ignore[return-value, arg-type]


def hold_out_views(
    scene: Scene, num_views: int, min_views: int, mask_ratio: float, share: float = 0.25
) -> tuple[Scene, np.ndarray, np.ndarray]:
    """
    Split the views of a scene.

    Returns:
        The scene of the views to train on and, in terms of the whole scene, an evaluation sample: up to `num_views`
        views (V,), those trained on first, and their `view_mask` (V,), True for the views held out.

    Raises:
        BadSampleError: The scene has too few pictures.
    """
    total = len(scene.images)
    held_out = _evenly_spaced(total, int(total * share))
    rest = np.setdiff1d(np.arange(total), held_out)
    if len(held_out) == 0 or len(rest) < min_views:
        raise BadSampleError(
            f"scene {scene.name!r} has {total} pictures; expected at least {min_views} to train on, and a third of "
            "these besides to evaluate on"
        )
    cameras = {}
    if scene.extrinsics is not None and scene.intrinsics is not None:
        cameras = {"extrinsics": scene.extrinsics[rest], "intrinsics": scene.intrinsics[rest]}
    train = replace(scene, images=_SomeImages(scene.images, rest.tolist()), **cameras)
    num_context = min(num_context_views(num_views, mask_ratio), len(rest))
    context = rest[_evenly_spaced(len(rest), num_context)]
    targets = held_out[_evenly_spaced(len(held_out), min(num_views - num_context, len(held_out)))]
    return train, np.concatenate([context, targets]), np.arange(len(context) + len(targets)) >= len(context)


def batches_of(samples: Sequence[dict[str, Any]], size: int = 4) -> list[dict[str, Any]]:
    """Collate good samples into batches of about equal size, at most `size`, and at least two where there are two."""
    bounds = np.linspace(0, len(samples), ceil(len(samples) / size) + 1).round().astype(int)
    batches = [collate_scenes(samples[start:end]) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    return [{key: value for key, value in batch.items() if key != "bad_samples"} for batch in batches]


def _evenly_spaced(total: int, count: int) -> np.ndarray:
    """`count` different indices below `total`, away from the ends."""
    return (2 * np.arange(count) + 1) * total // (2 * count)


def _openers(scenes: SceneDataset, count: int) -> list[Callable[[], Scene]]:
    return [partial(scenes.__getitem__, index) for index in range(count)]


@dataclass(frozen=True)
class _SomeImages(Sequence[Any]):
    images: Sequence[Any]
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]  # no slices
        return self.images[self.indices[index]]
