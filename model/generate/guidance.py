"""Classifier-free guidance of one Gaussian against another, dimension by dimension (spec 1.10).

The target is p(x) proportional to N_c(x)^(1+w) N_u(x)^-w, with N_c the conditional and N_u the unconditional Gaussian of the
same mixture component. The rules in closed form, `analytic` and `clipped`, stand beside the kernel that applies them
(model/kernels/mixture_sample); here is the reference's rule. Letters: n tokens, d soft channels, m proposals of a chunk.
"""

import torch
from torch import Tensor

from model.generate.draws import Purpose, TokenDraws
from model.kernels.mixture_sample.reference import Gaussian, analytic, clipped

__all__ = ["NUM_PROPOSALS", "Gaussian", "analytic", "clipped", "rejection_sample"]

NUM_PROPOSALS = 1000
"""Proposals of the reference before it gives up on guidance."""
_CHUNK = 40
_GRID_RADIUS, _GRID_STEPS = 10.0, 1000
"""The reference looks for the maximum of p on 1001 points, mean +- 10."""


def rejection_sample(conditional: Gaussian, unconditional: Gaussian, weight: float, draws: TokenDraws) -> Tensor:
    """One sample by the reference's rule: fp32 [n, d].

    Proposals x ~ q = N(mc, 2 max(sc, su)); fac = max over the grid of p(point) / q(mc); the first of 1000 proposals with
    U(0, fac q(x)) < p(x) is taken, and a draw from N_c if there is none. fac q does not bound p in the tails, so the law is
    proportional to min(p, fac q): samples lie nearer to mc than the analytic rule's.

    Proposals come in chunks, and rows that have all their dims leave early, which changes nothing but the cost.
    """
    sample = conditional.at(draws.normal(Purpose.NOISE, conditional.loc.shape[1:]))
    proposal_scale = 2 * torch.maximum(conditional.scale, unconditional.scale)
    log_peak = _log_target_peak(conditional, unconditional, weight)
    pending = torch.ones_like(sample, dtype=torch.bool)
    rows = torch.arange(len(sample), device=sample.device)
    for chunk in range(NUM_PROPOSALS // _CHUNK):
        if chunk and not len(rows := rows[pending[rows].any(1)]):
            break
        own, shape = draws.rows(rows), (sample.shape[1], _CHUNK)
        noise = own.normal(Purpose.PROPOSAL, shape, chunk=chunk)
        offset = noise * proposal_scale[rows, :, None]
        log_uniform = torch.log(own.uniform(Purpose.ACCEPTANCE, shape, chunk=chunk))
        # log(fac q(x)) = log max p - noise^2 / 2: the normalisation of q cancels.
        bound = log_uniform + log_peak[rows, :, None] - 0.5 * noise**2
        accepted = bound < _log_target(offset, _rows(conditional, rows), _rows(unconditional, rows), weight)
        first = accepted.int().argmax(-1, keepdim=True)
        taken = accepted.any(-1) & pending[rows]
        point = conditional.loc[rows] + offset.gather(-1, first)[..., 0]
        sample[rows] = torch.where(taken, point, sample[rows])
        pending[rows] &= ~taken
    return sample


def _rows(gaussian: Gaussian, rows: Tensor) -> Gaussian:
    return Gaussian(gaussian.loc[rows, :, None], gaussian.scale[rows, :, None])


def _log_target(offset: Tensor, conditional: Gaussian, unconditional: Gaussian, weight: float) -> Tensor:
    """log p at mc + offset, up to a constant of each dimension."""
    distance = (offset + (conditional.loc - unconditional.loc)) / unconditional.scale
    return -0.5 * (1 + weight) * (offset / conditional.scale) ** 2 + 0.5 * weight * distance**2


def _log_target_peak(conditional: Gaussian, unconditional: Gaussian, weight: float) -> Tensor:
    """Maximum of `_log_target` over the reference's grid, fp32 [n, d].

    log p is a parabola, so its maximum on the grid lies at one of the points beside its vertex or at an end: four
    evaluations in place of 1001.
    """
    best = analytic(conditional, unconditional, weight)
    step = 2 * _GRID_RADIUS / _GRID_STEPS
    vertex = ((best.loc - conditional.loc + _GRID_RADIUS) / step).clamp(0, _GRID_STEPS).floor()
    candidates = torch.stack([vertex, (vertex + 1).clamp(max=_GRID_STEPS), torch.zeros_like(vertex), torch.full_like(vertex, _GRID_STEPS)], dim=-1)
    every = torch.arange(len(vertex), device=vertex.device)
    return _log_target(candidates * step - _GRID_RADIUS, _rows(conditional, every), _rows(unconditional, every), weight).amax(-1)
