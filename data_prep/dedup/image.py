"""Perceptual hashes within a few bits of each other: an exact search in Hamming space.

The 64 bits are cut into `distance + e` blocks. Two hashes that differ in at most `distance` bits agree in at least `e` whole blocks, so
sorting by every choice of `e` blocks (a *table*) and comparing what falls into one bucket finds every pair. More blocks mean more sorts
and smaller buckets; `choose_scheme` takes what costs least for the number of hashes. A pair is reported by one table only: by that of
the first `e` blocks in which it agrees.

A hash of a photograph has 32 bits set, half of them, because the median of the coefficients divides them. Where many coefficients tie
(blank pictures, flat shapes, plain gradients, exact symmetry) far fewer bits are set and unrelated pictures come close; such hashes are
not compared (`is_telling`), and those pictures only count as the same when their bytes are.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.dedup.pairs import PAIRS_AT_ONCE, Pairs, colliding, mix, order_of, popcount, starts_of

MIN_BITS, MAX_BITS = 24, 40
"""Bits set in a hash that tells pictures apart. With 24 of them 48 coefficients are distinct: two unrelated hashes come within
6 bits once in 20 million, with 16 (a picture of exact left-right symmetry) already once in 4,000."""

_TABLE_NS, _STORED_TABLE_NS, _PAIR_NS = 60.0, 300.0, 2.5
"""Measured cost of a row per table, of one in a table that is first written to storage, and of a comparison. They decide speed only."""

_ROWS_AT_ONCE = 1 << 15
"""Rows compared at a time: all arrays of a step stay in the processor's cache."""

