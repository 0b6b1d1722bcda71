"""Bounds on scores."""

from typing import Any

import numpy as np
import pytest

from data_prep.config import ScoreConfig
from data_prep.filters.scores import check_bounds
from data_prep.reasons import Drop

SIMILARITY = ScoreConfig(name="similarity", min=0.3)
NSFW = ScoreConfig(name="nsfw", max=0.1)


@pytest.mark.parametrize("value", [0.3, "0.3", 1, np.float32(0.5), " 0.31 ", True, float("inf")])
def test_numbers_of_every_kind_are_kept_within_the_bounds(value: Any) -> None:
    check_bounds([SIMILARITY], {"similarity": value})


@pytest.mark.parametrize(
    ("values", "detail"),
    [
        ({"similarity": 0.2999}, "similarity 0.2999 < 0.3"),
        ({"similarity": "-1"}, "similarity -1 < 0.3"),
        ({}, "similarity missing"),
        ({"similarity": None}, "similarity missing"),
        ({"similarity": float("nan")}, "similarity missing"),
        ({"similarity": "NaN"}, "similarity missing"),
        ({"similarity": " "}, "similarity missing"),
        ({"similarity": "high"}, "similarity is no number: 'high'"),
        ({"similarity": [1]}, "similarity is no number: '[1]'"),
        ({"similarity": 0.9, "nsfw": 0.5}, "nsfw 0.5 > 0.1"),
    ],
)
def test_everything_else_is_dropped_and_says_why(values: dict[str, Any], detail: str) -> None:
    bounds = [SIMILARITY, NSFW] if "nsfw" in values else [SIMILARITY]
    with pytest.raises(Drop) as caught:
        check_bounds(bounds, values)
    assert (caught.value.reason, caught.value.detail) == ("score", detail)


def test_what_a_scorer_may_still_give_is_passed_over_but_not_an_empty_column() -> None:
    check_bounds([SIMILARITY, NSFW], {"similarity": 0.4}, may_miss=True)
    with pytest.raises(Drop, match="score"):
        check_bounds([SIMILARITY], {"similarity": None}, may_miss=True)
