"""What every kernel is held to: as exact as eager, written everywhere, the same twice, and compilable for the chips it is for.

The three-way rule: a kernel's error against fp32 (or fp64) truth is at most the error of eager torch in the kernel's own dtype, plus a
small tolerance. It asks nothing that the dtype cannot give, and lets nothing pass that eager would not.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from model.kernels.config import KernelsConfig
from model.kernels.dispatch import has_triton, triton_version

REPOSITORY = Path(__file__).resolve().parents[3]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-3}
"""Relative, added to eager's own error."""
REFERENCE = KernelsConfig(
    gmm_nll="reference",
    linear_cross_entropy="reference",
    affine_coupling="reference",
    rms_norm="reference",
    layer_norm="reference",
    rope="reference",
    geglu="reference",
    mixture_sample="reference",
)
"""Plain torch in every operation of the model."""


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; infinite where one is NaN or infinite and the other is not."""
    found, truth = found.detach().double().cpu(), truth.detach().double().cpu()
    assert found.shape == truth.shape, (found.shape, truth.shape)
    same = (found == truth) | (found.isnan() & truth.isnan())
    difference = torch.where(same, 0.0, found - truth)
    if not difference.isfinite().all():
        return float("inf")
    scale = float(torch.where(truth.isfinite(), truth, 0.0).norm())
    return float(difference.norm()) / scale if scale else float(difference.norm())


def assert_as_exact_as_eager(
    found: Mapping[str, Tensor], eager: Mapping[str, Tensor], truth: Mapping[str, Tensor], *, dtype: torch.dtype, tolerance: float | None = None
) -> None:
    """The three-way rule for an output and every gradient, by name."""
    assert found.keys() == eager.keys() == truth.keys()
    allowed = TOLERANCE[dtype] if tolerance is None else tolerance
    errors = {name: (relative_error(found[name], truth[name]), relative_error(eager[name], truth[name])) for name in truth}
    worse = {name: pair for name, pair in errors.items() if not pair[0] <= pair[1] + allowed}
    assert not worse, f"(kernel's error, eager's error): {worse}"


def assert_same_twice(run: Callable[[], Mapping[str, Tensor]]) -> None:
    """Two runs agree to the bit."""
    first, second = run(), run()
    different = [name for name in first if not torch.equal(first[name].nan_to_num(7.0), second[name].nan_to_num(7.0))]
    assert not different, f"not the same twice: {different}"


def permutes_on_chip() -> str:
    """Why the installed Triton cannot run the flow's kernel; empty if it can, or if there is none."""
    return "" if not has_triton() or triton_version() >= (3, 4) else "Triton permutes through shared memory from 3.4 on"


def strided(x: Tensor) -> Tensor:
    """The same values in memory where no dimension is contiguous."""
    wide = torch.full((*x.shape, 2), float("nan") if x.is_floating_point() else 0, dtype=x.dtype, device=x.device)
    wide[..., 0] = x.detach()
    return wide[..., 0].requires_grad_(x.requires_grad)


@dataclass(frozen=True, slots=True)
class Compilation:
    """One Triton kernel with types and constants, to be compiled ahead of time for a GPU that need not be there."""

    kernel: str
    """`package.module:function`."""
    signature: dict[str, str]
    """Argument -> Triton type ("*bf16", "i32", "fp32", ...), `constexpr` for those in `constants`."""
    constants: dict[str, object]
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = field(default=())
    """Arguments divisible by 16, as pointers of torch and most strides are."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the assembler says of one kernel."""

    registers: int
    """Per thread."""
    spilled_bytes: int
    """Local memory per thread: registers that did not fit."""
    shared_bytes: int
    """Per program."""

    @property
    def fits(self) -> bool:
        """Whether all values stay in registers, but for two that the assembler itself gives up to end at 64, where a quarter more warps run
        than at 72: so Triton 3.4 and 3.7 for sm_80."""
        return self.spilled_bytes == 0 or (self.spilled_bytes <= 8 and self.registers == 64)


def compile_for_gpu(compilations: Sequence[Compilation], *, capability: int = 90) -> list[Compiled]:
    """Compiles kernels to machine code of compute capability `capability` in a child process (the interpreter is off there)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1"}
    request = json.dumps({"capability": capability, "kernels": [asdict(one) for one in compilations]})
    command = [sys.executable, "-m", "tests.model.kernels.compile_ahead"]
    done = subprocess.run(command, input=request, capture_output=True, text=True, cwd=REPOSITORY, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [Compiled(**values) for values in json.loads(done.stdout.splitlines()[-1])]
