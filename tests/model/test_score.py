"""Caption scores equal the loss of the full forward pass."""

import dataclasses

import pytest
import torch

from model.batch import NoiseSettings
from model.config import TextConfig
from model.jetformer import build_jetformer
from model.score import score_captions

LENGTHS = (1, 3, 5, 4)


def candidates(config):
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(2, config.text.num_pieces, (len(LENGTHS), config.text.length), generator=generator)
    slots = torch.arange(config.text.length)
    lengths = torch.tensor(LENGTHS)[:, None]
    return text, slots < lengths - 1, slots < lengths


@pytest.mark.parametrize("max_rows", [1, 5, 256])
@pytest.mark.parametrize("ignore_pad", [False, True])
def test_scores_equal_full_forward_passes(ignore_pad, max_rows, small_config, randomise, build_batch):
    config = dataclasses.replace(small_config, text=TextConfig(length=5, num_pieces=20, ignore_pad=ignore_pad))
    model = randomise(build_jetformer(config))
    text, mask, loss = candidates(config)
    if not ignore_pad:
        mask, loss = torch.ones_like(mask), torch.ones_like(loss)
    images = build_batch(config, 3).image
    scores = score_captions(model, images, text, mask, loss, seed=7, max_rows=max_rows)
    assert scores.shape == (3, 4)
    for number in range(len(text)):
        row = [number] * 3
        batch = build_batch(
            config,
            3,
            text=text[row],
            text_mask=mask[row],
            text_loss=loss[row],
            image=images,
            text_first=torch.zeros(3, dtype=torch.bool),
            noise=NoiseSettings(seed=7),
            score_all=True,
        )
        with torch.no_grad():
            outputs = model(batch).outputs
        torch.testing.assert_close(scores[:, number], -(outputs["text_nll"] * loss[row]).sum(1), rtol=1e-5, atol=1e-5)


def test_one_slot_needs_no_further_position(small_config, randomise, build_batch):
    config = dataclasses.replace(small_config, text=TextConfig(length=1, num_pieces=20))
    model = randomise(build_jetformer(config))
    text = torch.arange(20)[:, None]
    ones = torch.ones_like(text, dtype=torch.bool)
    scores = score_captions(model, build_batch(config, 2).image, text, ones, ones)
    assert (scores.exp().sum(1) < 1).all()  # 20 of the 23 outcomes
    assert scores.shape == (2, 20)
