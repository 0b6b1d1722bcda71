"""Triton: residual addition and LayerNorm, rows in the registers of a program.

Letters: N rows (all tokens of all images), W width, P programs of the backward pass. BLOCK_R rows are a tile [BLOCK_R, BLOCK_W, GROUP] with element
w * GROUP + g of row r at (r, w, g): GROUP = 4 makes every thread take 4 neighbours of fp32 (16 bytes) and of bf16 (8 bytes), so that no value has to
change threads between a load in one dtype and a store in the other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.layer_norm.reference import LAYER_NORM_EPS

EPS = tl.constexpr(LAYER_NORM_EPS)


@triton.jit
def row_sum(tile):
    """[BLOCK_R, BLOCK_W, GROUP] -> [BLOCK_R, 1, 1]."""
    return tl.sum(tl.sum(tile, axis=2), axis=1)[:, None, None]


@triton.jit
def layer_norm_fwd_kernel(
    X,  # [num_x_rows, W]: row n of the sum reads row n % num_x_rows
    BRANCH,  # [N, W], if HAS_BRANCH
    WEIGHT,  # [W]
    BIAS,  # [W]
    TOTAL,  # [N, W], if HAS_BRANCH
    NORMED,  # [N, W]
    MEAN,  # fp32 [N]
    RSTD,  # fp32 [N]
    num_rows,
    num_x_rows,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None, None]  # [BLOCK_R, 1, 1]
    column = (tl.arange(0, BLOCK_W)[:, None] * GROUP + tl.arange(0, GROUP)[None, :])[None, :, :]  # [1, BLOCK_W, GROUP]
    inside = column < WIDTH
    here = (row < num_rows) & inside  # [BLOCK_R, BLOCK_W, GROUP]
    offset = row.to(tl.int64) * WIDTH + column
    if HAS_BRANCH:
        x = tl.load(X + ((row % num_x_rows).to(tl.int64) * WIDTH + column), mask=here, other=0.0).to(tl.float32)
        branch = tl.load(BRANCH + offset, mask=here, other=0.0).to(tl.float32)
        total = (x + branch).to(TOTAL.dtype.element_ty)
        tl.store(TOTAL + offset, total, mask=here)
        x = total.to(tl.float32)
    else:
        x = tl.load(X + offset, mask=here, other=0.0).to(tl.float32)
    mean = row_sum(x) / WIDTH
    centred = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(row_sum(centred * centred) / WIDTH + EPS)
    tl.store(MEAN + row, mean, mask=row < num_rows)
    tl.store(RSTD + row, rstd, mask=row < num_rows)
    weight = tl.load(WEIGHT + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(BIAS + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(NORMED + offset, (centred * rstd * weight + bias).to(NORMED.dtype.element_ty), mask=here)


@triton.jit
def layer_norm_bwd_kernel(
    TOTAL,  # [N, W]: what was normed
    WEIGHT,  # [W]
    MEAN,  # fp32 [N]
    RSTD,  # fp32 [N]
    D_NORMED,  # [N, W]
    D_TOTAL,  # [N, W], if HAS_TOTAL: the gradient from elsewhere
    D_X,  # [N, W], if WRITES_X
    D_BRANCH,  # [N, W], if WRITES_BRANCH: the same numbers in the dtype of the branch
    D_WEIGHT,  # fp32 [P, W]: partial sums
    D_BIAS,  # fp32 [P, W]: likewise
    num_rows,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    WRITES_X: tl.constexpr,
    WRITES_BRANCH: tl.constexpr,
):
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    column = (tl.arange(0, BLOCK_W)[:, None] * GROUP + tl.arange(0, GROUP)[None, :])[None, :, :]  # [1, BLOCK_W, GROUP]
    inside = column < WIDTH
    weight = tl.load(WEIGHT + column, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK_R, BLOCK_W, GROUP], tl.float32)
    d_bias = tl.zeros([BLOCK_R, BLOCK_W, GROUP], tl.float32)
    num_tiles = tl.cdiv(num_rows, BLOCK_R)
    for step in range(tl.cdiv(num_tiles - program, num_programs)):
        row = ((program + step * num_programs) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None, None]  # [BLOCK_R, 1, 1]
        exists = row < num_rows
        here = exists & inside  # [BLOCK_R, BLOCK_W, GROUP]
        offset = row.to(tl.int64) * WIDTH + column
        mean = tl.load(MEAN + row, mask=exists, other=0.0)
        rstd = tl.load(RSTD + row, mask=exists, other=0.0)
        # All loads come before the first sum over threads, which waits for them: none is left to be waited for after it.
        x_hat = (tl.load(TOTAL + offset, mask=here, other=0.0).to(tl.float32) - mean) * rstd
        d_normed = tl.load(D_NORMED + offset, mask=here, other=0.0).to(tl.float32)
        if HAS_TOTAL:
            d_total = tl.load(D_TOTAL + offset, mask=here, other=0.0).to(tl.float32)
        d_weight += d_normed * x_hat
        d_bias += d_normed
        d_hat = d_normed * weight
        d_x = (d_hat - row_sum(d_hat) / WIDTH - x_hat * (row_sum(d_hat * x_hat) / WIDTH)) * rstd
        if HAS_TOTAL:
            d_x += d_total
        if WRITES_X:
            tl.store(D_X + offset, d_x.to(D_X.dtype.element_ty), mask=here)
        if WRITES_BRANCH:
            tl.store(D_BRANCH + offset, d_x.to(D_BRANCH.dtype.element_ty), mask=here)
    partial = program.to(tl.int64) * WIDTH + column
    tl.store(D_WEIGHT + partial, tl.sum(d_weight, axis=0)[None, :, :], mask=inside)
    tl.store(D_BIAS + partial, tl.sum(d_bias, axis=0)[None, :, :], mask=inside)


def launch_fwd(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x + branch, its norm, fp32 [N] mean, fp32 [N] 1 / standard deviation); the first is x itself where there is no branch."""
    x = x.contiguous()
    branch = None if branch is None else branch.contiguous()
    total = x if branch is None else torch.empty_like(branch, dtype=torch.promote_types(x.dtype, branch.dtype))
    num_rows, width = _rows(total)
    normed = torch.empty_like(total, dtype=out_dtype)
    mean, rstd = (torch.empty(num_rows, dtype=torch.float32, device=x.device) for _ in range(2))
    shape = forward_tile(width)
    if num_rows and width:
        with torch.cuda.device_of(x):
            layer_norm_fwd_kernel[(triton.cdiv(num_rows, shape["BLOCK_R"]),)](
                x,
                x if branch is None else branch,
                weight.contiguous(),
                bias.contiguous(),
                total,
                normed,
                mean,
                rstd,
                num_rows,
                _rows(x)[0],
                **shape,
                HAS_BRANCH=branch is not None,
            )
    return total, normed, mean, rstd


