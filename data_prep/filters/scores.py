"""Bounds on scores: columns of the input, or what a scorer gives."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from data_prep.config import ScoreConfig
from data_prep.reasons import Drop


def check_bounds(bounds: Iterable[ScoreConfig], values: Mapping[str, Any], *, may_miss: bool = False) -> None:
    """Judges the values that have a bound. Text that reads as a number is one, as in CSV.

    Args:
        may_miss: pass over scores without a value, because a scorer may still give them.

    Raises:
        Drop: score: out of bounds, no number, or missing (also None, NaN and empty text): what was never scored was not found good.
    """
    for bound in bounds:
        value = _as_number(bound.name, values.get(bound.name))
        if value is None:
            if may_miss and bound.name not in values:
                continue
            raise Drop("score", f"{bound.name} missing")
        if bound.min is not None and value < bound.min:
            raise Drop("score", f"{bound.name} {value:g} < {bound.min:g}")
        if bound.max is not None and value > bound.max:
            raise Drop("score", f"{bound.name} {value:g} > {bound.max:g}")


def _as_number(name: str, value: Any) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise Drop("score", f"{name} is no number: {str(value)[:50]!r}") from None
    return None if math.isnan(number) else number
