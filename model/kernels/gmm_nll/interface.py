"""Log-likelihood of soft tokens under a Gaussian mixture whose parameters are a linear function of hidden states.

At K=1024, d=128 the head emits 263,168 numbers per token (spec 1.14); kept for the backward pass they are 0.4 GB per image. Here
at most a chunk of them exists at a time. Letters: N tokens, D width, K mixtures (of this rank), d channels.
"""

from typing import Any

import torch
from torch import Tensor

from model.kernels.collectives import copy_to_group, logsumexp_over_group
from model.kernels.dispatch import choose
from model.kernels.gmm_nll.one_pass import GmmHead, Passes
from model.kernels.gmm_nll.reference import HeadWeights, linear_gmm_logsumexp_reference, positive_scale
from model.kernels.gmm_nll.torch_passes import TorchPasses
from model.kernels.weighted_loss import sum_weighted, token_nll, weighted_loss

WORKSPACE_BYTES = 2**30
"""Outputs of the head held at once."""


def linear_gmm_nll(
    hidden: Tensor,
    soft: Tensor,
    weights: HeadWeights,
    *,
    group: Any = None,
    num_mixtures: int | None = None,
    impl: str = "auto",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Tensor:
    """-log p(soft) of every token; its gradient may differ from token to token, so the backward pass computes the head again.

    Args:
        hidden: [N, D], bf16, fp32 or fp64; computed in the dtype of the weights.
        soft: [N, d], fp32 (fp64 with fp64 weights).
        weights: see `HeadWeights`, of one dtype; K is this rank's share of the mixtures.
        group: process group over which the mixtures are split; hidden and soft are the same on its ranks. The result and the
            gradients of hidden and soft are then whole on every rank: two all-reduces of [2, N] and one of each gradient.
        num_mixtures: over all ranks, in shares that differ by at most one; needed with a group.
        impl: `auto`, `triton`, `torch` or `reference` (model.kernels.config).
        workspace_bytes: for the head outputs of one chunk of tokens.

    Returns:
        fp32 nats [N]; differentiable in hidden, soft and all weights.

    Raises:
        ValueError: shapes do not fit, or num_mixtures is missing.
        UserError: `impl` cannot run here.
    """
    hidden, soft = _checked(hidden, soft, weights)
    chosen = choose("gmm_nll", impl, hidden.device, hidden.dtype)
    if chosen == "reference":
        return _reference_nll(hidden, soft, weights, group)
    return token_nll(GmmHead(_passes(chosen), group, num_mixtures, workspace_bytes), hidden, soft, *weights)


def linear_gmm_nll_loss(
    hidden: Tensor,
    soft: Tensor,
    weights: HeadWeights,
    token_weight: Tensor,
    *,
    group: Any = None,
    num_mixtures: int | None = None,
    impl: str = "auto",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[Tensor, Tensor]:
    """sum_n token_weight_n * -log p(soft_n): the loss of training, with gradients computed in the forward pass.

    Args:
        token_weight: [N], constants; tokens of weight 0 count nothing in the loss, even where their likelihood is not finite (in the
            gradients, where it is finite).
        Others as `linear_gmm_nll`.

    Returns:
        (loss, scalar, differentiable in hidden, soft and all weights, once; nll, fp32 [N], not differentiable).

    Raises:
        ValueError: shapes do not fit, num_mixtures is missing, or token_weight asks for a gradient.
        UserError: `impl` cannot run here.
    """
    hidden, soft = _checked(hidden, soft, weights)
    if token_weight.shape != hidden.shape[:1] or token_weight.requires_grad:
        raise ValueError(
            f"token_weight must be [{len(hidden)}] constants, got {list(token_weight.shape)}, requires_grad={token_weight.requires_grad}"
        )
    token_weight = token_weight.to(soft.dtype)
    chosen = choose("gmm_nll", impl, hidden.device, hidden.dtype)
    if chosen == "reference":
        nll = _reference_nll(hidden, soft, weights, group)
        return sum_weighted(nll, token_weight), nll.detach()
    return weighted_loss(GmmHead(_passes(chosen), group, num_mixtures, workspace_bytes), token_weight, hidden, soft, *weights)


def _passes(impl: str) -> Passes:
    if impl == "torch":
        return TorchPasses()
    from model.kernels.gmm_nll.triton_passes import TritonPasses

    return TritonPasses()


def _reference_nll(hidden: Tensor, soft: Tensor, weights: HeadWeights, group: Any) -> Tensor:
    """Everything at once, by autograd."""
    joint, logits = linear_gmm_logsumexp_reference(copy_to_group(hidden, group), copy_to_group(soft, group), weights)
    return logsumexp_over_group(logits, group) - logsumexp_over_group(joint, group)


def _checked(hidden: Tensor, soft: Tensor, weights: HeadWeights) -> tuple[Tensor, Tensor]:
    """hidden in the dtype of the weights, soft in that of the sums."""
    found = tuple(tuple(weight.shape) for weight in weights)
    mixtures, _, soft_dim, width = sizes = found[2] if len(found) == 4 and len(found[2]) == 4 else (0, 0, 0, 0)
    if found != ((mixtures, width), (mixtures,), (mixtures, 2, soft_dim, width), (mixtures, 2, soft_dim)) or not all(sizes):
        raise ValueError(f"head weights must be [K, D], [K], [K, 2, d, D] and [K, 2, d], got {found}")
    dtypes = {weight.dtype for weight in weights}
    if len(dtypes) > 1:
        raise ValueError(f"head weights must have one dtype, got {', '.join(sorted(map(str, dtypes)))}")
    if hidden.dim() != 2 or soft.dim() != 2 or hidden.shape[1] != width or soft.shape[1] != soft_dim or len(hidden) != len(soft):
        raise ValueError(f"hidden must be [N, {width}] and soft [N, {soft_dim}], got {list(hidden.shape)} and {list(soft.shape)}")
    (dtype,) = dtypes
    return hidden.to(dtype), soft.to(torch.float64 if dtype == torch.float64 else torch.float32)


__all__ = ["WORKSPACE_BYTES", "HeadWeights", "linear_gmm_nll", "linear_gmm_nll_loss", "positive_scale"]
