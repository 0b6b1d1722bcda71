"""The pipeline edge: one tensor, exact both ways."""

import pytest
import torch

from model.state import Latents, State, attach_aux, pack, unpack


def states(dtype: torch.dtype) -> State:
    generator = torch.Generator().manual_seed(0)
    soft = torch.randn(2, 4, 3, generator=generator)
    soft.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), 1e-42, -0.0])
    return State(hidden=torch.randn(2, 7, 5, generator=generator).to(dtype), soft=soft)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_tokens_cross_the_edge_bit_exactly_both_ways(dtype):
    state = states(dtype)
    state.hidden.requires_grad_()
    state.soft.requires_grad_()
    edge = pack(state)
    received = edge.detach().requires_grad_()
    back = unpack(received, flow=False, width=5, num_tokens=4, soft_dim=3)
    assert torch.equal(back.hidden, state.hidden)
    assert torch.equal(back.soft.view(torch.int32), state.soft.view(torch.int32))
    grad_hidden, grad_soft = torch.randn_like(back.hidden), torch.randn_like(back.soft)
    torch.autograd.backward([back.hidden, back.soft], [grad_hidden, grad_soft])
    edge.backward(received.grad)
    assert torch.equal(state.soft.grad, grad_soft)
    assert torch.equal(state.hidden.grad, grad_hidden)


def test_a_flow_edge_is_the_latents():
    state = State(x=torch.randn(2, 4, 12))
    assert torch.equal(unpack(pack(state), flow=True, width=5, num_tokens=4, soft_dim=3).x, state.x)


def test_latents_join_for_an_edge():
    trained, frozen = torch.randn(2, 4, 12), torch.randn(1, 4, 12)
    state = State(latents=Latents((trained,), (frozen,)))
    state.join_latents()
    assert state.latents is None
    assert torch.equal(pack(state), torch.cat([trained, frozen]))
    alone = State(latents=Latents((trained,)))
    alone.join_latents()
    assert alone.x is trained


def test_attached_terms_get_the_stated_gradient_and_leave_the_edge_alone():
    weight = torch.tensor(3.0, requires_grad=True)
    edge = torch.randn(2, 3, requires_grad=True)
    out = attach_aux(edge * 1, weight.square(), 0.25)
    assert torch.equal(out, edge)
    out.sum().backward()
    assert weight.grad.item() == pytest.approx(0.25 * 6.0)
    assert torch.equal(edge.grad, torch.ones(2, 3))