Matches = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(later, earlier, distance): row numbers int64 [P], and the bits in which they differ, uint8 [P]."""


def is_telling(hashes: np.ndarray) -> np.ndarray:
    """Which of uint64 [N] can be compared: bool [N]."""
    bits = popcount(hashes)
    return (bits >= MIN_BITS) & (bits <= MAX_BITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """Which blocks are compared. Block b holds the bits from `64 * b // num_blocks` on, lowest first."""

    distance: int
    """Bits in which two hashes may differ, 0-7."""
    num_equal: int
    """Blocks that make the key of a table."""

    @property
    def num_blocks(self) -> int:
        """Blocks that the 64 bits are cut into."""
        return self.distance + self.num_equal

    @property
    def num_tables(self) -> int:
        """Choices of `num_equal` blocks."""
        return math.comb(self.num_blocks, self.num_equal)

    def tables(self) -> list[tuple[int, ...]]:
        """The blocks of every table."""
        return list(itertools.combinations(range(self.num_blocks), self.num_equal))

    def edges(self) -> list[int]:
        """Where the blocks begin, and 64."""
        return [64 * block // self.num_blocks for block in range(self.num_blocks + 1)]

    def keys(self, hashes: np.ndarray, table: int) -> tuple[np.ndarray, int]:
        """(uint64 [N] that is the same for hashes that agree in the blocks of the table, its number of bits)."""
        edges, key, width = self.edges(), np.zeros(len(hashes), np.uint64), 0
        for block in self.tables()[table]:
            bits = edges[block + 1] - edges[block]
            part = (hashes >> np.uint64(edges[block])) & np.uint64((1 << bits) - 1)
            key |= part << np.uint64(width)
            width += bits
        return key, width

    def agreement(self, differences: np.ndarray) -> np.ndarray:
        """Which blocks of uint64 [N] are zero: bool [N, num_blocks]."""
        edges = self.edges()
        masks = [(1 << end) - (1 << begin) for begin, end in itertools.pairwise(edges)]
        return (differences[:, None] & np.array(masks, dtype=np.uint64)) == 0


def choose_scheme(distance: int, num: int, num_targets: int | None = None, *, is_stored: bool = False) -> Scheme:
    """The cheapest scheme for `num` hashes compared with each other, or with `num_targets` others.

    Args:
        is_stored: every table is written to storage and read again, because one task cannot hold all hashes.
    """
    table_ns = _STORED_TABLE_NS if is_stored else _TABLE_NS
    pairs = num * num / 2 if num_targets is None else num * num_targets
    rows = num + (num_targets or 0)

    def cost(scheme: Scheme) -> float:
        in_buckets = pairs / 2.0 ** (64 * scheme.num_equal / scheme.num_blocks)
        return scheme.num_tables * (rows * table_ns + in_buckets * _PAIR_NS)

    return min((Scheme(distance=distance, num_equal=count) for count in range(1, 6)), key=cost)


def shuffled_bits(hashes: np.ndarray) -> np.ndarray:
    """uint64 [N] with the bits of each in another, fixed order. Distances stay.

    Neighbouring frequencies of a picture are correlated; a block should hold unrelated bits.
    """
    places = np.argsort(mix(np.arange(64, dtype=np.uint64)))
    octets = np.arange(256)
    result = np.zeros(len(hashes), np.uint64)
    for number in range(8):
        moved = np.zeros(256, np.uint64)
        for bit in range(8):
            moved |= ((octets >> bit) & 1).astype(np.uint64) << np.uint64(places[8 * number + bit])
        result |= moved[((hashes >> np.uint64(8 * number)) & np.uint64(255)).astype(np.uint8)]
    return result


def matches_in_table(hashes: np.ndarray, scheme: Scheme, table: int, *, num_fixed: int = 0, fixed_only: bool = False) -> Iterator[Matches]:
    """The pairs that a table reports: every pair of rows within the distance that agrees in its blocks and no earlier ones.

    Args:
        hashes: uint64 [N], of `shuffled_bits`, in the order in which samples are considered.
        scheme, table: what to compare.
        num_fixed: rows below this are never dropped: pairs among them are left out.
        fixed_only: only pairs with a fixed row.
    """
    key, width = scheme.keys(hashes, table)
    chosen = np.isin(np.arange(scheme.num_blocks), scheme.tables()[table])
    pairs = colliding(key, width, num_fixed=num_fixed, fixed_only=True) if fixed_only else _close(hashes, key, width, num_fixed, scheme.distance)
    for later, earlier in pairs:
        difference = hashes[later] ^ hashes[earlier]
        bits = popcount(difference)
        close = np.flatnonzero(bits <= scheme.distance)
        agrees = scheme.agreement(difference[close])
        close = close[((agrees & (np.cumsum(agrees, axis=1) <= scheme.num_equal)) == chosen).all(axis=1)]
        yield later[close], earlier[close], bits[close]


def matches(hashes: np.ndarray, distance: int, *, num_fixed: int = 0, fixed_only: bool = False) -> Matches:
    """Every pair of uint64 [N] within `distance` bits, once. `num_fixed` and `fixed_only` as in `matches_in_table`."""
    scheme = choose_scheme(distance, len(hashes) - num_fixed, num_fixed) if fixed_only else choose_scheme(distance, len(hashes))
    hashes = shuffled_bits(hashes)
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint8))]
    for table in range(scheme.num_tables):
        found += matches_in_table(hashes, scheme, table, num_fixed=num_fixed, fixed_only=fixed_only)
    later, earlier, bits = (np.concatenate(column) for column in zip(*found, strict=True))
    return later, earlier, bits


def _close(hashes: np.ndarray, key: np.ndarray, width: int, num_fixed: int, distance: int) -> Iterator[Pairs]:
    """Pairs of one bucket within `distance` bits.

    Compares every row with the one before it, then with the one before that, and so on: shifted slices need no index arrays.
    """
    order = order_of(key, width)
    reach = np.arange(len(order)) - starts_of(key[order])
    reach[order < num_fixed] = 0
    hashes = hashes[order]
    for begin in range(0, len(hashes), _ROWS_AT_ONCE):
        end = min(len(hashes), begin + _ROWS_AT_ONCE)
        found: list[Pairs] = []
        waiting, rows = 0, None
        for lag in range(1, int(reach[begin:end].max()) + 1):
            if rows is None and lag % 8 == 1:
                active = begin + np.flatnonzero(reach[begin:end] >= lag)
                rows = active if 4 * len(active) < end - begin else None
            if rows is None:
                first = max(begin, lag)
                close = popcount(hashes[first:end] ^ hashes[first - lag : end - lag]) <= distance
                close &= reach[first:end] >= lag
                later = first + np.flatnonzero(close)
            else:
                rows = rows[reach[rows] >= lag]
                later = rows[popcount(hashes[rows] ^ hashes[rows - lag]) <= distance]
            if len(later):
                found.append((order[later], order[later - lag]))
                waiting += len(later)
            if waiting > PAIRS_AT_ONCE:
                yield _joined(found)
                found, waiting = [], 0
        if found:
            yield _joined(found)


def _joined(found: list[Pairs]) -> Pairs:
    return np.concatenate([later for later, _ in found]), np.concatenate([earlier for _, earlier in found])
