"""Affine coupling in Triton: [x1 | y2], permuted, and its log-determinant in one pass; its gradients in another.

Letters: R rows (tokens of all images), C channels, h = C / 2.

A tile holds whole rows, so that a permutation of the channels stays inside it. `tl.gather` is given the tile flattened to one dimension:
along one dimension of a two-dimensional tile the compiler makes it a cascade of warp shuffles, BLOCK_C / 32 squared of them for a row.
Triton 3.3 does so even then: README.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
"""Elements of a tile, unless one row is longer."""


@triton.jit
def permute_columns(tile, ORDER, num_channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """tile[:, order], through shared memory. Columns beyond `num_channels` are filled with anything."""
    channels = tl.arange(0, BLOCK_C)
    order = tl.load(ORDER + channels, mask=channels < num_channels, other=0)
    index = (tl.arange(0, BLOCK_R) * BLOCK_C)[:, None] + order[None, :]  # [BLOCK_R, BLOCK_C]
    flat = tl.gather(tl.reshape(tile, [BLOCK_R * BLOCK_C]), tl.reshape(index, [BLOCK_R * BLOCK_C]), 0)
    return tl.reshape(flat, [BLOCK_R, BLOCK_C])


@triton.jit
def log_of_scale(raw_scale, decay):
    """ln(2 sigmoid(a)); decay = exp(-|a|). The flow starts at a = 0, where this is exact: ln(2 sigmoid(a)) = a/2 - ln cosh(a/2)."""
    square = 0.25 * raw_scale * raw_scale
    near = 0.5 * raw_scale - square * (0.5 - square * (1 / 12 - square * (1 / 45 - square * (17 / 2520))))
    far = tl.minimum(raw_scale, 0.0) - tl.log(0.5 + 0.5 * decay)
    return tl.where(tl.abs(raw_scale) < 0.25, near, far)


@triton.jit
def affine_coupling_fwd_kernel(
    FIRST,
    SECOND,
    PARAMS,
    ORDER,
    OUT_FIRST,
    OUT_SECOND,
    LOGDET,
    num_rows,
    half,
    first_stride,
    second_stride,
    params_stride,
    out_stride,
    INVERSE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """[OUT_FIRST | OUT_SECOND] = [x1 | (x2 + b) s][order], LOGDET = sum of ln s; or x2 = y2 / s - b and no LOGDET."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channels = tl.arange(0, BLOCK_C)
    row_exists = rows < num_rows
    row, channel = rows.to(tl.int64)[:, None], channels[None, :]
    in_first = row_exists[:, None] & (channels < half)[None, :]  # [BLOCK_R, BLOCK_C]
    in_second = row_exists[:, None] & ((channels >= half) & (channels < 2 * half))[None, :]
    first = tl.load(FIRST + row * first_stride + channel, mask=in_first, other=0.0)
    second = tl.load(SECOND + row * second_stride + (channel - half), mask=in_second, other=0.0)
    shift = tl.load(PARAMS + row * params_stride + (channel - half), mask=in_second, other=0.0)
    raw_scale = tl.load(PARAMS + row * params_stride + channel, mask=in_second, other=0.0)
    if INVERSE:
        # 1 / (2 sigmoid(a)); overflows to infinity where the scale is zero, as division by it does.
        moved = second * (0.5 + 0.5 * tl.exp(-raw_scale)) - shift
    else:
        decay = tl.exp(-tl.abs(raw_scale))
        scale = tl.where(raw_scale >= 0, 2.0, 2.0 * decay) / (1.0 + decay)
        moved = (second + shift) * scale
        log_scale = log_of_scale(raw_scale, decay)
        tl.store(LOGDET + rows, tl.sum(tl.where(in_second, log_scale, 0.0), axis=1), mask=row_exists)
    out = permute_columns(tl.where(in_first, first, moved), ORDER, 2 * half, BLOCK_R, BLOCK_C)
    tl.store(OUT_FIRST + row * out_stride + channel, out, mask=in_first)
    tl.store(OUT_SECOND + row * out_stride + (channel - half), out, mask=in_second)


