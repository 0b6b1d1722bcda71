"""LayerNorm, and the residual addition that stands before it.

Letters: B images, W width.
"""

import torch
from torch import Tensor

from model.kernels.dispatch import HALF_OR_SINGLE, choose
from model.kernels.layer_norm.reference import add_layer_norm_reference, layer_norm_reference

MAX_WIDTH = 4096
"""The kernels hold a row in the registers of one program."""


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, out_dtype: torch.dtype, impl: str = "auto") -> Tensor:
    """(x - mean) / sqrt(variance + 1e-6) * weight + bias, in fp32 inside (spec 1.3).

    Args:
        x: [..., W].
        weight, bias: [W], of any floating dtype.
        out_dtype: what the result is rounded to, once.
        impl: `kernels.layer_norm`.

    Returns:
        [..., W] in `out_dtype`.

    Raises:
        ValueError: `weight` or `bias` does not fit x.
        UserError: `impl` cannot run here.
    """
    _check_parameters(x, weight, bias)
    if _choose(impl, x, out_dtype) == "triton":
        from model.kernels.layer_norm.autograd import LayerNormFunction

        return LayerNormFunction.apply(x, weight, bias, out_dtype)
    return layer_norm_reference(x, weight, bias, out_dtype)


def add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, *, out_dtype: torch.dtype, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """x + branch, and `layer_norm` of it.

    Args:
        x: [B, ..., W], or [1, ..., W] to be added to every image.
        branch: [B, ..., W], also in a narrower dtype than x: the sum has the wider of the two.
        weight, bias: [W], of any floating dtype.
        out_dtype: what the norm is rounded to, once.
        impl: `kernels.layer_norm`.

    Returns:
        (x + branch, its norm in `out_dtype`), [B, ..., W] each.

    Raises:
        ValueError: shapes do not fit.
        UserError: `impl` cannot run here.
    """
    if x.shape != branch.shape and x.shape != (1, *branch.shape[1:]):
        raise ValueError(f"x {list(x.shape)} and branch {list(branch.shape)} must have one shape, or x one row for all of the branch")
    _check_parameters(branch, weight, bias)
    if _choose(impl, x, branch.dtype, out_dtype) == "triton":
        from model.kernels.layer_norm.autograd import AddLayerNormFunction

        return AddLayerNormFunction.apply(x, branch, weight, bias, out_dtype)
    return add_layer_norm_reference(x, branch, weight, bias, out_dtype)


def _choose(impl: str, x: Tensor, *dtypes: torch.dtype) -> str:
    if torch.compiler.is_compiling():
        return "reference"  # for the compiler to fuse with its neighbours
    unfit = [dtype for dtype in dtypes if dtype not in HALF_OR_SINGLE]
    chosen = choose("layer_norm", impl, x.device, unfit[0] if unfit else x.dtype)
    if chosen != "triton" or x.shape[-1] <= MAX_WIDTH:
        return chosen
    if impl == "auto":
        return "reference"
    raise ValueError(f"kernels.layer_norm=triton takes rows of up to {MAX_WIDTH} elements, not {x.shape[-1]}: set it to auto")


def _check_parameters(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(f"weight {list(weight.shape)} and bias {list(bias.shape)} do not fit x {list(x.shape)}: they must be [{x.shape[-1]}]")
