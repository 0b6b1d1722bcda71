"""The learning rate is the function of spec 1.9."""

import math

import pytest

from pipeline.config import OptimizerConfig
from pipeline.schedule import learning_rate


def test_first_update_of_the_reference_schedule_does_not_move() -> None:
    assert learning_rate(OptimizerConfig(), 0, 1000) == 0.0


def test_cosine_matches_the_formula_of_the_reference() -> None:
    config, total = OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.1), 1000
    for step in (1, 50, 99, 100, 101, 550, 999, 1000, 1200):
        progress = min(max((step - 100) / 900, 0.0), 1.0)
        expected = 1e-3 * min(1.0, step / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        assert learning_rate(config, step, total) == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert learning_rate(config, 100, total) == pytest.approx(1e-3)
    assert learning_rate(config, 1000, total) == pytest.approx(0.0, abs=1e-18)


def test_wsd_is_constant_between_warmup_and_decay() -> None:
    config = OptimizerConfig(learning_rate=2.0, schedule="wsd", warmup_fraction=0.1, decay_fraction=0.2)
    assert learning_rate(config, 5, 100) == pytest.approx(1.0)
    assert [learning_rate(config, step, 100) for step in (10, 50, 80)] == [2.0, 2.0, 2.0]
    assert learning_rate(config, 90, 100) == pytest.approx(1.0)
    assert learning_rate(config, 100, 100) == 0.0


def test_constant_only_warms_up_and_may_skip_that() -> None:
    assert learning_rate(OptimizerConfig(schedule="constant", learning_rate=0.5), 999, 1000) == 0.5
    assert learning_rate(OptimizerConfig(schedule="constant", learning_rate=0.5, warmup_fraction=0.0), 0, 1000) == 0.5
