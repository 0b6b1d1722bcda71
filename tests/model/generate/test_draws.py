"""Random draws of sampling."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.generate.draws import Purpose, TokenDraws, all_tokens, categorical


def test_categorical_follows_the_softmax():
    num = 20_000
    logits = torch.tensor([0.0, 1.0, -float("inf"), 2.0, -1.0])
    uniform = (torch.arange(num) + 0.5) / num
    counts = torch.bincount(categorical(logits.expand(num, -1), uniform), minlength=5) / num
    torch.testing.assert_close(counts, torch.softmax(logits, -1), rtol=0, atol=2 / num)


def test_categorical_at_the_ends_stays_among_the_possible():
    logits = torch.tensor([[-float("inf"), 0.0, 0.0, -float("inf")]]).expand(2, -1)
    assert categorical(logits, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 2]


def test_categorical_adds_up_whole_numbers_only():
    """A GPU adds floating-point numbers in no fixed order, and refuses to where deterministic algorithms are asked for."""
    summed = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is torch.ops.aten.cumsum:
                summed.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Watch():
        categorical(torch.zeros(2, 3), torch.tensor([0.1, 0.9]))
    assert summed == [torch.int64]


def test_draws_differ_by_purpose_token_chunk_seed_and_sample_only():
    positions = torch.arange(4)
    draws = TokenDraws(0, positions, 3)
    reference = draws.normal(Purpose.NOISE, (5,))
    assert torch.equal(TokenDraws(0, positions[2:], 3).normal(Purpose.NOISE, (5,)), reference[2:])
    assert torch.equal(draws.rows(torch.tensor([1])).normal(Purpose.NOISE, (5,)), reference[1:2])
    others = [
        draws.normal(Purpose.PROPOSAL, (5,)),
        draws.normal(Purpose.NOISE, (5,), chunk=1),
        TokenDraws(0, positions, 4).normal(Purpose.NOISE, (5,)),
        TokenDraws(1, positions, 3).normal(Purpose.NOISE, (5,)),
        TokenDraws(0, positions + 4, 3).normal(Purpose.NOISE, (5,)),
    ]
    for other in others:
        assert not torch.isclose(other, reference).any()


def test_draws_of_all_tokens_at_once_are_those_of_each():
    positions = torch.tensor([4, 0, 9])
    every = all_tokens(3, positions, 6)
    uniform, normal = every.uniform(Purpose.COMPONENT).view(6, 3), every.normal(Purpose.NOISE, (5,)).view(6, 3, 5)
    for token in range(6):
        alone = TokenDraws(3, positions, token)
        assert torch.equal(uniform[token], alone.uniform(Purpose.COMPONENT))
        assert torch.equal(normal[token], alone.normal(Purpose.NOISE, (5,)))
        device_token = TokenDraws(3, positions, torch.full((3,), token))
        rows = torch.tensor([2, 0])
        chunk = alone.rows(rows).normal(Purpose.PROPOSAL, (2,), chunk=7)
        assert torch.equal(device_token.rows(rows).normal(Purpose.PROPOSAL, (2,), chunk=7), chunk)
