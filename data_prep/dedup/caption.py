"""Captions of nearly the same wording: MinHash sketches over character shingles, and locality-sensitive hashing.

A caption is normalised first (case, punctuation and white space do not count); captions of one normal form are the same. Of the others
the similarity is the Jaccard index of their sets of `SHINGLE` characters in a row, estimated from `NUM_PERMUTATIONS` minima: the share of
minima on which two captions agree, give or take 0.04. Only captions that agree on all minima of some band are compared.

Minima are kept as 4 bits each (b-bit MinHash, Li and König 2010): 64 bytes a caption, at a cost of 4 % in accuracy. Unequal minima agree
in 4 bits once in 16 times, which `similarity` takes into account. The signatures are computed here by numpy, not by a library: they decide
what is dropped, so they must not change with somebody's release.
"""

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from data_prep.dedup.pairs import mix, popcount

SHINGLE = 4
"""Characters of a shingle."""

NUM_PERMUTATIONS = 128
SKETCH_BYTES = NUM_PERMUTATIONS // 2

_CHANCE = 1 / 16
"""How often two unequal minima have the same 4 bits."""

_RECALL = 0.97
"""Pairs of exactly the wanted similarity that share a band."""

BUCKET_CAP = 1000
"""Earlier captions of a bucket that one is compared to at most (`pairs.colliding`): stock phrases must not cost quadratic time."""

_CAPTIONS_AT_ONCE = 1 << 14
_MATRIX_CELLS = 1 << 17
"""Shingles hashed at a time: 512 KiB, so that all permutations run in the processor's cache."""


class _Letters(dict[int, str]):
    """For `str.translate`: punctuation, symbols, spaces and control characters become a space, variation selectors nothing."""

    def __missing__(self, code: int) -> str:
        is_selector = 0xFE00 <= code <= 0xFE0F
        self[code] = "" if is_selector else " " if unicodedata.category(chr(code))[0] in "PSZC" else chr(code)
        return self[code]


def normalize(captions: Sequence[str]) -> list[str]:
    """Normal forms: compatibility characters unified, case folded, words parted by one space, nothing else left.

    A caption of symbols alone keeps them; an empty one stays empty (and is never compared).
    """
    letters = _Letters()
    folded = (unicodedata.normalize("NFKC", caption).casefold() for caption in captions)
    return [" ".join(text.translate(letters).split()) or " ".join(text.split()) for text in folded]


def text_hashes(texts: Sequence[str]) -> np.ndarray:
    """xxh3-64 of the normal forms: uint64 [N]. Among a billion captions two share one by chance with a probability of 3 %."""
    return np.fromiter((xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) for text in texts), np.uint64, len(texts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bands:
    """How minima are grouped: captions that agree on all `num_rows` minima of one of `num_bands` bands are compared."""

    similarity: float
    num_bands: int
    num_rows: int

    @property
    def min_agreement(self) -> int:
        """Minima, of all, on which two captions of the wanted similarity agree."""
        return math.ceil(NUM_PERMUTATIONS * (self.similarity * (1 - _CHANCE) + _CHANCE) - 1e-9)

    def keys(self, minima: np.ndarray) -> np.ndarray:
        """Keys of the bands: uint64 [num_bands, N] of minima uint32 [NUM_PERMUTATIONS, N]."""
        keys = np.empty((self.num_bands, minima.shape[1]), np.uint64)
        for band in range(self.num_bands):
            key = np.full(minima.shape[1], band, np.uint64)
            for row in minima[band * self.num_rows : (band + 1) * self.num_rows]:
                key = mix(key ^ row)
            keys[band] = key
        return keys


def choose_bands(similarity: float) -> Bands:
    """The longest bands, hence fewest comparisons, that find `_RECALL` of the pairs of exactly this similarity."""
    if similarity == 1:
        return Bands(similarity=1, num_bands=1, num_rows=NUM_PERMUTATIONS)
    best, num_rows, num_bands = None, 1, 1
    while num_rows * num_bands <= NUM_PERMUTATIONS:
        best = Bands(similarity=similarity, num_bands=num_bands, num_rows=num_rows)
        num_rows += 1
        num_bands = math.ceil(math.log(1 - _RECALL) / math.log1p(-(similarity**num_rows)))
    assert best is not None
    return best


def minima_of(texts: Sequence[str]) -> Iterator[np.ndarray]:
    """Minima of normal forms, some thousand captions at a time: uint32 [NUM_PERMUTATIONS, n]."""
    factors = (mix(np.arange(1, NUM_PERMUTATIONS + 1, dtype=np.uint64)) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    for begin in range(0, len(texts), _CAPTIONS_AT_ONCE):
        shingles, starts, counts = _shingles(texts[begin : begin + _CAPTIONS_AT_ONCE])
        minima = np.empty((NUM_PERMUTATIONS, len(counts)), np.uint32)
        order = np.argsort(counts, kind="stable")
        first = 0
        while first < len(order):
            # Captions of similar length side by side; the shorter ones repeat their last shingle, which changes no minimum.
            longest = int(counts[order[min(len(order), first + max(1, _MATRIX_CELLS // int(counts[order[first]]))) - 1]])
            rows = order[first : first + max(1, _MATRIX_CELLS // longest)]
            longest = int(counts[rows[-1]])
            matrix = shingles[starts[rows] + np.minimum(np.arange(longest)[:, None], counts[rows] - 1)]
            permuted = np.empty_like(matrix)
            for number, factor in enumerate(factors):
                np.multiply(matrix, factor, out=permuted)
                minima[number, rows] = permuted.min(axis=0)
            first += len(rows)
        yield minima


def sketches_of(minima: np.ndarray) -> np.ndarray:
    """What `agreement` compares: uint8 [N, SKETCH_BYTES] of minima uint32 [NUM_PERMUTATIONS, N]."""
    nibbles = ((minima * np.uint32(0x9E3779B1)) >> np.uint32(28)).astype(np.uint8)
    return np.ascontiguousarray((nibbles[0::2] | (nibbles[1::2] << 4)).T)


def agreement(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Minima on which captions agree, 0-128: int64 [N] of sketches uint8 [N, SKETCH_BYTES]."""
    difference = np.ascontiguousarray(one).view(np.uint64) ^ np.ascontiguousarray(other).view(np.uint64)
    difference |= difference >> np.uint64(2)
    difference |= difference >> np.uint64(1)
    differing = popcount(difference & np.uint64(0x1111111111111111)).sum(axis=1, dtype=np.int64)
    return NUM_PERMUTATIONS - differing


def similarity(agreement: np.ndarray | int) -> np.ndarray:
    """Jaccard index that an agreement stands for."""
    return np.clip((np.asarray(agreement) / NUM_PERMUTATIONS - _CHANCE) / (1 - _CHANCE), 0, 1)


def _shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hashes uint32, first shingle of each text int64 [N], number of its shingles int64 [N]); shorter texts are padded."""
    padded = [text.ljust(SHINGLE) for text in texts]
    lengths = np.fromiter(map(len, padded), np.int64, len(padded))
    letters = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    windows = len(letters) - SHINGLE + 1
    value = letters[:windows].copy()
    with np.errstate(over="ignore"):
        for shift in range(1, SHINGLE):
            value = value * np.uint64(0x100000001B3) + letters[shift : windows + shift]
    return (mix(value) >> np.uint64(32)).astype(np.uint32), np.cumsum(lengths) - lengths, lengths - SHINGLE + 1
