"""What latents know of a room: linear probes of spatial facts, and whether they depend on the views they come from."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from .modeling_spa3r import Spa3RModel
from .probes import r_squared, ridge_probe
from .rooms import CATEGORIES, Room, generate_room
from .rooms_walks import RoomWalks


# Facts are probed for so many categories, and pairs of categories, that occur most often.
NUM_COUNTED, NUM_PAIRS = 6, 6
# A pair needs this many rooms with exactly one object of either kind, to learn from and to score.
MIN_TRAIN_ROOMS, MIN_TEST_ROOMS = 40, 10


class RoomFacts:
    """
    Numbers to read off features of rooms.

    Attributes:
        groups: "object count" (of each of the commonest categories), "distance" (metres between the centres of the
            single objects of two categories) and "room size" (square metres): name -> (rooms, outputs) float64, NaN
            where a room has no such fact.
    """

    def __init__(self, rooms: Sequence[Room]):
        counts = [Counter(thing.category for thing in room.objects) for room in rooms]
        spread = {category: np.var([count[category] for count in counts]) for category in CATEGORIES}
        counted = sorted(CATEGORIES, key=lambda category: -spread[category])[:NUM_COUNTED]
        single = [{category for category, number in count.items() if number == 1} for count in counts]
        pairs = Counter(pair for categories in single for pair in combinations(sorted(categories), 2))
        chosen = [pair for pair, _ in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:NUM_PAIRS]]
        self.groups = {
            "object count": torch.tensor([[float(count[category]) for category in counted] for count in counts]),
            "distance": torch.tensor([[_distance(room, *pair) for pair in chosen] for room in rooms]),
            "room size": torch.tensor([[room.floor_area] for room in rooms]),
        }


def _distance(room: Room, *categories: str) -> float:
    centres = [[thing.center for thing in room.objects if thing.category == category] for category in categories]
    if any(len(found) != 1 for found in centres):
        return float("nan")
    return float(np.linalg.norm(centres[0][0] - centres[1][0]))


def probe_facts(train: Tensor, test: Tensor, facts: RoomFacts) -> dict[str, float]:
    """
    R squared of ridge probes, 1 for perfect, 0 for no better than the mean; of each group the mean over its facts.

    Args:
        train: (n, features) of the first n rooms of `facts`.
        test: (m, features) of the others.
    """
    scores = {}
    for name, values in facts.groups.items():
        of_train, of_test = values[: len(train)], values[len(train) :]
        results = []
        for output in range(values.shape[1]):
            known, scored = ~of_train[:, output].isnan(), ~of_test[:, output].isnan()
            if known.sum() < MIN_TRAIN_ROOMS or scored.sum() < MIN_TEST_ROOMS:
                continue
            guess = ridge_probe(train[known], of_train[known, output : output + 1], test[scored])
            results.append(r_squared(guess, of_test[scored, output : output + 1].double()).item())
        if results:
            scores[name] = float(np.mean(results))
    return scores


def views_of(walks: RoomWalks, views: Sequence[int]) -> Callable[[int], Tensor]:
    """For the index of a room, its pictures (V, 3, H, W) in [0, 1] at the given places along the walk."""

    def pixel_values(index: int) -> Tensor:
        return torch.from_numpy(walks[index].rgb[list(views)]).movedim(-1, 1).float() / 255

    return pixel_values


@torch.no_grad()
def backbone_tokens(model: Spa3RModel, pictures: Callable[[int], Tensor], num_rooms: int, size: int = 4) -> Tensor:
    """Last-layer backbone tokens (rooms, V, P, 2C) float16 of one set of views of each room."""
    tokens = []
    for start in range(0, num_rooms, size):
        batch = torch.stack([pictures(index) for index in range(start, min(start + size, num_rooms))])
        tokens.append(model.backbone(batch.to(model.device)).last_hidden_state.half().cpu())
    return torch.cat(tokens)


@torch.no_grad()
def encode_tokens(model: Spa3RModel, tokens: Tensor, image_size: tuple[int, int], size: int = 16) -> Tensor:
    """Latents (rooms, Q, D) of backbone tokens (rooms, V, P, 2C)."""
    parts = [model.encode(part.to(model.device).float(), image_size).cpu() for part in tokens.split(size)]
    return torch.cat(parts)


def pooled_tokens(tokens: Tensor, num_prefix_tokens: int) -> Tensor:
    """Patch tokens (rooms, V, P, 2C) averaged over views and patches: (rooms, 2C)."""
    return tokens[:, :, num_prefix_tokens:].float().mean((1, 2))


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Centred kernel alignment of features (n, p) and (n, q) of the same n things: 1 where they are alike but for a
    rotation and a scale (arXiv 1905.00414)."""
    first, second = (features.double() - features.double().mean(0) for features in (first, second))
    kernels = first @ first.T, second @ second.T
    return ((kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm())).item()


def view_invariance(first: Tensor, second: Tensor) -> dict[str, float]:
    """
    How alike the features of a room are from disjoint sets of views.

    Args:
        first, second: (rooms, features) from one set of views and from the other.

    Returns:
        `retrieval`: share of rooms whose features from one set are nearest (cosine, mean taken off) to the same room's
        from the other, both ways; chance is 1 / rooms. `cka`: `linear_cka`.
    """
    centred = [features.double() - features.double().mean(0) for features in (first, second)]
    cosine = torch.nn.functional.normalize(centred[0], dim=-1) @ torch.nn.functional.normalize(centred[1], dim=-1).T
    own = torch.arange(len(first))
    right = [(cosine.argmax(axis) == own).double().mean().item() for axis in (0, 1)]
    return {"retrieval": sum(right) / 2, "cka": linear_cka(first, second)}


def rooms_of(walks: RoomWalks) -> list[Room]:
    return [generate_room(seed) for seed in walks.seeds]
