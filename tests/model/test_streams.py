"""Counter-based random streams."""

import math

import pytest
import torch

from model import streams
from model.streams import Stream

POSITIONS = torch.arange(4000)


def test_a_draw_depends_on_its_own_position_only():
    together = streams.normal(3, Stream.RGB_NOISE, torch.tensor([5, 9, 2**40]), (4, 3))
    alone = streams.normal(3, Stream.RGB_NOISE, torch.tensor([2**40]), (4, 3))
    assert torch.equal(together[2:], alone)


@pytest.mark.parametrize(
    "other",
    [
        lambda: streams.uniform(4, Stream.RGB_NOISE, POSITIONS, (3,)),
        lambda: streams.uniform(3, Stream.DROPOUT, POSITIONS, (3,)),
        lambda: streams.uniform(3, Stream.RGB_NOISE, POSITIONS + 1, (3,)),
        lambda: streams.uniform(3, Stream.RGB_NOISE, POSITIONS, (3,), substream=1),
    ],
)
def test_seed_stream_position_and_substream_give_unrelated_draws(other):
    first, second = streams.uniform(3, Stream.RGB_NOISE, POSITIONS, (3,)).flatten(), other().flatten()
    correlation = torch.corrcoef(torch.stack([first, second]))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(len(first))


def test_uniform_is_uniform():
    values = streams.uniform(0, Stream.DEQUANTISATION, POSITIONS, (5, 5))
    assert values.shape == (4000, 5, 5)
    assert values.min() >= 0
    assert values.max() < 1
    counts = torch.histc(values, bins=20, min=0, max=1)
    expected = values.numel() / 20
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 50  # 19 degrees of freedom: p < 1e-4


def test_normal_is_standard_normal():
    values = streams.normal(0, Stream.INPUT_NOISE, POSITIONS, (25,)).double().flatten()
    n = len(values)
    assert abs(values.mean()) < 5 / math.sqrt(n)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((values**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert values.isfinite().all()


def test_neighbouring_elements_are_uncorrelated():
    values = streams.normal(0, Stream.SAMPLING, POSITIONS, (8,))
    correlation = torch.corrcoef(values.T) - torch.eye(8)
    assert correlation.abs().max() < 6 / math.sqrt(len(values))


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_keep_mask_drops_the_stated_share(probability):
    keep = streams.keep_mask(0, Stream.DROPOUT, POSITIONS, (33,), drop_probability=probability)
    assert keep.shape == (4000, 33)
    assert abs((~keep).double().mean() - probability) < 5 * math.sqrt(probability * (1 - probability) / keep.numel()) + 2**-16


def test_a_substream_of_each_row_gives_the_bits_of_that_substream():
    substreams = [0, 1, 17, (39 << 32) | (255 << 4) | 3, 2**62 + 5]
    rows = torch.tensor(substreams)
    positions = torch.tensor([5, 0, 9, 2**40, 5])
    for draw in (streams.random_bits, streams.uniform, streams.normal):
        shape = 3 if draw is streams.random_bits else (3, 5)
        for seed in (0, 2**63 + 11):
            together = draw(seed, Stream.SAMPLING, positions, shape, substream=rows)
            alone = [draw(seed, Stream.SAMPLING, positions[i : i + 1], shape, substream=s) for i, s in enumerate(substreams)]
            assert torch.equal(together, torch.cat(alone))
