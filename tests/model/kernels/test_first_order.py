"""Fused operations have first gradients only, and say so where somebody asks for more."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.kernels.affine_coupling.interface import affine_coupling
from model.kernels.dispatch import triton_version
from model.kernels.geglu.interface import geglu
from model.kernels.layer_norm.interface import layer_norm
from model.kernels.rms_norm.interface import rms_norm
from model.kernels.rope.interface import apply_rope


def coupled(x: Tensor, impl: str) -> Tensor:
    order = torch.arange(8, device=x.device)
    return affine_coupling(x[..., :4], x[..., 4:], x, order, order, joined=True, impl=impl)[0][0]


OPERATIONS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "affine_coupling": coupled,
    "geglu": lambda x, impl: geglu(x, x, impl=impl),
    "layer_norm": lambda x, impl: layer_norm(x, x[0, 0, 0].detach(), x[0, 0, 0].detach(), out_dtype=torch.float32, impl=impl),
    "rms_norm": lambda x, impl: rms_norm(x, x[0, 0, 0].detach(), impl=impl),
    "rope": lambda x, impl: apply_rope(x, x[:1, :1, :, :4].detach(), x[:1, :1, :, 4:].detach(), impl=impl),
}


@pytest.fixture(params=OPERATIONS)
def operation(request: pytest.FixtureRequest, triton_device: torch.device) -> Callable[[Tensor, str], Tensor]:
    if request.param == "affine_coupling" and triton_version() < (3, 4):
        pytest.skip("the coupling's kernel needs Triton 3.4")
    return OPERATIONS[request.param]


def test_create_graph_is_refused(operation: Callable[[Tensor, str], Tensor], triton_device: torch.device) -> None:
    """The gradient of a sum is a constant: what comes of it would pass for one too, and a penalty on it would count nothing."""
    x = torch.linspace(-1, 1, 96, device=triton_device).view(2, 2, 3, 8).requires_grad_()
    torch.autograd.grad(operation(x, "reference").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="create_graph=True asks for gradients"):
        torch.autograd.grad(operation(x, "triton").sum(), x, create_graph=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_is_not_taken_for_it(operation: Callable[[Tensor, str], Tensor], triton_device: torch.device, reentrant: bool) -> None:
    x = torch.linspace(-1, 1, 96, device=triton_device).view(2, 2, 3, 8).requires_grad_()
    checkpoint(operation, x, "triton", use_reentrant=reentrant).sum().backward()
    (expected,) = torch.autograd.grad(operation(x, "triton").sum(), x)
    assert x.grad is not None
    assert torch.equal(x.grad, expected)
