"""torch.compile of a layer's computation (`kernels.compile=layers`): one compiled function for all layers of a shape.

Inside, the interfaces of `model.kernels` take their plain torch, which Inductor fuses with what stands around it.
"""

import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from configs.errors import UserError
from model.kernels.dispatch import has_triton, is_interpreting

Function = TypeVar("Function", bound=Callable[..., object])


def run_compiled(function: Function, device: torch.device) -> Function:
    """`function`, compiled at its first call with arguments of a new kind.

    Args:
        function: at module level, with the layer among its arguments: layers that differ in their weights alone then share its code.
        device: of its tensors.

    Raises:
        UserError: nothing compiles for this device here.
    """
    require_compiler(device.type)
    return _compiled(function)


def vary_batch(*tensors: Tensor | None) -> None:
    """Says that the number of rows of these arguments varies, so that the first compilation fits all numbers but one."""
    for tensor in tensors:
        if tensor is not None and len(tensor) > 1:  # code for one row is always its own
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def compiler_obstacle(device_type: str) -> str:
    """Why torch.compile cannot work for a device here; empty if it can."""
    if not torch._dynamo.is_dynamo_supported():
        return "this version of torch does not compile under this version of Python"
    if device_type == "cuda":
        if not has_triton():
            return "Triton, in which it writes code for GPUs, is not installed"
        if is_interpreting():
            return "TRITON_INTERPRET=1 keeps Triton from compiling"
        return _missing("CC", ("gcc", "clang"), "a C compiler, with which Triton builds its launchers,")
    if device_type == "cpu":
        return _missing("CXX", ("g++", "clang++"), "a C++ compiler, with which it builds code for CPUs,")
    return f"it has no code for {device_type} that this project uses"


def _missing(variable: str, names: tuple[str, ...], what: str) -> str:
    asked = os.environ.get(variable)
    if asked:
        return "" if shutil.which(asked.split()[0]) else f"{what} is not where {variable}={asked} says"
    return "" if any(shutil.which(name) for name in names) else f"{what} is not on PATH (looked for {', '.join(names)})"


@cache
def require_compiler(device_type: str) -> None:
    """Nothing, if torch.compile works for a device here.

    Raises:
        UserError: it does not.
    """
    obstacle = compiler_obstacle(device_type)
    if obstacle:
        raise UserError(
            "kernels.compile=layers cannot run here",
            got=f"torch.compile is not usable: {obstacle} (device {device_type})",
            expected="what torch.compile needs on this device",
            fix="install it, or set kernels.compile=off: the results are the same to rounding",
        )


@cache
def _compiled(function: Function) -> Function:
    return torch.compile(function)  # type: ignore[return-value]
