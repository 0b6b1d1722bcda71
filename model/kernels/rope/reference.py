"""Plain torch: rotary position embedding in the half-split form (spec 1.6).

Letters: B examples, S positions, H head width.
"""

import torch
from torch import Tensor

from model.kernels.precision import widen


def apply_rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x1 cos - x2 sin, x2 cos + x1 sin) for the halves x1, x2 of each head: [B, heads, S, H] -> the same, in the dtype of x."""
    first, second = widen(x).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
