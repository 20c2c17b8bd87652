"""Linear probes and measures of view-invariance, on features whose answers are known."""

import pytest
import torch

from spa3r_hf.probes import classification_probe, r_squared, ridge_probe


pytest.importorskip("scipy")
from spa3r_hf.spatial_probes import (  # noqa: E402  # needs the rooms
    MIN_TEST_ROOMS,
    MIN_TRAIN_ROOMS,
    RoomFacts,
    linear_cka,
    probe_facts,
    view_invariance,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_ridge_probe_finds_what_is_linear_and_nothing_in_noise():
    features, weights = normal(300, 20), normal(20, 2, seed=1)
    values = features @ weights + 3
    guess = ridge_probe(features[:200], values[:200], features[200:])
    assert (r_squared(guess, values[200:]) > 0.999).all()
    noise = normal(300, 2, seed=2)
    scores = r_squared(ridge_probe(features[:200], noise[:200], features[200:]), noise[200:])
    assert (scores < 0.05).all() and (scores > -0.3).all()


def test_a_ridge_probe_works_with_more_features_than_rows_and_ignores_their_scale():
    features = torch.cat((normal(120, 4), normal(120, 500, seed=1)), dim=1)
    values = features[:, :4].sum(1, keepdim=True)
    scale = 10 ** normal(504, seed=2)
    guesses = [ridge_probe(f[:90], values[:90], f[90:]) for f in (features, features * scale + 5)]
    torch.testing.assert_close(*guesses, rtol=1e-6, atol=1e-6)


def test_the_strength_is_not_chosen_on_the_test_rows():
    features, values = normal(60, 10), normal(60, 1, seed=3)
    first = ridge_probe(features[:50], values[:50], features[50:])
    torch.testing.assert_close(first[:3], ridge_probe(features[:50], values[:50], features[50:53]))


def test_a_classification_probe_separates_what_is_separable():
    labels = torch.arange(300) % 3
    features = torch.nn.functional.one_hot(labels, 3) * 4 + normal(300, 3)
    guess = classification_probe(features[:200], labels[:200], features[200:], num_classes=5)
    assert (guess == labels[200:]).double().mean() > 0.9


def test_r_squared_of_the_mean_is_zero_and_of_the_truth_one():
    values = normal(50, 2)
    assert torch.equal(r_squared(values, values), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(
        r_squared(values.mean(0).expand(50, 2), values), torch.zeros(2, dtype=torch.float64), atol=1e-9, rtol=0
    )


def test_cka_does_not_see_rotation_and_scale():
    features = normal(40, 8)
    rotation = torch.linalg.qr(normal(8, 8, seed=1)).Q
    assert linear_cka(features, 3 * features @ rotation + 7) == pytest.approx(1)
    assert linear_cka(features, normal(40, 8, seed=2)) < 0.5


def test_view_invariance_from_equal_to_unrelated_features():
    features = normal(50, 30)
    same = view_invariance(features, features)
    near = view_invariance(features, features + 2.5 * normal(50, 30, seed=1))
    none = view_invariance(features, normal(50, 30, seed=2))
    assert same == {"retrieval": 1.0, "cka": pytest.approx(1)}
    assert same["retrieval"] > near["retrieval"] > none["retrieval"] and none["retrieval"] < 0.1


def test_facts_of_rooms_are_read_off_features_that_hold_them():
    from spa3r_hf.rooms import generate_room

    rooms = [generate_room(seed) for seed in range(80)]
    facts = RoomFacts(rooms)
    assert facts.groups.keys() == {"object count", "distance", "room size"}
    assert facts.groups["room size"][:, 0].tolist() == pytest.approx([room.floor_area for room in rooms])
    distance = facts.groups["distance"]
    assert (distance[~distance.isnan()] > 0).all() and distance.isnan().any()

    known = torch.cat([values.nan_to_num() for values in facts.groups.values()], dim=1)
    scores = probe_facts(known[:55], known[55:], facts)
    assert scores["room size"] > 0.99 and scores["object count"] > 0.99
    assert MIN_TRAIN_ROOMS <= 55 and MIN_TEST_ROOMS <= 25
    blind = probe_facts(torch.ones(55, 3), torch.ones(25, 3), facts)
    assert all(value <= 1e-6 for value in blind.values())
