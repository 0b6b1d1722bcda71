"""The whole model: start values, causality, exact skips, independence of batch composition."""

import dataclasses
import math

import pytest
import torch

from model import stats
from model.config import JetFormerConfig, ObjectiveConfig
from model.jetformer import build_jetformer
from model.sequence import image_slice, text_slice


def with_objective(config: JetFormerConfig, **changes: object) -> JetFormerConfig:
    return dataclasses.replace(config, objective=dataclasses.replace(config.objective, **changes))


def test_image_loss_starts_at_the_published_value(small_config, build_batch):
    # Identity flow and unit Gaussians: 1.3257 + 0.7213 E[x^2] + log2(127.5) bits (spec 1.8).
    config = dataclasses.replace(small_config, gmm=dataclasses.replace(small_config.gmm, init_symmetry_std=0.0))
    batch = build_batch(config, 32, train=False, text_first=torch.ones(32, dtype=torch.bool))
    state = build_jetformer(config)(batch)
    pixels = batch.image.double() / 127.5 - 1 + 0.5 / 127.5
    expected = 0.5 * math.log2(2 * math.pi) + pixels.square().mean() / (2 * math.log(2)) + math.log2(127.5)
    assert state.total_loss().item() == pytest.approx(expected.item(), abs=2e-3)


def test_text_loss_starts_at_134_nats_with_the_reference_head(build_batch):
    # The kernel has std 1 and its input unit RMS, so logits have std sqrt(D) = 32 at D = 1024 (spec 1.6). Here sqrt(D) is 24.
    config = JetFormerConfig(
        image=dataclasses.replace(JetFormerConfig().image, resolution=8, patch_size=4, channels=3),
        text=dataclasses.replace(JetFormerConfig().text, length=8, num_pieces=32_000),
        flow=dataclasses.replace(JetFormerConfig().flow, depth=1, block_depth=1, width=8, num_heads=1),
        decoder=dataclasses.replace(JetFormerConfig().decoder, width=1024, depth=1, mlp_dim=64, dropout=0.0),
        gmm=dataclasses.replace(JetFormerConfig().gmm, num_mixtures=2, soft_dim=8),
    )
    batch = build_batch(config, 16, train=False, text_first=torch.zeros(16, dtype=torch.bool))
    measured = stats.summarise(build_jetformer(config)(batch).stats)["text_nats"]
    assert measured == pytest.approx(134.4, rel=0.1)


def test_no_position_sees_its_future(small_config, small_model, build_batch):
    for text_first in (True, False):
        batch = build_batch(small_config, 1, train=False, text_first=torch.tensor([text_first]), score_all=True)
        soft = torch.randn(1, small_config.image.num_tokens, small_config.gmm.soft_dim, requires_grad=True)
        hidden = small_model.embed.embed(batch, soft)
        inputs = hidden.detach().requires_grad_()
        from model.state import State

        state = State(hidden=inputs, soft=soft)
        for block in small_model.blocks:
            state = block(state, batch)
        output = small_model.head.norm(state.hidden)
        for position in range(output.shape[1]):
            (gradient,) = torch.autograd.grad(output[0, position].sum(), inputs, retain_graph=True)
            seen = gradient[0].abs().sum(-1) > 0
            assert seen[: position + 1].all()
            assert not seen[position + 1 :].any()


def test_image_prediction_ignores_the_token_it_predicts(small_config, small_model, build_batch):
    # End to end, through embedding and slicing: NLL parameters of token i do not depend on soft tokens i, i+1, ...
    from model.state import State

    for text_first in (True, False):
        batch = build_batch(small_config, 1, train=False, text_first=torch.tensor([text_first]), score_all=True)
        soft = torch.randn(1, small_config.image.num_tokens, small_config.gmm.soft_dim, requires_grad=True)
        state = State(hidden=small_model.embed.embed(batch, soft), soft=soft)
        for block in small_model.blocks:
            state = block(state, batch)
        predicting = state.hidden[:, image_slice(small_config, text_first=text_first)]
        for token in range(small_config.image.num_tokens):
            (gradient,) = torch.autograd.grad(predicting[0, token].sum(), soft, retain_graph=True, allow_unused=True)
            seen = torch.zeros(soft.shape[1], dtype=torch.bool) if gradient is None else gradient[0].abs().sum(-1) > 0
            assert seen[:token].all()
            assert not seen[token:].any()
        text = state.hidden[:, text_slice(small_config, text_first=text_first)]
        (gradient,) = torch.autograd.grad(text.sum(), soft, retain_graph=True, allow_unused=True)
        sees_image = gradient is not None and bool(gradient.abs().sum() > 0)
        assert sees_image is (not text_first)


