"""What a run is refused at its start."""

import dataclasses

import pytest
import torch

from configs.errors import UserError
from model.kernels import inductor
from model.kernels.config import KernelsConfig
from model.kernels.preflight import check_kernels

CPU = torch.device("cpu")


def test_what_is_not_forced_is_never_refused() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        check_kernels(KernelsConfig(), CPU, dtype)


@pytest.mark.parametrize(
    "forced",
    [{"rms_norm": "apex"}, {"geglu": "liger"}, {"optimizer": "apex"}, {"gradient_accumulation_fusion": "on"}],
    ids=lambda forced: next(iter(forced)),
)
def test_what_cannot_run_is_refused_by_name(forced: dict[str, str]) -> None:
    ((option, value),) = forced.items()
    with pytest.raises(UserError, match=f"kernels.{option}={value} cannot run here"):
        check_kernels(dataclasses.replace(KernelsConfig(), **forced), CPU, torch.float32)  # type: ignore[arg-type]


def test_kernels_of_fp32_tensors_may_be_forced_in_a_bf16_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from model.kernels import preflight

    asked = {}
    monkeypatch.setattr(preflight, "choose", lambda operation, requested, device, dtype: asked.update({operation: dtype}))
    check_kernels(KernelsConfig(affine_coupling="triton", mixture_sample="triton"), CPU, torch.bfloat16)
    assert asked == {"affine_coupling": torch.float32, "mixture_sample": torch.bfloat16}


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "compiler_obstacle", lambda device_type: "there is no compiler")
    inductor.require_compiler.cache_clear()
    with pytest.raises(UserError, match=r"(?s)kernels.compile=layers cannot run here.*there is no compiler"):
        check_kernels(KernelsConfig(compile="layers"), CPU, torch.float32)
