"""Sorting and pairing of rows, against the obvious way."""

import numpy as np
import pytest

from data_prep.dedup import pairs
from data_prep.dedup.pairs import colliding, mix, order_of, popcount, popcount_by_shifts


def all_pairs(keys: np.ndarray, num_fixed: int, fixed_only: bool) -> set[tuple[int, int]]:
    later, earlier = np.tril_indices(len(keys), -1)
    wanted = (keys[later] == keys[earlier]) & (later >= num_fixed) & ((earlier < num_fixed) | (not fixed_only))
    return set(zip(later[wanted].tolist(), earlier[wanted].tolist(), strict=True))


def found_pairs(keys: np.ndarray, **options: int | bool) -> list[tuple[int, int]]:
    found = [zip(later.tolist(), earlier.tolist(), strict=True) for later, earlier in colliding(keys, **options)]
    return [pair for batch in found for pair in batch]


def test_both_ways_of_counting_bits_agree() -> None:
    values = np.random.default_rng(0).integers(0, 2**64, 10_000, dtype=np.uint64)
    values[:2] = 0, 2**64 - 1
    expected = [bin(value).count("1") for value in values.tolist()]
    assert popcount(values).tolist() == expected
    assert popcount_by_shifts(values).tolist() == expected


def test_mixing_maps_different_values_to_different_ones() -> None:
    values = np.concatenate([np.arange(100_000, dtype=np.uint64), np.arange(100_000, dtype=np.uint64) << np.uint64(40)])
    assert len(np.unique(mix(values))) == len(np.unique(values))


@pytest.mark.parametrize("bits", [7, 16, 21, 32, 45, 64])
def test_rows_are_sorted_stably_whatever_the_width_of_the_key(bits: int) -> None:
    keys = np.random.default_rng(bits).integers(0, 2**bits, 5000, dtype=np.uint64)
    keys[2500:] = keys[:2500]
    assert order_of(keys, bits).tolist() == sorted(range(len(keys)), key=lambda row: (keys[row], row))


@pytest.mark.parametrize(("num_fixed", "fixed_only"), [(0, False), (60, False), (60, True), (200, True)])
def test_all_pairs_of_a_bucket_come_once(num_fixed: int, fixed_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "PAIRS_AT_ONCE", 50)
    keys = np.random.default_rng(1).integers(0, 30, 200).astype(np.uint64)
    found = found_pairs(keys, num_fixed=num_fixed, fixed_only=fixed_only)
    assert len(found) == len(set(found))
    assert set(found) == all_pairs(keys, num_fixed, fixed_only)


def test_no_rows_make_no_pairs() -> None:
    assert found_pairs(np.zeros(0, np.uint64)) == []
    assert found_pairs(np.zeros(5, np.uint64), num_fixed=5) == []


def test_a_large_bucket_is_compared_to_its_first_rows_and_to_those_just_before() -> None:
    found = found_pairs(np.zeros(1000, np.uint64), cap=10)
    assert len(found) == len(set(found)) == sum(min(row, 10) for row in range(1000))
    assert sorted(earlier for later, earlier in found if later == 700) == [0, 1, 2, 3, 4, 695, 696, 697, 698, 699]
    assert sorted(earlier for later, earlier in found if later == 7) == list(range(7))
