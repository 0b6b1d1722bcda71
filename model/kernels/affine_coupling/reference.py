"""Affine coupling in plain torch: any float dtype, differentiable, the truth in tests."""

import math

import torch
from torch import Tensor
from torch.nn import functional


def affine_coupling(first: Tensor, second: Tensor, params: Tensor, order: Tensor, *, joined: bool) -> tuple[tuple[Tensor, ...], Tensor]:
    """As `interface.affine_coupling`."""
    shift, raw_scale = params.chunk(2, dim=-1)
    log_scale = functional.logsigmoid(raw_scale) + math.log(2)
    moved = (second + shift) * torch.exp(log_scale)
    return _permuted(first, moved, order, joined), log_scale.flatten(1).sum(1)


def affine_coupling_inverse(first: Tensor, second: Tensor, params: Tensor, order: Tensor, *, joined: bool) -> tuple[Tensor, ...]:
    """As `interface.affine_coupling_inverse`."""
    shift, raw_scale = params.chunk(2, dim=-1)
    log_scale = functional.logsigmoid(raw_scale) + math.log(2)
    return _permuted(first, second * torch.exp(-log_scale) - shift, order, joined)


def _permuted(first: Tensor, second: Tensor, order: Tensor, joined: bool) -> tuple[Tensor, ...]:
    out = torch.cat([first, second], dim=-1).index_select(-1, order)
    return (out,) if joined else out.chunk(2, dim=-1)
