"""Triton: residual addition, dropout and RMSNorm, one row in the registers of one program.

Letters: N rows (all positions of all examples), B examples, D width, P programs of the backward pass. A row is a tile [BLOCK_W, GROUP] with element
w * GROUP + g at (w, g): GROUP = 4 where dropout draws four decisions from one random word, so that the word is computed once per line.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels import splitmix
from model.kernels.rms_norm.reference import RMS_NORM_EPS
from model.kernels.splitmix import DropoutKey

GOLDEN = tl.constexpr(splitmix.GOLDEN)
MULTIPLIER_0 = tl.constexpr(splitmix.MULTIPLIERS[0])
MULTIPLIER_1 = tl.constexpr(splitmix.MULTIPLIERS[1])
SHIFT_0 = tl.constexpr(splitmix.SHIFTS[0])
SHIFT_1 = tl.constexpr(splitmix.SHIFTS[1])
SHIFT_2 = tl.constexpr(splitmix.SHIFTS[2])
LANES = tl.constexpr(splitmix.LANES)
EPS = tl.constexpr(RMS_NORM_EPS)


@triton.jit
def keep_tile(KEYS, row, rows_per_sample, threshold, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, GROUP: tl.constexpr):
    """bool [BLOCK_W, GROUP]: `splitmix.keep_mask` of one row; GROUP divides LANES, and LANES divides WIDTH where GROUP is not 1."""
    key = tl.load(KEYS + row // rows_per_sample).to(tl.uint64, bitcast=True)
    first = (row % rows_per_sample).to(tl.uint64) * WIDTH
    line = first + (tl.arange(0, BLOCK_W) * GROUP).to(tl.uint64)[:, None]  # [BLOCK_W, 1]
    bits = key + (line // LANES + 1) * GOLDEN
    bits = (bits ^ (bits >> SHIFT_0)) * MULTIPLIER_0
    bits = (bits ^ (bits >> SHIFT_1)) * MULTIPLIER_1
    bits = bits ^ (bits >> SHIFT_2)
    lane = line % LANES + tl.arange(0, GROUP).to(tl.uint64)[None, :]  # [BLOCK_W, GROUP]
    draw = ((bits >> (lane * 16)) & 0xFFFF).to(tl.int32)
    return (draw ^ 0x8000) >= threshold


@triton.jit
def norm_fwd_kernel(
    X,  # [N, D]
    BRANCH,  # [N, D], if HAS_BRANCH
    SCALE,  # [D], if HAS_NORM
    KEYS,  # int64 [B], if HAS_DROPOUT
    TOTAL,  # [N, D], if HAS_BRANCH
    NORMED,  # [N, D], if HAS_NORM
    RSTD,  # fp32 [N], if HAS_NORM
    rows_per_sample,
    threshold,
    keep_probability,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK_W)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [BLOCK_W, GROUP]
    inside = column < WIDTH
    offset = row.to(tl.int64) * WIDTH + column
    x = tl.load(X + offset, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        branch = tl.load(BRANCH + offset, mask=inside, other=0.0).to(tl.float32)
        if HAS_DROPOUT:
            keep = keep_tile(KEYS, row, rows_per_sample, threshold, WIDTH, BLOCK_W, GROUP)
            branch = tl.div_rn(branch, tl.full([BLOCK_W, GROUP], 0.0, tl.float32) + keep_probability).to(TOTAL.dtype.element_ty).to(tl.float32)
            branch = tl.where(keep, branch, 0.0)
        total = (x + branch).to(TOTAL.dtype.element_ty)
        tl.store(TOTAL + offset, total, mask=inside)
        x = total.to(tl.float32)
    if HAS_NORM:
        mean_square = tl.sum(tl.sum(x * x, axis=1), axis=0) / WIDTH
        rstd = tl.rsqrt(mean_square + EPS)
        tl.store(RSTD + row, rstd)
        gain = 1.0 + tl.load(SCALE + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(NORMED + offset, (x * rstd * gain).to(NORMED.dtype.element_ty), mask=inside)


@triton.jit
def norm_bwd_kernel(
    TOTAL,  # [N, D]: what was normed
    SCALE,  # [D]
    RSTD,  # fp32 [N]
    D_NORMED,  # [N, D]
    D_TOTAL,  # [N, D], if HAS_BRANCH: the gradient from elsewhere
    KEYS,  # int64 [B], if HAS_DROPOUT
    D_X,  # [N, D]
    D_BRANCH,  # [N, D], if HAS_DROPOUT; without it the gradients of x and of the branch are the same
    D_SCALE,  # fp32 [P, D]: partial sums
    num_rows,
    rows_per_sample,
    threshold,
    keep_probability,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK_W)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [BLOCK_W, GROUP]
    inside = column < WIDTH
    gain = 1.0 + tl.load(SCALE + column, mask=inside, other=0.0).to(tl.float32)
    d_scale = tl.zeros([BLOCK_W, GROUP], tl.float32)
    for step in range(tl.cdiv(num_rows - program, num_programs)):
        row = program + step * num_programs
        offset = row.to(tl.int64) * WIDTH + column
        rstd = tl.load(RSTD + row)
        x_hat = tl.load(TOTAL + offset, mask=inside, other=0.0).to(tl.float32) * rstd
        d_normed = tl.load(D_NORMED + offset, mask=inside, other=0.0).to(tl.float32)
        d_scale += d_normed * x_hat
        d_hat = d_normed * gain
        d_x = (d_hat - x_hat * (tl.sum(tl.sum(d_hat * x_hat, axis=1), axis=0) / WIDTH)) * rstd
        if HAS_BRANCH:
            d_x += tl.load(D_TOTAL + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(D_X + offset, d_x.to(D_X.dtype.element_ty), mask=inside)
        if HAS_DROPOUT:
            keep = keep_tile(KEYS, row, rows_per_sample, threshold, WIDTH, BLOCK_W, GROUP)
            d_branch = tl.div_rn(d_x, tl.full([BLOCK_W, GROUP], 0.0, tl.float32) + keep_probability)
            tl.store(D_BRANCH + offset, tl.where(keep, d_branch, 0.0).to(D_BRANCH.dtype.element_ty), mask=inside)
    tl.store(D_SCALE + program.to(tl.int64) * WIDTH + column, d_scale, mask=inside)


@triton.jit
def dropout_bwd_kernel(
    D_TOTAL,  # [N, D]
    KEYS,  # int64 [B]
    D_BRANCH,  # [N, D]
    rows_per_sample,
    threshold,
    keep_probability,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK_W)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [BLOCK_W, GROUP]
    inside = column < WIDTH
    offset = row.to(tl.int64) * WIDTH + column
    d_total = tl.load(D_TOTAL + offset, mask=inside, other=0.0).to(tl.float32)
    keep = keep_tile(KEYS, row, rows_per_sample, threshold, WIDTH, BLOCK_W, GROUP)
    d_branch = tl.div_rn(d_total, tl.full([BLOCK_W, GROUP], 0.0, tl.float32) + keep_probability)
    tl.store(D_BRANCH + offset, tl.where(keep, d_branch, 0.0).to(D_BRANCH.dtype.element_ty), mask=inside)


def launch_norm_fwd(x: Tensor, branch: Tensor | None, scale: Tensor | None, dropout: DropoutKey | None) -> tuple[Tensor, Tensor, Tensor]:
    """(x + keep * branch / (1 - p), its norm, fp32 [N] 1 / root mean square). What was not asked for is x, x and an empty tensor."""
    x = x.contiguous()
    num_rows, width = _rows(x)
    branch = None if branch is None else branch.contiguous()
    total = x if branch is None else torch.empty_like(x)
    normed = x if scale is None else torch.empty_like(x)
    rstd = torch.empty(0 if scale is None else num_rows, dtype=torch.float32, device=x.device)
    if num_rows and width:
        with torch.cuda.device_of(x):
            norm_fwd_kernel[(num_rows,)](
                x,
                x if branch is None else branch,
                x if scale is None else scale.contiguous(),
                x if dropout is None else dropout.keys.contiguous(),
                total,
                normed,
                rstd,
                *_dropout_arguments(x, dropout),
                **tile(width, has_dropout=dropout is not None),
                HAS_BRANCH=branch is not None,
                HAS_DROPOUT=dropout is not None,
                HAS_NORM=scale is not None,
            )
    return total, normed, rstd


def launch_norm_bwd(
    total: Tensor, scale: Tensor, rstd: Tensor, d_normed: Tensor, d_total: Tensor | None, dropout: DropoutKey | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the branch (the same tensor where nothing was dropped) and of scale."""
    num_rows, width = _rows(total)
    d_x = torch.empty_like(total)
    d_branch = d_x if dropout is None else torch.empty_like(total)
    programs = num_backward_programs(num_rows)
    d_scale = torch.empty(programs, width, dtype=torch.float32, device=total.device)
    if num_rows and width:
        with torch.cuda.device_of(total):
            norm_bwd_kernel[(programs,)](
                total,
                scale.contiguous(),
                rstd,
                d_normed.contiguous(),
                total if d_total is None else d_total.contiguous(),
                total if dropout is None else dropout.keys.contiguous(),
                d_x,
                d_branch,
                d_scale,
                num_rows,
                *_dropout_arguments(total, dropout),
                **tile(width, has_dropout=dropout is not None),
                HAS_BRANCH=d_total is not None,
                HAS_DROPOUT=dropout is not None,
            )
    return d_x, d_branch, d_scale.sum(0).to(scale.dtype)


