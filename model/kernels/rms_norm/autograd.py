"""Gradients of the Triton kernels: what is kept for the backward pass is the sum and one number per row, no mask."""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from model.kernels.first_order import first_order
from model.kernels.rms_norm.triton_kernels import launch_dropout_bwd, launch_norm_bwd, launch_norm_fwd
from model.kernels.splitmix import DropoutKey


class RmsNormFunction(Function):
    """Saved: x, scale, rstd fp32 [N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        """[..., D], [D] -> [..., D]."""
        x = x.contiguous()
        _, normed, rstd = launch_norm_fwd(x, None, scale, None)
        ctx.save_for_backward(x, scale, rstd)
        return normed

    @staticmethod
    @first_order
    def backward(ctx: Any, d_normed: Tensor) -> tuple[Tensor, Tensor]:
        """Of x and scale."""
        x, scale, rstd = ctx.saved_tensors
        d_x, _, d_scale = launch_norm_bwd(x, scale, rstd, d_normed, None, None)
        return d_x, d_scale


class AddDropoutFunction(Function):
    """Saved: the keys int64 [B]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, keys: Tensor, dropout: DropoutKey) -> Tensor:
        """[B, ..., D] twice -> [B, ..., D]."""
        ctx.save_for_backward(keys)
        ctx.probability = dropout.probability
        return launch_norm_fwd(x, branch, None, dropout)[0]

    @staticmethod
    @first_order
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Of x and the branch."""
        (keys,) = ctx.saved_tensors
        return d_total, launch_dropout_bwd(d_total, DropoutKey(keys, ctx.probability)), None, None


class AddDropoutRmsNormFunction(Function):
    """Saved: the sum, scale, rstd fp32 [N], and the keys int64 [B] where there is dropout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, scale: Tensor, keys: Tensor | None, dropout: DropoutKey | None) -> tuple[Tensor, Tensor]:
        """[B, ..., D] twice, [D] -> the sum and its norm."""
        total, normed, rstd = launch_norm_fwd(x, branch, scale, dropout)
        ctx.save_for_backward(total, scale, rstd, keys)
        ctx.probability = None if dropout is None else dropout.probability
        return total, normed

    @staticmethod
    @first_order
    def backward(ctx: Any, d_total: Tensor, d_normed: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Of x, the branch and scale."""
        total, scale, rstd, keys = ctx.saved_tensors
        dropout = None if keys is None else DropoutKey(keys, ctx.probability)
        d_x, d_branch, d_scale = launch_norm_bwd(total, scale, rstd, d_normed, d_total, dropout)
        return d_x, d_branch, d_scale, None, None
