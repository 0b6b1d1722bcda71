"""The reductions that the ranks of a tensor-parallel group owe each other, each with its gradient.

A `group` is a torch.distributed process group, or None where there is one rank: then nothing happens.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def copy_to_group(x: Tensor, group: Any) -> Tensor:
    """Identity forward, gradients summed over the ranks: before a computation that each rank does a share of."""
    return x if group is None else _CopyToGroup.apply(x, group)


def sum_over_group(x: Tensor, group: Any) -> Tensor:
    """Sum over the ranks forward, identity backward."""
    return x if group is None else _SumOverGroup.apply(x, group)


def logsumexp_over_group(x: Tensor, group: Any) -> Tensor:
    """log(sum over the ranks of exp(x)), elementwise and stable: all-reduces one maximum and one sum of the size of x."""
    return x if group is None else _LogSumExpOverGroup.apply(x, group)


def reduce_in_place(x: Tensor, group: Any, *, maximum: bool = False) -> Tensor:
    """x becomes its sum, or its maximum, over the ranks, and is returned; no gradient."""
    if group is not None:
        dist.all_reduce(x, op=dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM, group=group)
    return x


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _SumOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _LogSumExpOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        peak = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        # Where every rank has probability 0 the maximum is -inf, and -inf - -inf is not a number.
        peak = torch.where(peak == -torch.inf, 0, peak)
        total = torch.exp(x - peak)
        dist.all_reduce(total, group=group)
        result = peak + torch.log(total)
        ctx.save_for_backward(x, result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, result = ctx.saved_tensors
        return grad * torch.exp(x - result), None
