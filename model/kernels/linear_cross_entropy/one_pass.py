"""The chunk loop of the text head: likelihood of a chunk of tokens and, while its logits are still there, every gradient.

All in torch: the products are cuBLAS's, and what is left is five passes over [c, V] on half a percent of a training step's FLOPs
(README.md). Letters: N tokens, c tokens of a chunk, D width, V pieces (of this rank).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.kernels.chunks import split_tokens
from model.kernels.collectives import logsumexp_over_group, reduce_in_place
from model.kernels.products import accumulation_dtype, add_product, widened_product

_BYTES_PER_LOGIT = 14
"""The logits in fp32, one temporary of their size, a copy of their gradient in half precision, and what logsumexp takes."""


@dataclass(frozen=True, slots=True)
class VocabularyHead:
    """See `weighted_loss.Head`; its tensors are hidden [N, D], weight [V, D] and bias [V]."""

    targets: Tensor
    """int64 [N], of the whole vocabulary."""
    first_row: int
    """The piece of which this rank holds row 0."""
    group: Any
    workspace_bytes: int
    num_shared: int = 1

    def run(
        self, tensors: Sequence[Tensor], *, token_weight: Tensor | None = None, wanted: Sequence[bool] = (), normalisers: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """-log p(target) of every token; the normaliser is the logsumexp of all logits, [N]."""
        hidden, weight, bias = tensors
        wide, num_tokens = accumulation_dtype(hidden.dtype), len(hidden)
        normaliser, picked = torch.empty(2, num_tokens, dtype=wide, device=hidden.device)
        gradients = [None] * 3 if token_weight is None else _room(tensors, wanted, wide)
        chunks = split_tokens(num_tokens, bytes_per_token=_BYTES_PER_LOGIT * len(bias), workspace_bytes=self.workspace_bytes)
        for index, rows in enumerate(chunks):
            x = hidden[rows]
            logits = widened_product(x, weight.t()).add_(bias)
            local = self.targets[rows] - self.first_row
            own = (local >= 0) & (local < len(bias))
            place = torch.where(own, local, 0).unsqueeze(1)
            picked[rows] = logits.gather(1, place).squeeze(1) * own
            if normalisers is None:
                normaliser[rows] = logsumexp_over_group(torch.logsumexp(logits, dim=1), self.group)
            else:
                normaliser[rows] = normalisers[rows]
            if token_weight is None:
                continue
            d_logits = logits.sub_(normaliser[rows, None]).exp_().mul_(token_weight[rows, None])
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
        return normaliser - picked, normaliser, gradients


def _room(tensors: Sequence[Tensor], wanted: Sequence[bool], wide: torch.dtype) -> list[Tensor | None]:
    hidden, weight, bias = tensors
    make = torch.empty_like if len(hidden) else torch.zeros_like
    return [
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if wanted[0] else None,
        make(weight, dtype=wide, memory_format=torch.contiguous_format) if wanted[1] else None,
        torch.zeros_like(bias, dtype=wide) if wanted[2] else None,
    ]
