"""Adds bf16 gradients to DeepSpeed's fp32 accumulators many at a time.

DeepSpeed's hook adds each gradient as it arrives: a cast and an addition per parameter and micro-batch. The flow of the 1.3B model has some 2,500
parameters of a few thousand elements, so that launches, not bandwidth, would set the pace of the backward pass.
"""

from typing import Any

import torch
from torch import Tensor, nn

SMALL = 2**20
"""Elements up to which a gradient waits for others; a larger one is worth launches of its own."""
MAX_WAITING = 2**24
"""Elements that wait at most: 32 MiB of gradients, and 64 MiB for their fp32 copies while they are added."""


class GradientSums:
    """Takes the place of `BF16_Optimizer.accumulate_hp_grads_and_remove_lp`; the sums are the same to the bit."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._waiting: dict[tuple[int, int], Tensor] = {}
        self._num_elements = 0

    def __call__(self, parameter: nn.Parameter, group: int, index: int) -> None:
        """Takes over the gradient of one parameter, which stands at (group, index) of DeepSpeed's lists."""
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        place, total = (group, index), self._optimizer.fp32_groups_gradients[group][index]
        parameter._hp_grad = total  # type: ignore[attr-defined]
        self._optimizer.fp32_groups_has_gradients[group][index] = True
        if gradient.numel() > SMALL:
            total.add_(gradient.view(total.shape))
            return
        if place in self._waiting:  # of an earlier micro-batch: one addition at a time per accumulator
            self.flush()
        self._waiting[place] = gradient.view(total.shape)
        self._num_elements += gradient.numel()
        if self._num_elements >= MAX_WAITING:
            self.flush()

    def forget(self) -> None:
        """Drops what waits, of a step that failed."""
        self._waiting.clear()
        self._num_elements = 0

    @torch.no_grad()
    def flush(self) -> None:
        """Adds what waits; to be called before anybody reads the accumulators."""
        if not self._waiting:
            return
        totals = [self._optimizer.fp32_groups_gradients[group][index] for group, index in self._waiting]
        gradients = list(self._waiting.values())
        wide = list(torch.empty(self._num_elements, dtype=torch.float32, device=gradients[0].device).split([len(g.view(-1)) for g in gradients]))
        wide = [part.view_as(total) for part, total in zip(wide, totals, strict=True)]
        torch._foreach_copy_(wide, gradients)
        torch._foreach_add_(totals, wide)
        self.forget()
