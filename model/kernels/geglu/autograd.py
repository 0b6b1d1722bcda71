"""Gradients of the gated activation; the activation is recomputed, so two tensors are kept and not three."""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from model.kernels.first_order import first_order
from model.kernels.geglu.triton_kernels import launch_geglu_bwd, launch_geglu_fwd


class GegluFunction(Function):
    """Saved: gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """[..., F] twice -> [..., F]."""
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return launch_geglu_fwd(gate, up)

    @staticmethod
    @first_order
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        """Of gate and up."""
        gate, up = ctx.saved_tensors
        return launch_geglu_bwd(gate, up, d_out)
