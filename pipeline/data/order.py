"""Sample order as a function of (seed, position): a full shuffle that needs no list of samples and no state but one integer.

Positions count the samples of a run from 0 and go on through the epochs. Within an epoch the shards are permuted, then cut
into windows of a few shards, and the samples of each window are permuted among each other, so that a reader works on one
window of shards at a time (whole-shard reads) while neighbours in a batch come from all over it. The next epoch permutes
both anew. Nothing here knows of ranks or workers: they read other positions of the same order.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.data.hashing import Int64Array, UInt64Array, hash_counters, key, mix

_ROUNDS = 16
"""Enough for all permutations of a handful of things to be equally likely; 8 would do for thousands."""
_ROUND_CONSTANTS = mix(np.arange(_ROUNDS, dtype=np.uint64))
_NUM_CACHED_EPOCHS = 4


class Located(NamedTuple):
    """Where samples live; three int64 arrays of equal length."""

    epoch: Int64Array
    shard: Int64Array
    """Number of the shard in the manifest's list."""
    member: Int64Array
    """Number of the sample in its shard."""


def permute(index: Int64Array, *, size: Int64Array, keys: UInt64Array, inverse: bool = False) -> Int64Array:
    """Keyed bijection of 0..size-1 for every element: `index[i]` goes to its place under permutation `keys[i]` of `size[i]` things.

    A Feistel network over pairs (left, right) with left < a, right < b, where a * b is the least near-square product
    that holds `size` (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"); results beyond `size` are sent
    round again (cycle walking), which ends because the network is a bijection, and is rare because a * b < size + a.

    Args:
        index: int64 [N], 0 <= index < size
        size: int64 [N]
        keys: uint64 [N]
        inverse: the permutation that undoes it
    """
    sizes = np.broadcast_to(size, index.shape).astype(np.uint64)
    word_keys = np.broadcast_to(keys, index.shape)
    half = np.ceil(np.sqrt(sizes) / 2).astype(np.uint64)
    left_sizes = 2 * half  # even: with two odd sides only a subgroup of the permutations can be reached
    right_sizes = (sizes + left_sizes - np.uint64(1)) // left_sizes
    result = index.astype(np.uint64)
    walking = np.arange(len(result))
    while len(walking):
        moved = _feistel(result[walking], left_sizes[walking], right_sizes[walking], word_keys[walking], inverse)
        result[walking] = moved
        walking = walking[moved >= sizes[walking]]
    return result.astype(np.int64)


def _feistel(values: UInt64Array, left_sizes: UInt64Array, right_sizes: UInt64Array, keys: UInt64Array, inverse: bool) -> UInt64Array:
    left, right = values // right_sizes, values % right_sizes
    for number in reversed(range(_ROUNDS)) if inverse else range(_ROUNDS):
        round_keys = keys + _ROUND_CONSTANTS[number]
        if number % 2 == 0:
            shift = mix(right ^ round_keys) % left_sizes
            left = (left + (left_sizes - shift if inverse else shift)) % left_sizes
        else:
            shift = mix(left ^ round_keys) % right_sizes
            right = (right + (right_sizes - shift if inverse else shift)) % right_sizes
    return left * right_sizes + right


@dataclass(frozen=True, slots=True)
class _EpochLayout:
    """The shards of one epoch in reading order. S shards, W windows; O(S) memory whatever the number of samples."""

    shards: Int64Array
    """[S] shard read in place i"""
    places: Int64Array
    """[S] place of shard i"""
    starts: Int64Array
    """[S + 1] samples before place i"""
    window_keys: UInt64Array
    """[W]"""