@pytest.mark.parametrize("objective", [{}, {"loss_on_prefix": True}, {"stop_grad_flow_on_image_prefix": False}, {"order": "alternate"}])
def test_exact_skips_change_neither_loss_nor_gradient(small_config, small_model, build_batch, objective):
    small_model.config = config = with_objective(small_config, **objective)
    for layer in (small_model.patchify, *small_model.couplings, small_model.embed, *small_model.blocks, small_model.head):
        layer.config = config
    gradients, losses = [], []
    for score_all in (False, True):
        batch = build_batch(config, 6, train=True, sigma=20.0, score_all=score_all)
        assert 0 < batch.num_text_first < 6
        small_model.zero_grad()
        state = small_model(batch)
        state.total_loss().backward()
        losses.append(state.total_loss().item())
        gradients.append({name: p.grad.clone() for name, p in small_model.named_parameters()})
        assert stats.summarise(state.stats)["loss"] == pytest.approx(losses[-1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_every_parameter_gets_a_gradient_when_a_micro_batch_lacks_one_order(small_config, small_model, build_batch, probability):
    batch = build_batch(small_config, 3, text_first=torch.full((3,), bool(probability)))
    small_model(batch).total_loss().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small_model.parameters())


def test_loss_is_the_mean_of_its_micro_batches(small_config, small_model, build_batch):
    # Same positions, so same noise, drops and dropout, whatever the micro-batch.
    whole = build_batch(small_config, 6, sigma=30.0)

    def part(first: int, last: int):
        rows = slice(first, last)
        return build_batch(
            small_config, last - first, sigma=30.0, positions=whole.positions[rows], text=whole.text[rows], image=whole.image[rows],
        )  # fmt: skip

    losses = [small_model(part(i, i + 2)).total_loss() for i in (0, 2, 4)]
    torch.testing.assert_close(sum(losses) / 3, small_model(whole).total_loss(), rtol=1e-5, atol=1e-6)


def test_mixture_components_differ_after_training_only_if_symmetry_is_broken(small_config, build_batch):
    def spread(std: float) -> float:
        config = dataclasses.replace(small_config, gmm=dataclasses.replace(small_config.gmm, init_symmetry_std=std))
        model = build_jetformer(config).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # Adam would blow rounding differences up to its step size
        for step in range(8):
            optimizer.zero_grad()
            model(build_batch(config, 4, first_position=4 * step)).total_loss().backward()
            optimizer.step()
        weight = model.head.gmm.component_weight.detach()
        return ((weight - weight.mean(0)).abs().max() / weight.abs().max()).item()

    assert spread(0.0) < 1e-9
    assert spread(0.02) > 1e-3


def test_label_drop_hides_the_caption(small_config, small_model, build_batch):
    def hidden(text):
        batch = build_batch(small_config, 1, train=False, text_first=torch.tensor([True]), drop_prefix=torch.tensor([True]), text=text)
        return small_model(batch).hidden

    first, second = (torch.full((1, small_config.text.length), token) for token in (3, 4))
    assert torch.equal(hidden(first), hidden(second))


def test_alternate_order_meets_its_share_in_every_run():
    from model.batch import draw_text_first

    drawn = draw_text_first(ObjectiveConfig(order="alternate", text_first_probability=0.25), 0, torch.arange(400))
    for start in range(0, 390):
        assert 2 <= int(drawn[start : start + 10].sum()) <= 3
    bernoulli = draw_text_first(ObjectiveConfig(text_first_probability=0.25), 0, torch.arange(20_000))
    assert bernoulli.double().mean().item() == pytest.approx(0.25, abs=0.02)


def test_same_seed_same_weights_and_other_seed_other_weights(small_config):
    first, again, other = build_jetformer(small_config, seed=1), build_jetformer(small_config, seed=1), build_jetformer(small_config, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.embed.text.weight, other.embed.text.weight)
