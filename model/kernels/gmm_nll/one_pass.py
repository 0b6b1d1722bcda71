"""The chunk loop: likelihood of a chunk of tokens and, while its outputs are still there, every gradient.

Letters: N tokens, c tokens of a chunk, D width, K mixtures (of this rank), d channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from model.kernels.chunks import largest_share, split_tokens
from model.kernels.collectives import logsumexp_over_group
from model.kernels.products import accumulation_dtype, add_product, widened_product


class Passes(Protocol):
    """The two elementwise passes over the outputs of one chunk."""

    def bytes_per_component(self, component_bias: Tensor) -> int:
        """What one token of a chunk holds per mixture, given the component bias [K, 2, d]."""
        ...

    def log_joint(self, raw: Tensor, logits: Tensor, soft: Tensor) -> tuple[Tensor, Any]:
        """logit_k + log N_k(soft), fp32 [c, K], and what `gradients` wants to see again.

        Args:
            raw: [c, K, 2, d], means and raw scales; logits: fp32 [c, K]; soft: fp32 [c, d].
        """
        ...

    def gradients(self, raw: Tensor, kept: Any, soft: Tensor, responsibility: "Responsibility") -> tuple[Tensor, Tensor]:
        """Overwrites raw with its gradient; returns those of soft, fp32 [c, d], and of the component bias, fp32 [K, 2, d]."""
        ...


@dataclass(frozen=True, slots=True)
class Responsibility:
    """Share of component k in the loss of a token: weight_n exp(log_joint_nk - joint_n)."""

    log_joint: Tensor
    """fp32 [c, K]."""
    joint: Tensor
    """fp32 [c], its logsumexp over all mixtures of all ranks."""
    weight: Tensor
    """fp32 [c]."""

    def values(self) -> Tensor:
        """fp32 [c, K]."""
        return self.weight[:, None] * torch.exp(self.log_joint - self.joint[:, None])


@dataclass(frozen=True, slots=True)
class GmmHead:
    """See `weighted_loss.Head`; its tensors are hidden [N, D], soft [N, d] and the four of `HeadWeights`."""

    passes: Passes
    group: Any
    num_mixtures: int | None
    """Over all ranks; needed with a group."""
    workspace_bytes: int
    num_shared: int = 2

    def run(
        self, tensors: Sequence[Tensor], *, token_weight: Tensor | None = None, wanted: Sequence[bool] = (), normalisers: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """-log p(soft) of every token; the normalisers are the logsumexp of log-joints and of logits over all mixtures, [2, N]."""
        hidden, soft, logit_weight, logit_bias, component_weight, component_bias = tensors
        mixtures, _, soft_dim, width = component_weight.shape
        flat_weight, flat_bias = component_weight.reshape(-1, width), component_bias.reshape(-1)
        wide, num_tokens = accumulation_dtype(hidden.dtype), len(hidden)
        found = torch.empty(2, num_tokens, dtype=wide, device=hidden.device)
        sums = None if token_weight is None else _Sums.empty(tensors, hidden=wanted[0], weights=any(wanted[2:]))
        per_token = self.passes.bytes_per_component(component_bias) * largest_share(mixtures, self.num_mixtures, self.group)
        chunks = list(split_tokens(num_tokens, bytes_per_token=per_token, workspace_bytes=self.workspace_bytes))
        outputs = hidden.new_empty(chunks[0].stop if chunks else 0, len(flat_weight))
        for index, rows in enumerate(chunks):
            x, target = hidden[rows], soft[rows]
            logits = widened_product(x, logit_weight.t()) + logit_bias.to(wide)
            # One buffer for all chunks: a fresh one would stand beside that of the chunk before.
            raw = torch.addmm(flat_bias, x, flat_weight.t(), out=outputs[: len(x)])
            components = raw.view(-1, mixtures, 2, soft_dim)
            log_joint, kept = self.passes.log_joint(components, logits, target)
            if normalisers is None:
                local = torch.stack([torch.logsumexp(log_joint, dim=1), torch.logsumexp(logits, dim=1)])
                found[:, rows] = logsumexp_over_group(local, self.group)
            else:
                found[:, rows] = normalisers[:, rows]
            if sums is None or token_weight is None:
                continue
            joint, normaliser = found[:, rows]
            responsibility = Responsibility(log_joint, joint, token_weight[rows])
            d_logits = token_weight[rows, None] * torch.exp(logits - normaliser[:, None]) - responsibility.values()
            sums.soft[rows], d_bias = self.passes.gradients(components, kept, target, responsibility)
            d_logits_narrow = d_logits.to(x.dtype)
            if sums.hidden is not None:
                d_hidden = widened_product(raw, flat_weight)
                add_product(d_hidden, d_logits_narrow, logit_weight)
                sums.hidden[rows] = d_hidden
            if sums.weights is not None:
                add_product(sums.weights[0], d_logits_narrow.t(), x, accumulate=index > 0)
                add_product(sums.weights[2].view(-1, width), raw.t(), x, accumulate=index > 0)
                sums.weights[1].add_(d_logits.sum(0))
                sums.weights[3].add_(d_bias)
        gradients: list[Tensor | None] = [None] * len(tensors)
        if sums is not None:
            gradients[:2] = sums.hidden, sums.soft
            gradients[2:] = sums.weights or gradients[2:]
        return found[1] - found[0], found, gradients


@dataclass(frozen=True, slots=True)
class _Sums:
    """Room for the gradients; those of hidden and of the weights cost a matrix product each, and are left out where nobody wants them."""

    hidden: Tensor | None
    soft: Tensor
    weights: list[Tensor] | None
    """Summed over the chunks: fp32 for weights of half precision."""

    @staticmethod
    def empty(tensors: Sequence[Tensor], *, hidden: bool, weights: bool) -> "_Sums":
        wide = accumulation_dtype(tensors[0].dtype)
        # The first chunk writes the two large sums whole; without any chunk they are 0.
        make = torch.empty if len(tensors[0]) else torch.zeros
        return _Sums(
            hidden=torch.empty(tensors[0].shape, dtype=wide, device=tensors[0].device) if hidden else None,
            soft=torch.empty(tensors[1].shape, dtype=tensors[1].dtype, device=tensors[1].device),
            weights=[(make if t.dim() in (2, 4) else torch.zeros)(t.shape, dtype=wide, device=t.device) for t in tensors[2:]] if weights else None,
        )
