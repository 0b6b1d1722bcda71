"""A 64-bit perceptual hash: near-duplicates differ in few bits.

The definition is that of `imagehash.phash(hash_size=8)`: of the 32x32 two-dimensional DCT of a gray picture, the 8x8 lowest
coefficients; a bit says whether one is above their median, most significant bit first, row by row. Here the cosines are rounded
to integers, so that every sum is exact in float64 and the hash is the same on every processor, also for blank pictures, whose
coefficients would otherwise be rounding noise.
"""

import functools

import cv2
import numpy as np

SIDE = 32
"""Side of the gray picture that is hashed."""

_KEPT = 8
_GRID = 256  # OpenCV averages whole blocks ten times as fast as fractions of pixels: other sizes are sampled on a grid of blocks first
_FAR = 3  # times the grid: beyond, sampling would miss pixels
_SCALE = 2**18  # largest power for which no sum below leaves the 53 bits that float64 holds exactly


def phash(pixels: np.ndarray) -> int:
    """Hash of uint8 [h, w] or [h, w, 3] (RGB): area-averaged to 32x32 luma, then `phash_32`."""
    gray = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    height, width = gray.shape
    if (width % SIDE or height % SIDE) and max(width, height) <= _FAR * _GRID:
        gray = cv2.resize(gray, (_GRID, _GRID), interpolation=cv2.INTER_LINEAR)
    return phash_32(cv2.resize(gray, (SIDE, SIDE), interpolation=cv2.INTER_AREA))


def phash_32(gray: np.ndarray) -> int:
    """Hash of uint8 [32, 32], as an unsigned 64-bit integer."""
    cosines = _cosines()
    levels = gray.astype(np.float64) - 128
    low = cosines @ levels @ cosines.T
    low[0, 0] += 128.0 * SIDE * SIDE * _SCALE * _SCALE
    ranked = np.sort(low, axis=None)
    bits = low > (ranked[_KEPT * _KEPT // 2 - 1] + ranked[_KEPT * _KEPT // 2]) / 2
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def distance(one: int, other: int) -> int:
    """Number of bits in which two hashes differ, 0-64."""
    return bin(one ^ other).count("1")


@functools.cache
def _cosines() -> np.ndarray:
    """[8, 32]: the lowest frequencies of the DCT-II, times 2**18, as whole numbers."""
    angles = np.pi * np.arange(_KEPT)[:, None] * (2 * np.arange(SIDE)[None] + 1) / (2 * SIDE)
    return np.rint(np.cos(angles) * _SCALE)
