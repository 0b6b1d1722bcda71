"""The sample order of a split from which samples were taken down: their positions yield other samples, all others stay as they were.

What stands in for a sample at position p is a function of (seed, p, attempt): attempt after attempt draws another position of p's own
shuffle window (whose shards are open anyway), until it holds a sample that may be used. So every rank, worker and layout finds the same
one, an epoch keeps its length, and a further takedown changes only the positions that show what it hit. Evaluation counts each
sample once: there the positions of samples that were taken down are left out, and nothing stands in for them.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.data.hashing import Int64Array, hash_counters, key
from pipeline.data.order import Located, SampleOrder

_ATTEMPTS_IN_WINDOW = 64
"""Then the window is nearly all taken down, and as many attempts draw from the whole epoch."""


class LiveOrder:
    """A `SampleOrder` that never yields a sample that was taken down. Safe to share between threads."""

    def __init__(self, order: SampleOrder, excluded: Sequence[Int64Array]) -> None:
        """
        Args:
            excluded: numbers of the samples of each shard that must not be used, ascending

        Raises:
            ValueError: no sample is left.
        """
        self.order = order
        self._firsts = np.concatenate([[0], np.cumsum(order.counts)])
        parts = [first + rows for first, rows in zip(self._firsts.tolist(), excluded, strict=False)]
        self._dead = np.concatenate([np.empty(0, dtype=np.int64), *parts])
        """Numbers over all shards of the samples that must not be used, ascending."""
        self.num_samples = order.num_samples
        """Positions of an epoch, with those whose sample is replaced."""
        self.num_excluded = len(self._dead)
        if self.num_excluded >= self.num_samples:
            raise ValueError(f"all {self.num_samples} samples are excluded")

    def locate(self, positions: Int64Array) -> Located:
        """Epoch, shard and member of the samples that these global positions yield (int64 [N], any order, repeats allowed)."""
        positions = np.asarray(positions, dtype=np.int64)
        located = self.order.locate(positions)
        waiting = np.flatnonzero(self._is_dead(located.shard, located.member))
        for attempt in range(1, 2 * _ATTEMPTS_IN_WINDOW + 1):
            if not len(waiting):
                return located
            others = self._draw(positions[waiting], attempt)
            found = self.order.locate(others)
            good = ~self._is_dead(found.shard, found.member)
            located.shard[waiting[good]], located.member[waiting[good]] = found.shard[good], found.member[good]
            waiting = waiting[~good]
        if len(waiting):
            located.shard[waiting], located.member[waiting] = self._choose_among_the_few(positions[waiting])
        return located

    def positions_of(self, shard: int, member: int, epochs: Int64Array) -> Int64Array:
        """All positions of these epochs that yield the sample, ascending: its own, and those where it stands in for another."""
        if self._is_dead(np.array([shard]), np.array([member])).any():
            return np.empty(0, dtype=np.int64)
        own = self.order.positions_of(Located(epochs, np.full_like(epochs, shard), np.full_like(epochs, member)))
        replaced = np.concatenate([np.empty(0, dtype=np.int64), *(self._dead_positions(int(epoch)) for epoch in epochs)])
        stand_in = self.locate(replaced)
        return np.sort(np.concatenate([own, replaced[(stand_in.shard == shard) & (stand_in.member == member)]]))

    def live_positions(self, limit: int | None = None) -> Int64Array:
        """The positions of the first epoch whose own sample may be used, ascending; the first `limit` of them."""
        num = self.num_samples if limit is None else min(self.num_samples, limit + self.num_excluded)
        return np.setdiff1d(np.arange(num, dtype=np.int64), self._dead_positions(0), assume_unique=True)[:limit]

    def _is_dead(self, shard: Int64Array, member: Int64Array) -> npt.NDArray[np.bool_]:
        if not self.num_excluded:
            return np.zeros(len(shard), dtype=bool)
        numbers = self._firsts[shard] + member
        nearest = np.minimum(np.searchsorted(self._dead, numbers), self.num_excluded - 1)
        return self._dead[nearest] == numbers

    def _dead_positions(self, epoch: int) -> Int64Array:
        shard = np.searchsorted(self._firsts, self._dead, side="right") - 1
        return self.order.positions_of(Located(np.full_like(shard, epoch), shard, self._dead - self._firsts[shard]))

    def _draw(self, positions: Int64Array, attempt: int) -> Int64Array:
        """Another position of the same window, or, after many attempts, of the same epoch."""
        if attempt <= _ATTEMPTS_IN_WINDOW:
            starts, sizes = self.order.window_bounds(positions)
        else:
            starts, sizes = positions - positions % self.num_samples, np.full_like(positions, self.num_samples)
        return starts + self._hash(positions, attempt, sizes)

    def _choose_among_the_few(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Hardly anything is left of the split: a hash picks one of the remaining samples by number."""
        number = self._hash(positions, 0, np.full_like(positions, self.num_samples - self.num_excluded))
        live_before = self._dead - np.arange(self.num_excluded)
        chosen = number + np.searchsorted(live_before, number, side="right")
        shard = np.searchsorted(self._firsts, chosen, side="right") - 1
        return shard, chosen - self._firsts[shard]

    def _hash(self, positions: Int64Array, attempt: int, sizes: Int64Array) -> Int64Array:
        """A number below `sizes` for each position."""
        words = hash_counters(key(self.order.seed, "replacement", attempt), positions)
        return (words % sizes.astype(np.uint64)).astype(np.int64)
