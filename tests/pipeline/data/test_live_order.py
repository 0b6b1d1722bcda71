"""Positions of samples that were taken down yield others, the same everywhere; all other positions stay as they were."""

import numpy as np
import pytest

from pipeline.data.live_order import LiveOrder
from pipeline.data.order import Located, SampleOrder

COUNTS = [7, 5, 9, 1, 12, 6]
EXCLUDED = [[0, 6], [], [1, 2, 3], [0], [11], [4]]


def _order(window: int = 2, seed: int = 3, counts: list[int] | None = None) -> SampleOrder:
    return SampleOrder(counts or COUNTS, seed=seed, window=window)


def _live(excluded: list[list[int]], **options) -> LiveOrder:
    return LiveOrder(_order(**options), [np.array(rows, dtype=np.int64) for rows in excluded])


def _pairs(located: Located) -> list[tuple[int, int]]:
    return list(zip(located.shard.tolist(), located.member.tolist(), strict=True))


@pytest.mark.parametrize("window", [1, 2, 16])
def test_only_positions_of_excluded_samples_change_and_none_of_them_is_left(window):
    plain, live = _order(window), _live(EXCLUDED, window=window)
    positions = np.arange(5 * plain.num_samples)
    before, after = _pairs(plain.locate(positions)), _pairs(live.locate(positions))
    dead = {(shard, row) for shard, rows in enumerate(EXCLUDED) for row in rows}
    assert not dead & set(after)
    assert [new for old, new in zip(before, after, strict=True) if old not in dead] == [old for old in before if old not in dead]
    assert sum(old in dead for old in before) == 5 * len(dead) == 5 * live.num_excluded


def test_a_replacement_comes_from_the_positions_own_window_and_epoch():
    """Its shards are open anyway: a replacement never makes a rank fetch another one."""
    plain, live = _order(), _live([[0], [0], [0], [], [0], [0]])
    positions = np.arange(4 * plain.num_samples)
    located = live.locate(positions)
    starts, sizes = plain.window_bounds(positions)
    moved = np.flatnonzero(np.array(_pairs(plain.locate(positions)) != np.array(_pairs(located))).any(axis=-1))
    assert len(moved) == 4 * 5
    found = plain.positions_of(located)
    assert (starts[moved] <= found[moved]).all()
    assert (found[moved] < starts[moved] + sizes[moved]).all()


def test_a_replacement_is_a_function_of_its_position_alone():
    live, positions = _live(EXCLUDED), np.arange(90)
    whole = _pairs(live.locate(positions))
    shuffled = np.random.default_rng(0).permutation(90)
    assert _pairs(live.locate(positions[shuffled])) == [whole[place] for place in shuffled]
    assert [_pairs(live.locate(positions[place : place + 1]))[0] for place in range(90)] == whole
    assert _pairs(_live(EXCLUDED, seed=4).locate(positions)) != whole


def test_a_further_takedown_changes_only_the_positions_that_show_what_it_hit():
    positions = np.arange(10 * sum(COUNTS))
    before = _pairs(_live(EXCLUDED).locate(positions))
    more = [rows + ([3] if shard == 4 else []) for shard, rows in enumerate(EXCLUDED)]
    after = _pairs(_live([sorted(rows) for rows in more]).locate(positions))
    assert [new for old, new in zip(before, after, strict=True) if old != (4, 3)] == [old for old in before if old != (4, 3)]
    assert before.count((4, 3)) >= 10
    assert (4, 3) not in after


def test_replacements_are_spread_over_the_window():
    excluded = [list(range(0, 100, 2)), []]
    live = _live(excluded, counts=[100, 100])
    located = live.locate(np.arange(40 * 200))
    counts = np.bincount(located.shard * 100 + located.member, minlength=200)
    assert (counts[:100:2] == 0).all()
    left = np.delete(counts, np.arange(0, 100, 2))
    # 40 times its own, and 40 * 50 replacements shared by 150.
    assert left.min() >= 40
    expected = 40 * 50 / 150
    assert (((left - 40) - expected) ** 2 / expected).sum() < 150 + 5 * np.sqrt(300)


@pytest.mark.parametrize("left", [0, 29, 39])
def test_a_single_sample_that_is_left_stands_in_for_all(left):
    """Also where a window holds nothing that may be used."""
    numbers = np.delete(np.arange(40), left)
    excluded = [
        [int(n) - first for n in numbers if first <= n < first + count] for first, count in zip(np.cumsum([0, *COUNTS]), COUNTS, strict=False)
    ]
    live = _live(excluded, window=1)
    shard = int(np.searchsorted(np.cumsum(COUNTS), left, side="right"))
    member = left - sum(COUNTS[:shard])
    assert set(_pairs(live.locate(np.arange(120)))) == {(shard, member)}
    assert live.live_positions().tolist() == live.order.positions_of(Located(np.array([0]), np.array([shard]), np.array([member]))).tolist()


def test_when_hardly_anything_is_left_every_sample_left_still_occurs():
    counts, left = [20_000, 20_000], [5, 19_999, 20_000, 33_333]
    numbers = np.delete(np.arange(40_000), left)
    live = LiveOrder(SampleOrder(counts, seed=1, window=1), [numbers[numbers < 20_000], numbers[numbers >= 20_000] - 20_000])
    located = live.locate(np.arange(2000))
    assert set((20_000 * located.shard + located.member).tolist()) == set(left)


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match="all 12 samples are excluded"):
        LiveOrder(_order(counts=[5, 7]), [np.arange(5), np.arange(7)])


def test_without_exclusions_it_is_the_order_itself():
    plain, live = _order(), LiveOrder(_order(), ())
    for found, expected in zip(live.locate(np.arange(100)), plain.locate(np.arange(100)), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert live.num_excluded == 0
    assert live.live_positions().tolist() == list(range(40))


def test_live_positions_are_those_of_the_first_epoch_that_keep_their_sample():
    plain, live = _order(), _live(EXCLUDED)
    kept = [position for position in range(40) if _pairs(plain.locate(np.array([position]))) == _pairs(live.locate(np.array([position])))]
    assert live.live_positions().tolist() == kept
    for limit in (1, 5, 32, 33, 100):
        assert live.live_positions(limit).tolist() == kept[:limit]


def test_positions_of_a_sample_are_all_those_that_yield_it():
    live, epochs = _live(EXCLUDED), np.arange(3)
    located = _pairs(live.locate(np.arange(3 * 40)))
    for shard, count in enumerate(COUNTS):
        for member in range(count):
            expected = [position for position, place in enumerate(located) if place == (shard, member)]
            assert live.positions_of(shard, member, epochs).tolist() == expected
            assert (not expected) == (member in EXCLUDED[shard])
