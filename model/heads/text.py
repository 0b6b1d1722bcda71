"""Text head: a softmax over the vocabulary, its rows split over tensor-parallel ranks (spec 1.6, 1.8).

Letters: n examples, T text slots, D width, V vocabulary.
"""

from torch import Tensor, nn
from torch.nn import functional

from model.kernels.config import KernelsConfig
from model.kernels.linear_cross_entropy.interface import linear_cross_entropy, linear_cross_entropy_loss
from model.kernels.precision import widen
from model.parallel import TensorParallel, sharded_parameter


class TextHead(nn.Module):
    """Dense D -> V and its cross-entropy, without ever holding the whole vocabulary on one rank."""

    def __init__(self, width: int, vocab_size: int, tp: TensorParallel, kernels: KernelsConfig | None = None) -> None:
        super().__init__()
        self.tp = tp
        self.kernels = kernels or KernelsConfig()
        self.vocab_size = vocab_size
        self.first_row = tp.bounds(vocab_size)[0]
        self.weight = sharded_parameter((vocab_size, width), tp)
        self.bias = sharded_parameter((vocab_size,), tp)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> fp32 [..., V of this rank]."""
        return widen(functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias))

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """-log softmax at the targets: hidden [n, T, D], int64 targets [n, T] -> fp32 nats [n, T]."""
        nll = linear_cross_entropy(
            hidden.flatten(0, 1),
            self.weight,
            self.bias,
            targets.flatten(),
            first_row=self.first_row,
            vocab_size=self.vocab_size,
            group=self.tp.group,
            impl=self.kernels.linear_cross_entropy,
            workspace_bytes=self.kernels.workspace_mib * 2**20,
        )
        return nll.view(targets.shape)

    def loss(self, hidden: Tensor, targets: Tensor, token_weight: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of token_weight * nll, differentiable; nll [n, T], constant): arguments as `nll`, token_weight [n, T] constants."""
        loss, nll = linear_cross_entropy_loss(
            hidden.flatten(0, 1),
            self.weight,
            self.bias,
            targets.flatten(),
            token_weight.flatten(),
            first_row=self.first_row,
            vocab_size=self.vocab_size,
            group=self.tp.group,
            impl=self.kernels.linear_cross_entropy,
            workspace_bytes=self.kernels.workspace_mib * 2**20,
        )
        return loss, nll.view(targets.shape)


def slot_weights(loss_mask: Tensor) -> Tensor:
    """What each slot counts in its example's mean over the scored ones: bool [n, T] -> fp32 [n, T]."""
    return loss_mask / loss_mask.sum(-1, keepdim=True).clamp(min=1)
