"""Plain torch: log-density of a Gaussian mixture whose parameters are a linear function of the hidden states.

Letters: N tokens, D width, K mixtures, d channels.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from model.kernels.precision import widen

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
MIN_SCALE = 1e-6

HeadWeights = tuple[Tensor, Tensor, Tensor, Tensor]
"""logit_weight [K, D], logit_bias [K], component_weight [K, 2, d, D], component_bias [K, 2, d]."""


def positive_scale(raw: Tensor) -> Tensor:
    """Square-plus, (r + sqrt(r^2 + 4)) / 2, at least 1e-6 (spec 1.7). Stable for r << 0, where the plain form cancels."""
    root = torch.sqrt(raw * raw + 4)
    return torch.where(raw < 0, 2 / (root - raw), (raw + root) / 2).clamp(min=MIN_SCALE)


def linear_gmm_logsumexp_reference(hidden: Tensor, soft: Tensor, weights: HeadWeights) -> tuple[Tensor, Tensor]:
    """logsumexp_k(logit_k + log N_k(soft)) and logsumexp_k(logit_k), whose difference is the mixture's log-density.

    Args:
        hidden: [N, D]; soft: fp32 [N, d].

    Returns:
        fp32 [N] twice.
    """
    logit_weight, logit_bias, component_weight, component_bias = weights
    mixtures, _, soft_dim, width = component_weight.shape
    hidden = hidden.to(logit_weight.dtype)
    logits = widen(functional.linear(hidden, logit_weight, logit_bias))
    raw = widen(functional.linear(hidden, component_weight.reshape(-1, width), component_bias.flatten()))
    loc, raw_scale = raw.view(-1, mixtures, 2, soft_dim).unbind(2)
    log_scale = torch.asinh(raw_scale / 2).clamp(min=math.log(MIN_SCALE))
    standardised = (soft.unsqueeze(1) - loc) * torch.exp(-log_scale)
    log_density = -(0.5 * standardised.square() + log_scale).sum(-1) - soft_dim * HALF_LOG_2PI
    return torch.logsumexp(logits + log_density, dim=-1), torch.logsumexp(logits, dim=-1)
