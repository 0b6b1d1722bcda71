"""The sample order is a permutation per epoch, a function of (seed, position), and uniform."""

import itertools
import math

import numpy as np
import pytest

from pipeline.data.hashing import hash_counters, key
from pipeline.data.order import Located, SampleOrder, permute

SHAPES = [[7], [1], [5, 3, 8, 1, 1, 9, 4], [10, 0, 4, 0], [1] * 11, [100, 37, 64]]


def _is_uniform(fractions: np.ndarray, cells: int) -> bool:
    """Chi-square of a histogram of [0, 1) against flat, within five standard deviations."""
    observed = np.bincount((fractions * cells).astype(int), minlength=cells)
    expected = len(fractions) / cells
    return bool(((observed - expected) ** 2 / expected).sum() < cells + 5 * math.sqrt(2 * cells))


def _visited(order: SampleOrder, start: int, num: int) -> list[tuple[int, int]]:
    located = order.locate(np.arange(start, start + num))
    return list(zip(located.shard.tolist(), located.member.tolist(), strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9, 16, 17, 100, 1000, 4097])
def test_permute_is_a_bijection_and_its_inverse_undoes_it(size):
    keys = np.full(size, key(5, "test"), dtype=np.uint64)
    moved = permute(np.arange(size), size=np.array([size]), keys=keys)
    assert sorted(moved.tolist()) == list(range(size))
    np.testing.assert_array_equal(permute(moved, size=np.array([size]), keys=keys, inverse=True), np.arange(size))


@pytest.mark.parametrize("size", [3, 4, 5])
def test_every_permutation_is_equally_likely(size):
    trials = 20_000
    keys = hash_counters(key(0, "trials"), np.arange(trials))
    columns = [permute(np.full(trials, index), size=np.array([size]), keys=keys) for index in range(size)]
    codes = sum(column * size**index for index, column in enumerate(columns))
    legal = [sum(value * size**index for index, value in enumerate(values)) for values in itertools.permutations(range(size))]
    counts = np.array([(codes == code).sum() for code in legal])
    expected = trials / len(legal)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = math.factorial(size) - 1
    assert counts.sum() == trials
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("counts", SHAPES)
@pytest.mark.parametrize("window", [1, 2, 16])
def test_every_epoch_visits_each_sample_exactly_once(counts, window):
    order = SampleOrder(counts, seed=3, window=window)
    everything = sorted((shard, member) for shard, count in enumerate(counts) for member in range(count))
    for epoch in range(3):
        assert sorted(_visited(order, epoch * order.num_samples, order.num_samples)) == everything


def test_epochs_seeds_and_windows_give_different_permutations():
    def epoch(number: int, seed: int = 0, window: int = 2) -> list[tuple[int, int]]:
        return _visited(SampleOrder([20, 30, 25], seed=seed, window=window), number * 75, 75)

    assert len({tuple(order) for order in (epoch(0), epoch(1), epoch(2), epoch(0, seed=1), epoch(0, seed=-1), epoch(0, window=1))}) == 6


def test_order_does_not_depend_on_how_it_is_asked():
    """Any subset, in any order, by any number of readers: only the position counts."""
    counts = [13, 1, 40, 9]
    whole = SampleOrder(counts, seed=9, window=2).locate(np.arange(400))
    for ranks in (1, 2, 3, 7):
        order = SampleOrder(counts, seed=9, window=2)
        for rank in reversed(range(ranks)):
            part = order.locate(np.arange(rank, 400, ranks))
            for mine, everyones in zip(part, whole, strict=True):
                np.testing.assert_array_equal(mine, everyones[rank::ranks])


def test_the_order_itself_stays_the_same():
    """A change of the hash would silently give a resumed run other data."""
    located = SampleOrder([5, 3, 8], seed=1234, window=2).locate(np.array([0, 1, 2, 3, 15, 16, 17, 10**12]))
    assert located.epoch.tolist() == [0, 0, 0, 0, 0, 1, 1, 62_500_000_000]
    assert located.shard.tolist() == [2, 2, 2, 1, 0, 0, 2, 2]
    assert located.member.tolist() == [5, 6, 4, 1, 0, 4, 5, 0]


