"""The flow: invertibility, log-determinant, start, gradients per image."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from model.batch import NoiseSettings
from model.flow.coupling import Coupling, encode
from model.flow.permutation import SPATIAL_CYCLE, build_permutation, coupling_kinds, invert
from model.jetformer import build_jetformer
from model.kernels.config import KernelsConfig
from model.kernels.dispatch import is_interpreting
from model.patchify import patchify
from model.state import State
from tests.model.kernels.checks import permutes_on_chip


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
    z = state.latents.joined()
    assert not state.latents.frozen[0].requires_grad
    assert (z - exact).abs().max() < 0.2  # only dequantisation apart
    everything = small_model.patchify(State(), build_batch(small_config, 6, train=False, score_all=True))
    for coupling in small_model.couplings:
        everything = coupling(everything, build_batch(small_config, 6, train=False, score_all=True))
    assert everything.latents.frozen is None
    torch.testing.assert_close(z, everything.latents.joined())


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


def one_by_one(couplings, x):
    """The flow without links: every coupling restores the order of the subpixels."""
    logdet = torch.zeros(len(x))
    for coupling in couplings:
        x, term, _ = coupling.transform(x)
        logdet = logdet + term
    return x, logdet


def run_layers(model, batch):
    state = model.patchify(State(), batch)
    for coupling in model.couplings:
        state = coupling(state, batch)
    return state


CHAINS = [("channels",), ("channels", "channels", "spatial"), ("spatial", "channels"), ("spatial",)]


@pytest.fixture(params=CHAINS, ids="-".join)
def chain(request, small_config, randomise):
    """Five couplings of some kinds in turn."""
    return randomise(build_jetformer(replace(small_config, flow=replace(small_config.flow, depth=5, kinds=request.param))))


def test_composed_permutations_change_no_bit(chain, build_batch):
    batch = build_batch(chain.config, 4, train=False, score_all=True)
    x = chain.patchify(State(), batch).x
    expected, logdet = one_by_one(chain.couplings, x)
    z, composed_logdet = chain.encode(x)
    assert torch.equal(z, expected)
    assert torch.equal(composed_logdet, logdet)
    state = run_layers(chain, batch)
    assert torch.equal(state.latents.joined(), expected)
    assert torch.equal(state.outputs["logdet"], logdet)
    back = z
    for coupling in reversed(list(chain.couplings)):
        back = coupling.inverse(back)
    assert torch.equal(chain.decode(z), back)


def test_composed_permutations_change_no_gradient(chain):
    x = torch.randn(2, chain.config.image.num_tokens, chain.config.image.token_dim, requires_grad=True)
    leaves = [x, *chain.couplings.parameters()]
    gradients = []
    for run in (one_by_one, encode):
        z, logdet = run(chain.couplings, x)
        gradients.append(torch.autograd.grad(z.square().sum() + logdet.sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_linked_couplings_gather_once(small_config, randomise, build_batch):
    """Between couplings of channels the latents stand in the order of the next one."""
    model = randomise(build_jetformer(replace(small_config, flow=replace(small_config.flow, depth=4, kinds=("channels",)))))
    batch = build_batch(model.config, 4)
    state = model.patchify(State(), batch)
    for index, coupling in enumerate(model.couplings):
        state = coupling(state, batch)
        linked = index < 3
        assert state.x is None
        assert state.latents.reader is (model.coupling(index + 1) if linked else None)
        for part in (state.latents.trained, state.latents.frozen):
            assert len(part) == (2 if linked else 1)
    with pytest.raises(AssertionError, match="order of another coupling"):
        model.coupling(2)(model.coupling(0)(model.patchify(State(), batch), batch), batch)
    with pytest.raises(AssertionError, match="order of the next coupling"):
        model.coupling(0)(model.patchify(State(), batch), batch).latents.joined()


def test_links_follow_permutations_that_change_later(small_config, randomise, build_batch):
    config = replace(small_config, flow=replace(small_config.flow, depth=3, kinds=("channels",)))
    model, other = randomise(build_jetformer(config)), build_jetformer(config)
    batch = build_batch(config, 4, score_all=True)
    x = model.patchify(State(), batch).x
    names = set(model.state_dict())
    generator = torch.Generator().manual_seed(0)

    def agree():
        expected = one_by_one(model.couplings, x)[0]
        assert torch.equal(run_layers(model, batch).latents.joined(), expected)
        assert torch.equal(model.encode(x)[0], expected)
        torch.testing.assert_close(model.decode(expected), x, rtol=1e-4, atol=1e-4)
        return expected

    before = agree()
    model.coupling(1).set_permutation(torch.randperm(config.image.token_dim, generator=generator))
    changed = agree()
    assert not torch.equal(changed, before)
    for coupling in other.couplings:
        coupling.set_permutation(torch.randperm(config.image.token_dim, generator=generator))
    for assign in (False, True):
        buffers = {name: value.clone() for name, value in other.state_dict().items() if name.endswith("permutation")}
        model.load_state_dict(model.state_dict() | buffers, assign=assign)
        assert not torch.equal(agree(), changed)
        for coupling in other.couplings:
            coupling.set_permutation(coupling.permutation.flip(0))
    model.coupling(0).set_permutation(torch.randperm(config.image.token_dim, generator=generator))
    copied = deepcopy(model)
    assert torch.equal(copied.encode(x)[0], agree())
    assert set(model.state_dict()) == names
    assert len(list(model.couplings.modules())) == 1 + sum(len(list(coupling.modules())) for coupling in model.couplings)
    moved = model.to("meta")
    assert moved.encode(x.to("meta"))[0].device.type == "meta"


def test_kernel_computes_the_loss_and_the_gradients_of_the_reference(small_config, randomise, build_batch):
    """The whole model, with images that the flow does not train on."""
    if not is_interpreting() or permutes_on_chip():
        pytest.skip(permutes_on_chip() or "Triton is not interpreting")
    found = []
    for impl in ("reference", "triton"):
        model = randomise(build_jetformer(small_config, kernels=KernelsConfig(affine_coupling=impl)))
        batch = build_batch(small_config, 5, sigma=20.0)
        assert 0 < batch.num_text_first < 5
        loss = model(batch).total_loss()
        loss.backward()
        found.append({"loss": loss.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()})
        x = torch.randn(2, small_config.image.num_tokens, small_config.image.token_dim, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found[-1] |= {"encoded": model.encode(x)[0], "decoded": model.decode(x)}
    reference, triton = found
    for name, value in reference.items():
        torch.testing.assert_close(triton[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_inference_mode_leaves_nothing_behind_that_training_cannot_use(small_config, randomise, build_batch):
    batch = build_batch(small_config)
    expected = randomise(build_jetformer(small_config))(batch).total_loss()
    model = randomise(build_jetformer(small_config))
    with torch.inference_mode():
        model.decode(model.encode(torch.randn(2, small_config.image.num_tokens, small_config.image.token_dim))[0])
    loss = model(batch).total_loss()
    loss.backward()
    assert torch.equal(loss, expected)


def test_a_model_made_in_inference_mode_follows_its_permutations(small_config, randomise):
    x = torch.randn(2, small_config.image.num_tokens, small_config.image.token_dim)
    with torch.inference_mode():
        model = randomise(build_jetformer(small_config))
        before = model.encode(x)[0]
        model.coupling(0).set_permutation(model.coupling(0).permutation.roll(1))
        after = model.encode(x)[0]
        assert not torch.equal(before, after)
        assert torch.allclose(model.decode(after), x, atol=1e-5)


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