def launch_dropout_bwd(d_total: Tensor, dropout: DropoutKey) -> Tensor:
    """keep * d_total / (1 - p)."""
    d_total = d_total.contiguous()
    d_branch = torch.empty_like(d_total)
    num_rows, width = _rows(d_total)
    if num_rows and width:
        with torch.cuda.device_of(d_total):
            dropout_bwd_kernel[(num_rows,)](
                d_total, dropout.keys.contiguous(), d_branch, *_dropout_arguments(d_total, dropout), **tile(width, has_dropout=True)
            )
    return d_branch


def tile(width: int, *, has_dropout: bool) -> dict[str, int]:
    """Shape of the tile of a row, and warps that hold 8 elements of it per thread (16 in the widest rows)."""
    most = splitmix.LANES if has_dropout else 8  # 8 bf16 make a 16-byte access
    group = most if width % most == 0 else 1
    lines = triton.next_power_of_2(triton.cdiv(width, group))
    return {"WIDTH": width, "BLOCK_W": lines, "GROUP": group, "num_warps": min(max(lines * group // 256, 1), 16)}


def num_backward_programs(num_rows: int) -> int:
    """Programs of the backward pass: each adds up dscale over its rows, so few of them mean few partial sums."""
    return min(triton.cdiv(num_rows, 4), 512)


def _rows(x: Tensor) -> tuple[int, int]:
    width = x.shape[-1]
    return (x.numel() // width if width else 0), width


def _dropout_arguments(x: Tensor, dropout: DropoutKey | None) -> tuple[int, int, float]:
    """rows_per_sample, threshold, keep_probability."""
    if dropout is None:
        return 1, 0, 1.0
    return max(_rows(x)[0] // max(len(x), 1), 1), dropout.threshold, 1 - dropout.probability
