"""Losses of wide linear heads as autograd functions: gradients in the forward pass where the weights of the tokens are known, in the backward
pass where they are not.

A gradient that waits for the backward pass computes the head again: four matrix products in place of three. The weight of each token
in the loss is all that its gradient needs from outside; whoever knows it beforehand is served in one pass.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from model.kernels.collectives import reduce_in_place
from model.kernels.first_order import first_order
from model.kernels.precision import as_given


class Head(Protocol):
    """A head whose outputs exist for one chunk of tokens at a time."""

    @property
    def group(self) -> Any:
        """Process group over which its classes are split, or None."""
        ...

    @property
    def num_shared(self) -> int:
        """How many of the tensors, the first ones, are inputs that all ranks of the group hold; the others are this rank's parameters."""
        ...

    def run(
        self, tensors: Sequence[Tensor], *, token_weight: Tensor | None = None, wanted: Sequence[bool] = (), normalisers: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """The nll of every token, and gradients of sum_n token_weight_n nll_n.

        Args:
            tensors: inputs, then parameters.
            token_weight: [N]; None: no gradients.
            wanted: which of the tensors want one.
            normalisers: of an earlier run on the same tensors, which spares the collectives.

        Returns:
            (nll [N], normalisers, a gradient or None per tensor: this rank's share for inputs, in the dtype it was summed in for parameters).
        """
        ...


def token_nll(head: Head, *tensors: Tensor) -> Tensor:
    """-log p of every token, [N]; differentiable token by token, by running the head again in the backward pass."""
    return _TokenNll.apply(head, *tensors)


def weighted_loss(head: Head, token_weight: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """(sum_n token_weight_n nll_n, differentiable once; nll [N], constant).

    A token of weight 0 is left out of the sum even if its nll is not finite. Of the gradients it is left out if its nll is finite: as by
    autograd, they hold 0 times the token's own.
    """
    return _WeightedLoss.apply(head, token_weight, torch.is_grad_enabled(), *tensors)


def sum_weighted(nll: Tensor, token_weight: Tensor) -> Tensor:
    """sum_n token_weight_n nll_n, in which 0 times infinity is 0."""
    return torch.where(token_weight == 0, 0, nll * token_weight).sum()


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: Head, token_weight: Tensor, with_gradients: bool, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[3:]
        with as_given(token_weight.device):
            nll, _, gradients = head.run(tensors, token_weight=token_weight if with_gradients and any(wanted) else None, wanted=wanted)
        ctx.head, ctx.gradients, ctx.dtypes = head, gradients, [tensor.dtype for tensor in tensors]
        ctx.mark_non_differentiable(nll)
        return sum_weighted(nll, token_weight), nll

    @staticmethod
    @first_order
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "second backward pass through one forward pass of a loss whose gradients are made in the forward pass and handed out once\n"
                "  to fix: run the forward pass again, or use the function that returns one nll per token, which recomputes"
            )
        scaled = [None if gradient is None else _scaled(gradient, d_loss, dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return None, None, None, *_handed_out(ctx.head, scaled, ctx.dtypes)


class _TokenNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: Head, *tensors: Tensor) -> Tensor:
        with as_given(tensors[0].device):
            nll, normalisers, _ = head.run(tensors)
        ctx.head = head
        ctx.save_for_backward(normalisers, *tensors)
        return nll

    @staticmethod
    @first_order
    def backward(ctx: Any, d_nll: Tensor) -> tuple[Tensor | None, ...]:
        normalisers, *tensors = ctx.saved_tensors
        with as_given(d_nll.device):
            _, _, gradients = ctx.head.run(tensors, token_weight=d_nll.contiguous(), wanted=ctx.needs_input_grad[1:], normalisers=normalisers)
        return None, *_handed_out(ctx.head, gradients, [tensor.dtype for tensor in tensors])


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor in `dtype`: one pass and one rounding."""
    if gradient.dtype == dtype:
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _handed_out(head: Head, gradients: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> list[Tensor | None]:
    """Whole gradients in the dtypes of their tensors: rounded once, summed over the ranks where all of them hold the tensor."""
    narrowed = [None if gradient is None else gradient.to(dtype) for gradient, dtype in zip(gradients, dtypes, strict=True)]
    for gradient in narrowed[: head.num_shared]:
        if gradient is not None:
            reduce_in_place(gradient, head.group)
    return narrowed
