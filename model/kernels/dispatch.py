"""Which implementation of an operation runs here, and why: the one place that looks at device, dtype and installed libraries.

`choose` is what every interface calls; `explain` is what `jetway doctor` prints.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from configs.errors import UserError

HALF_OR_SINGLE = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class Where:
    """What a choice depends on."""

    device_type: str
    dtype: torch.dtype
    """Of the operation's main input."""
    forced: bool = False
    """The configuration names the implementation: Triton's interpreter is then good enough."""


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute an operation."""

    name: str
    gain: str
    """What it is, and what it saves."""
    obstacle: Callable[[Where], str]
    """Why it cannot run there; empty if it can."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation that `auto` takes, and why."""

    operation: str
    implementation: str
    reason: str


def choose(operation: str, requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation to run.

    Args:
        operation: a field of `KernelsConfig`.
        requested: `auto`, or the name of one implementation.

    Raises:
        UserError: the requested implementation cannot run on this device or dtype, or lacks a library.
    """
    return _choose(operation, requested, device.type, dtype)


def explain(device_type: str, dtype: torch.dtype) -> list[Choice]:
    """What `auto` takes for every operation on a device, with what stood in the way of the ones before it."""
    choices = []
    for operation, implementations in OPERATIONS.items():
        where = Where(device_type, dtype)
        passed_over: list[str] = []
        for implementation in implementations:
            obstacle = implementation.obstacle(where)
            if not obstacle:
                choices.append(Choice(operation, implementation.name, "; ".join([implementation.gain, *passed_over])))
                break
            passed_over.append(f"not {implementation.name}: {obstacle}")
    return choices


@cache
def _choose(operation: str, requested: str, device_type: str, dtype: torch.dtype) -> str:
    implementations = OPERATIONS[operation]
    if requested == "auto":
        return next(one.name for one in implementations if not one.obstacle(Where(device_type, dtype)))
    for one in implementations:
        if one.name == requested:
            obstacle = one.obstacle(Where(device_type, dtype, forced=True))
            if obstacle:
                raise UserError(
                    f"kernels.{operation}={requested} cannot run here",
                    got=f"{obstacle} (device {device_type}, {str(dtype).removeprefix('torch.')})",
                    expected="an implementation that this machine offers",
                    fix=f"set kernels.{operation}=auto; `jetway doctor` lists what runs here and why",
                )
            return requested
    raise UserError(
        f"kernels.{operation}={requested} is no implementation", expected=f"auto or one of {', '.join(one.name for one in implementations)}"
    )


def _nothing(where: Where) -> str:
    return ""


def _triton(where: Where) -> str:
    """Triton kernels of ours: fp32 and bf16 on CUDA, or in the interpreter where somebody asks for it."""
    if where.dtype not in HALF_OR_SINGLE:
        return f"the kernel takes bf16 and fp32, not {str(where.dtype).removeprefix('torch.')}"
    if not has_triton():
        return "Triton is not installed"
    if where.device_type == "cuda":
        return ""
    if not is_interpreting():
        return f"Triton does not compile for {where.device_type} (TRITON_INTERPRET=1 runs it there, slowly)"
    return "" if where.forced else "Triton's interpreter is for tests"


def _triton_gather(where: Where) -> str:
    """The flow's kernel: fp32 only, and it permutes in registers."""
    if where.dtype != torch.float32:
        return f"the kernel takes fp32, not {str(where.dtype).removeprefix('torch.')}"
    obstacle = _triton(where)
    if not obstacle and not hasattr(importlib.import_module("triton.language"), "gather"):
        return "Triton has no tl.gather before 3.3"
    return obstacle


def _apex(symbol: str) -> Callable[[Where], str]:
    def obstacle(where: Where) -> str:
        if where.device_type != "cuda":
            return "apex runs on CUDA only"
        return "" if find_symbol(symbol) is not None else f"{symbol} is not importable"

    return obstacle


def _liger(where: Where) -> str:
    if where.device_type != "cuda":
        return "Liger's kernels run on GPUs only"
    return "" if find_symbol("liger_kernel.ops.geglu.LigerGELUMulFunction") is not None else "liger-kernel is not installed"


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def is_interpreting() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1."""
    if not has_triton():
        return False
    knobs = getattr(importlib.import_module("triton"), "knobs", None)
    return os.environ.get("TRITON_INTERPRET", "0") == "1" if knobs is None else bool(knobs.runtime.interpret)


@cache
def find_symbol(path: str) -> object | None:
    """`package.module.symbol` if it can be imported, else None: a name alone proves nothing, as the package index holds another `apex`."""
    module, _, symbol = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), symbol, None)
    except Exception:  # an extension built for another torch fails in its own ways
        return None


OPERATIONS: dict[str, tuple[Implementation, ...]] = {
    "gmm_nll": (
        Implementation("triton", "three matrix products and two fused passes per chunk; gradients in the forward pass", _triton),
        Implementation("torch", "chunked; gradients in the forward pass", _nothing),
        Implementation("reference", "every output of the head at once", _nothing),
    ),
    "linear_cross_entropy": (
        Implementation("torch", "chunked; gradients in the forward pass", _nothing),
        Implementation("reference", "every logit at once", _nothing),
    ),
    "affine_coupling": (
        Implementation("triton", "permutation, affine map and log-determinant in one pass", _triton_gather),
        Implementation("reference", "plain torch", _nothing),
    ),
    "rms_norm": (
        Implementation("triton", "residual, dropout and norm in one pass", _triton),
        Implementation("apex", "fused norm", _apex("apex.normalization.fused_layer_norm.FusedRMSNormAffineMixedDtypesFunction")),
        Implementation("reference", "plain torch", _nothing),
    ),
    "rope": (
        Implementation("triton", "one pass", _triton),
        Implementation("reference", "plain torch", _nothing),
    ),
    "geglu": (
        Implementation("liger", "one pass; from a kept library", _liger),
        Implementation("triton", "one pass", _triton),
        Implementation("reference", "plain torch", _nothing),
    ),
    "mixture_sample": (
        Implementation("triton", "reads the rows of the drawn component once, for both guidance rows", _triton),
        Implementation("reference", "plain torch", _nothing),
    ),
    "optimizer": (
        Implementation("apex", "one multi-tensor kernel", _apex("apex.optimizers.FusedAdam")),
        Implementation("torch", "torch's fused AdamW", _nothing),
    ),
}
"""Operation -> implementations, the one that `auto` prefers first."""