def launch_bwd(
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    d_normed: Tensor,
    d_total: Tensor | None,
    *,
    x_dtype: torch.dtype | None,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients of x and of the branch in the dtypes asked for (None: not wanted; one tensor where alike), and fp32 [2, W] of weight and bias."""
    num_rows, width = _rows(total)
    d_x = None if x_dtype is None else torch.empty_like(total, dtype=x_dtype)
    d_branch = d_x if branch_dtype == x_dtype else None if branch_dtype is None else torch.empty_like(total, dtype=branch_dtype)
    shape = backward_tile(width)
    programs = num_backward_programs(num_rows, shape["BLOCK_R"])
    partial = torch.empty(2, programs, width, dtype=torch.float32, device=total.device)
    if num_rows and width:
        with torch.cuda.device_of(total):
            layer_norm_bwd_kernel[(programs,)](
                total,
                weight.contiguous(),
                mean,
                rstd,
                d_normed.contiguous(),
                total if d_total is None else d_total.contiguous(),
                total if d_x is None else d_x,
                total if d_branch is None else d_branch,
                partial[0],
                partial[1],
                num_rows,
                **shape,
                HAS_TOTAL=d_total is not None,
                WRITES_X=d_x is not None,
                WRITES_BRANCH=d_branch is not None and d_branch is not d_x,
            )
    return d_x, d_branch, partial.sum(1)


def forward_tile(width: int) -> dict[str, int]:
    """16 elements per thread and, up to W=512, a warp for each row: sums then need no shared memory."""
    block, constants = _row_tile(width)
    return constants | {"BLOCK_R": min(max(512 // block, 1), 16), "num_warps": min(max(block // 512, 1), 16)}


def backward_tile(width: int) -> dict[str, int]:
    """8 elements per thread, which has 3 inputs and 2 running sums of each: at W=512 a program is one row in two warps."""
    block, constants = _row_tile(width)
    return constants | {"BLOCK_R": min(max(256 // block, 1), 16), "num_warps": min(max(block // 256, 1), 16)}


def num_backward_programs(num_rows: int, rows_per_tile: int) -> int:
    """Programs of the backward pass, which add up their tiles: at least 4 each, so that the partial sums are few."""
    return min(triton.cdiv(num_rows, 4 * rows_per_tile), 1024)


def _row_tile(width: int) -> tuple[int, dict[str, int]]:
    group = 4 if width % 4 == 0 else 1
    lines = triton.next_power_of_2(triton.cdiv(width, group))
    return lines * group, {"WIDTH": width, "BLOCK_W": lines, "GROUP": group}


def _rows(x: Tensor) -> tuple[int, int]:
    width = x.shape[-1]
    return (x.numel() // width if width else 0), width