class SampleOrder:
    """The order of a data set's samples over all epochs. Safe to share between threads."""

    def __init__(self, counts: Sequence[int] | Int64Array, *, seed: int, window: int) -> None:
        """
        Args:
            counts: samples in each shard
            seed: the run's seed
            window: shards whose samples are shuffled among each other

        Raises:
            ValueError: no samples, a negative count, or an empty window
        """
        self.counts = np.asarray(counts, dtype=np.int64)
        if self.counts.ndim != 1 or (self.counts < 0).any() or self.counts.sum() == 0:
            raise ValueError(f"counts={list(self.counts[:8])} must list the samples of each shard and hold at least one")
        if window < 1:
            raise ValueError(f"window={window} must be at least one shard")
        self.seed = seed
        self.window = window
        self.num_samples = int(self.counts.sum())
        self._layouts: dict[int, _EpochLayout] = {}
        self._lock = threading.Lock()

    def locate(self, positions: Int64Array) -> Located:
        """Epoch, shard and member of the samples at these global positions (int64 [N], any order, repeats allowed)."""
        positions = np.asarray(positions, dtype=np.int64)
        epoch, rank = np.divmod(positions, self.num_samples)
        shard, member = np.empty_like(rank), np.empty_like(rank)
        for number in np.unique(epoch):
            chosen = epoch == number
            shard[chosen], member[chosen] = self._locate_in_epoch(int(number), rank[chosen])
        return Located(epoch, shard, member)

    def positions_of(self, located: Located) -> Int64Array:
        """The inverse of `locate`: at which global position each sample is read in the given epoch."""
        positions = np.empty_like(located.member)
        for number in np.unique(located.epoch):
            chosen = located.epoch == number
            layout = self._layout(int(number))
            place = layout.places[located.shard[chosen]]
            start, size, keys = self._window_of(layout, place)
            local = layout.starts[place] + located.member[chosen] - start
            positions[chosen] = number * self.num_samples + start + permute(local, size=size, keys=keys, inverse=True)
        return positions

    def window_bounds(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """First global position, and number of samples, of the shuffle window that each position lies in (int64 [N] each)."""
        positions = np.asarray(positions, dtype=np.int64)
        epoch, rank = np.divmod(positions, self.num_samples)
        starts, sizes = np.empty_like(rank), np.empty_like(rank)
        for number in np.unique(epoch):
            chosen = epoch == number
            layout = self._layout(int(number))
            place = np.searchsorted(layout.starts, rank[chosen], side="right") - 1
            start, sizes[chosen], _ = self._window_of(layout, place)
            starts[chosen] = number * self.num_samples + start
        return starts, sizes

    def shards_from(self, position: int, num_windows: int) -> Int64Array:
        """The shards of the window that holds `position` and of the `num_windows - 1` after it, in reading order; one may occur twice."""
        epoch, rank = divmod(position, self.num_samples)
        layout = self._layout(epoch)
        first = (int(np.searchsorted(layout.starts, rank, side="right")) - 1) // self.window
        found = []
        for _ in range(num_windows):
            if first * self.window >= len(self.counts):
                epoch, first = epoch + 1, 0
                layout = self._layout(epoch)
            found.append(layout.shards[first * self.window : (first + 1) * self.window])
            first += 1
        return np.concatenate(found)

    def _locate_in_epoch(self, epoch: int, rank: Int64Array) -> tuple[Int64Array, Int64Array]:
        layout = self._layout(epoch)
        place = np.searchsorted(layout.starts, rank, side="right") - 1
        start, size, keys = self._window_of(layout, place)
        shuffled = start + permute(rank - start, size=size, keys=keys)
        place = np.searchsorted(layout.starts, shuffled, side="right") - 1
        return layout.shards[place], shuffled - layout.starts[place]

    def _window_of(self, layout: _EpochLayout, place: Int64Array) -> tuple[Int64Array, Int64Array, UInt64Array]:
        """First rank, number of samples and key of the windows that hold these places."""
        number = place // self.window
        start = layout.starts[number * self.window]
        stop = layout.starts[np.minimum((number + 1) * self.window, len(self.counts))]
        return start, stop - start, layout.window_keys[number]

    def _layout(self, epoch: int) -> _EpochLayout:
        with self._lock:
            layout = self._layouts.get(epoch)
            if layout is None:
                layout = self._layouts[epoch] = self._build_layout(epoch)
                if len(self._layouts) > _NUM_CACHED_EPOCHS:
                    del self._layouts[next(iter(self._layouts))]
            return layout

    def _build_layout(self, epoch: int) -> _EpochLayout:
        num_shards = len(self.counts)
        place = np.arange(num_shards, dtype=np.int64)
        shard_key = np.array([key(self.seed, "shard order", epoch)], dtype=np.uint64)
        shards = permute(place, size=np.array([num_shards]), keys=shard_key)
        places = np.empty_like(shards)
        places[shards] = place
        starts = np.concatenate([[0], np.cumsum(self.counts[shards])])
        num_windows = -(-num_shards // self.window)
        window_keys = hash_counters(key(self.seed, "sample order", epoch), np.arange(num_windows))
        return _EpochLayout(shards=shards, places=places, starts=starts, window_keys=window_keys)
