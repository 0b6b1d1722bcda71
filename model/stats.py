"""The metrics that layers record, as sums and counts that add up over layers, micro-batches and ranks.

A layer that every tensor-parallel rank computes alike records on tensor rank 0 only; one that sees a share of the images
records its share. So one all-reduce of the whole vector over the world, then sum / count, is right for every layout.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model.state import State

METRICS = (
    "loss",  # mean over examples of the training loss
    "image_bits",  # bits per subpixel of text-first examples, at the noise of the batch
    "text_nats",  # nats per text token of image-first examples
    "image_bits_unconditional",  # image-first examples (only where everything is scored)
    "text_nats_unconditional",  # text-first examples (only where everything is scored)
    "logdet_per_dim",  # nats per subpixel
    "soft_nats_per_dim",  # mixture NLL per soft channel
    "rest_nats_per_dim",  # N(0, 1) NLL per factored-out channel; 1.419 when they are standard normal
    "effective_components",  # exp(entropy) of the mixture weights
    "scale_saturation",  # share of raw coupling scales above 6, where 2*sigmoid is flat
)


def add(state: "State", name: str, total: Tensor, *, count: float) -> None:
    """Adds a sum (a scalar on the model's device) and the number of things it is a sum of to one metric."""
    if state.stats is None:
        state.stats = torch.zeros(2, len(METRICS), dtype=torch.float64, device=total.device)
    column = METRICS.index(name)
    state.stats[0, column] += total.detach().double()
    state.stats[1, column] += count


def summarise(sums: Tensor) -> dict[str, float]:
    """[2, metrics] sums and counts, reduced over all ranks, to means; metrics that nobody recorded are left out."""
    totals, counts = sums.tolist()
    return {name: total / count for name, total, count in zip(METRICS, totals, counts, strict=True) if count > 0}
