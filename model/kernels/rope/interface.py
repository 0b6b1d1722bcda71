"""Rotary position embedding.

Letters: B examples, S positions, H head width.
"""

import torch
from torch import Tensor

from model.kernels.dispatch import choose
from model.kernels.rope.reference import apply_rope_reference


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, impl: str = "auto") -> Tensor:
    """Rotates the pairs (x[i], x[i + H/2]) of every head by the angle of their position, in fp32 inside (spec 1.6).

    Args:
        x: [B, heads, S, H], any strides.
        cos, sin: [B or 1, 1, S, H/2], fp32; constants, they get no gradient from the kernel.
        impl: `kernels.rope`.

    Returns:
        [B, heads, S, H] in the dtype of x.

    Raises:
        ValueError: the shapes do not fit.
        UserError: `impl` cannot run here.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be [B, heads, S, H], not {list(x.shape)}")
    batch, _, length, head_dim = x.shape
    shapes = [(rows, 1, length, head_dim // 2) for rows in (1, batch)]
    if head_dim % 2 or cos.shape not in shapes or sin.shape != cos.shape:
        raise ValueError(f"tables {list(cos.shape)} and {list(sin.shape)} do not fit x {list(x.shape)}: both must be [{batch} or 1, 1, S, H/2]")
    if not torch.compiler.is_compiling() and choose("rope", impl, x.device, x.dtype) == "triton":
        from model.kernels.rope.autograd import RopeFunction

        return RopeFunction.apply(x, cos, sin)
    return apply_rope_reference(x, cos, sin)
