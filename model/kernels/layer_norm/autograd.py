"""Gradients of the Triton kernels: what is kept for the backward pass is the sum and two numbers per row."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from model.kernels.first_order import first_order
from model.kernels.layer_norm.triton_kernels import launch_bwd, launch_fwd


class LayerNormFunction(Function):
    """Saved: x, weight, mean fp32 [N], rstd fp32 [N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, out_dtype: torch.dtype) -> Tensor:
        """[..., W], [W] twice -> [..., W]."""
        x, normed, mean, rstd = launch_fwd(x, None, weight, bias, out_dtype)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = bias.dtype
        return normed

    @staticmethod
    @first_order
    def backward(ctx: Any, d_normed: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        """Of x, weight and bias."""
        x, weight, mean, rstd = ctx.saved_tensors
        x_dtype = x.dtype if ctx.needs_input_grad[0] else None
        d_x, _, (d_weight, d_bias) = launch_bwd(x, weight, mean, rstd, d_normed, None, x_dtype=x_dtype, branch_dtype=None)
        return d_x, d_weight.to(weight.dtype), d_bias.to(ctx.bias_dtype), None


class AddLayerNormFunction(Function):
    """Saved: the sum, weight, mean fp32 [N], rstd fp32 [N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[B or 1, ..., W], [B, ..., W], [W] twice -> the sum [B, ..., W] and its norm."""
        total, normed, mean, rstd = launch_fwd(x, branch, weight, bias, out_dtype)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.set_materialize_grads(False)  # the last sum of a network has no reader but the norm: no zeros to be read for it
        ctx.repeats = x.shape != branch.shape
        ctx.dtypes = x.dtype, branch.dtype, bias.dtype
        return total, normed

    @staticmethod
    @first_order
    def backward(
        ctx: Any, d_total: Tensor | None, d_normed: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
        """Of x, the branch, weight and bias."""
        x_dtype, branch_dtype, bias_dtype = ctx.dtypes
        d_weight = d_bias = None
        if d_normed is None:
            d_x = d_branch = d_total
        else:
            total, weight, mean, rstd = ctx.saved_tensors
            wants_x, wants_branch = ctx.needs_input_grad[:2]
            summed = total.dtype if ctx.repeats else x_dtype  # before it is summed over the examples
            d_x, d_branch, (d_weight, d_bias) = launch_bwd(
                total, weight, mean, rstd, d_normed, d_total, x_dtype=summed if wants_x else None, branch_dtype=branch_dtype if wants_branch else None
            )
            d_weight, d_bias = d_weight.to(weight.dtype), d_bias.to(bias_dtype)
        if d_x is not None:
            d_x = (d_x.sum(0, keepdim=True) if ctx.repeats else d_x).to(x_dtype)
        return d_x, None if d_branch is None else d_branch.to(branch_dtype), d_weight, d_bias, None
