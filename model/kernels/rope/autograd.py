"""Gradient of the rotation: the rotation back."""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from model.kernels.first_order import first_order
from model.kernels.rope.triton_kernels import launch_rope


class RopeFunction(Function):
    """Saved: the tables fp32 [B or 1, 1, S, H/2], which all layers share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, heads, S, H] -> the same."""
        ctx.save_for_backward(cos, sin)
        return launch_rope(x, cos, sin, reverse=False)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Of x."""
        cos, sin = ctx.saved_tensors
        return launch_rope(grad, cos, sin, reverse=True), None, None