def test_positions_wrap_within_one_request_larger_than_the_data_set():
    order = SampleOrder([2, 1], seed=0, window=16)
    located = order.locate(np.arange(30))
    assert located.epoch.tolist() == [position // 3 for position in range(30)]
    assert len({tuple(_visited(order, epoch * 3, 3)) for epoch in range(10)}) > 1


def test_a_window_is_finished_before_the_next_begins():
    counts = np.full(12, 10)
    order = SampleOrder(counts, seed=5, window=3)
    shards = order.locate(np.arange(120)).shard.reshape(4, 30)
    windows = [set(row.tolist()) for row in shards]
    assert [len(window) for window in windows] == [3, 3, 3, 3]
    assert set().union(*windows) == set(range(12))
    assert all(len(set(row[:10].tolist())) > 1 for row in shards), "samples of a window's shards are mixed"


def test_positions_of_inverts_locate():
    order = SampleOrder([13, 1, 0, 40, 9], seed=2, window=2)
    positions = np.random.default_rng(0).integers(0, 10_000, size=500)
    np.testing.assert_array_equal(order.positions_of(order.locate(positions)), positions)


@pytest.mark.parametrize("counts", [[10_000] * 500_000, [1_250_000_000] * 4])
def test_five_billion_samples_stay_a_bijection_and_uniform(counts):
    order = SampleOrder(counts, seed=7, window=64)
    assert order.num_samples == 5_000_000_000
    rng = np.random.default_rng(1)
    positions = np.unique(rng.integers(0, order.num_samples, size=100_000))
    located = order.locate(positions)
    assert ((located.member >= 0) & (located.member < order.counts[located.shard])).all()
    identities = located.shard * max(counts) + located.member
    assert len(np.unique(identities)) == len(positions)
    np.testing.assert_array_equal(order.positions_of(Located(*located)), positions)
    position_in_data = located.shard + located.member / max(counts)
    assert _is_uniform(position_in_data / len(counts), cells=200)
    assert _is_uniform(located.member / max(counts), cells=50)
    neighbours = np.corrcoef(located.member[:-1], located.member[1:])[0, 1]
    assert abs(neighbours) < 0.02


@pytest.mark.parametrize(
    ("counts", "window", "match"), [([], 1, "at least one"), ([0, 0], 1, "at least one"), ([3, -1], 1, "counts"), ([3], 0, "window=0")]
)
def test_impossible_orders_are_refused(counts, window, match):
    with pytest.raises(ValueError, match=match):
        SampleOrder(counts, seed=0, window=window)


@pytest.mark.parametrize("counts", SHAPES)
@pytest.mark.parametrize("window", [1, 2, 16])
def test_windows_hold_what_their_positions_read(counts, window):
    order = SampleOrder(counts, seed=7, window=window)
    positions = np.arange(2 * order.num_samples)
    starts, sizes = order.window_bounds(positions)
    assert ((starts <= positions) & (positions < starts + sizes)).all()
    for start in np.unique(starts).tolist():
        size = int(sizes[start])
        read = set(order.locate(np.arange(start, start + size)).shard.tolist())
        listed = order.shards_from(start, 1).tolist()
        assert len(listed) <= window
        assert read <= set(listed)
        assert sum(counts[shard] for shard in listed) == size


def test_shards_ahead_are_those_of_the_next_windows_and_of_the_next_epoch():
    order = SampleOrder([5, 3, 8, 1, 9], seed=0, window=2)
    last = order.num_samples - 1
    first_of_next = order.shards_from(order.num_samples, 1).tolist()
    assert order.shards_from(last, 2).tolist() == [*order.shards_from(last, 1).tolist(), *first_of_next]
    whole = order.shards_from(0, 3).tolist()
    assert sorted(whole) == [0, 1, 2, 3, 4]
    assert order.shards_from(0, 4).tolist() == [*whole, *first_of_next]
    for position in range(order.num_samples):
        ahead = order.shards_from(position, 2).tolist()
        assert set(order.locate(np.arange(position, min(position + 3, order.num_samples))).shard.tolist()) <= set(ahead)
