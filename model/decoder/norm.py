"""RMS norm with a (1 + scale) gain (spec 1.6)."""

import torch
from torch import Tensor, nn

from model.kernels.rms_norm.interface import rms_norm


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (1 + scale), computed in fp32, returned in the dtype of x."""

    def __init__(self, width: int, *, impl: str = "auto") -> None:
        """
        Args:
            width: D.
            impl: `kernels.rms_norm`.
        """
        super().__init__()
        self.impl = impl
        self.scale = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return rms_norm(x, self.scale, impl=self.impl)
