"""Plain torch: cross-entropy of a linear layer over a vocabulary. Letters: N tokens, D width, V pieces."""

from torch import Tensor
from torch.nn import functional

from model.kernels.precision import widen

_NONE_IGNORED = -(2**31)
"""torch takes -100 for "do not count": here it is a piece that is none, an error as any other."""


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(hidden W^T + b) at the targets: hidden [N, D], weight [V, D], bias [V], int64 targets [N] -> fp32 nats [N]."""
    logits = widen(functional.linear(hidden.to(weight.dtype), weight, bias))
    return functional.cross_entropy(logits, targets, reduction="none", ignore_index=_NONE_IGNORED)
