"""Gradients added by many are the gradients added one by one."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pipeline.parallel import gradient_sums
from pipeline.parallel.gradient_sums import GradientSums

SHAPES = [(3,), (4, 5), (40, 50), (1,), (7, 2)]


@pytest.fixture
def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in SHAPES]


@pytest.fixture
def optimizer() -> SimpleNamespace:
    """DeepSpeed's lists: two groups of flat fp32 accumulators."""
    totals = [torch.zeros(shape) for shape in SHAPES]
    return SimpleNamespace(fp32_groups_gradients=[totals[:2], totals[2:]], fp32_groups_has_gradients=[[False] * 2, [False] * 3])


@pytest.mark.parametrize(
    ("small", "most"), [(2**20, 2**24), (100, 2**24), (2**20, 30), (0, 0)], ids=["wait", "large at once", "little room", "none waits"]
)
def test_sums_over_micro_batches_equal_those_of_single_additions(parameters, optimizer, small, most, monkeypatch) -> None:
    monkeypatch.setattr(gradient_sums, "SMALL", small)
    monkeypatch.setattr(gradient_sums, "MAX_WAITING", most)
    sums, generator = GradientSums(optimizer), torch.Generator().manual_seed(0)
    expected = [torch.zeros(shape) for shape in SHAPES]
    for _ in range(3):
        for number in (4, 0, 2, 1):  # parameter 3 gets none
            gradient = torch.randn(SHAPES[number], generator=generator).bfloat16()
            expected[number].add_(gradient.float())
            parameters[number].grad = gradient
            sums(parameters[number], *((0, number) if number < 2 else (1, number - 2)))
            assert parameters[number].grad is None
    sums.flush()
    found = [*optimizer.fp32_groups_gradients[0], *optimizer.fp32_groups_gradients[1]]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert optimizer.fp32_groups_has_gradients == [[True, True], [True, False, True]]
    assert parameters[2]._hp_grad is found[2]


def test_a_parameter_without_gradient_is_left_alone(parameters, optimizer) -> None:
    sums = GradientSums(optimizer)
    sums(parameters[0], 0, 0)
    sums.flush()
    assert not optimizer.fp32_groups_has_gradients[0][0]
