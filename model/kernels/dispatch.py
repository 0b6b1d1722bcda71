"""Which implementation of an operation runs here, and why: the one place that looks at device, dtype and installed libraries.

`choose` is what every interface calls; `explain` is what `jetway doctor` prints.
"""

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from configs.errors import UserError

HALF_OR_SINGLE = (torch.bfloat16, torch.float32)
OLDEST_TRITON = (3, 2)
_INTERPRETED = "TRITON_INTERPRET=1 runs it in the interpreter, which is for tests"


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
    """What `auto` takes for every operation of a run on a device, with what stood in the way of the ones before it.

    Args:
        dtype: of the run's parameters (`parallel.precision`); an operation that is fp32 in every run is judged as such.
    """
    choices = []
    for operation, implementations in OPERATIONS.items():
        where = Where(device_type, torch.float32 if operation in ALWAYS_FP32 else dtype)
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
    where = Where(device_type, dtype, forced=True)
    for one in implementations:
        if one.name == requested:
            obstacle = one.obstacle(where)
            if obstacle:
                raise UserError(
                    f"kernels.{operation}={requested} cannot run here",
                    got=f"{obstacle} (device {device_type}, {_name(dtype)})",
                    expected=f"one of auto, {', '.join(other.name for other in implementations if not other.obstacle(where))}",
                    fix=f"set kernels.{operation}=auto; `jetway doctor` shows what runs here and why",
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
        return f"the kernel takes bf16 and fp32, not {_name(where.dtype)}"
    if not has_triton():
        return "Triton is not installed"
    if triton_version() < OLDEST_TRITON:
        return f"it needs Triton {_dotted(OLDEST_TRITON)} or later, not {_dotted(triton_version())}"
    if is_interpreting():  # on a GPU too: it would copy every tensor to the host and back
        return "" if where.forced else _INTERPRETED
    if where.device_type == "cuda":
        return ""
    return f"Triton does not compile for {where.device_type}" + (" (TRITON_INTERPRET=1 runs it there, slowly)" if where.forced else "")


def _triton_gather(where: Where) -> str:
    """The flow's kernel: fp32 only, and it permutes on the chip."""
    if where.dtype != torch.float32:
        return f"the kernel takes fp32, not {_name(where.dtype)}"
    obstacle = _triton(where)
    if not obstacle and triton_version() < (3, 4):
        return f"Triton permutes through shared memory from 3.4 on, and this is {_dotted(triton_version())}"
    return obstacle


def _apex(*symbols: str) -> Callable[[Where], str]:
    """NVIDIA's apex with the extensions named: its Python part imports without them, and fails at the first call."""

    def obstacle(where: Where) -> str:
        if where.device_type != "cuda":
            return "apex runs on CUDA only"
        missing = [symbol for symbol in symbols if find_symbol(symbol) is None]
        return f"no {' and no '.join(missing)} (NVIDIA's apex, built with its CUDA extensions, has it)" if missing else ""

    return obstacle


def _fused_accumulation(where: Where) -> str:
    """Megatron-core calls apex's product where weights are bf16 and their gradients are summed in fp32."""
    if where.dtype != torch.bfloat16:
        return f"only a bf16 run has an fp32 accumulator beside its weights, not one in {_name(where.dtype)}"
    return _apex("fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32")(where)


def _deepspeed(where: Where) -> str:
    """DeepSpeed's FusedAdam. Its CPU optimiser is compiled at the first start; torch's fused one needs no compiler and does the same."""
    if where.device_type != "cuda":
        return "DeepSpeed's FusedAdam runs on CUDA only"
    if find_symbol("deepspeed.ops.adam.FusedAdam") is None:
        return "deepspeed.ops.adam.FusedAdam is not importable"
    prebuilt = find_symbol("deepspeed.git_version_info.installed_ops")
    if isinstance(prebuilt, dict) and prebuilt.get("fused_adam"):
        return ""
    can_build = find_symbol("torch.utils.cpp_extension.CUDA_HOME") is not None and shutil.which("ninja") is not None
    return "" if can_build else "DeepSpeed compiles it at the first start, and there is no CUDA toolkit or no ninja here"


def _liger(where: Where) -> str:
    if where.device_type != "cuda":
        return "Liger's kernels run on GPUs only"
    if find_symbol("liger_kernel.ops.geglu.LigerGELUMulFunction") is None:
        return "liger-kernel is not installed"
    return _INTERPRETED if is_interpreting() and not where.forced else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@cache
def triton_version() -> tuple[int, int]:
    """Of the installed Triton: major and minor."""
    major, minor = importlib.import_module("triton").__version__.split(".")[:2]
    return int(major), int(minor)


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


_APEX_NORM = _apex("apex.normalization.fused_layer_norm.FusedRMSNormAffineMixedDtypesFunction", "fused_layer_norm_cuda.rms_forward_affine")

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
        Implementation("apex", "fused norm", _APEX_NORM),
        Implementation("reference", "plain torch", _nothing),
    ),
    "layer_norm": (
        Implementation("triton", "residual and norm in one pass", _triton),
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
        Implementation("apex", "one multi-tensor kernel", _apex("apex.optimizers.FusedAdam", "amp_C.multi_tensor_adam")),
        Implementation("torch", "one kernel per group of weights; part of torch", _nothing),
        Implementation("deepspeed", "one multi-tensor kernel, compiled at the first start", _deepspeed),
    ),
    "gradient_accumulation_fusion": (
        Implementation("on", "weight gradients of tensor-parallel linears are added in fp32 inside the matrix product", _fused_accumulation),
        Implementation("off", "weight gradients are rounded to bf16 before they are added up in fp32", _nothing),
    ),
}
"""Operation -> implementations, the one that `auto` prefers first."""

ALWAYS_FP32 = frozenset({"affine_coupling", "layer_norm", "optimizer"})
"""Operations on fp32 tensors in a bf16 run too: the flow's affine map and residual stream (spec 1.3) and the masters of the weights."""
