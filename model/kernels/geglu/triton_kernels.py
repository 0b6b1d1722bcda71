"""Triton: gelu_tanh(gate) * up and its gradients, elementwise; the activation is computed again in the backward pass.

Letters: N elements.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 1024
"""Elements of one program: 8 per thread of 4 warps, which in bf16 is one 16-byte access."""

TWO_SQRT_2_OVER_PI = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715)
# In the interpreter a constant on the left of a tensor makes a constant of the product: constants stand on the right.


@triton.jit
def half_of_tanh(gate):
    """(1 + tanh z) / 2 = sigmoid(2z) with z = sqrt(2/pi) (g + 0.044715 g^3), which does not cancel where tanh is near -1."""
    return 1 / (1 + tl.exp((gate + gate * gate * gate * CUBIC) * -TWO_SQRT_2_OVER_PI))


@triton.jit
def geglu_fwd_kernel(
    GATE,  # [N]
    UP,  # [N]
    OUT,  # [N]
    num_elements,
    BLOCK_N: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    inside = offset < num_elements
    gate = tl.load(GATE + offset, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + offset, (gate * half_of_tanh(gate) * up).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def geglu_bwd_kernel(
    GATE,  # [N]
    UP,  # [N]
    D_OUT,  # [N]
    D_GATE,  # [N]
    D_UP,  # [N]
    num_elements,
    BLOCK_N: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    inside = offset < num_elements
    gate = tl.load(GATE + offset, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + offset, mask=inside, other=0.0).to(tl.float32)
    d_out = tl.load(D_OUT + offset, mask=inside, other=0.0).to(tl.float32)
    half = half_of_tanh(gate)
    # The product of the two saturating factors comes first: it is 0 long before the polynomial overflows.
    slope = half + gate * (half * (1 - half)) * ((1 + gate * gate * (3 * CUBIC)) * TWO_SQRT_2_OVER_PI)
    tl.store(D_GATE + offset, (d_out * up * slope).to(D_GATE.dtype.element_ty), mask=inside)
    tl.store(D_UP + offset, (d_out * gate * half).to(D_UP.dtype.element_ty), mask=inside)


def launch_geglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """Contiguous gate and up -> gelu_tanh(gate) * up."""
    out = torch.empty_like(gate)
    if gate.numel():
        with torch.cuda.device_of(gate):
            geglu_fwd_kernel[(triton.cdiv(gate.numel(), BLOCK_N),)](gate, up, out, gate.numel(), BLOCK_N=BLOCK_N)
    return out


def launch_geglu_bwd(gate: Tensor, up: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        grid = (triton.cdiv(gate.numel(), BLOCK_N),)
        with torch.cuda.device_of(gate):
            geglu_bwd_kernel[grid](gate, up, d_out.contiguous(), d_gate, d_up, gate.numel(), BLOCK_N=BLOCK_N)
    return d_gate, d_up