@triton.jit
def affine_coupling_bwd_kernel(
    D_OUT_FIRST,
    D_OUT_SECOND,
    D_LOGDET,
    SECOND,
    PARAMS,
    INVERSE_ORDER,
    D_FIRST,
    D_PARAMS,
    num_rows,
    rows_per_image,
    half,
    d_out_first_stride,
    d_out_second_stride,
    second_stride,
    params_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """D_FIRST = dx1, D_PARAMS = [db | da], with db = dx2 = dy2 s and da = (dy2 y2 + dlogdet) (1 - sigmoid(a)); y2 is computed again."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channels = tl.arange(0, BLOCK_C)
    row_exists = rows < num_rows
    row, channel = rows.to(tl.int64)[:, None], channels[None, :]
    in_first = row_exists[:, None] & (channels < half)[None, :]  # [BLOCK_R, BLOCK_C]
    in_second = row_exists[:, None] & ((channels >= half) & (channels < 2 * half))[None, :]
    d_first = tl.load(D_OUT_FIRST + row * d_out_first_stride + channel, mask=in_first, other=0.0)
    d_second = tl.load(D_OUT_SECOND + row * d_out_second_stride + (channel - half), mask=in_second, other=0.0)
    second = tl.load(SECOND + row * second_stride + (channel - half), mask=in_second, other=0.0)
    shift = tl.load(PARAMS + row * params_stride + (channel - half), mask=in_second, other=0.0)
    raw_scale = tl.load(PARAMS + row * params_stride + channel, mask=in_second, other=0.0)
    d_logdet = tl.load(D_LOGDET + rows // rows_per_image, mask=row_exists, other=0.0)
    d_cat = permute_columns(tl.where(in_first, d_first, d_second), INVERSE_ORDER, 2 * half, BLOCK_R, BLOCK_C)
    decay = tl.exp(-tl.abs(raw_scale))
    sigmoid = tl.where(raw_scale >= 0, 1.0, decay) / (1.0 + decay)
    complement = tl.where(raw_scale >= 0, decay, 1.0) / (1.0 + decay)  # 1 - sigmoid without cancellation
    d_shift = d_cat * (2.0 * sigmoid)
    d_raw_scale = (d_shift * (second + shift) + d_logdet[:, None]) * complement
    tl.store(D_FIRST + row * half + channel, d_cat, mask=in_first)
    tl.store(D_PARAMS + row * (2 * half) + (channel - half), d_shift, mask=in_second)
    tl.store(D_PARAMS + row * (2 * half) + channel, d_raw_scale, mask=in_second)


def block_sizes(num_channels: int) -> tuple[int, int, int]:
    """(BLOCK_R, BLOCK_C, num_warps): 8 elements of a tile per thread, 16 where a row is longest."""
    block_c = triton.next_power_of_2(num_channels)
    block_r = max(TILE // block_c, 1)
    return block_r, block_c, min(block_r * block_c // 256, 16)


def launch_fwd(first: Tensor, second: Tensor, params: Tensor, order: Tensor, out_first: Tensor, out_second: Tensor, logdet: Tensor | None) -> None:
    """Fills out_first and out_second [R, h], of one row stride, and the rows' log-determinants [R]; the inverse map without `logdet`.

    All fp32, of last stride 1; params [R, C]; order: int32 [C], contiguous.
    """
    num_rows, half = first.shape
    if not first.numel():
        return
    block_r, block_c, num_warps = block_sizes(2 * half)
    with torch.cuda.device_of(first):
        affine_coupling_fwd_kernel[(triton.cdiv(num_rows, block_r),)](
            first,
            second,
            params,
            order,
            out_first,
            out_second,
            first if logdet is None else logdet,
            num_rows,
            half,
            first.stride(0),
            second.stride(0),
            params.stride(0),
            out_first.stride(0),
            INVERSE=logdet is None,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=num_warps,
        )


def launch_bwd(d_first: Tensor, d_second: Tensor, d_logdet: Tensor, second: Tensor, params: Tensor, inverse_order: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the outputs [R, h], [R, h], of the images' log-determinants [B] -> gradients of first [R, h], of params [R, C]."""
    num_rows, half = second.shape
    d_input = torch.empty((num_rows, half), dtype=second.dtype, device=second.device)
    d_params = torch.empty((num_rows, 2 * half), dtype=second.dtype, device=second.device)
    if not second.numel():
        return d_input, d_params
    block_r, block_c, num_warps = block_sizes(2 * half)
    with torch.cuda.device_of(second):
        affine_coupling_bwd_kernel[(triton.cdiv(num_rows, block_r),)](
            d_first,
            d_second,
            d_logdet,
            second,
            params,
            inverse_order,
            d_input,
            d_params,
            num_rows,
            num_rows // len(d_logdet),
            half,
            d_first.stride(0),
            d_second.stride(0),
            second.stride(0),
            params.stride(0),
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=num_warps,
        )
    return d_input, d_params
