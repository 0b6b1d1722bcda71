"""The flow: invertibility, log-determinant, start, gradients per image."""

import math

import pytest
import torch

from model.batch import NoiseSettings
from model.flow.coupling import Coupling
from model.flow.permutation import SPATIAL_CYCLE, build_permutation, coupling_kinds, invert
from model.jetformer import build_jetformer
from model.patchify import patchify
from model.state import State


def test_inverse_recovers_input(small_model, small_config):
    x = torch.randn(4, small_config.image.num_tokens, small_config.image.token_dim, generator=torch.Generator().manual_seed(0))
    z, _ = small_model.encode(x)
    assert (z - x).abs().max() > 0.1  # the randomised flow does something
    torch.testing.assert_close(small_model.decode(z), x, rtol=1e-5, atol=1e-5)


def test_logdet_equals_autograd_jacobian(small_model, small_config):
    model = small_model.double()
    shape = (small_config.image.num_tokens, small_config.image.token_dim)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1)).double()

    def latents(flat):
        # Couplings keep their network in fp32: one image, so the Jacobian is taken in the same precision.
        return model.encode(flat.view(1, *shape))[0].flatten()

    jacobian = torch.autograd.functional.jacobian(latents, x.flatten())
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(model.encode(x)[1][0], expected, rtol=1e-4, atol=1e-4)


def test_flow_starts_as_the_identity(small_config):
    model = build_jetformer(small_config)
    x = torch.randn(2, small_config.image.num_tokens, small_config.image.token_dim)
    z, logdet = model.encode(x)
    assert torch.equal(z, x)
    assert torch.equal(logdet, torch.zeros(2))


@pytest.mark.parametrize("kind", ["channels", *SPATIAL_CYCLE])
def test_permutations_are_bijections_and_invert(small_config, kind):
    permutation = build_permutation(kind, 0, small_config.flow, small_config.image)
    count = small_config.image.token_dim if kind == "channels" else small_config.image.num_tokens
    assert sorted(permutation.tolist()) == list(range(count))
    values = torch.arange(count)
    assert torch.equal(values[permutation][invert(permutation)], values)


def test_half_of_each_coupling_passes_unchanged(small_model, small_config):
    x = torch.randn(1, small_config.image.num_tokens, small_config.image.token_dim)
    for index, kind in enumerate(coupling_kinds(small_config.flow)):
        y = small_model.coupling(index).transform(x)[0]
        unchanged = (y == x).all(dim=(1 if kind == "channels" else 2))
        assert unchanged.sum() == unchanged.numel() // 2, kind


def test_frozen_rows_advance_like_trained_ones(small_config, small_model, build_batch):
    batch = build_batch(small_config, 6, train=False)
    assert 0 < batch.num_text_first < 6
    state = small_model.patchify(State(), batch)
    pixels = batch.image.float() / 127.5 - 1
    for coupling in small_model.couplings:
        state = coupling(state, batch)
    exact = small_model.encode(patchify(pixels, small_config.image.patch_size))[0]
    assert (state.x - exact).abs().max() < 0.2  # only dequantisation apart
    everything = small_model.patchify(State(), build_batch(small_config, 6, train=False, score_all=True))
    for coupling in small_model.couplings:
        everything = coupling(everything, build_batch(small_config, 6, train=False, score_all=True))
    torch.testing.assert_close(state.x, everything.x)


def test_image_first_examples_give_the_flow_no_gradient(small_config, small_model, build_batch):
    batch = build_batch(small_config, 4, text_first=torch.zeros(4, dtype=torch.bool))
    small_model(batch).total_loss().backward()
    for name, parameter in small_model.couplings.named_parameters():
        assert parameter.grad is not None, name  # so that no rank misses a collective
        assert not parameter.grad.any(), name


def test_state_dict_restores_the_inverse_permutation(small_config):
    source = Coupling(small_config, 0)
    source.set_permutation(torch.randperm(small_config.image.token_dim))
    target = Coupling(small_config, 0)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.inverse_permutation, source.inverse_permutation)


def test_scale_is_capped_at_two_per_coupling(small_config):
    model = build_jetformer(small_config)
    with torch.no_grad():
        for coupling in model.couplings:
            coupling.dnn.final_proj.bias.fill_(50.0)
    x = torch.randn(1, small_config.image.num_tokens, small_config.image.token_dim)
    logdet = model.encode(x)[1]
    transformed = small_config.flow.depth * x[0].numel() / 2
    torch.testing.assert_close(logdet[0].item(), transformed * math.log(2), rtol=1e-5, atol=0)


def test_noise_settings_are_immutable():
    settings = NoiseSettings(seed=0)
    with pytest.raises(AttributeError):
        settings.seed = 1  # type: ignore[misc]
