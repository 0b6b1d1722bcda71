"""Plain torch: RMSNorm with a (1 + scale) gain, and the residual addition with dropout before it (spec 1.6).

Letters: B examples, S positions, D width.
"""

import torch
from torch import Tensor

from model.kernels.precision import widen
from model.kernels.splitmix import DropoutKey, keep_mask

RMS_NORM_EPS = 1e-6


def rms_norm_reference(x: Tensor, scale: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (1 + scale): [..., D], [D] -> [..., D] in the dtype of x."""
    wide = widen(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_NORM_EPS)
    return (normed * (1 + widen(scale))).to(x.dtype)


def add_dropout_reference(x: Tensor, branch: Tensor, dropout: DropoutKey | None) -> Tensor:
    """x + keep * branch / (1 - p): [B, ..., D] twice -> [B, ..., D]. The quotient is rounded to the dtype of x, and so is the sum."""
    if dropout is None:
        return x + branch
    keep = keep_mask(dropout, branch.shape[1:])
    return x + torch.where(keep, branch / (1 - dropout.probability), 0)
