"""The two elementwise passes as Triton kernels, memory-bound: the head's outputs are read twice and overwritten once.

Letters: c tokens of a chunk, K mixtures, d channels. A program handles a block of mixtures for a block of tokens, one token after the
other, so that its loads are whole contiguous runs of [BLOCK_K, 2, d] and the sums over tokens stay in registers. No atomics: partial
sums go to memory of their own and are added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from model.kernels.dispatch import is_interpreting
from model.kernels.gmm_nll.reference import HALF_LOG_2PI, MIN_SCALE

MAX_INVERSE_SCALE = tl.constexpr(1 / MIN_SCALE)
LARGEST = tl.constexpr(1e18)
"""Raw scales are cut here, so that their squares stay finite."""
TILE = 2048
"""Elements of one tile of means, at most: 16 per thread of four warps."""
GRADIENT_TOKENS = 64
"""Of the gradient pass: 1/64 of the memory of its outputs goes to partial sums of the bias gradient."""
LIKELIHOOD_TOKENS = 8
"""Tokens per program of the likelihood pass, which sums over none."""


@triton.jit
def _split_scale(raw):
    """Of the raw scale r: (1 / scale, d log scale / d r), the scale being square-plus with its floor. README.md, section 1."""
    size = tl.minimum(tl.abs(raw), LARGEST)
    square = size * size + 4.0
    slope = tl.rsqrt(square)
    half_sum = 0.5 * (size + square * slope)  # e^|log scale|, at least 1
    inverse = tl.where(raw < 0, half_sum, 1.0 / half_sum)
    return tl.minimum(inverse, MAX_INVERSE_SCALE), tl.where(inverse > MAX_INVERSE_SCALE, 0.0, slope)


@triton.jit
def _log(x, FAST: tl.constexpr):
    """The chip's own logarithm, off by at most 2^-22 (absolute near 1, relative elsewhere); the interpreter has none."""
    if FAST:
        return libdevice.fast_logf(x)
    return tl.log(x)


@triton.jit
def _place(num_mixtures, BLOCK_K: tl.constexpr):
    """Which block of mixtures, of which block of tokens: one axis, as the second one of a CUDA grid ends at 65,535."""
    program, num_blocks = tl.program_id(0), tl.cdiv(num_mixtures, BLOCK_K)
    return program % num_blocks, program // num_blocks


@triton.jit
def gmm_log_joint_kernel(
    RAW,  # [c, K, 2, d], contiguous
    LOGITS,  # fp32 [c, K]
    SOFT,  # fp32 [c, d]
    LOG_JOINT,  # fp32 [c, K]
    num_tokens,
    num_mixtures,
    soft_dim,
    constant,  # d/2 ln 2 pi
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FAST: tl.constexpr,
):
    """LOG_JOINT = logit_k - sum_j (z^2 / 2 + log scale) - constant, with z = (soft - mean) / scale."""
    block, tokens = _place(num_mixtures, BLOCK_K)
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    j = tl.arange(0, BLOCK_D)
    is_mixture = k < num_mixtures
    inside = is_mixture[:, None] & (j < soft_dim)[None, :]
    first = tokens * TOKENS
    for offset in range(0, tl.minimum(TOKENS, num_tokens - first)):
        n = (first + offset).to(tl.int64)
        entry = n * (2 * num_mixtures * soft_dim) + (k * (2 * soft_dim))[:, None] + j[None, :]
        loc = tl.load(RAW + entry, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_K, BLOCK_D]
        raw = tl.load(RAW + entry + soft_dim, mask=inside, other=0.0).to(tl.float32)
        soft = tl.load(SOFT + n * soft_dim + j, mask=j < soft_dim, other=0.0)
        logit = tl.load(LOGITS + n * num_mixtures + k, mask=is_mixture, other=0.0)
        inverse, _ = _split_scale(raw)
        z = (soft[None, :] - loc) * inverse
        # Outside of the tensor all loads are 0: mean 0, scale 1, distance 0, so that the terms vanish.
        exponent = tl.sum(0.5 * z * z - _log(inverse, FAST), axis=1)  # [BLOCK_K]
        tl.store(LOG_JOINT + n * num_mixtures + k, logit - exponent - constant, mask=is_mixture)


