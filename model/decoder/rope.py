"""Tables of the rotary position embedding (spec 1.6); `model.kernels.rope` applies them.

Letters: B examples, S positions, H head width.
"""

import torch
from torch import Tensor

BASE = 10_000.0


def rope_tables(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position / BASE**(2i/H), fp32 [B, 1, S, H/2], for int64 positions [B, S]."""
    exponents = torch.arange(head_dim // 2, device=positions.device, dtype=torch.float32) * (2.0 / head_dim)
    angles = positions[:, None, :, None].float() / BASE**exponents
    return torch.cos(angles), torch.sin(angles)
