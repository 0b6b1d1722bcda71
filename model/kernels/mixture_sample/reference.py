"""Plain torch: one draw from a chosen component of the image head, with the closed-form rules of guidance (spec 1.10).

The target of guidance is p(x) proportional to N_c(x)^(1+w) N_u(x)^-w, with N_c the conditional and N_u the unconditional Gaussian of
the same component, dimension by dimension. Letters: B examples, N = copies * B rows, D width, K mixtures, d soft channels.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.kernels.gmm_nll.reference import positive_scale
from model.kernels.precision import widen

ClosedForm = Literal["analytic", "clipped"]
MIN_TEMPERATURE = 1e-6
"""Guidance divides by the scales: at temperature 0 they are as good as 0, and keep their ratios."""


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Independent Gaussians, fp32 [n, d] each."""

    loc: Tensor
    scale: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """The point `noise` standard deviations from the mean."""
        return self.loc + self.scale * noise


def analytic(conditional: Gaussian, unconditional: Gaussian, weight: float) -> Gaussian:
    """The target in closed form, where it is a Gaussian; N_c where it cannot be normalised.

    p has precision lam = (1+w)/sc^2 - w/su^2 and mean ((1+w) mc/sc^2 - w mu/su^2) / lam.
    """
    precision_c, precision_u = conditional.scale**-2, unconditional.scale**-2
    precision = (1 + weight) * precision_c - weight * precision_u
    normalisable = precision > 0
    safe = torch.where(normalisable, precision, 1.0)
    # Relative to mc, so that nothing cancels where the two means agree.
    loc = conditional.loc + weight * precision_u * (conditional.loc - unconditional.loc) / safe
    return Gaussian(torch.where(normalisable, loc, conditional.loc), torch.where(normalisable, safe.rsqrt(), conditional.scale))


def clipped(conditional: Gaussian, unconditional: Gaussian, weight: float) -> Gaussian:
    """The target with r = (sc/su)^2 cut at 1: never wider than N_c (the closed form of STARFlow, arXiv 2506.06276).

    Where the conditional Gaussian is the narrower one this is `analytic`. Where it is slightly the wider one, `analytic` goes
    through a pole at r = (1+w)/w: at w = 9 and r = 1.1 it moves the mean by 99 (mc - mu) and triples the scale.
    """
    ratio = (conditional.scale / unconditional.scale).square().clamp(max=1)
    remainder = 1 + weight - weight * ratio
    loc = conditional.loc + weight * ratio * (conditional.loc - unconditional.loc) / remainder
    return Gaussian(loc, conditional.scale * remainder.rsqrt())


def component_gaussian_reference(hidden: Tensor, weight: Tensor, bias: Tensor, component: Tensor, *, temperature: float = 1.0) -> Gaussian:
    """The chosen component of each row, tempered: 2d rows of the head instead of 2Kd (spec 1.14).

    Args:
        hidden: [N, D]; weight: [K, 2, d, D], means and raw scales; bias: [K, 2, d]; component: int64 [N].

    Returns:
        fp32 [N, d] each.
    """
    own_weight, own_bias = weight[component], bias[component]
    raw = widen(torch.einsum("nrdw,nw->nrd", own_weight, hidden.to(weight.dtype))) + widen(own_bias)
    loc, raw_scale = raw.unbind(1)
    return Gaussian(loc, positive_scale(raw_scale) * max(temperature, MIN_TEMPERATURE))


def mixture_sample_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    component: Tensor,
    noise: Tensor,
    *,
    cfg_scale: float = 0.0,
    cfg_rule: ClosedForm = "analytic",
    temperature: float = 1.0,
) -> Tensor:
    """See `interface.mixture_sample`."""
    if not cfg_scale:
        return component_gaussian_reference(hidden, weight, bias, component, temperature=temperature).at(noise)
    conditional = component_gaussian_reference(hidden[::2], weight, bias, component, temperature=temperature)
    unconditional = component_gaussian_reference(hidden[1::2], weight, bias, component, temperature=temperature)
    return (clipped if cfg_rule == "clipped" else analytic)(conditional, unconditional, cfg_scale).at(noise)
