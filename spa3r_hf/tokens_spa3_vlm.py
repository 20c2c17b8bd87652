"""Image placeholders in the inputs of a VLM: how many there have to be, and which scene they stand for."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .errors import BadSampleError


Sizes = Sequence[Sequence[tuple[int, int]]]


def check_lengths(inputs: Mapping[str, Any], image_token_id: int, max_length: int) -> None:
    """
    Args:
        inputs: With `input_ids` and `attention_mask`, rows for each sample.
        image_token_id: The placeholder.
        max_length: The most tokens that a sample may have, its padding not counted.

    Raises:
        BadSampleError: A sample has more.
    """
    for index, (row, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        length = int(np.asarray(mask).sum())
        if length > max_length:
            num_visual = int((np.asarray(row) == image_token_id).sum())
            raise BadSampleError(
                f"sample {index} has {length} tokens, {num_visual} of them visual; expected at most max_length = "
                f"{max_length} (nothing is cut off: use fewer views, or a larger limit)"
            )


def count_visual_tokens(
    inputs: Mapping[str, Any],
    sizes: Sizes,
    image_token_id: int,
    patch_sizes: tuple[int, int] | None,
    fixed: int | None,
) -> list[list[int]]:
    """
    How many visual tokens the VLM will make of every picture, after a check that it has so many placeholders.

    Args:
        inputs: Of the VLM.
        sizes: Of every sample, width and height of its pictures, as they were given to the VLM's image processor.
        image_token_id: The placeholder.
        patch_sizes: `patch_size` and `merge_size`, where the numbers follow from the sizes (`image_grid_thw`).
        fixed: The number of tokens of any picture, where it is fixed.
            (Neither: the pictures of a sample have equally many.)

    Returns:
        For every sample, the numbers of visual tokens of its pictures.

    Raises:
        BadSampleError: A sample has another number of placeholders.
        ValueError: The pictures were resized or cut.
    """
    by_grid = [] if patch_sizes is None else _count_by_grids(inputs, sizes, *patch_sizes)
    counts: list[list[int]] = []
    for index, (row, pictures) in enumerate(zip(inputs["input_ids"], sizes, strict=True)):
        found = int((np.asarray(row) == image_token_id).sum())
        if patch_sizes is not None:
            expected = [by_grid.pop(0) for _ in pictures]
        else:
            expected = [found // len(pictures) if fixed is None else fixed for _ in pictures]
        if found != sum(expected):
            raise BadSampleError(
                f"sample {index} has {found} image placeholders in input_ids; expected {sum(expected)}, as its "
                f"{len(pictures)} views make {expected} visual tokens"
            )
        counts.append(expected)
    return counts


def _count_by_grids(inputs: Mapping[str, Any], sizes: Sizes, patch_size: int, merge_size: int) -> list[int]:
    flat = [size for pictures in sizes for size in pictures]
    if not flat:
        return []
    grids, num_patches = np.asarray(inputs["image_grid_thw"]), len(inputs["pixel_values"])
    expected = np.array([(1, height // patch_size, width // patch_size) for width, height in flat])
    if not np.array_equal(grids, expected) or num_patches != expected.prod(1).sum():
        raise ValueError(
            f"the VLM's image processor made {num_patches} patches, image_grid_thw = {grids.tolist()}; expected "
            f"{expected.prod(1).sum()}, {expected.tolist()}, as it was given pictures of {flat} pixels (width, "
            f"height) and its patches are of {patch_size}"
        )
    return (expected.prod(1) // merge_size**2).tolist()


def scene_ids_of_tokens(
    input_ids: Sequence[Any], image_token_id: int, scenes: Sequence[Sequence[int]], counts: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """
    Which scene each visual token reads.

    Args:
        input_ids: (L,) of every sample.
        image_token_id: The placeholder.
        scenes: Of every sample, the numbers of its pictures' scenes.
        counts: Of every sample, the numbers of visual tokens of its pictures.

    Returns:
        (L,) int64 for every sample, -1 where there is no visual token.
    """
    rows = []
    for ids, numbers, lengths in zip(input_ids, scenes, counts, strict=True):
        is_image = np.asarray(ids) == image_token_id
        row = np.full(len(is_image), -1, dtype=np.int64)
        row[is_image] = np.repeat(np.asarray(numbers, dtype=np.int64), lengths)
        rows.append(row)
    return rows


__all__ = ["check_lengths", "count_visual_tokens", "scene_ids_of_tokens"]
