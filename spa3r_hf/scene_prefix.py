"""What questions about one scene have in common: the views, the tokens up to where they differ, and their cache."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.logits_process import LogitsProcessor

from .media_spa3_vlm import FrameSampling, read_conversation


Messages = Sequence[dict[str, Any]]


class NoSharedPrefixError(ValueError):
    """Questions that cannot be answered together; the message says why."""


# --- conversations


def with_open_views(conversations: Sequence[Messages], sampling: FrameSampling) -> tuple[list[Messages], int]:
    """
    The conversations with their views opened, once for all of them.

    Args:
        conversations: About the same views: those of the first are taken for all.
        sampling: Which frames of a video are seen.

    Returns:
        The conversations with pictures instead of files and videos; the number of views of each.

    Raises:
        BadSampleError: A conversation, or something in it, cannot be used.
        FileNotFoundError: A picture or video is missing.
        ValueError: Their numbers of views differ.
    """
    views: list[Image.Image] = []
    opened: list[Messages] = []
    for index, conversation in enumerate(conversations):
        sample = read_conversation(conversation, sampling, f"question {index}")
        if not index:
            views = [view() for view in sample.views]
        if len(sample.views) != len(views):
            raise ValueError(
                f"question {index} has {len(sample.views)} views and question 0 has {len(views)}; expected questions "
                "about the same views"
            )
        pictures = iter(zip(views, sample.scenes, strict=True))
        opened.append([_with_pictures(message, pictures) for message in sample.messages])
    return opened, len(views)


def _with_pictures(message: dict[str, Any], pictures: Any) -> dict[str, Any]:
    content = []
    for entry in message["content"]:
        if entry["type"] == "image":
            picture, scene = next(pictures)
            entry = {"type": "image", "image": picture, "scene": scene}
        content.append(entry)
    return dict(message, content=content)


def with_last_view_only(conversation: Messages) -> list[dict[str, Any]]:
    """A conversation with open views, as if all but the last of them were not there."""
    is_view = [[entry["type"] == "image" for entry in message["content"]] for message in conversation]
    left = sum(map(sum, is_view))
    shortened = []
    for message, flags in zip(conversation, is_view, strict=True):
        content = []
        for entry, flag in zip(message["content"], flags, strict=True):
            left -= flag
            if not flag or not left:
                content.append(entry)
        shortened.append(dict(message, content=content))
    return shortened


# --- tokens


def rows_of_questions(
    first: Sequence[int], shortened: Sequence[Sequence[int]], image_token_id: int
) -> list[list[int]]:
    """
    The tokens of every question, from those of the first, and from those of all with their last view only.

    No view has to be processed again for this: what follows the last visual token does not depend on the views.

    Args:
        first: (L,), the tokens of the first question.
        shortened: Those of every question, with the last view alone.
        image_token_id: The placeholder of a visual token.

    Raises:
        NoSharedPrefixError: The questions' texts do not all come after the views.
    """
    rows, heads = [], set()
    end = _after_last(first, image_token_id)
    for tokens in shortened:
        start = _after_last(tokens, image_token_id)
        heads.add(tuple(tokens[:start]))
        rows.append([*first[:end], *tokens[start:]])
    if len(heads) > 1 or rows[0] != list(first):
        raise NoSharedPrefixError("the chat template puts what differs between questions before the last view")
    return rows


def _after_last(tokens: Sequence[int], token: int) -> int:
    return next((place + 1 for place in reversed(range(len(tokens))) if tokens[place] == token), 0)


def common_length(rows: Sequence[list[int]]) -> int:
    """Number of tokens with which all rows begin, at least one less than any row has."""
    first, last = min(rows), max(rows)  # of all, these two differ first
    limit = min(map(len, rows)) - 1
    return next((place for place in range(limit) if first[place] != last[place]), limit)


def first_tokens(inputs: dict[str, Any], length: int) -> dict[str, Any]:
    """The inputs of a model for the first `length` tokens of a single row, with all its pictures."""
    shape = inputs["input_ids"].shape
    return {
        name: value[:, :length] if isinstance(value, Tensor) and value.shape == shape else value
        for name, value in inputs.items()
    }


# --- the cache


def empty_cache(vlm: PreTrainedModel) -> DynamicCache:
    """
    A cache as `generate` makes it for this model.

    Raises:
        NoSharedPrefixError: Such a cache cannot be copied for several questions to go on from.
    """
    cache = DynamicCache(config=vlm.config.get_text_config(decoder=True))
    kinds = {type(layer) for layer in cache.layers}
    if others := sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer}):
        raise NoSharedPrefixError(f"{type(vlm).__name__} has a cache of {', '.join(others)}, which cannot be copied")
    return cache


@dataclass(frozen=True)
class ScenePrefix:
    """
    Tokens that have gone through the model, for any number of questions to go on from.

    Attributes:
        tokens: (L,), those that all questions begin with.
        cache: Of one row. It is never changed: see `copies`.
    """

    tokens: list[int]
    cache: Cache

    @property
    def num_cached(self) -> int:
        """Number of positions in the cache: L, and more where a scene's tokens are appended."""
        return self.cache.get_seq_length()

    def copies(self, number: int) -> Cache:
        """A cache of that many equal rows, which grows without changing this one."""
        # These kinds of layers make new tensors when they grow; so their own are shared as long as there is one row.
        copied = copy.copy(self.cache)
        copied.layers = [copy.copy(layer) for layer in self.cache.layers]
        if number > 1:
            copied.batch_repeat_interleave(number)
        return copied

    def needs_equal_lengths(self, num_more: int) -> bool:
        """
        Whether padding between this prefix and what follows, `num_more` positions at most, would change an answer.

        A sliding window counts positions, whether there is a token or padding on them.
        """
        windows = [layer.sliding_window for layer in self.cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
        return any(self.num_cached + num_more > window for window in windows)

    def continued(self, suffixes: Sequence[Sequence[int]], device: torch.device) -> dict[str, Any]:
        """
        What `generate` takes besides the cache.

        Args:
            suffixes: The tokens after this prefix, of B questions.
            device: Where the result is put.

        Returns:
            `input_ids` (B, T) and `attention_mask` (B, T): prefix, padding, suffix.
        """
        width = max(map(len, suffixes))
        # Padding is masked; but penalties of repetition look at all ids, and know this one already.
        filler = self.tokens[0]
        start = [*self.tokens, *[filler] * (self.num_cached - len(self.tokens))]
        ids = [[*start, *[filler] * (width - len(suffix)), *suffix] for suffix in suffixes]
        mask = [[1] * len(start) + [0] * (width - len(suffix)) + [1] * len(suffix) for suffix in suffixes]
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }


class ScoreMargins(LogitsProcessor):
    """Changes no score, but keeps by how much the best token of each step was ahead of the second best."""

    def __init__(self) -> None:
        self._margins: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]  # narrower types
        best = scores.float().topk(2).values
        self._margins.append(best[:, 0] - best[:, 1])
        return scores

    def smallest(self, lengths: Sequence[int]) -> list[float]:
        """For each row, the smallest of its first so many steps."""
        rows = torch.stack(self._margins, dim=1).tolist()
        return [min(row[:length]) for row, length in zip(rows, lengths, strict=True)]


__all__ = [
    "NoSharedPrefixError",
    "ScenePrefix",
    "ScoreMargins",
    "common_length",
    "empty_cache",
    "first_tokens",
    "rows_of_questions",
    "with_last_view_only",
    "with_open_views",
]
