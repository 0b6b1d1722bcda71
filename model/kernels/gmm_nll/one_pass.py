"""The chunk loop: likelihood of a chunk of tokens and, while its outputs are still there, every gradient.

A gradient that waits for the backward pass has to compute the head again: four matrix products in place of three. The
weight of each token in the loss is all that the gradient needs from outside, so whoever knows it beforehand is served in one pass.
Letters: N tokens, c tokens of a chunk, D width, K mixtures (of this rank), d channels.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from model.kernels.chunks import split_tokens
from model.kernels.collectives import logsumexp_over_group
from model.kernels.gmm_nll.reference import HeadWeights
from model.kernels.products import accumulation_dtype, add_product, widened_product


class Passes(Protocol):
    """The two elementwise passes over the outputs of one chunk."""

    def bytes_per_token(self, weights: HeadWeights) -> int:
        """What one token of a chunk holds."""
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


@dataclass(slots=True)
class Gradients:
    """Of sum_n weight_n nll_n. Weight gradients stand in the dtype they were summed in; those of hidden and soft are this rank's share."""

    hidden: Tensor | None
    """[N, D]."""
    soft: Tensor
    """[N, d]."""
    weights: HeadWeights | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which gradients somebody asked for: each of the first and the last costs a matrix product."""

    hidden: bool
    weights: bool


def run(
    hidden: Tensor,
    soft: Tensor,
    weights: HeadWeights,
    *,
    passes: Passes,
    group: Any,
    workspace_bytes: int,
    token_weight: Tensor | None = None,
    wanted: Wanted | None = None,
    normalisers: Tensor | None = None,
) -> tuple[Tensor, Tensor, Gradients | None]:
    """-log p(soft) of every token, and with `wanted` the gradients of sum_n token_weight_n nll_n.

    Args:
        hidden: [N, D] in the dtype of the weights; soft: [N, d].
        group: process group over which the mixtures are split, or None.
        token_weight: [N]; needed for gradients.
        normalisers: [2, N] of an earlier run, which spares the collectives.

    Returns:
        (nll [N], normalisers [2, N]: logsumexp of log-joints and of logits over all mixtures, gradients).
    """
    logit_weight, logit_bias, component_weight, component_bias = weights
    mixtures, _, soft_dim, width = component_weight.shape
    flat_weight, flat_bias = component_weight.reshape(-1, width), component_bias.reshape(-1)
    wide = accumulation_dtype(component_weight.dtype)
    num_tokens = len(hidden)
    found = torch.empty(2, num_tokens, dtype=wide, device=hidden.device)
    gradients = None if wanted is None else _empty_gradients(hidden, soft, weights, wanted, wide)
    chunks = list(split_tokens(num_tokens, bytes_per_token=passes.bytes_per_token(weights), workspace_bytes=workspace_bytes))
    outputs = torch.empty(chunks[0].stop if chunks else 0, len(flat_weight), dtype=hidden.dtype, device=hidden.device)
    for index, rows in enumerate(chunks):
        x, target = hidden[rows], soft[rows]
        logits = widened_product(x, logit_weight.t()) + logit_bias.to(wide)
        # One buffer for all chunks: a fresh one would stand beside that of the chunk before.
        raw = torch.addmm(flat_bias, x, flat_weight.t(), out=outputs[: len(x)])
        components = raw.view(-1, mixtures, 2, soft_dim)
        log_joint, kept = passes.log_joint(components, logits, target)
        if normalisers is None:
            local = torch.stack([torch.logsumexp(log_joint, dim=1), torch.logsumexp(logits, dim=1)])
            found[:, rows] = logsumexp_over_group(local, group)
        else:
            found[:, rows] = normalisers[:, rows]
        if gradients is None:
            continue
        assert token_weight is not None
        joint, normaliser = found[:, rows]
        responsibility = Responsibility(log_joint, joint, token_weight[rows])
        d_logits = token_weight[rows, None] * torch.exp(logits - normaliser[:, None]) - responsibility.values()
        gradients.soft[rows], d_bias = passes.gradients(components, kept, target, responsibility)
        d_logits_narrow = d_logits.to(x.dtype)
        if gradients.hidden is not None:
            d_hidden = widened_product(raw, flat_weight)
            add_product(d_hidden, d_logits_narrow, logit_weight)
            gradients.hidden[rows] = d_hidden
        if gradients.weights is not None:
            add_product(gradients.weights[0], d_logits_narrow.t(), x, accumulate=index > 0)
            add_product(gradients.weights[2].view(-1, width), raw.t(), x, accumulate=index > 0)
            gradients.weights[1].add_(d_logits.sum(0))
            gradients.weights[3].add_(d_bias)
    return found[1] - found[0], found, gradients


def _empty_gradients(hidden: Tensor, soft: Tensor, weights: HeadWeights, wanted: Wanted, wide: torch.dtype) -> Gradients:
    """Room for the sums. The two large ones are written whole by the first chunk, if there is one."""
    make = torch.zeros_like if not len(hidden) else torch.empty_like
    return Gradients(
        hidden=torch.empty_like(hidden, memory_format=torch.contiguous_format) if wanted.hidden else None,
        soft=torch.empty(soft.shape, dtype=soft.dtype, device=soft.device),
        weights=(
            make(weights[0], dtype=wide, memory_format=torch.contiguous_format),
            torch.zeros_like(weights[1], dtype=wide),
            make(weights[2], dtype=wide, memory_format=torch.contiguous_format),
            torch.zeros_like(weights[3], dtype=wide),
        )
        if wanted.weights
        else None,
    )
