"""No figure before the result was compared: the three-way rule of tests/model/kernels/checks.py, on the device and at the benchmark's shape."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tests.model.kernels.checks import TOLERANCE

Results = Mapping[str, Tensor]
CHANCE = 1.1
"""Two errors of the same size differ by chance; in the tests, whose inputs are fixed, this is not needed."""
CHUNK = 2**26


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth, in fp64 on their device; infinite where only one of them is finite."""
    assert found.shape == truth.shape, (found.shape, truth.shape)
    difference = scale = 0.0
    for a, b in zip(found.detach().flatten().split(CHUNK), truth.detach().flatten().split(CHUNK), strict=True):
        a, b = a.double(), b.double()
        difference += float((a - b).square().sum())
        scale += float(b.square().sum())
    if not (difference < float("inf") and scale < float("inf")):
        return float("inf")
    return (difference / scale) ** 0.5 if scale else difference**0.5


def compare_with_reference(
    found: Results, eager: Callable[[], Results], truth: Callable[[], Results], *, dtype: torch.dtype, tolerance: float | None = None
) -> str:
    """The three-way rule, with the reference in the kernel's dtype as `eager`, and in a wider one as `truth`.

    Returns:
        A sentence with the largest errors.

    Raises:
        AssertionError: an output or a gradient is less exact than eager's.
    """
    true = dict(truth())
    ours = {name: relative_error(found[name], value) for name, value in true.items()}
    del found
    others = {name: relative_error(value, true[name]) for name, value in eager().items()}
    allowed = TOLERANCE[dtype] if tolerance is None else tolerance
    worse = {name: (error, others[name]) for name, error in ours.items() if not error <= CHANCE * others[name] + allowed}
    assert not worse, f"wrong, and so not timed; (its error, eager's error): {worse}"
    worst = max(ours, key=lambda name: ours[name])
    return f"checked against the reference at this shape: largest relative error {ours[worst]:.1e} ({worst}), eager's there {others[worst]:.1e}"
