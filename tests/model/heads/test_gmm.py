"""The mixture head against torch.distributions."""

import pytest
import torch
from torch import distributions

from model.heads.gmm import GmmHead
from model.kernels.gmm_nll.reference import positive_scale
from model.parallel import TensorParallel


@pytest.fixture
def head(small_config):
    head = GmmHead(small_config, TensorParallel.single()).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).double())
    return head


def random_inputs(config, tokens=3):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, tokens, config.decoder.width, generator=generator).double()
    soft = torch.randn(2, tokens, config.gmm.soft_dim, generator=generator).double()
    return hidden, soft


def test_nll_equals_torch_distributions(head, small_config):
    hidden, soft = random_inputs(small_config)
    mixture = head.mixture(hidden)
    components = distributions.Independent(distributions.Normal(mixture.loc, mixture.scale), 1)
    expected = -distributions.MixtureSameFamily(distributions.Categorical(logits=mixture.logits), components).log_prob(soft)
    torch.testing.assert_close(head.nll(hidden, soft), expected)


def test_loss_is_the_weighted_sum_of_the_nll(head, small_config):
    hidden, soft = (x.requires_grad_() for x in random_inputs(small_config))
    weight = torch.tensor([[0.5, 0.0, 1.0], [2.0, 1.0, 0.1]]).double()
    loss, nll = head.loss(hidden, soft, weight)
    expected = head.nll(hidden, soft)
    torch.testing.assert_close(nll, expected.detach())
    inputs = (hidden, soft, *head.parameters())
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("raw", [-1e4, -50.0, -1.0, 0.0, 1.0, 50.0, 1e4])
def test_positive_scale_is_exp_asinh(raw):
    value = torch.tensor(raw, dtype=torch.float32)
    expected = torch.exp(torch.asinh(value.double() / 2)).clamp(min=1e-6)
    torch.testing.assert_close(positive_scale(value).double(), expected, rtol=1e-5, atol=0)


def test_effective_components_counts(head, small_config):
    hidden, _ = random_inputs(small_config)
    with torch.no_grad():
        head.logit_weight.zero_()
        head.logit_bias.zero_()
    torch.testing.assert_close(head.effective_components(hidden), torch.full((2, 3), 5.0).double())
    with torch.no_grad():
        head.logit_bias[2] = 100.0
    torch.testing.assert_close(head.effective_components(hidden), torch.ones(2, 3).double())


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_no_nan_at_extreme_scales_and_logits(head, small_config, extreme):
    head.float()
    hidden, soft = (x.float() for x in random_inputs(small_config))
    with torch.no_grad():
        head.component_bias[:, 1] = extreme
        head.logit_bias[::2] = 80.0
        head.logit_bias[1::2] = -80.0
    nll = head.nll(hidden, soft.requires_grad_())
    nll.sum().backward()
    assert nll.isfinite().all()
    assert all(p.grad.isfinite().all() for p in (*head.parameters(), soft))
