"""Cross-entropy of a linear layer over a vocabulary, without ever holding the logits of all tokens.

Letters: N tokens, D width, V pieces (of this rank).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from model.kernels.collectives import copy_to_group, logsumexp_over_group, sum_over_group
from model.kernels.dispatch import choose
from model.kernels.linear_cross_entropy.one_pass import VocabularyHead
from model.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from model.kernels.precision import widen
from model.kernels.weighted_loss import sum_weighted, token_nll, weighted_loss

WORKSPACE_BYTES = 2**30
"""Logits and their temporaries held at once."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    *,
    first_row: int = 0,
    vocab_size: int | None = None,
    group: Any = None,
    impl: str = "auto",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Tensor:
    """-log softmax(hidden W^T + b) at the targets, per token; its gradient computes the logits again.

    Args:
        hidden: [N, D], computed in the dtype of the weight; weight: [V, D]; bias: [V], in the weight's dtype.
        targets: int64 [N], pieces of the whole vocabulary. None is ignored: what does not count has token_weight 0. One outside fails as an
            index out of range does (on CUDA by an assertion on the device); split over a group it is not noticed.
        first_row: the piece of which this rank holds row 0.
        vocab_size: over all ranks, in shares that differ by at most one; needed with a group.
        group: process group over which the vocabulary is split; hidden and targets are the same on its ranks. The result and the
            gradient of hidden are then whole on every rank.
        impl: `auto`, `torch` or `reference` (model.kernels.config).
        workspace_bytes: for the logits of one chunk of tokens.

    Returns:
        fp32 nats [N]; differentiable in hidden, weight and bias.

    Raises:
        ValueError: shapes do not fit, or vocab_size is missing.
        UserError: `impl` cannot run here.
    """
    hidden = _checked(hidden, weight, bias, targets)
    if choose("linear_cross_entropy", impl, hidden.device, hidden.dtype) == "reference":
        return _reference_nll(hidden, weight, bias, targets, first_row, group)
    return token_nll(VocabularyHead(targets, first_row, group, vocab_size, workspace_bytes), hidden, weight, bias)


def linear_cross_entropy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    *,
    first_row: int = 0,
    vocab_size: int | None = None,
    group: Any = None,
    impl: str = "auto",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[Tensor, Tensor]:
    """sum_n token_weight_n nll_n, with gradients computed in the forward pass.

    Args:
        token_weight: [N], constants.
        Others as `linear_cross_entropy`.

    Returns:
        (loss, scalar, differentiable in hidden, weight and bias, once; nll, fp32 [N], not differentiable).

    Raises:
        ValueError: shapes do not fit, vocab_size is missing, or token_weight asks for a gradient.
        UserError: `impl` cannot run here.
    """
    hidden = _checked(hidden, weight, bias, targets)
    if token_weight.shape != targets.shape or token_weight.requires_grad:
        raise ValueError(
            f"token_weight must be [{len(hidden)}] constants, got {list(token_weight.shape)}, requires_grad={token_weight.requires_grad}"
        )
    token_weight = token_weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    if choose("linear_cross_entropy", impl, hidden.device, hidden.dtype) == "reference":
        nll = _reference_nll(hidden, weight, bias, targets, first_row, group)
        return sum_weighted(nll, token_weight), nll.detach()
    return weighted_loss(VocabularyHead(targets, first_row, group, vocab_size, workspace_bytes), token_weight, hidden, weight, bias)


def _reference_nll(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, first_row: int, group: Any) -> Tensor:
    """Every logit at once, by autograd."""
    if group is None:
        return linear_cross_entropy_reference(hidden, weight, bias, targets)
    logits = widen(functional.linear(copy_to_group(hidden, group), weight, bias))
    local = targets - first_row
    own = (local >= 0) & (local < len(bias))
    picked = logits.gather(1, torch.where(own, local, 0).unsqueeze(1)).squeeze(1)
    return logsumexp_over_group(torch.logsumexp(logits, dim=1), group) - sum_over_group(picked * own, group)


def _checked(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """hidden in the dtype of the weight."""
    fits = (
        hidden.dim() == weight.dim() == 2
        and hidden.shape[1] == weight.shape[1]
        and bias.shape == weight.shape[:1]
        and targets.shape == hidden.shape[:1]
    )
    if not fits:
        shapes = [list(tensor.shape) for tensor in (hidden, weight, bias, targets)]
        raise ValueError(f"hidden, weight, bias and targets must be [N, D], [V, D], [V] and [N], got {', '.join(map(str, shapes))}")
    if weight.dtype != bias.dtype:
        raise ValueError(f"weight and bias must have one dtype, got {weight.dtype} and {bias.dtype}")
    return hidden.to(weight.dtype)
