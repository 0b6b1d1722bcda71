"""Affine coupling by the Triton kernels, with its backward pass.

Letters: B images, R rows (all but the last dimension), C channels, h = C / 2.
"""

from typing import Any

import torch
from torch import Tensor

from model.kernels.affine_coupling import triton_kernels
from model.kernels.first_order import first_order


def affine_coupling(
    first: Tensor, second: Tensor, params: Tensor, order: Tensor, inverse_order: Tensor, *, joined: bool
) -> tuple[tuple[Tensor, ...], Tensor]:
    """As `interface.affine_coupling`, fp32."""
    *out, logdet = _AffineCoupling.apply(first, second, params, order, inverse_order, joined)
    return tuple(out), logdet


def affine_coupling_inverse(first: Tensor, second: Tensor, params: Tensor, order: Tensor, *, joined: bool) -> tuple[Tensor, ...]:
    """As `interface.affine_coupling_inverse`, fp32, without gradients."""
    out, out_first, out_second = _outputs(first, joined)
    triton_kernels.launch_fwd(_rows(first), _rows(second), _rows(params), _index(order), out_first, out_second, None)
    return out


class _AffineCoupling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, params: Tensor, order: Tensor, inverse_order: Tensor, joined: bool) -> tuple[Tensor, ...]:
        out, out_first, out_second = _outputs(first, joined)
        logdet = torch.empty(first.numel() // first.shape[-1], dtype=first.dtype, device=first.device)  # of each row
        triton_kernels.launch_fwd(_rows(first), _rows(second), _rows(params), _index(order), out_first, out_second, logdet)
        # x2 and the parameters, 3h floats of a row. The outputs in their place would be 2h and the whole parameters, of which a is a part.
        ctx.save_for_backward(second, params, inverse_order)
        ctx.joined = joined
        return *out, logdet.view(len(first), -1).sum(1)

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        second, params, inverse_order = ctx.saved_tensors
        *d_out, d_logdet = gradients
        d_first, d_second = _rows(d_out[0]).chunk(2, dim=-1) if ctx.joined else map(_rows, d_out)
        inputs = _rows(second), _rows(params), _index(inverse_order)
        d_first, d_params = triton_kernels.launch_bwd(d_first, d_second, d_logdet.contiguous(), *inputs)
        d_params = d_params.view(params.shape)
        # d(x2 + b)/dx2 = d(x2 + b)/db: the same numbers in the same memory.
        return d_first.view(second.shape), d_params[..., : second.shape[-1]], d_params, None, None, None


def _outputs(like: Tensor, joined: bool) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """(what the caller gets, its first half, its second half as rows [R, h])."""
    half = like.shape[-1]
    if joined:
        y = torch.empty((*like.shape[:-1], 2 * half), dtype=like.dtype, device=like.device)
        first, second = y.view(-1, 2 * half).chunk(2, dim=-1)
        return (y,), first, second
    parts = tuple(torch.empty(like.shape, dtype=like.dtype, device=like.device) for _ in range(2))
    return parts, parts[0].view(-1, half), parts[1].view(-1, half)


def _rows(x: Tensor) -> Tensor:
    """[..., n] -> [R, n] with last stride 1, a copy only where no view is."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _index(order: Tensor) -> Tensor:
    """int32: less to read."""
    return order.to(torch.int32).contiguous()
