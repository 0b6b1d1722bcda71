"""The chunk loop of the text head: likelihood of a chunk of tokens and, while its logits are still there, every gradient.

All in torch: the products are cuBLAS's, and what is left is five passes over [c, V] on half a percent of a training step's FLOPs
(README.md). Letters: N tokens, c tokens of a chunk, D width, V pieces (of this rank).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.kernels.chunks import largest_share, split_tokens
from model.kernels.collectives import reduce_in_place
from model.kernels.products import accumulation_dtype, add_product, widened_product

_BYTES_PER_LOGIT = 10
"""The logits in fp32, their exponentials while they are summed, and a copy of their gradient in half precision."""


@dataclass(frozen=True, slots=True)
class VocabularyHead:
    """See `weighted_loss.Head`; its tensors are hidden [N, D], weight [V, D] and bias [V]."""

    targets: Tensor
    """int64 [N], of the whole vocabulary."""
    first_row: int
    """The piece of which this rank holds row 0."""
    group: Any
    vocab_size: int | None
    """Over all ranks; needed with a group."""
    workspace_bytes: int
    num_shared: int = 1

    def run(
        self, tensors: Sequence[Tensor], *, token_weight: Tensor | None = None, wanted: Sequence[bool] = (), normalisers: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """-log p(target) of every token; the normalisers are the largest logit and the logsumexp of the distances to it, [2, N].

        Apart, since their sum would be rounded at the size of the logit.
        """
        hidden, weight, bias = tensors
        wide, num_tokens = accumulation_dtype(hidden.dtype), len(hidden)
        found = torch.empty(2, num_tokens, dtype=wide, device=hidden.device)
        picked = torch.empty(num_tokens, dtype=wide, device=hidden.device)
        gradients: list[Tensor | None] = [None, None, None] if token_weight is None else _room(tensors, wanted, wide)
        per_token = _BYTES_PER_LOGIT * largest_share(len(bias), self.vocab_size, self.group)
        chunks = split_tokens(num_tokens, bytes_per_token=per_token, workspace_bytes=self.workspace_bytes)
        for index, rows in enumerate(chunks):
            x = hidden[rows]
            logits = widened_product(x, weight.t()).add_(bias)
            own, place = self._rows_of(self.targets[rows], len(bias))
            peak, normaliser = found[:, rows]
            if normalisers is None:
                peak.copy_(reduce_in_place(logits.amax(1), self.group, maximum=True))
            else:
                found[:, rows] = normalisers[:, rows]
            logits.sub_(peak.unsqueeze(1))
            if normalisers is None:
                normaliser.copy_(reduce_in_place(torch.exp(logits).sum(1), self.group).log_())
            picked[rows] = logits.gather(1, place).squeeze(1) * own
            if token_weight is None:
                continue
            d_logits = logits.sub_(normaliser.unsqueeze(1)).exp_().mul_(token_weight[rows, None])
            d_logits.scatter_add_(1, place, -(token_weight[rows] * own).unsqueeze(1))
            narrow = d_logits.to(x.dtype)
            d_hidden, d_weight, d_bias = gradients
            if d_hidden is not None:
                d_hidden[rows] = widened_product(narrow, weight)
            if d_weight is not None:
                add_product(d_weight, narrow.t(), x, accumulate=index > 0)
            if d_bias is not None:
                d_bias.add_(d_logits.sum(0))
        reduce_in_place(picked, self.group)
        return found[1] - picked, found, gradients

    def _rows_of(self, targets: Tensor, num_pieces: int) -> tuple[Tensor, Tensor]:
        """Whether this rank holds a target, bool [c], and the row where it does, [c, 1]. One rank holds all: another piece fails in `gather`."""
        local = targets - self.first_row
        own = torch.ones_like(local, dtype=torch.bool) if self.group is None else (local >= 0) & (local < num_pieces)
        return own, torch.where(own, local, 0).unsqueeze(1)


def _room(tensors: Sequence[Tensor], wanted: Sequence[bool], wide: torch.dtype) -> list[Tensor | None]:
    hidden, weight, bias = tensors
    make = torch.empty_like if len(hidden) else torch.zeros_like
    return [
        torch.empty(hidden.shape, dtype=wide, device=hidden.device) if wanted[0] else None,
        make(weight, dtype=wide, memory_format=torch.contiguous_format) if wanted[1] else None,
        torch.zeros_like(bias, dtype=wide) if wanted[2] else None,
    ]
