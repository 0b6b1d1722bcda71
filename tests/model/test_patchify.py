"""Pixels, noise and patches."""

import dataclasses

import pytest
import torch

from model.config import ImageConfig
from model.parallel import TensorParallel
from model.patchify import Patchify, noise_sigma, patchify, to_uint8, unpatchify
from model.state import State


def test_patch_order_is_row_column_channel():
    image = torch.arange(4 * 4 * 3).reshape(1, 4, 4, 3)
    tokens = patchify(image, 2)
    assert tokens.shape == (1, 4, 12)
    assert tokens[0, 1].tolist() == image[0, 0:2, 2:4].flatten().tolist()
    assert tokens[0, 2].tolist() == image[0, 2:4, 0:2].flatten().tolist()


@pytest.mark.parametrize(("resolution", "patch_size", "channels"), [(8, 2, 1), (12, 4, 3)])
def test_unpatchify_inverts(resolution, patch_size, channels):
    config = ImageConfig(resolution=resolution, patch_size=patch_size, channels=channels)
    image = torch.randn(2, resolution, resolution, channels)
    assert torch.equal(unpatchify(patchify(image, patch_size), config), image)


def test_uint8_inverts_dequantisation_exactly(small_config, build_batch):
    batch = build_batch(small_config, 8, train=False)
    tokens = Patchify(small_config, TensorParallel.single())(State(), batch).x
    order = torch.argsort((~batch.text_first).long(), stable=True)
    assert torch.equal(to_uint8(unpatchify(tokens, small_config.image)), batch.image[order])


def test_sigma_falls_on_a_half_cosine_and_stays():
    values = [noise_sigma(step, total_steps=100, start=64.0, end=3.0) for step in (0, 50, 100, 1000)]
    assert values == pytest.approx([64.0, 33.5, 3.0, 3.0])


def test_training_noise_has_its_std_stays_on_the_grid_and_spares_image_first(small_config, build_batch):
    batch = build_batch(small_config, 400, sigma=10.0)
    tokens = Patchify(small_config, TensorParallel.single())(State(), batch).x
    clean = patchify(batch.image.float() / 127.5 - 1, small_config.image.patch_size)
    difference = (tokens - clean) * 127.5
    boundary = batch.num_text_first
    assert 0 < boundary < 400
    noisy, spared = difference[:boundary], difference[boundary:]
    assert noisy.std().item() == pytest.approx(10.0, rel=0.02)
    levels = tokens[:boundary] * 127.5 + 127.5
    assert levels.min() < 0  # not clipped
    assert spared.min() >= -1e-3
    assert spared.max() < 1.001
    config = dataclasses.replace(small_config, objective=dataclasses.replace(small_config.objective, rgb_noise_on_image_prefix=True))
    assert ((Patchify(config, TensorParallel.single())(State(), batch).x[boundary:] - clean[boundary:]) * 127.5).std() > 9
