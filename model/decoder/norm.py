"""RMS norm with a (1 + scale) gain (spec 1.6)."""

import torch
from torch import Tensor, nn

from model.kernels.precision import widen

RMS_NORM_EPS = 1e-6


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (1 + scale), computed in fp32, returned in the dtype of x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        wide = widen(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_NORM_EPS)
        return (normed * (1 + widen(self.scale))).to(x.dtype)
