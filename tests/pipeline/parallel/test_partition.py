"""The stage cut is contiguous, non-empty, and as even as any can be."""

import itertools
import random

import pytest

from pipeline.parallel.partition import partition, stage_costs


def brute_force(costs: list[float], num_stages: int) -> float:
    inner = itertools.combinations(range(1, len(costs)), num_stages - 1)
    return min(max(stage_costs(costs, [0, *cut, len(costs)])) for cut in inner)


def test_no_other_cut_has_a_cheaper_largest_stage() -> None:
    generator = random.Random(0)
    for _ in range(200):
        costs = [generator.choice([0.0, 1.0, 2.0, 5.0, 20.0]) + generator.random() for _ in range(generator.randint(1, 9))]
        num_stages = generator.randint(1, len(costs))
        bounds = partition(costs, num_stages)
        assert bounds[0] == 0
        assert bounds[-1] == len(costs)
        assert all(a < b for a, b in itertools.pairwise(bounds)), "every stage holds a layer"
        assert max(stage_costs(costs, bounds)) == pytest.approx(brute_force(costs, num_stages))


def test_layers_without_cost_do_not_leave_a_stage_empty() -> None:
    assert partition([0.0, 0.0, 0.0], 3) == [0, 1, 2, 3]
    assert partition([0.0, 5.0, 0.0, 0.0], 2)[1] in (1, 2, 3)


def test_a_heavy_head_gets_a_stage_of_its_own() -> None:
    assert partition([1, 1, 1, 1, 10], 2) == [0, 4, 5]


@pytest.mark.parametrize("num_stages", [0, 4])
def test_impossible_cut_is_refused(num_stages: int) -> None:
    with pytest.raises(ValueError, match="cannot be cut"):
        partition([1.0, 2.0, 3.0], num_stages)
