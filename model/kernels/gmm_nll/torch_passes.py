"""The two elementwise passes in plain torch: any device, any float dtype. Derivation: README.md. Letters as in one_pass.py."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.kernels.gmm_nll.one_pass import Responsibility
from model.kernels.gmm_nll.reference import HALF_LOG_2PI, MIN_SCALE
from model.kernels.precision import widen

_TENSORS_HELD = 7
"""fp32 tensors [c, K, d] at the widest place, the head's own two included."""


@dataclass(slots=True)
class _Kept:
    standardised: Tensor
    inverse_scale: Tensor
    slope: Tensor
    """Derivative of the log-scale by the raw scale, 1 / sqrt(r^2 + 4); 0 where the scale is at its floor."""


class TorchPasses:
    """See `one_pass.Passes`."""

    def bytes_per_component(self, component_bias: Tensor) -> int:
        """Intermediates are held for a whole chunk here."""
        return _TENSORS_HELD * component_bias.shape[2] * max(4, component_bias.element_size())

    def log_joint(self, raw: Tensor, logits: Tensor, soft: Tensor) -> tuple[Tensor, _Kept]:
        """logit_k + log N_k(soft)."""
        loc, raw_scale = widen(raw).unbind(2)
        size = raw_scale.abs()
        # r^2 would overflow where r^2 + 4 = r^2 anyway.
        root = torch.where(size < 1e9, size.square().add_(4).sqrt_(), size)
        half_sum = size.add_(root).mul_(0.5)  # e^|log scale|
        log_scale = torch.copysign(torch.log(half_sum), raw_scale)
        inverse_scale = torch.where(raw_scale < 0, half_sum, half_sum.reciprocal()).clamp_(max=1 / MIN_SCALE)
        is_free = log_scale >= math.log(MIN_SCALE)
        slope = root.reciprocal_().mul_(is_free)
        log_scale.clamp_(min=math.log(MIN_SCALE))
        standardised = (soft.unsqueeze(1) - loc).mul_(inverse_scale)
        exponent = log_scale.addcmul_(standardised, standardised, value=0.5).sum(-1)
        return logits - exponent - soft.shape[1] * HALF_LOG_2PI, _Kept(standardised, inverse_scale, slope)

    def gradients(self, raw: Tensor, kept: _Kept, soft: Tensor, responsibility: Responsibility) -> tuple[Tensor, Tensor]:
        """d loc = -q z / scale, d raw = -q (z^2 - 1) / sqrt(r^2 + 4), d soft = -sum_k d loc."""
        negative = -responsibility.values().unsqueeze(-1)
        d_loc = kept.inverse_scale.mul_(kept.standardised).mul_(negative)
        d_raw_scale = kept.standardised.square_().sub_(1).mul_(kept.slope).mul_(negative)
        raw[:, :, 0], raw[:, :, 1] = d_loc, d_raw_scale
        return -d_loc.sum(1), torch.stack([d_loc.sum(0), d_raw_scale.sum(0)], dim=1)
