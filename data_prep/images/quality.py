"""What a picture's source and pixels say about its worth."""

import functools
from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from data_prep.config import FilterConfig
from data_prep.reasons import Drop

_NOISE = 0.1  # energy of a coefficient that is nothing but the rounding of pixels to whole levels, 1/12, and a little more
_LINES = 32  # rows, and columns, whose spectrum is taken
_BORDER_LEVELS = 10  # grey levels by which JPEG's ringing may shake a border
_TOLERANCE = 0.02
"""Tables that differ from a standard one by this share in sum are that one with another rounding."""

# Annex K of ITU-T T.81, table K.1 (luma), row by row.
_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


def jpeg_quality(tables: Mapping[int, Sequence[int]]) -> int:
    """Quality 1-100 at which libjpeg scales its standard luma table to table 0; -1 if it is no scaled standard table.

    Args:
        tables: number of the table -> its 64 values, row by row (not in zigzag order). Only table 0, that of luma, is read:
            encoders that give colour another quality do so to save bytes where it is seen least.
    """
    table = tables.get(0)
    if table is None or len(table) != 64:
        return -1
    exact = _exact().get(tuple(table))
    if exact is not None:
        return exact
    errors = np.abs(_standard() - np.asarray(table)).sum(axis=1) / _standard().sum(axis=1)
    best = int(errors.argmin())
    return best + 1 if errors[best] <= _TOLERANCE else -1


@functools.cache
def _standard() -> np.ndarray:
    """int64 [100, 64]: the luma tables of qualities 1 to 100."""
    quality = np.arange(1, 101)[:, None]
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return np.clip((np.asarray(_LUMA).reshape(1, 64) * scale + 50) // 100, 1, 255)


@functools.cache
def _exact() -> dict[tuple[int, ...], int]:
    return {tuple(row): number for number, row in enumerate(_standard().tolist(), start=1)}


def check_pixels(pixels: np.ndarray, filters: FilterConfig) -> None:
    """Judges a picture as it will be stored, uint8 [h, w] or [h, w, 3] (RGB). Each measure is taken only if its filter is on.

    Raises:
        Drop: blank, border or upscaled.
    """
    if not filters.min_contrast and filters.max_border >= 1 and not filters.min_detail:
        return
    luma = pixels if pixels.ndim == 2 else np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))
    if filters.min_contrast and (found := contrast(luma)) < filters.min_contrast:
        raise Drop("blank", f"contrast {found:.1f}")
    if filters.max_border < 1 and (found := border_share(luma)) > filters.max_border:
        raise Drop("border", f"{100 * found:.0f} %")
    if filters.min_detail and (found := detail(luma)) < filters.min_detail:
        raise Drop("upscaled", f"detail {found:.1f}")


def contrast(luma: np.ndarray) -> float:
    """Standard deviation of uint8 [h, w], in grey levels; blank pictures have less than about 4."""
    return float(cv2.meanStdDev(luma)[1][0, 0])


def border_share(luma: np.ndarray) -> float:
    """Share, 0-1, of the height or the width (the larger one) of uint8 [h, w] that lines of one colour take at its two ends.

    A line belongs to a border if all of it is within a few levels of the outermost line's mean, so a sky that fades is none.
    """
    return max(_constant_ends(luma, axis=1), _constant_ends(luma, axis=0))


def _constant_ends(luma: np.ndarray, axis: int) -> float:
    lowest, highest = luma.min(axis=axis).astype(np.int16), luma.max(axis=axis).astype(np.int16)
    total = 0
    for step in (1, -1):
        low, high = lowest[::step], highest[::step]
        level = (int(low[0]) + int(high[0])) / 2
        outside = (low < level - _BORDER_LEVELS) | (high > level + _BORDER_LEVELS)
        if not outside.any():
            return 1.0
        total += int(outside.argmax())
    return total / len(lowest)


def detail(luma: np.ndarray) -> float:
    """Energy in the upper half of the frequencies of uint8 [h, w] over that in the two octaves below, in permille.

    A ratio of neighbouring bands, because the share of all energy says more about how plain a picture is than about how sharp.
    Measured at 256 pixels: 40 photographs shrunk, cut out, saved as JPEG have 34 to 390 (the least: one blurred by motion; 5 % below 59); enlarged
    2 to 4 times, at most 31.
    """
    step = max(1, min(luma.shape) // _LINES)
    upper, lower = 0.0, 0.0
    for lines in (luma[::step], luma[:, ::step].T):
        length = lines.shape[1] & ~1  # OpenCV's transform wants an even one
        if length < 16:
            return 0.0
        waves = cv2.dct(np.ascontiguousarray(lines[:, :length], dtype=np.float32), flags=cv2.DCT_ROWS)
        energy = np.einsum("nf,nf->f", waves, waves)
        upper += float(energy[length // 2 :].sum()) - _NOISE * lines.shape[0] * (length // 2)
        lower += float(energy[length // 8 : length // 2].sum()) + lines.shape[0] * (length // 2 - length // 8)
    return max(0.0, 1000 * upper / lower)
