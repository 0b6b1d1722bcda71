"""The affine map of a coupling with the permutation that follows it (spec 1.3).

Letters: B images, h = C / 2 channels of a half.
"""

import torch
from torch import Tensor

from configs.errors import UserError
from model.kernels.affine_coupling import reference
from model.kernels.dispatch import choose

MAX_CHANNELS = 8192
"""The kernel holds a row in the registers and the shared memory of one program."""


def affine_coupling(
    first: Tensor,
    second: Tensor,
    params: Tensor,
    order: Tensor,
    inverse_order: Tensor,
    *,
    joined: bool,
    impl: str = "auto",
) -> tuple[tuple[Tensor, ...], Tensor]:
    """y2 = (x2 + b) * 2 sigmoid(a), and [x1 | y2][order].

    Args:
        first, second: x1 and x2, [B, ..., h]; rows may be strided.
        params: [b | a], shifts and raw scales, [B, ..., C]. One tensor, as autograd would join the gradients of two.
        order: int32 or int64 [C]: the place in [x1 | y2] of each output channel.
        inverse_order: its inverse, [C], for the backward pass.
        joined: return [B, ..., C] rather than two halves.
        impl: a value of `KernelsConfig.affine_coupling`.

    Returns:
        ((y,) or (first, second), log-determinant [B] in nats, summed over all dimensions of an image). The gradients of `second` and
        of the shifts share memory: do not change one in place.

    Raises:
        ValueError: the shapes do not fit together.
        UserError: the requested implementation cannot run here.
    """
    if inverse_order.shape != order.shape:
        raise ValueError(f"inverse_order must be {list(order.shape)} as order is, not {list(inverse_order.shape)}")
    if _runs_in_triton(first, second, params, order, impl):
        from model.kernels.affine_coupling import autograd

        return autograd.affine_coupling(first, second, params, order, inverse_order, joined=joined)
    return reference.affine_coupling(first, second, params, order, joined=joined)


def affine_coupling_inverse(first: Tensor, second: Tensor, params: Tensor, order: Tensor, *, joined: bool, impl: str = "auto") -> tuple[Tensor, ...]:
    """x2 = y2 / (2 sigmoid(a)) - b, and [x1 | x2][order]: (x,) or (first, second). Arguments as of `affine_coupling`, second = y2.

    The kernel has no backward pass: where a gradient is wanted, `auto` takes the reference.

    Raises:
        ValueError: the shapes do not fit together.
        UserError: the requested implementation cannot run here.
    """
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (first, second, params))
    if _runs_in_triton(first, second, params, order, impl) and not wants_gradient:
        from model.kernels.affine_coupling import autograd

        return autograd.affine_coupling_inverse(first, second, params, order, joined=joined)
    return reference.affine_coupling_inverse(first, second, params, order, joined=joined)


def _runs_in_triton(first: Tensor, second: Tensor, params: Tensor, order: Tensor, impl: str) -> bool:
    shapes, half = [tuple(x.shape) for x in (first, second, params, order)], first.shape[-1]
    if first.dim() < 2 or shapes != [shapes[0], shapes[0], (*shapes[0][:-1], 2 * half), (2 * half,)]:
        raise ValueError(f"affine_coupling takes two halves [B, ..., h], params [B, ..., 2h] and an order [2h], not {shapes}")
    # One of another dtype is enough to be refused: the kernel reads what it is given.
    dtype = next((x.dtype for x in (first, second, params) if x.dtype != torch.float32), torch.float32)
    if impl == "auto" and (len(order) > MAX_CHANNELS or first.numel() == 0):
        return False
    is_triton = choose("affine_coupling", impl, first.device, dtype) == "triton"
    if is_triton and len(order) > MAX_CHANNELS:
        raise UserError(
            "kernels.affine_coupling=triton cannot run here",
            got=f"{len(order)} channels per token",
            expected=f"at most {MAX_CHANNELS}: a row must fit into one program",
            fix="set kernels.affine_coupling=auto",
        )
    return is_triton and first.numel() > 0
