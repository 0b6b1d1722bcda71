"""RMSNorm, and the residual addition with dropout that stands before it.

Letters: B examples, D width.
"""

import torch
from torch import Tensor

from model.kernels.dispatch import choose, find_symbol
from model.kernels.rms_norm.reference import RMS_NORM_EPS, add_dropout_reference, rms_norm_reference
from model.kernels.splitmix import DropoutKey

MAX_WIDTH = 8192
"""The kernels hold a row in the registers of one program."""


def rms_norm(x: Tensor, scale: Tensor, *, impl: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + 1e-6) * (1 + scale), in fp32 inside (spec 1.6).

    Args:
        x: [..., D].
        scale: [D], of any floating dtype.
        impl: `kernels.rms_norm`.

    Returns:
        [..., D] in the dtype of x.

    Raises:
        ValueError: `scale` does not fit x.
        UserError: `impl` cannot run here.
    """
    _check_scale(x, scale)
    chosen = _choose(impl, x)
    if chosen == "triton":
        from model.kernels.rms_norm.autograd import RmsNormFunction

        return RmsNormFunction.apply(x, scale)
    if chosen == "apex":
        return _apex_rms_norm(x, scale)
    return rms_norm_reference(x, scale)


def add_dropout(x: Tensor, branch: Tensor, dropout: DropoutKey | None, *, impl: str = "auto") -> Tensor:
    """x + keep * branch / (1 - p), with the mask of `dropout`.

    Args:
        x, branch: [B, ..., D] of one shape and dtype.
        dropout: which elements to drop; None drops none.
        impl: `kernels.rms_norm`.

    Returns:
        [B, ..., D]. The quotient is rounded to the dtype, and then the sum, by every implementation.

    Raises:
        ValueError: shapes, dtypes or the number of keys do not fit.
        UserError: `impl` cannot run here.
    """
    _check_branch(x, branch, dropout)
    if dropout is not None and _choose(impl, x) == "triton":
        from model.kernels.rms_norm.autograd import AddDropoutFunction

        return AddDropoutFunction.apply(x, branch, dropout.keys, dropout)
    return add_dropout_reference(x, branch, dropout)


def add_dropout_rms_norm(x: Tensor, branch: Tensor, scale: Tensor, dropout: DropoutKey | None, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """`add_dropout`, and `rms_norm` of its result.

    Args:
        x, branch: [B, ..., D] of one shape and dtype.
        scale: [D], of any floating dtype.
        dropout: which elements of the branch to drop; None drops none.
        impl: `kernels.rms_norm`.

    Returns:
        (x + keep * branch / (1 - p), its norm), [B, ..., D] each.

    Raises:
        ValueError: shapes, dtypes or the number of keys do not fit.
        UserError: `impl` cannot run here.
    """
    _check_branch(x, branch, dropout)
    _check_scale(x, scale)
    chosen = _choose(impl, x)
    if chosen == "triton":
        from model.kernels.rms_norm.autograd import AddDropoutRmsNormFunction

        return AddDropoutRmsNormFunction.apply(x, branch, scale, None if dropout is None else dropout.keys, dropout)
    total = add_dropout_reference(x, branch, dropout)
    return total, _apex_rms_norm(total, scale) if chosen == "apex" else rms_norm_reference(total, scale)


def _choose(impl: str, x: Tensor) -> str:
    if torch.compiler.is_compiling():
        return "reference"  # for the compiler to fuse with its neighbours
    chosen = choose("rms_norm", impl, x.device, x.dtype)
    if chosen != "triton" or x.shape[-1] <= MAX_WIDTH:
        return chosen
    if impl == "auto":
        return "reference"
    raise ValueError(f"kernels.rms_norm=triton takes rows of up to {MAX_WIDTH} elements, not {x.shape[-1]}: set it to auto")


def _apex_rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """apex multiplies by its weight, and returns the dtype of that: 1 + scale in fp32 keeps what bf16 would round away."""
    function = find_symbol("apex.normalization.fused_layer_norm.FusedRMSNormAffineMixedDtypesFunction")
    assert function is not None, "dispatch chose apex"
    normed: Tensor = function.apply(x, 1 + scale.float(), (x.shape[-1],), RMS_NORM_EPS)  # type: ignore[attr-defined]
    return normed.to(x.dtype)


def _check_scale(x: Tensor, scale: Tensor) -> None:
    if scale.shape != x.shape[-1:]:
        raise ValueError(f"scale {list(scale.shape)} does not fit x {list(x.shape)}: it must be [{x.shape[-1]}]")


def _check_branch(x: Tensor, branch: Tensor, dropout: DropoutKey | None) -> None:
    if x.shape != branch.shape or x.dtype != branch.dtype:
        raise ValueError(f"x {x.dtype} {list(x.shape)} and branch {branch.dtype} {list(branch.shape)} must have one shape and dtype")
    if dropout is not None and (x.dim() < 2 or dropout.keys.shape != x.shape[:1] or dropout.keys.dtype != torch.int64):
        raise ValueError(f"dropout keys must be int64 [{len(x)}], not {dropout.keys.dtype} {list(dropout.keys.shape)}, and x [B, ..., D]")
