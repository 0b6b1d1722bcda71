"""Every layout reads the same samples per step, each exactly once."""

import numpy as np
import pytest

from pipeline.data.batching import BatchPlan, split_evenly

LAYOUTS = [(dp, micro) for dp in (1, 2, 3, 4, 6, 12) for micro in (1, 2, 3, 4, 6, 12, 24) if 24 % (dp * micro) == 0]


@pytest.mark.parametrize(("dp_degree", "micro_batch_size"), LAYOUTS)
@pytest.mark.parametrize("origin", [0, 1000])
def test_a_step_is_partitioned_over_ranks_and_micro_batches(dp_degree, micro_batch_size, origin):
    plan = BatchPlan(global_batch_size=24, dp_degree=dp_degree, micro_batch_size=micro_batch_size, origin=origin)
    for step in (0, 1, 10**9):
        parts = [plan.positions(step, dp_rank=rank, micro_batch=number) for rank in range(dp_degree) for number in range(plan.num_micro_batches)]
        assert {len(part) for part in parts} == {micro_batch_size}
        start = origin + step * 24
        np.testing.assert_array_equal(np.concatenate(parts), np.arange(start, start + 24))
        np.testing.assert_array_equal(plan.step_positions(step), np.arange(start, start + 24))
        assert plan.samples_seen(step) == start
        assert (plan.step_of(plan.step_positions(step)) == step).all()


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="global_batch_size=10 is not divisible by dp_degree"):
        BatchPlan(global_batch_size=10, dp_degree=2, micro_batch_size=4)
    with pytest.raises(ValueError, match="at least 1"):
        BatchPlan(global_batch_size=10, dp_degree=0, micro_batch_size=5)


@pytest.mark.parametrize(("step", "rank", "number"), [(-1, 0, 0), (0, 2, 0), (0, 0, 2), (0, -1, 0)])
def test_positions_outside_the_plan_are_refused(step, rank, number):
    plan = BatchPlan(global_batch_size=8, dp_degree=2, micro_batch_size=2)
    with pytest.raises(ValueError, match="no micro-batch"):
        plan.positions(step, dp_rank=rank, micro_batch=number)


@pytest.mark.parametrize(("num", "parts"), [(10, 3), (3, 3), (2, 5), (0, 4), (64, 1)])
def test_split_evenly_covers_everything_in_near_equal_parts(num, parts):
    bounds = split_evenly(num, parts)
    sizes = np.diff(bounds)
    assert bounds[0] == 0
    assert bounds[-1] == num
    assert sizes.max() - sizes.min() <= 1
