"""Backward passes that are not differentiable themselves."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

Backward = Callable[..., Any]


def first_order(backward: Backward) -> Backward:
    """Marks the backward pass of an autograd function whose gradients cannot be differentiated again.

    torch's `once_differentiable` refuses that only where the gradient that arrives wants one of its own. That of a loss is a constant 1: the
    gradients of `loss.backward(create_graph=True)` would pass for constants, and a penalty on them would count nothing, without a word.
    """

    @wraps(backward)
    def only_once(ctx: Any, *gradients: Any) -> Any:
        # Autograd records in a backward pass where it was asked for create_graph, and nowhere else.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True asks for gradients that can be differentiated again; this operation has only first ones\n"
                "  to fix: set it to reference, which is plain torch (kernels.* of a run, impl= of a call)"
            )
        return backward(ctx, *gradients)

    return only_once
