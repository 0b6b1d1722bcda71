"""Rotary position embedding in the half-split form of Gemma (spec 1.6).

Letters: B examples, S positions, H head width.
"""

import torch
from torch import Tensor

from model.kernels.precision import widen

BASE = 10_000.0


def rope_tables(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position / BASE**(2i/H), fp32 [B, 1, S, H/2], for int64 positions [B, S]."""
    exponents = torch.arange(head_dim // 2, device=positions.device, dtype=torch.float32) * (2.0 / head_dim)
    angles = positions[:, None, :, None].float() / BASE**exponents
    return torch.cos(angles), torch.sin(angles)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates (x[:H/2], x[H/2:]) pairs in fp32: [B, heads, S, H] -> the same, in the dtype of x."""
    first, second = widen(x).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
