"""The text head's likelihood: against torch.nn, by chunks, and split over ranks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.kernels.linear_cross_entropy.interface import linear_cross_entropy, linear_cross_entropy_loss
from tests.model.kernels.checks import assert_as_exact_as_eager, assert_same_twice, strided

SHAPES = [(1, 3, 1), (5, 20, 24), (251, 65, 33), (1023, 16, 320), (7, 48, 3003)]
"""(N, D, V)."""


def make_inputs(shape: tuple[int, int, int], *, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    num_tokens, width, pieces = shape
    generator = torch.Generator().manual_seed(seed)
    values = {
        "hidden": torch.randn(num_tokens, width, generator=generator),
        "weight": torch.randn(pieces, width, generator=generator) * 2 * width**-0.5,
        "bias": torch.randn(pieces, generator=generator),
    }
    targets = torch.randint(0, pieces, (num_tokens,), generator=generator)
    return {name: value.to(device, dtype).requires_grad_() for name, value in values.items()}, targets.to(device)


def token_weights(num_tokens: int, device: torch.device) -> Tensor:
    weight = torch.linspace(0.2, 1.7, num_tokens)
    weight[num_tokens // 2] = 0.0
    return weight.to(device)


def per_token(inputs: dict[str, Tensor], targets: Tensor, **options: object) -> dict[str, Tensor]:
    nll = linear_cross_entropy(*inputs.values(), targets, **options)  # type: ignore[arg-type]
    loss = (nll * token_weights(len(nll), nll.device)).sum()
    return {"nll": nll, **dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))}


def one_pass(inputs: dict[str, Tensor], targets: Tensor, **options: object) -> dict[str, Tensor]:
    weight = token_weights(len(targets), targets.device)
    loss, nll = linear_cross_entropy_loss(*inputs.values(), targets, weight, **options)  # type: ignore[arg-type]
    return {"nll": nll, **dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))}


def truth_of(inputs: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
    return per_token({name: value.detach().double().requires_grad_() for name, value in inputs.items()}, targets, impl="reference")


def test_reference_is_cross_entropy() -> None:
    inputs, targets = make_inputs((6, 5, 9), dtype=torch.float64)
    expected = functional.cross_entropy(inputs["hidden"] @ inputs["weight"].T + inputs["bias"], targets, reduction="none")
    torch.testing.assert_close(linear_cross_entropy(*inputs.values(), targets, impl="reference"), expected)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradients_pass_gradcheck(impl: str) -> None:
    inputs, targets = make_inputs((4, 3, 5), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: linear_cross_entropy(*x, targets, impl=impl, workspace_bytes=1), tuple(inputs.values()))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_are_as_exact_as_eager(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    inputs, targets = make_inputs(shape, dtype=dtype, device=device)
    truth, eager = truth_of(inputs, targets), per_token(inputs, targets, impl="reference")
    for run in (per_token, one_pass):
        found = run(inputs, targets, impl="torch", workspace_bytes=10 * shape[2] * 100)
        assert_as_exact_as_eager(found, eager, truth, dtype=dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_change_nothing_and_leave_no_memory_unwritten(chunk: int) -> None:
    inputs, targets = make_inputs((7, 12, 5), dtype=torch.float32)
    expected = per_token(inputs, targets, impl="reference")
    for run in (per_token, one_pass):
        found = run({name: strided(value) for name, value in inputs.items()}, targets, impl="torch", workspace_bytes=chunk * 10 * 5)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=2e-5, atol=1e-6)


def test_extreme_logits_are_finite() -> None:
    inputs, targets = make_inputs((6, 4, 8), dtype=torch.float32)
    with torch.no_grad():
        inputs["bias"][::2], inputs["bias"][1::2] = 1e4, -1e4
    truth, eager = truth_of(inputs, targets), per_token(inputs, targets, impl="reference")
    found = one_pass(inputs, targets, impl="torch")
    assert all(value.isfinite().all() for value in found.values())
    assert_as_exact_as_eager(found, eager, truth, dtype=torch.float32)


def test_same_twice() -> None:
    inputs, targets = make_inputs((300, 16, 40), dtype=torch.bfloat16)
    assert_same_twice(lambda: one_pass(inputs, targets, impl="torch", workspace_bytes=10 * 40 * 128))


@pytest.mark.parametrize("run", [per_token, one_pass])
def test_autocast_changes_nothing(run: Callable[..., dict[str, Tensor]]) -> None:
    inputs, targets = make_inputs((5, 6, 9), dtype=torch.float32)
    expected = run(inputs, targets, impl="torch")
    with torch.autocast("cpu", torch.bfloat16):
        found = run(inputs, targets, impl="torch")
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_no_tokens() -> None:
    inputs, targets = make_inputs((1, 6, 4), dtype=torch.float32)
    loss, nll = linear_cross_entropy_loss(inputs["hidden"][:0], inputs["weight"], inputs["bias"], targets[:0], torch.ones(0))
    loss.backward()
    assert nll.shape == (0,)
    assert inputs["weight"].grad is not None
    assert float(inputs["weight"].grad.abs().sum()) == 0


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("piece", [-100, -1, 9])
def test_a_target_that_is_no_piece_is_an_error(piece: int, impl: str) -> None:
    """Not a likelihood that looks like any other, and not a token that counts nothing."""
    inputs, targets = make_inputs((5, 6, 9), dtype=torch.float32)
    targets[2] = piece
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        linear_cross_entropy(*inputs.values(), targets, impl=impl)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        linear_cross_entropy_loss(*inputs.values(), targets, token_weights(5, targets.device), impl=impl)


def test_what_does_not_fit_is_named() -> None:
    inputs, targets = make_inputs((4, 3, 5), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"must be \[N, D\], \[V, D\], \[V\] and \[N\], got \[4, 3\], \[5, 3\], \[5\], \[3\]"):
        linear_cross_entropy(*inputs.values(), targets[:3])
    with pytest.raises(ValueError, match=r"token_weight must be \[4\] constants"):
        linear_cross_entropy_loss(*inputs.values(), targets, torch.ones(3))
    with pytest.raises(ValueError, match="weight and bias must have one dtype"):
        linear_cross_entropy(inputs["hidden"], inputs["weight"], inputs["bias"].bfloat16(), targets)
