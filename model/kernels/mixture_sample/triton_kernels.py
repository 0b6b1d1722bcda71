"""Triton: rows of one component times hidden states, square-plus, guidance and noise in one pass.

Letters: B examples, D width, K mixtures, d soft channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.gmm_nll.reference import MIN_SCALE

BLOCK_CHANNELS = 2
MAX_BLOCK_WIDTH = 512
NUM_WARPS = 4
EPILOGUES = {"none": 0, "analytic": 1, "clipped": 2, "gaussians": 3}
"""What follows the products: a plain draw, a guided one by either rule, or the Gaussians themselves."""


@triton.jit
def _positive_scale(raw, min_scale, temperature):
    """(r + sqrt(r^2 + 4)) / 2, stable for r << 0, floored, tempered."""
    root = tl.sqrt_rn(raw * raw + 4.0)
    scale = tl.where(raw < 0, tl.div_rn(2.0, root - tl.minimum(raw, 0.0)), 0.5 * (raw + root))
    return tl.where(scale < min_scale, min_scale, scale) * temperature  # unlike tl.maximum, a NaN stays


@triton.jit
def _analytic(loc, scale, other_loc, other_scale, weight):
    """reference.analytic."""
    precision_u = tl.div_rn(1.0, other_scale * other_scale)
    precision = (1.0 + weight) * tl.div_rn(1.0, scale * scale) - weight * precision_u
    normalisable = precision > 0
    safe = tl.where(normalisable, precision, 1.0)
    guided = loc + tl.div_rn(weight * precision_u * (loc - other_loc), safe)
    return tl.where(normalisable, guided, loc), tl.where(normalisable, tl.div_rn(1.0, tl.sqrt_rn(safe)), scale)


@triton.jit
def _clipped(loc, scale, other_loc, other_scale, weight):
    """reference.clipped."""
    quotient = tl.div_rn(scale, other_scale)
    ratio = tl.where(quotient > 1, 1.0, quotient * quotient)
    remainder = 1.0 + weight - weight * ratio
    return loc + tl.div_rn(weight * ratio * (loc - other_loc), remainder), tl.div_rn(scale, tl.sqrt_rn(remainder))


@triton.jit
def mixture_sample_kernel(
    HIDDEN,  # [COPIES * B, D]
    WEIGHT,  # [K, 2, d, D]
    BIAS,  # [K, 2, d]
    COMPONENT,  # int64 [B]
    NOISE,  # fp32 [B, d]; not read with EPILOGUE gaussians
    OUT,  # fp32 [B, d]; with EPILOGUE gaussians the means [COPIES * B, d]
    SCALE,  # fp32 [COPIES * B, d], written with EPILOGUE gaussians alone
    width,
    soft_dim,
    cfg_scale,
    min_scale,
    temperature,
    COPIES: tl.constexpr,
    EPILOGUE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One program per example and block of channels: every weight is read once, for both rows of the example."""
    example = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    is_channel = channel < soft_dim
    first_row = tl.load(COMPONENT + example) * 2 * soft_dim
    loc_rows = WEIGHT + (first_row + channel)[:, None] * width  # [BLOCK_C, 1]
    raw_rows = WEIGHT + (first_row + soft_dim + channel)[:, None] * width
    hidden = HIDDEN + example * COPIES * width

    # Elementwise partial products, reduced once at the end: one warp-wide sum per output in place of one per block of columns.
    loc_c = tl.zeros((BLOCK_C, BLOCK_W), dtype=tl.float32)  # [BLOCK_C, BLOCK_W]
    raw_c = tl.zeros((BLOCK_C, BLOCK_W), dtype=tl.float32)
    loc_u = tl.zeros((BLOCK_C, BLOCK_W), dtype=tl.float32)
    raw_u = tl.zeros((BLOCK_C, BLOCK_W), dtype=tl.float32)
    for start in range(0, width, BLOCK_W):
        column = start + tl.arange(0, BLOCK_W)  # [BLOCK_W]
        is_column = column < width
        inside = is_channel[:, None] & is_column[None, :]
        w_loc = tl.load(loc_rows + column[None, :], mask=inside, other=0.0).to(tl.float32)  # [BLOCK_C, BLOCK_W]
        w_raw = tl.load(raw_rows + column[None, :], mask=inside, other=0.0).to(tl.float32)
        h_c = tl.load(hidden + column, mask=is_column, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_W]
        loc_c += w_loc * h_c
        raw_c += w_raw * h_c
        if COPIES == 2:
            h_u = tl.load(hidden + width + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
            loc_u += w_loc * h_u
            raw_u += w_raw * h_u

    bias_loc = tl.load(BIAS + first_row + channel, mask=is_channel, other=0.0).to(tl.float32)  # [BLOCK_C]
    bias_raw = tl.load(BIAS + first_row + soft_dim + channel, mask=is_channel, other=0.0).to(tl.float32)
    loc = tl.sum(loc_c, axis=1) + bias_loc
    scale = _positive_scale(tl.sum(raw_c, axis=1) + bias_raw, min_scale, temperature)
    other_loc = tl.sum(loc_u, axis=1) + bias_loc
    other_scale = _positive_scale(tl.sum(raw_u, axis=1) + bias_raw, min_scale, temperature)
    if EPILOGUE == 3:
        own = example * COPIES * soft_dim + channel
        tl.store(OUT + own, loc, mask=is_channel)
        tl.store(SCALE + own, scale, mask=is_channel)
        if COPIES == 2:
            tl.store(OUT + own + soft_dim, other_loc, mask=is_channel)
            tl.store(SCALE + own + soft_dim, other_scale, mask=is_channel)
    else:
        if EPILOGUE == 1:
            loc, scale = _analytic(loc, scale, other_loc, other_scale, cfg_scale)
        elif EPILOGUE == 2:
            loc, scale = _clipped(loc, scale, other_loc, other_scale, cfg_scale)
        own = example * soft_dim + channel
        noise = tl.load(NOISE + own, mask=is_channel, other=0.0)
        tl.store(OUT + own, loc + scale * noise, mask=is_channel)


def block_shape(width: int) -> dict[str, int]:
    """Tile of a program, by the width alone: a sample does not depend on what is drawn beside it."""
    return {"BLOCK_C": BLOCK_CHANNELS, "BLOCK_W": min(MAX_BLOCK_WIDTH, triton.next_power_of_2(width))}


def launch_mixture_sample(
    hidden: Tensor, weight: Tensor, bias: Tensor, component: Tensor, noise: Tensor, *, cfg_scale: float, cfg_rule: str, temperature: float
) -> Tensor:
    """Shapes as `interface.mixture_sample`."""
    sample = torch.empty(noise.shape, dtype=torch.float32, device=weight.device)
    epilogue = cfg_rule if cfg_scale else "none"
    _launch(hidden, weight, bias, component, noise.float().contiguous(), sample, sample, cfg_scale, temperature, epilogue)
    return sample


def launch_component_gaussian(hidden: Tensor, weight: Tensor, bias: Tensor, component: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """hidden [copies * B, D], component int64 [B] -> mean and scale, fp32 [copies * B, d] each; copies: 1 or 2."""
    loc, scale = (torch.empty(len(hidden), weight.shape[2], dtype=torch.float32, device=weight.device) for _ in range(2))
    _launch(hidden, weight, bias, component, loc, loc, scale, 0.0, temperature, "gaussians")
    return loc, scale


def _launch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    component: Tensor,
    noise: Tensor,
    out: Tensor,
    scale: Tensor,
    cfg_scale: float,
    temperature: float,
    epilogue: str,
) -> None:
    (_, _, soft_dim, width), size = weight.shape, len(component)
    if not size:
        return
    with torch.cuda.device_of(weight):
        mixture_sample_kernel[size, triton.cdiv(soft_dim, BLOCK_CHANNELS)](
            # Parameters are dense already: of them nothing is copied.
            hidden.to(weight.dtype).contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            component.contiguous(),
            noise,
            out,
            scale,
            width,
            soft_dim,
            float(cfg_scale),
            MIN_SCALE,
            float(temperature),
            COPIES=len(hidden) // size,
            EPILOGUE=EPILOGUES[epilogue],
            **block_shape(width),
            num_warps=NUM_WARPS,
        )
