"""Micro-batches of noise pictures and random captions, for whatever trains."""

import dataclasses

import torch

from model.batch import Batch, NoiseSettings, make_batch
from pipeline.config import RunConfig


def random_batches(config: RunConfig, micro_batch_size: int, num: int, device: torch.device, *, padded: bool = False) -> list[Batch]:
    """Micro-batches of noise pictures and random captions, as one step of training sees them.

    Args:
        padded: captions of all lengths, which attention has to mask; without it they fill all slots.
    """
    model, generator = config.model, torch.Generator().manual_seed(0)
    batches = []
    for index in range(num):
        positions = torch.arange(index * micro_batch_size, (index + 1) * micro_batch_size)
        side, attended = model.image.resolution, torch.ones(micro_batch_size, model.text.length, dtype=torch.bool)
        if padded:
            lengths = positions[:, None] % model.text.length + 1
            attended = torch.arange(model.text.length) < lengths
        batch = make_batch(
            model,
            positions=positions,
            text=torch.randint(0, model.text.num_pieces, attended.shape, generator=generator),
            text_mask=attended,
            text_loss=attended.clone(),
            image=torch.randint(0, 256, (micro_batch_size, side, side, model.image.channels), generator=generator, dtype=torch.uint8),
            noise=NoiseSettings(seed=0, sigma=30.0, train=True),
        )
        batches.append(dataclasses.replace(batch.to(device), log_stats=False))
    return batches
