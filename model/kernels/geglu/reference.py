"""Plain torch: the gated activation of the decoder's MLP (spec 1.6)."""

from torch import Tensor
from torch.nn import functional


def geglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up, elementwise."""
    return functional.gelu(gate, approximate="tanh") * up
