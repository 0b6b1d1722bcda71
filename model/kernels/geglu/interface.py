"""The gated activation of the decoder's MLP.

Letters: F hidden units of this rank.
"""

import torch
from torch import Tensor

from model.kernels.dispatch import choose, find_symbol
from model.kernels.geglu.reference import geglu_reference


def geglu(gate: Tensor, up: Tensor, *, impl: str = "auto") -> Tensor:
    """gelu_tanh(gate) * up (spec 1.6).

    Args:
        gate, up: [..., F] of one shape and dtype.
        impl: `kernels.geglu`. `liger` writes the gradients over `gate` and `up`: nothing else may need them then, as nothing does in the decoder.

    Returns:
        [..., F].

    Raises:
        ValueError: shapes or dtypes differ.
        UserError: `impl` cannot run here.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {gate.dtype} {list(gate.shape)} and up {up.dtype} {list(up.shape)} must have one shape and dtype")
    if torch.compiler.is_compiling():
        return geglu_reference(gate, up)  # for the compiler to fuse with its neighbours
    chosen = choose("geglu", impl, gate.device, gate.dtype)
    if chosen == "triton":
        from model.kernels.geglu.autograd import GegluFunction

        return GegluFunction.apply(gate, up)
    if chosen == "liger":
        function = find_symbol("liger_kernel.ops.geglu.LigerGELUMulFunction")
        assert function is not None, "dispatch chose liger"
        return function.apply(gate, up)  # type: ignore[attr-defined]
    return geglu_reference(gate, up)
