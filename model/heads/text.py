"""Text head: a softmax over the vocabulary, its rows split over tensor-parallel ranks (spec 1.6, 1.8).

Letters: n examples, T text slots, D width, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.kernels.precision import widen
from model.parallel import TensorParallel, copy_to_ranks, logsumexp_over_ranks, sharded_parameter, sum_over_ranks


class TextHead(nn.Module):
    """Dense D -> V and its cross-entropy, without ever holding the whole vocabulary on one rank."""

    def __init__(self, width: int, vocab_size: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.first_row = tp.bounds(vocab_size)[0]
        self.weight = sharded_parameter((vocab_size, width), tp)
        self.bias = sharded_parameter((vocab_size,), tp)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> fp32 [..., V of this rank]."""
        return widen(functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias))

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """-log softmax at the targets: hidden [n, T, D], int64 targets [n, T] -> fp32 nats [n, T]."""
        logits = self.logits(copy_to_ranks(hidden, self.tp))
        normaliser = logsumexp_over_ranks(torch.logsumexp(logits, dim=-1), self.tp)
        local = targets - self.first_row
        own = (local >= 0) & (local < logits.shape[-1])
        picked = logits.gather(-1, torch.where(own, local, 0).unsqueeze(-1)).squeeze(-1)
        return normaliser - sum_over_ranks(picked * own, self.tp)


def mean_nll(nll: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean over the scored slots of each example: [n, T], bool [n, T] -> nats per token [n]."""
    return (nll * loss_mask).sum(-1) / loss_mask.sum(-1).clamp(min=1)
