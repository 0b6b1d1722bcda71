"""Image head: a mixture of diagonal Gaussians over soft tokens, its components split over tensor-parallel ranks (spec 1.7).

Letters: n examples, I image tokens, N tokens flattened, D width, K mixtures (of this rank), d soft channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import JetFormerConfig
from model.kernels.config import KernelsConfig
from model.kernels.gmm_nll.interface import HeadWeights, linear_gmm_nll, linear_gmm_nll_loss, positive_scale
from model.kernels.precision import widen
from model.parallel import TensorParallel, logsumexp_over_ranks, sharded_parameter, sum_over_ranks


@dataclass(frozen=True, slots=True)
class Mixture:
    """Parameters of one mixture per token, fp32."""

    logits: Tensor
    """[..., K], unnormalised."""
    loc: Tensor
    """[..., K, d]."""
    scale: Tensor
    """[..., K, d], positive."""


class GmmHead(nn.Module):
    """Dense D -> K * (1 + 2d) and the mixture's negative log-likelihood.

    Rows of mixture k: logit_weight[k], component_weight[k, 0] (means) and component_weight[k, 1] (raw scales).
    """

    def __init__(self, config: JetFormerConfig, tp: TensorParallel, kernels: KernelsConfig | None = None) -> None:
        super().__init__()
        self.tp = tp
        self.kernels = kernels or KernelsConfig()
        width, mixtures, soft_dim = config.decoder.width, config.gmm.num_mixtures, config.gmm.soft_dim
        self.num_mixtures = mixtures
        self.logit_weight = sharded_parameter((mixtures, width), tp)
        self.logit_bias = sharded_parameter((mixtures,), tp)
        self.component_weight = sharded_parameter((mixtures, 2, soft_dim, width), tp)
        self.component_bias = sharded_parameter((mixtures, 2, soft_dim), tp)

    def nll(self, hidden: Tensor, soft: Tensor) -> Tensor:
        """-log p(soft): hidden [n, I, D], fp32 soft [n, I, d] -> fp32 nats [n, I]; differentiable in both."""
        nll = linear_gmm_nll(
            hidden.flatten(0, 1),
            soft.flatten(0, 1),
            self._weights,
            group=self.tp.group,
            num_mixtures=self.num_mixtures,
            impl=self.kernels.gmm_nll,
            workspace_bytes=self.kernels.workspace_mib * 2**20,
        )
        return nll.view(soft.shape[:2])

    def loss(self, hidden: Tensor, soft: Tensor, token_weight: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of token_weight * nll, differentiable; nll [n, I], constant): arguments as `nll`, token_weight [n, I] constants.

        Three matrix products of the head, where `nll` and its backward pass take four (model/kernels/gmm_nll).
        """
        loss, nll = linear_gmm_nll_loss(
            hidden.flatten(0, 1),
            soft.flatten(0, 1),
            self._weights,
            token_weight.flatten(),
            group=self.tp.group,
            num_mixtures=self.num_mixtures,
            impl=self.kernels.gmm_nll,
            workspace_bytes=self.kernels.workspace_mib * 2**20,
        )
        return loss, nll.view(soft.shape[:2])

    @property
    def _weights(self) -> HeadWeights:
        return self.logit_weight, self.logit_bias, self.component_weight, self.component_bias

    def mixture(self, hidden: Tensor) -> Mixture:
        """All parameters of this rank's components: hidden [..., D] -> K and d as in `Mixture`. Large: for small models and parity."""
        hidden = hidden.to(self.logit_weight.dtype)
        mixtures, _, soft_dim, width = self.component_weight.shape
        raw = widen(functional.linear(hidden, self.component_weight.reshape(-1, width), self.component_bias.flatten()))
        loc, raw_scale = raw.view(*hidden.shape[:-1], mixtures, 2, soft_dim).unbind(-2)
        return Mixture(self.mixture_logits(hidden), loc, positive_scale(raw_scale))

    def mixture_logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> fp32 [..., K]."""
        return widen(functional.linear(hidden.to(self.logit_weight.dtype), self.logit_weight, self.logit_bias))

    @torch.no_grad()
    def effective_components(self, hidden: Tensor) -> Tensor:
        """exp(entropy of the mixture weights) per token: [n, I, D] -> fp32 [n, I]."""
        logits = self.mixture_logits(hidden)
        normaliser = logsumexp_over_ranks(torch.logsumexp(logits, dim=-1), self.tp)
        weights = torch.exp(logits - normaliser.unsqueeze(-1))
        mean_logit = sum_over_ranks((weights * logits).sum(-1), self.tp)
        return torch.exp(normaliser - mean_logit)
