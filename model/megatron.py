"""Megatron-core's tensor-parallel linears behind the signature of a plain linear. Imported only when a rank has peers.

They are built uninitialised (`model.init` fills every parameter from its global name) and take their process group
explicitly, so nothing here reads Megatron's global parallel state. The gradient all-reduce of the inputs is done once per
group of linears by `copy_to_ranks`, not once per linear.
"""

from collections.abc import Mapping
from functools import cache

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import layers as megatron_layers
from torch import Tensor, nn

from model.parallel import TensorParallel


@cache
def _config(tp_size: int) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=tp_size,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,  # until there is an accumulator: `fuse_weight_gradients`
        params_dtype=torch.float32,
    )


class ColumnLinear(megatron_layers.ColumnParallelLinear):
    """[..., in] -> [..., out / tp]; expects an input that went through `copy_to_ranks`."""

    def __init__(self, in_features: int, out_features: int, tp: TensorParallel) -> None:
        super().__init__(
            in_features,
            out_features,
            config=_config(tp.size),
            init_method=nn.init.zeros_,
            bias=False,
            gather_output=False,
            disable_grad_reduce=True,
            tp_group=tp.group,
        )

    def forward(self, x: Tensor) -> Tensor:
        """The local share of the outputs."""
        return super().forward(x.to(self.weight.dtype))[0]


class RowLinear(megatron_layers.RowParallelLinear):
    """[..., in / tp] -> [..., out], summed over the ranks."""

    def __init__(self, in_features: int, out_features: int, tp: TensorParallel) -> None:
        super().__init__(
            in_features,
            out_features,
            config=_config(tp.size),
            init_method=nn.init.zeros_,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=tp.group,
        )

    def forward(self, x: Tensor) -> Tensor:
        """The whole output on every rank."""
        return super().forward(x.to(self.weight.dtype))[0]


def fuse_weight_gradients(module: nn.Module, accumulators: Mapping[nn.Parameter, Tensor]) -> list[nn.Parameter]:
    """From now on the backward pass of every tensor-parallel linear adds its weight gradient to an accumulator inside the product.

    The gradient is then rounded once, in fp32, and never written by itself. Autograd sees none: `weight.grad` stays None and hooks on it
    do not run, so whoever owns the accumulators must zero them, and count these weights among those that got a gradient.

    Args:
        module: searched for ColumnLinear and RowLinear.
        accumulators: weight -> contiguous fp32 tensor of as many elements.

    Returns:
        The weights concerned.
    """
    fused = []
    for layer in module.modules():
        if isinstance(layer, (ColumnLinear, RowLinear)):
            # Megatron's other convention, `weight.grad_added_to_main_grad`, makes a dummy gradient that the owner would add as well.
            assert not hasattr(layer.weight, "grad_added_to_main_grad")
            layer.weight.main_grad = accumulators[layer.weight].view(layer.weight.shape)
            layer.gradient_accumulation_fusion = True
            fused.append(layer.weight)
    return fused
