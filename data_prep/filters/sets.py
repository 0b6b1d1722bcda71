"""Sets that hold tens of millions of entries: eight bytes each, in one array, which Ray shares between the workers of a machine."""

from array import array
from collections.abc import Iterable

import numpy as np
import xxhash

from data_prep.dedup.pairs import popcount

_KEY_BITS = 16


class HashSet:
    """Texts by their 64-bit hashes: with ten million of them, one wrong hit in two million million questions."""

    __slots__ = ("_hashes",)

    def __init__(self, hashes: Iterable[int] = ()) -> None:
        """Args: hashes, of `hash_of`, in any order; an `array("Q")` is taken without a detour."""
        found = np.array(hashes if isinstance(hashes, array) else array("Q", hashes), dtype=np.uint64)
        found.sort()
        self._hashes = found[np.concatenate([[True], found[1:] != found[:-1]])] if len(found) else found

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, text: object) -> bool:
        if not len(self._hashes) or not isinstance(text, (str, bytes)):
            return False
        value = np.uint64(hash_of(text))
        place = self._hashes.searchsorted(value)
        return bool(place < len(self._hashes) and self._hashes[place] == value)


def hash_of(text: str | bytes) -> int:
    """XXH3, 64 bits."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)


class NearSet:
    """64-bit perceptual hashes, asked for one within a number of bits.

    Two hashes that differ in at most d bits agree in one of d + 1 blocks: only entries that share a block with the question are compared.
    """

    __slots__ = ("_blocks", "_hashes", "distance")

    def __init__(self, hashes: Iterable[int], distance: int) -> None:
        self._hashes = np.unique(np.fromiter(hashes, dtype=np.uint64))
        self.distance = distance
        self._blocks: list[tuple[int, int, np.ndarray, np.ndarray]] = []  # shift, mask, rows ordered by key, start of each key
        for number in range(distance + 1):
            low, high = 64 * number // (distance + 1), 64 * (number + 1) // (distance + 1)
            bits = min(_KEY_BITS, high - low)
            keys = (self._hashes >> np.uint64(low)) & np.uint64((1 << bits) - 1)
            order = np.argsort(keys, kind="stable").astype(np.uint32)
            starts = np.concatenate([[0], np.cumsum(np.bincount(keys.astype(np.int64), minlength=1 << bits))])
            self._blocks.append((low, (1 << bits) - 1, order, starts))

    def __len__(self) -> int:
        return len(self._hashes)

    def nearest(self, value: int) -> int | None:
        """Bits between `value` and the closest entry; None if none is within the distance."""
        best = self.distance + 1
        for shift, mask, order, starts in self._blocks:
            key = value >> shift & mask
            rows = order[starts[key] : starts[key + 1]]
            if len(rows):
                best = min(best, int(popcount(self._hashes[rows] ^ np.uint64(value)).min()))
        return best if best <= self.distance else None
