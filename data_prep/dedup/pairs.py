"""Rows that share a key, in bounded memory: what every near-duplicate search is made of.

Rows come in the order in which samples are considered; the first `num_fixed` of them are never dropped, so pairs among them do not matter.
A *bucket* is the rows of one key. Rows are always sorted stably, so that a bucket keeps their order.
"""

from collections.abc import Iterator

import numpy as np

PAIRS_AT_ONCE = 1 << 19
"""Pairs that `colliding` yields at a time."""

Pairs = tuple[np.ndarray, np.ndarray]
"""(later, earlier): row numbers, int64 [P]."""


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 [N] whose result has no visible structure (the finaliser of MurmurHash3)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
        values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def popcount(values: np.ndarray) -> np.ndarray:
    """Bits set in each of uint64 [...], as uint8."""
    if hasattr(np, "bitwise_count"):  # numpy 2
        return np.bitwise_count(values)
    return popcount_by_shifts(values)


def popcount_by_shifts(values: np.ndarray) -> np.ndarray:
    """`popcount` for numpy 1."""
    pairs, nibbles, octets = (np.uint64(mask) for mask in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F))
    values = values - ((values >> np.uint64(1)) & pairs)
    values = (values & nibbles) + ((values >> np.uint64(2)) & nibbles)
    values = (values + (values >> np.uint64(4))) & octets
    with np.errstate(over="ignore"):
        return ((values * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.uint8)


def order_of(keys: np.ndarray, bits: int = 64) -> np.ndarray:
    """A stable argsort of uint64 [N] below 2**bits: int64 [N].

    numpy sorts 16-bit numbers by radix, several times as fast as wider ones by comparison: two passes of it still win.
    """
    if bits > 32:
        return np.argsort(keys, kind="stable")
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    if bits > 16:
        order = order[np.argsort((keys >> np.uint64(16)).astype(np.uint16)[order], kind="stable")]
    return order


def sorted_unique(values: np.ndarray) -> np.ndarray:
    """What np.unique gives, twenty times as fast where most values differ (numpy 2.3 began to hash them)."""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]]


def positions(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """np.searchsorted, ten times as fast for many values in no order: it then walks through memory once."""
    order = np.argsort(values)
    result = np.empty(len(values), np.int64)
    result[order] = np.searchsorted(ordered, values[order])
    return result


def starts_of(sorted_keys: np.ndarray) -> np.ndarray:
    """Position where the bucket of each row begins: int64 [N]."""
    is_first = np.concatenate([[True], sorted_keys[1:] != sorted_keys[:-1]])[: len(sorted_keys)]
    return np.maximum.accumulate(np.where(is_first, np.arange(len(sorted_keys)), 0))


def colliding(keys: np.ndarray, bits: int = 64, *, num_fixed: int = 0, fixed_only: bool = False, cap: int = 0) -> Iterator[Pairs]:
    """All pairs of rows with the same key, the later one not fixed.

    Args:
        keys: uint64 [N] below 2**bits.
        bits: of the keys.
        num_fixed: rows below this are fixed.
        fixed_only: only pairs with a fixed row.
        cap: 0, or the most earlier rows that one row is compared to: in larger buckets half of them are the first rows of
            the bucket and half those just before the row. Large buckets then cost no quadratic time, but pairs are missed.
    """
    order = order_of(keys, bits)
    starts = starts_of(keys[order])
    counts = _fixed_in_bucket(order, starts, num_fixed) if fixed_only else np.arange(len(order)) - starts
    counts[order < num_fixed] = 0
    near = np.zeros_like(counts)
    if cap:
        if not fixed_only:
            near[counts > cap] = cap // 2
        counts = np.minimum(counts, cap)
    rows = np.flatnonzero(counts)
    totals = np.concatenate([[0], np.cumsum(counts[rows])])
    begin = 0
    while begin < len(rows):
        end = max(begin + 1, int(np.searchsorted(totals, totals[begin] + PAIRS_AT_ONCE, side="right")) - 1)
        repeats = counts[rows[begin:end]]
        later = np.repeat(rows[begin:end], repeats)
        rank = np.arange(len(later)) - np.repeat(totals[begin:end] - totals[begin], repeats)
        earlier = np.where(rank < near[later], later - 1 - rank, starts[later] + rank - near[later])
        yield order[later], order[earlier]
        begin = end


def _fixed_in_bucket(order: np.ndarray, starts: np.ndarray, num_fixed: int) -> np.ndarray:
    """How many fixed rows the bucket of each row holds: int64 [N]."""
    firsts = sorted_unique(starts)
    sizes = np.diff(np.append(firsts, len(starts)))
    until = np.concatenate([[0], np.cumsum(order < num_fixed)])
    return np.repeat(until[firsts + sizes] - until[firsts], sizes)
