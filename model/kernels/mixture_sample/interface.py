"""One draw from a chosen component of the image head, under guidance or not.

Letters: B examples, N = copies * B rows, D width, K mixtures, d soft channels.
"""

from typing import get_args

import torch
from torch import Tensor

from model.kernels.dispatch import choose
from model.kernels.mixture_sample.reference import (
    MIN_TEMPERATURE,
    ClosedForm,
    Gaussian,
    component_gaussian_reference,
    mixture_sample_reference,
)

__all__ = ["ClosedForm", "Gaussian", "component_gaussian", "mixture_sample"]


def mixture_sample(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    component: Tensor,
    noise: Tensor,
    *,
    cfg_scale: float = 0.0,
    cfg_rule: ClosedForm = "analytic",
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """A soft token per example: the guided Gaussian of its component, `noise` standard deviations from the mean (spec 1.10).

    For sampling: the Triton kernel gives no gradients.

    Args:
        hidden: [B, D], or with guidance [2B, D], conditional and unconditional rows in turn; read in the dtype of `weight`.
        weight: [K, 2, d, D], means and raw scales, bf16 or fp32; bias: [K, 2, d].
        component: int64 [B], in [0, K), shared by both rows of an example.
        noise: fp32 [B, d], standard normal.
        cfg_scale: guidance weight w; 0 is none, and one row per example.
        temperature: multiplies the scales after their floor, and is at least 1e-6.

    Returns:
        fp32 [B, d].

    Raises:
        ValueError: shapes that do not fit, or a rule that is none.
        UserError: `impl` cannot run here.
    """
    if cfg_rule not in get_args(ClosedForm):
        raise ValueError(f"cfg_rule={cfg_rule!r} has no closed form: {' or '.join(get_args(ClosedForm))}")
    _check(hidden, weight, bias, component, copies=2 if cfg_scale else 1)
    if noise.shape != (len(component), weight.shape[2]):
        raise ValueError(f"noise is {list(noise.shape)}, not [B, d] = {[len(component), weight.shape[2]]}")
    if choose("mixture_sample", impl, weight.device, weight.dtype) == "triton":
        from model.kernels.mixture_sample.triton_kernels import launch_mixture_sample

        options = {"cfg_scale": cfg_scale, "temperature": max(temperature, MIN_TEMPERATURE)}
        return launch_mixture_sample(hidden, weight, bias, component, noise, cfg_rule=cfg_rule, **options)
    return mixture_sample_reference(hidden, weight, bias, component, noise, cfg_scale=cfg_scale, cfg_rule=cfg_rule, temperature=temperature)


def component_gaussian(
    hidden: Tensor, weight: Tensor, bias: Tensor, component: Tensor, *, temperature: float = 1.0, impl: str = "auto"
) -> tuple[Gaussian, ...]:
    """The chosen component's Gaussian before any guidance: for rules that have no closed form.

    Args:
        hidden: [B, D] or [2B, D]; the rest as `mixture_sample`.

    Returns:
        One Gaussian of fp32 [B, d] per row of an example: conditional, and if there is one, unconditional.

    Raises:
        As `mixture_sample`.
    """
    copies = 2 if len(hidden) > len(component) else 1
    _check(hidden, weight, bias, component, copies=copies)
    if choose("mixture_sample", impl, weight.device, weight.dtype) == "triton":
        from model.kernels.mixture_sample.triton_kernels import launch_component_gaussian

        loc, scale = launch_component_gaussian(hidden, weight, bias, component, temperature=max(temperature, MIN_TEMPERATURE))
        return tuple(Gaussian(loc[copy::copies], scale[copy::copies]) for copy in range(copies))
    return tuple(component_gaussian_reference(hidden[copy::copies], weight, bias, component, temperature=temperature) for copy in range(copies))


def _check(hidden: Tensor, weight: Tensor, bias: Tensor, component: Tensor, *, copies: int) -> None:
    if weight.dim() != 4 or weight.shape[1] != 2 or bias.shape != weight.shape[:3]:
        raise ValueError(f"weight is {list(weight.shape)} and bias {list(bias.shape)}, not [K, 2, d, D] and [K, 2, d]")
    if component.dim() != 1 or component.dtype != torch.int64:
        raise ValueError(f"component is {component.dtype} {list(component.shape)}, not int64 [B]")
    if hidden.shape != (copies * len(component), weight.shape[3]):
        raise ValueError(f"hidden is {list(hidden.shape)}, not [{copies} * B, D] = {[copies * len(component), weight.shape[3]]}")
