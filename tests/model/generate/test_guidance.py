"""Both guidance rules against the densities that define them (spec 1.10)."""

import dataclasses

import numpy as np
import pytest
import torch

from model.generate.draws import Purpose, TokenDraws
from model.generate.guidance import NUM_PROPOSALS, Gaussian, _log_target, _log_target_peak, analytic, clipped, rejection_sample

NUM = 20_000


def gaussians(loc: float, scale: float, num: int = NUM) -> Gaussian:
    return Gaussian(torch.full((num, 1), loc), torch.full((num, 1), scale))


def draws(num: int = NUM) -> TokenDraws:
    return TokenDraws(5, torch.arange(num), 0)


def log_normal(x, loc, scale):
    return -0.5 * ((x - loc) / scale) ** 2 - np.log(scale)


CASES = [(0.0, 1.0, 0.0, 1.0, 3.0), (0.5, 0.7, -0.2, 1.1, 2.0), (-1.0, 1.2, 0.4, 1.3, 1.0), (0.3, 1.0, 0.0, 0.9, 0.5)]


@pytest.mark.parametrize(("loc_c", "scale_c", "loc_u", "scale_u", "weight"), CASES)
def test_analytic_rule_is_the_normalised_target(loc_c, scale_c, loc_u, scale_u, weight):
    x = np.linspace(-40, 40, 400_001)
    log_p = (1 + weight) * log_normal(x, loc_c, scale_c) - weight * log_normal(x, loc_u, scale_u)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean = (p * x).sum()
    guided = analytic(gaussians(loc_c, scale_c, 1), gaussians(loc_u, scale_u, 1), weight)
    assert guided.loc.item() == pytest.approx(mean, abs=1e-4)
    assert guided.scale.item() == pytest.approx(np.sqrt((p * (x - mean) ** 2).sum()), rel=1e-4)


def test_analytic_rule_is_conditional_where_the_target_cannot_be_normalised():
    guided = analytic(gaussians(0.4, 2.0, 1), gaussians(0.0, 1.0, 1), 3.0)
    assert (guided.loc.item(), guided.scale.item()) == (pytest.approx(0.4), 2.0)


@pytest.mark.parametrize("scale_c", [0.3, 0.8, 1.0])
def test_clipped_rule_is_the_analytic_one_where_the_conditional_is_narrower(scale_c):
    pair = gaussians(0.4, scale_c, 1), gaussians(-0.2, 1.0, 1)
    for got, expected in zip(dataclasses.astuple(clipped(*pair, 4.0)), dataclasses.astuple(analytic(*pair, 4.0)), strict=True):
        torch.testing.assert_close(got, expected)


def test_clipped_rule_stays_put_beside_the_pole_of_the_analytic_one():
    pair = gaussians(0.4, 1.1**0.5, 1), gaussians(0.3, 1.0, 1)
    assert analytic(*pair, 9.0).loc.item() == pytest.approx(0.4 + 99 * 0.1, rel=1e-3)
    guided = clipped(*pair, 9.0)
    assert guided.loc.item() == pytest.approx(0.4 + 9 * 0.1, rel=1e-4)
    assert guided.scale.item() == pytest.approx(1.1**0.5)


def test_analytic_rule_without_weight_changes_nothing():
    conditional = gaussians(0.4, 2.0, 1)
    guided = analytic(conditional, gaussians(0.0, 1.0, 1), 0.0)
    torch.testing.assert_close(guided.loc, conditional.loc)
    torch.testing.assert_close(guided.scale, conditional.scale)


@pytest.mark.parametrize(("shift", "expected"), [(0.2, 0.60), (0.5, 1.41), (1.0, 2.50)])
def test_rejection_rule_shifts_means_as_the_reference_does(shift, expected):
    """The reference's own law, simulated: at weight 3 and scale 1 it stays short of the analytic 3 * shift."""
    sample = rejection_sample(gaussians(shift, 1.0), gaussians(0.0, 1.0), 3.0, draws())
    assert sample.mean().item() - shift == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(("loc_c", "scale_c", "loc_u", "scale_u", "weight"), [*CASES, (1.5, 0.8, 0.0, 1.0, 4.0)])
def test_rejection_rule_follows_its_law(loc_c, scale_c, loc_u, scale_u, weight):
    """Histogram against min(p, fac q), with fac taken on the reference's 1001 points."""
    sample = rejection_sample(gaussians(loc_c, scale_c), gaussians(loc_u, scale_u), weight, draws())[:, 0].numpy()
    edges = np.linspace(loc_c - 8, loc_c + 8, 81)
    x = (edges[:-1, None] + (edges[1] - edges[0]) * (np.arange(20) + 0.5) / 20).ravel()
    proposal_scale = 2 * max(scale_c, scale_u)

    def log_target(points):
        return (1 + weight) * log_normal(points, loc_c, scale_c) - weight * log_normal(points, loc_u, scale_u)

    log_fac = log_target(loc_c + np.linspace(-10, 10, 1001)).max() - log_normal(loc_c, loc_c, proposal_scale)
    law = np.exp(np.minimum(log_target(x), log_fac + log_normal(x, loc_c, proposal_scale)))
    law = (law / law.sum()).reshape(80, 20).sum(1)
    histogram = np.histogram(sample, edges)[0] / len(sample)
    assert np.abs(histogram - law).sum() / 2 < 0.025  # total variation; sampling noise alone is about 0.015


def test_rejection_peak_is_the_maximum_over_all_grid_points():
    generator = torch.Generator().manual_seed(0)
    num = 500
    conditional = Gaussian(torch.randn(num, 3, generator=generator), torch.rand(num, 3, generator=generator) * 3 + 0.01)
    unconditional = Gaussian(torch.randn(num, 3, generator=generator), torch.rand(num, 3, generator=generator) * 3 + 0.01)
    grid = torch.linspace(-10, 10, 1001).expand(num, 3, -1)

    def widen(gaussian):
        return Gaussian(gaussian.loc[..., None], gaussian.scale[..., None])

    for weight in (0.5, 3.0, 9.0):
        brute = _log_target(grid, widen(conditional), widen(unconditional), weight).amax(-1)
        torch.testing.assert_close(_log_target_peak(conditional, unconditional, weight), brute, rtol=1e-4, atol=1e-3)


def test_rejection_rule_falls_back_to_the_conditional_gaussian():
    """A target that grows without bound, its largest grid points far from all proposals: what remains is the plain conditional draw."""
    num = 200
    conditional, unconditional = gaussians(0.1, 0.5, num), gaussians(0.0, 0.3, num)
    sample = rejection_sample(conditional, unconditional, 3.0, draws(num))
    assert torch.equal(sample, conditional.at(draws(num).normal(Purpose.NOISE, (1,))))


def test_rejection_sample_of_a_row_does_not_depend_on_the_others():
    generator = torch.Generator().manual_seed(1)
    num = 12
    conditional = Gaussian(torch.randn(num, 4, generator=generator), torch.rand(num, 4, generator=generator) + 0.3)
    unconditional = Gaussian(torch.randn(num, 4, generator=generator), torch.rand(num, 4, generator=generator) + 0.3)
    together = rejection_sample(conditional, unconditional, 3.0, draws(num))
    rows = torch.tensor([7, 2])
    some = rejection_sample(
        Gaussian(conditional.loc[rows], conditional.scale[rows]),
        Gaussian(unconditional.loc[rows], unconditional.scale[rows]),
        3.0,
        draws(num).rows(rows),
    )
    assert torch.equal(some, together[rows])


def test_number_of_proposals_is_the_references():
    assert NUM_PROPOSALS == 1000