@triton.jit
def gmm_gradient_kernel(
    RAW,  # [c, K, 2, d], contiguous; overwritten with its gradient
    LOG_JOINT,  # fp32 [c, K]
    JOINT,  # fp32 [c]
    WEIGHT,  # fp32 [c]
    SOFT,  # fp32 [c, d]
    D_SOFT,  # fp32 [blocks of mixtures, c, d], partial sums over mixtures
    D_BIAS,  # fp32 [blocks of tokens, K, 2, d], partial sums over tokens
    num_tokens,
    num_mixtures,
    soft_dim,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """d mean = -q z / scale, d raw = -q (z^2 - 1) / sqrt(r^2 + 4), d soft = sum_k q z / scale, with q = weight exp(log joint - joint)."""
    block, tokens = _place(num_mixtures, BLOCK_K)
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    j = tl.arange(0, BLOCK_D)
    is_mixture = k < num_mixtures
    is_channel = j < soft_dim
    inside = is_mixture[:, None] & is_channel[None, :]
    bias_loc = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    bias_raw = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    first = tokens * TOKENS
    for offset in range(0, tl.minimum(TOKENS, num_tokens - first)):
        n = (first + offset).to(tl.int64)
        entry = n * (2 * num_mixtures * soft_dim) + (k * (2 * soft_dim))[:, None] + j[None, :]
        loc = tl.load(RAW + entry, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_K, BLOCK_D]
        raw = tl.load(RAW + entry + soft_dim, mask=inside, other=0.0).to(tl.float32)
        soft = tl.load(SOFT + n * soft_dim + j, mask=is_channel, other=0.0)
        log_joint = tl.load(LOG_JOINT + n * num_mixtures + k, mask=is_mixture, other=-float("inf"))
        joint = tl.load(JOINT + n)
        weight = tl.load(WEIGHT + n)
        share = (weight * tl.exp(log_joint - joint))[:, None]  # q, [BLOCK_K, 1]
        inverse, slope = _split_scale(raw)
        z = (soft[None, :] - loc) * inverse
        d_loc = -share * (z * inverse)
        d_raw = -share * ((z * z - 1.0) * slope)
        tl.store(RAW + entry, d_loc.to(RAW.dtype.element_ty), mask=inside)
        tl.store(RAW + entry + soft_dim, d_raw.to(RAW.dtype.element_ty), mask=inside)
        bias_loc += d_loc
        bias_raw += d_raw
        place = (block.to(tl.int64) * num_tokens + n) * soft_dim + j
        tl.store(D_SOFT + place, -tl.sum(d_loc, axis=0), mask=is_channel)
    entry = tokens.to(tl.int64) * (2 * num_mixtures * soft_dim) + (k * (2 * soft_dim))[:, None] + j[None, :]
    tl.store(D_BIAS + entry, bias_loc, mask=inside)
    tl.store(D_BIAS + entry + soft_dim, bias_raw, mask=inside)


def block_sizes(num_mixtures: int, soft_dim: int) -> tuple[int, int]:
    """(BLOCK_K, BLOCK_D): all channels, and mixtures to fill a tile.

    Half of it where rows are no multiple of 16 elements: the address of every single element would not fit into the registers beside.
    """
    block_d = triton.next_power_of_2(soft_dim)
    tile = TILE if soft_dim % 16 == 0 else TILE // 2
    return min(triton.next_power_of_2(num_mixtures), max(1, tile // block_d)), block_d


def launch_log_joint(raw: Tensor, logits: Tensor, soft: Tensor) -> Tensor:
    """logit_k + log N_k(soft), fp32 [c, K]: raw contiguous [c, K, 2, d], logits fp32 [c, K], soft fp32 [c, d]."""
    num_tokens, num_mixtures, _, soft_dim = raw.shape
    block_k, block_d = block_sizes(num_mixtures, soft_dim)
    log_joint = torch.empty(num_tokens, num_mixtures, dtype=torch.float32, device=raw.device)
    programs = triton.cdiv(num_mixtures, block_k) * triton.cdiv(num_tokens, LIKELIHOOD_TOKENS)
    if programs:
        with torch.cuda.device_of(raw):
            gmm_log_joint_kernel[(programs,)](
                raw,
                logits,
                soft,
                log_joint,
                num_tokens,
                num_mixtures,
                soft_dim,
                soft_dim * HALF_LOG_2PI,
                TOKENS=LIKELIHOOD_TOKENS,
                BLOCK_K=block_k,
                BLOCK_D=block_d,
                FAST=not is_interpreting(),
                num_warps=4,
            )
    return log_joint


def launch_gradient(raw: Tensor, log_joint: Tensor, joint: Tensor, weight: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrites raw with its gradient; returns those of soft, fp32 [c, d], and of the bias, fp32 [K, 2, d]."""
    num_tokens, num_mixtures, _, soft_dim = raw.shape
    block_k, block_d = block_sizes(num_mixtures, soft_dim)
    mixture_blocks, token_blocks = triton.cdiv(num_mixtures, block_k), triton.cdiv(num_tokens, GRADIENT_TOKENS)
    d_soft = torch.empty(mixture_blocks, num_tokens, soft_dim, dtype=torch.float32, device=raw.device)
    d_bias = torch.empty(token_blocks, num_mixtures, 2, soft_dim, dtype=torch.float32, device=raw.device)
    if mixture_blocks * token_blocks:
        with torch.cuda.device_of(raw):
            gmm_gradient_kernel[(mixture_blocks * token_blocks,)](
                raw,
                log_joint,
                joint,
                weight,
                soft,
                d_soft,
                d_bias,
                num_tokens,
                num_mixtures,
                soft_dim,
                TOKENS=GRADIENT_TOKENS,
                BLOCK_K=block_k,
                BLOCK_D=block_d,
                num_warps=4,
            )
    return d_soft.sum(0), d_bias.sum(0)
