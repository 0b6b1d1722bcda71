"""DeepSpeed's PipelineModule, told exactly one thing per stage: run this module. Imports DeepSpeed."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn

from pipeline.parallel.gradient_sums import GradientSums
from pipeline.parallel.stage import PipelineStage


class Prebuilt(nn.Module):
    """A stage that exists already, in the shape that DeepSpeed's LayerSpec can build."""

    def __init__(self, stage: PipelineStage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, edge: Tensor) -> Tensor:
        """The outgoing edge, or the loss."""
        return self.stage(edge)


class OneModulePerStage(PipelineModule):
    """One composite module per stage, cut beforehand (DeepSpeed has no partition method with explicit bounds).

    It also sums, once per step, the gradients of parameters of which each tensor-parallel rank saw a share of the examples.
    """

    def __init__(self, layers: Sequence[Any], *, topology: Any, dynamic_shape: bool, tensor_group: Any) -> None:
        super().__init__(layers=list(layers), topology=topology, loss_fn=None, partition_method="uniform", dynamic_shape=dynamic_shape)
        self._tensor_group = tensor_group
        self._mark_fused: Callable[[], None] | None = None
        self.gradient_sums: GradientSums | None = None
        """Of the bf16 optimiser."""

    def sum_gradients_together(self, optimizer: Any) -> None:
        """Makes DeepSpeed's bf16 optimiser take gradients by many in place of one by one."""
        self.gradient_sums = GradientSums(optimizer)
        optimizer.accumulate_hp_grads_and_remove_lp = self.gradient_sums

    def fuse_weight_gradients(self, optimizer: Any) -> None:
        """Makes Megatron-core's linears add their weight gradients straight to the fp32 accumulators of DeepSpeed's bf16 optimiser.

        DeepSpeed zeroes the accumulators after each step, reduces them over the data-parallel ranks and clips them whole. What it
        learns from a hook on `weight.grad` alone, which these weights never have, is which of them got a gradient.
        """
        from model.megatron import fuse_weight_gradients

        places = {
            weight: (group, index)
            for group, weights in enumerate(optimizer.bf16_groups)
            for index, weight in enumerate(weights)
            if weight.requires_grad
        }
        gradients = optimizer.fp32_groups_gradients
        accumulators = {weight: gradients[group][index] for weight, (group, index) in places.items()}
        fused = [places[weight] for weight in fuse_weight_gradients(self, accumulators)]

        def mark() -> None:
            for group, index in fused:
                optimizer.fp32_groups_has_gradients[group][index] = True

        self._mark_fused = mark

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """DeepSpeed's hook for gradients to be summed before the data-parallel reduction.

        It would all-reduce the listed parameters one by one; the flow has thousands of small ones, so they are summed here
        in one bucket per dtype, and the list is empty.
        """
        if self.gradient_sums is not None:
            self.gradient_sums.flush()
        if self._mark_fused is not None:
            self._mark_fused()
        if self._tensor_group is not None:
            _sum_gradients([p for p in self.parameters() if getattr(p, "partial_gradient", False)], self._tensor_group)
        return []


def _sum_gradients(parameters: Sequence[nn.Parameter], group: Any) -> None:
    # With bf16 parameters the step's gradient is in DeepSpeed's fp32 accumulator.
    found = [p.grad if p.dtype == torch.float32 else getattr(p, "_hp_grad", None) for p in parameters]
    gradients = [gradient.view(-1) for gradient in found if gradient is not None]
    assert len(gradients) == len(parameters), "a parameter of the flow got no gradient: its peers would wait for it"
    if not gradients:
        return
    bucket = torch.cat(gradients)
    dist.all_reduce(bucket, group=group)
    torch._foreach_copy_(gradients, list(bucket.split([gradient.numel() for gradient in gradients])))
