"""A Triton kernel that only converts."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _convert_kernel(X, NARROW, WIDE, num, BLOCK: tl.constexpr):  # noqa: N803
    index = tl.arange(0, BLOCK)
    x = tl.load(X + index, mask=index < num, other=0.0)
    tl.store(NARROW + index, x.to(tl.bfloat16), mask=index < num)
    tl.store(WIDE + index, x.to(tl.bfloat16).to(tl.float32), mask=index < num)


def to_bf16_and_back(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [n] -> the same in bf16, and that in fp32."""
    narrow, wide = torch.empty(len(x), dtype=torch.bfloat16), torch.empty(len(x))
    _convert_kernel[(1,)](x, narrow, wide, len(x), BLOCK=triton.next_power_of_2(len(x)))
    return narrow, wide
