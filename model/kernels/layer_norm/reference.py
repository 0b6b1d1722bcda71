"""Plain torch: LayerNorm with gain and shift in fp32, and the residual addition before it (spec 1.3).

Letters: W width.
"""

import torch
from torch import Tensor
from torch.nn import functional

from model.kernels.precision import widen

LAYER_NORM_EPS = 1e-6


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, out_dtype: torch.dtype) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias: [..., W], [W] twice -> [..., W], rounded once, to `out_dtype`."""
    wide = widen(x)  # torch wants the parameters in its dtype
    return functional.layer_norm(wide, x.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), LAYER_NORM_EPS).to(out_dtype)


def add_layer_norm_reference(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x + branch, its norm): x and branch broadcast, and their sum has the wider dtype of the two."""
    total = x + branch
    return total, layer_norm_reference(total, weight, bias, out_dtype)
