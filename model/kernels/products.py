"""Matrix products of half-precision factors with an fp32 result, and a sum over chunks that stays in fp32.

A weight gradient that is summed over chunks in bf16 is rounded once per chunk; cuBLAS adds to an fp32 matrix at no cost in arithmetic.
"""

from functools import cache

import torch
from torch import Tensor

_SLICE_BYTES = 64 * 2**20
"""fp32 copy of a part of the left factor, where the library cannot widen the result itself, or of the product, where it cannot add it."""


def widened_product(left: Tensor, right: Tensor) -> Tensor:
    """left [m, k] @ right [k, n] -> [m, n], in fp32 if the factors are of half precision, else in their dtype."""
    if not _is_half(left):
        return left @ right
    if _widens_itself(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    result = torch.empty(left.shape[0], right.shape[1], dtype=torch.float32, device=left.device)
    _multiply_slices(result, left, right, accumulate=False)
    return result


def add_product(total: Tensor, left: Tensor, right: Tensor, *, accumulate: bool = True) -> None:
    """total += left [m, k] @ right [k, n], in place; with accumulate=False, total = the product, whatever was in it.

    Args:
        total: [m, n], fp32 if the factors are of half precision, else of their dtype.
    """
    if not _is_half(left):
        torch.addmm(total, left, right, beta=1 if accumulate else 0, out=total)
    elif not _widens_itself(left):
        _multiply_slices(total, left, right, accumulate=accumulate)
    elif not accumulate:
        torch.mm(left, right, out_dtype=torch.float32, out=total)
    elif _adds_widened(left.device):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        rows = max(1, _SLICE_BYTES // (4 * max(1, right.shape[1])))
        for start in range(0, left.shape[0], rows):
            total[start : start + rows].add_(torch.mm(left[start : start + rows], right, out_dtype=torch.float32))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of products of this dtype are kept in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _multiply_slices(total: Tensor, left: Tensor, right: Tensor, *, accumulate: bool) -> None:
    """By widened copies: exact, since fp32 (and TF32) holds every bf16 number."""
    wide, rows = right.float(), max(1, _SLICE_BYTES // (4 * max(1, left.shape[1])))
    for start in range(0, left.shape[0], rows):
        part = total[start : start + rows]
        torch.addmm(part, left[start : start + rows].float(), wide, beta=1 if accumulate else 0, out=part)


def _is_half(factor: Tensor) -> bool:
    return factor.dtype in (torch.bfloat16, torch.float16)


def _widens_itself(factor: Tensor) -> bool:
    return factor.is_cuda and _has_out_dtype()


@cache
def _has_out_dtype() -> bool:
    """Whether torch's products take `out_dtype` (on CUDA, since 2.8)."""
    return "dtype_out" in torch.ops.aten.mm.overloads()


@cache
def _adds_widened(device: torch.device) -> bool:
    """Whether a product of half precision can be added to an fp32 matrix: torch 2.8 and 2.9 want the factors' dtype there (pytorch #167931)."""
    factor = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    total = torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True
