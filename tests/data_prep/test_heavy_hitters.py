"""Counting many names in little memory: never too large a count, too small by no more than promised, merged or not."""

import random
from collections import Counter

import pytest

from data_prep.heavy_hitters import HeavyHitters, ranked


def stream(seed: int, length: int) -> list[str]:
    """Names of very different frequency, most of them seen once."""
    chance = random.Random(seed)
    return [f"n{int(chance.paretovariate(0.6))}" for _ in range(length)]


@pytest.mark.parametrize("capacity", [5, 50])
@pytest.mark.parametrize("num_parts", [1, 7])
def test_counts_are_too_small_by_no_more_than_promised(capacity: int, num_parts: int) -> None:
    names = stream(0, 20_000)
    truth = Counter(names)
    whole = HeavyHitters(capacity)
    for number in range(num_parts):
        part = HeavyHitters(capacity)
        for name in names[number::num_parts]:
            part.add(name)
        top = part.top()
        whole.merge(top, part.missed)
    found = whole.top()
    assert 0 < len(found) <= capacity
    assert whole.missed <= len(names) / capacity
    for name, number in found.items():
        assert truth[name] - whole.missed <= number <= truth[name]
    for name, number in truth.items():
        assert number <= whole.missed or name in found, "what is frequent is there"


def test_few_names_are_counted_exactly_in_a_stable_order() -> None:
    hitters = HeavyHitters(3)
    for name in "bbacca":
        hitters.add(name)
    assert list(hitters.top().items()) == [("a", 2), ("b", 2), ("c", 2)]
    assert hitters.missed == 0


def test_ranking_breaks_ties_by_name() -> None:
    assert ranked({"b": 1, "a": 1, "c": 5}.items(), 2) == [("c", 5), ("a", 1)]
