"""The likelihood as autograd functions: gradients in the forward pass where the loss weights are known, in the backward pass where not."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.kernels.collectives import sum_over_group
from model.kernels.gmm_nll.one_pass import Passes, Wanted, run
from model.kernels.gmm_nll.reference import HeadWeights


class WeightedLoss(torch.autograd.Function):
    """(loss, nll) of known token weights, with all gradients computed on the way: three matrix products."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        soft: Tensor,
        logit_weight: Tensor,
        logit_bias: Tensor,
        component_weight: Tensor,
        component_bias: Tensor,
        token_weight: Tensor,
        passes: Passes,
        group: Any,
        workspace_bytes: int,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        weights = (logit_weight, logit_bias, component_weight, component_bias)
        wanted = Wanted(hidden=ctx.needs_input_grad[0], weights=any(ctx.needs_input_grad[2:6])) if with_gradients else None
        nll, _, ctx.gradients = run(
            hidden, soft, weights, passes=passes, group=group, workspace_bytes=workspace_bytes, token_weight=token_weight, wanted=wanted
        )
        ctx.group, ctx.dtypes = group, [weight.dtype for weight in weights]
        ctx.mark_non_differentiable(nll)
        # nll is 0 * inf = NaN nowhere: a token of weight 0 is left out, whatever its likelihood.
        return torch.where(token_weight == 0, 0, nll * token_weight).sum(), nll

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "linear_gmm_nll_loss: second backward pass through one forward pass; its gradients are handed out once\n"
                "  to fix: run the forward pass again, or use linear_gmm_nll, which recomputes"
            )
        hidden = None if gradients.hidden is None else sum_over_group(gradients.hidden.mul_(d_loss), ctx.group)
        soft = sum_over_group(gradients.soft.mul_(d_loss), ctx.group)
        return hidden, soft, *_narrowed(gradients.weights, ctx.dtypes, d_loss), None, None, None, None, None


class TokenNll(torch.autograd.Function):
    """nll of every token, for gradients that come per token: the head is computed again in the backward pass, four matrix products."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        soft: Tensor,
        logit_weight: Tensor,
        logit_bias: Tensor,
        component_weight: Tensor,
        component_bias: Tensor,
        passes: Passes,
        group: Any,
        workspace_bytes: int,
    ) -> Tensor:
        weights = (logit_weight, logit_bias, component_weight, component_bias)
        nll, normalisers, _ = run(hidden, soft, weights, passes=passes, group=group, workspace_bytes=workspace_bytes)
        ctx.save_for_backward(hidden, soft, *weights, normalisers)
        ctx.passes, ctx.group, ctx.workspace_bytes = passes, group, workspace_bytes
        return nll

    @staticmethod
    def backward(ctx: Any, d_nll: Tensor) -> tuple[Tensor | None, ...]:
        hidden, soft, *weights, normalisers = ctx.saved_tensors
        wanted = Wanted(hidden=ctx.needs_input_grad[0], weights=any(ctx.needs_input_grad[2:6]))
        _, _, gradients = run(
            hidden,
            soft,
            tuple(weights),
            passes=ctx.passes,
            group=ctx.group,
            workspace_bytes=ctx.workspace_bytes,
            token_weight=d_nll.contiguous(),
            wanted=wanted,
            normalisers=normalisers,
        )
        assert gradients is not None
        d_hidden = None if gradients.hidden is None else sum_over_group(gradients.hidden, ctx.group)
        d_soft = sum_over_group(gradients.soft, ctx.group)
        return d_hidden, d_soft, *_narrowed(gradients.weights, [weight.dtype for weight in weights], None), None, None, None


def _narrowed(gradients: HeadWeights | None, dtypes: Sequence[torch.dtype], scale: Tensor | None) -> list[Tensor | None]:
    """The sums times `scale`, in the dtype of the parameters: rounded once."""
    if gradients is None:
        return [None] * len(dtypes)
    scaled = gradients if scale is None else [gradient.mul_(scale) for gradient in gradients]
    return [gradient.to(dtype) for gradient, dtype in zip(scaled, dtypes, strict=True)]
