"""What a picture's source and pixels say about its worth."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

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
