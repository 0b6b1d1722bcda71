"""Tensor parallelism: which slice of a parameter a rank holds, and the few collectives that the layers need.

Linears are Megatron-core's ColumnParallelLinear and RowParallelLinear when the group has more than one rank, and plain
`Dense` otherwise, so that a notebook builds and samples a model with no process group. The two vocabularies (text and
mixtures) are split here, unevenly if need be: 32,003 pieces divide by no group size, and padding would leak into checkpoints.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from model.kernels.collectives import copy_to_group, logsumexp_over_group, sum_over_group


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """This rank's place among the ranks that share every layer."""

    size: int = 1
    rank: int = 0
    group: Any = None
    """torch.distributed process group; None with size 1."""

    @staticmethod
    def single() -> "TensorParallel":
        """No tensor parallelism."""
        return TensorParallel()

    def bounds(self, total: int, rank: int | None = None) -> tuple[int, int]:
        """[start, stop) of a rank's share of `total` things, in shares that differ by at most one."""
        rank = self.rank if rank is None else rank
        return total * rank // self.size, total * (rank + 1) // self.size


@dataclass(frozen=True, slots=True)
class Shard:
    """The slice [start, start + size) of dimension `dim` of a global tensor."""

    dim: int
    start: int
    size: int
    global_size: int


def shard_of(parameter: Tensor) -> Shard | None:
    """The slice that a parameter is; None where every tensor-parallel rank holds the whole."""
    return getattr(parameter, "shard", None)


def global_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole tensor of which `parameter` is a slice."""
    shape, shard = list(parameter.shape), shard_of(parameter)
    if shard is not None:
        shape[shard.dim] = shard.global_size
    return tuple(shape)


def mark_shard(parameter: nn.Parameter, shard: Shard) -> None:
    """Declares `parameter` to be a slice, for checkpoints, initialisation and DeepSpeed's gradient norm."""
    parameter.shard = shard  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


class Dense(nn.Module):
    """y = x W^T + b, computed in the dtype of W whatever the dtype of x. Weight [out, in]; initialised by `model.init`."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of the weight."""
        return functional.linear(x.to(self.weight.dtype), self.weight, self.bias)


def column_linear(in_features: int, out_features: int, tp: TensorParallel) -> nn.Module:
    """A bias-free linear whose outputs are split over the ranks: [..., in] -> [..., out / tp]."""
    if tp.size == 1:
        return Dense(in_features, out_features, bias=False)
    from model.megatron import ColumnLinear

    layer = ColumnLinear(in_features, out_features, tp)
    share = out_features // tp.size
    mark_shard(layer.weight, Shard(0, tp.rank * share, share, out_features))
    return layer


def row_linear(in_features: int, out_features: int, tp: TensorParallel) -> nn.Module:
    """A bias-free linear whose inputs are split over the ranks, its output summed: [..., in / tp] -> [..., out]."""
    if tp.size == 1:
        return Dense(in_features, out_features, bias=False)
    from model.megatron import RowLinear

    layer = RowLinear(in_features, out_features, tp)
    share = in_features // tp.size
    mark_shard(layer.weight, Shard(1, tp.rank * share, share, in_features))
    return layer


def sharded_parameter(shape: Sequence[int], tp: TensorParallel) -> nn.Parameter:
    """An uninitialised parameter of global `shape`, split over dimension 0 (unevenly if need be)."""
    if tp.size == 1:
        return nn.Parameter(torch.empty(*shape))
    start, stop = tp.bounds(shape[0])
    parameter = nn.Parameter(torch.empty(stop - start, *shape[1:]))
    mark_shard(parameter, Shard(0, start, stop - start, shape[0]))
    return parameter


def copy_to_ranks(x: Tensor, tp: TensorParallel) -> Tensor:
    """Identity forward, gradients summed over the ranks: before a computation that each rank does a share of."""
    return copy_to_group(x, tp.group)


def sum_over_ranks(x: Tensor, tp: TensorParallel) -> Tensor:
    """Sum over the ranks forward, identity backward."""
    return sum_over_group(x, tp.group)


def logsumexp_over_ranks(x: Tensor, tp: TensorParallel) -> Tensor:
    """log(sum over ranks of exp(x)), elementwise and stable: all-reduces one maximum and one sum of the size of x."""
    return logsumexp_over_group(x, tp.group)


def gather_rows(x: Tensor, index: Tensor, max_rows: int, tp: TensorParallel) -> Tensor:
    """Rows that the ranks hold in parts, put together in one order on every rank.

    Args:
        x: [rows of this rank, ...].
        index: int64 [total], for each row of the result rank * max_rows + its row on that rank.
        max_rows: the most rows that any rank holds.

    Returns:
        [total, ...]; the backward pass gives each rank the gradient of its own rows.
    """
    if tp.size == 1:
        return x.index_select(0, index)
    return _GatherRows.apply(x, index, max_rows, tp)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, max_rows: int, tp: TensorParallel) -> Tensor:
        padded = x.new_zeros(max_rows, *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in range(tp.size)]
        dist.all_gather(parts, padded, group=tp.group)
        ctx.save_for_backward(index)
        ctx.own = slice(tp.rank * max_rows, tp.rank * max_rows + len(x))
        ctx.num_places = tp.size * max_rows
        return torch.cat(parts).index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (index,) = ctx.saved_tensors
        # All ranks' places, and not a mask of the own ones, which a GPU would have to tell the host first.
        places = grad.new_zeros(ctx.num_places, *grad.shape[1:]).index_copy_(0, index, grad)
        return places[ctx.own], None, None, None
