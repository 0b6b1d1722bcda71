"""Triton: rotation of the halves of each head, forward and, with the angle reversed, backward.

Letters: B examples, S positions, H head width, N = B * S * heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ELEMENTS = 2048
"""Of one half, per program: 16 per thread of 4 warps."""


@triton.jit
def rope_kernel(
    X,  # [B, heads, S, H] with strides
    COS,  # fp32 [B or 1, 1, S, H/2], each table contiguous
    SIN,
    OUT,  # [B, heads, S, H] with strides
    num_rows,
    heads,
    length,
    table_stride_b,
    x_stride_b,
    x_stride_n,
    x_stride_s,
    x_stride_h,
    out_stride_b,
    out_stride_n,
    out_stride_s,
    out_stride_h,
    HALF: tl.constexpr,
    REVERSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # Rows run over (example, position, head) with the head fastest, as projections leave them in memory.
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]  # [BLOCK_N, 1]
    column = tl.arange(0, BLOCK_H)[None, :]  # [1, BLOCK_H]
    inside = (row < num_rows) & (column < HALF)
    # There are fewer than 2^31 rows, and 32-bit divisions take a quarter of the instructions; offsets of elements are 64 bits wide.
    head, position, example = (row % heads).to(tl.int64), (row // heads % length).to(tl.int64), (row // heads // length).to(tl.int64)
    table = example * table_stride_b + position * HALF + column
    cos = tl.load(COS + table, mask=inside, other=0.0)
    sin = tl.load(SIN + table, mask=inside, other=0.0)
    if REVERSED:
        sin = -sin
    source = X + example * x_stride_b + head * x_stride_n + position * x_stride_s + column * x_stride_h
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF * x_stride_h, mask=inside, other=0.0).to(tl.float32)
    target = OUT + example * out_stride_b + head * out_stride_n + position * out_stride_s + column * out_stride_h
    tl.store(target, (first * cos - second * sin).to(OUT.dtype.element_ty), mask=inside)
    tl.store(target + HALF * out_stride_h, (second * cos + first * sin).to(OUT.dtype.element_ty), mask=inside)


def launch_rope(x: Tensor, cos: Tensor, sin: Tensor, *, reverse: bool) -> Tensor:
    """[B, heads, S, H] -> the same in the memory order of x, where that is dense."""
    out = torch.empty_like(x)
    _, heads, length, head_dim = x.shape
    num_rows = x.numel() // head_dim if head_dim else 0
    cos, sin = cos.contiguous(), sin.contiguous()
    if num_rows:
        blocks = tile(head_dim)
        with torch.cuda.device_of(x):
            rope_kernel[(triton.cdiv(num_rows, blocks["BLOCK_N"]),)](
                x,
                cos,
                sin,
                out,
                num_rows,
                heads,
                length,
                cos.stride(0) if len(cos) > 1 else 0,
                *x.stride(),
                *out.stride(),
                **blocks,
                REVERSED=reverse,
            )
    return out


def tile(head_dim: int) -> dict[str, int]:
    """Heads and columns of one program."""
    columns = triton.next_power_of_2(head_dim // 2)
    return {"HALF": head_dim // 2, "BLOCK_N": max(BLOCK_ELEMENTS // columns, 1), "BLOCK_H": columns}
