"""The choice of an implementation: complete, explained, and taken in by no package of a similar name."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from configs.errors import UserError
from model.kernels import dispatch
from model.kernels.config import KernelsConfig
from model.kernels.dispatch import ALWAYS_FP32, OPERATIONS, Where, choose, explain

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16


@pytest.fixture
def fresh() -> Iterator[None]:
    """No answer remembered from before, none left behind."""
    remembering = dispatch._choose, dispatch.find_symbol
    for function in remembering:
        function.cache_clear()
    yield
    for function in remembering:
        function.cache_clear()


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch, fresh: None) -> Callable[..., None]:
    """Says whether Triton is installed, which, and whether it interprets."""

    def pretend(*, installed: bool = True, interprets: bool = False, version: tuple[int, int] = (3, 6)) -> None:
        monkeypatch.setattr(dispatch, "has_triton", lambda: installed)
        monkeypatch.setattr(dispatch, "triton_version", lambda: version)
        monkeypatch.setattr(dispatch, "is_interpreting", lambda: installed and interprets)

    return pretend


def chosen(device_type: str, dtype: torch.dtype = BF16) -> dict[str, str]:
    return {choice.operation: choice.implementation for choice in explain(device_type, dtype)}


def test_configuration_and_table_offer_the_same() -> None:
    offered = {name: get_args(hint) for name, hint in get_type_hints(KernelsConfig).items() if "auto" in get_args(hint)}
    assert offered.keys() == OPERATIONS.keys()
    for name, values in offered.items():
        assert sorted(values) == sorted(["auto", *(one.name for one in OPERATIONS[name])]), name
        assert getattr(KernelsConfig(), name) == "auto"
    assert OPERATIONS.keys() >= ALWAYS_FP32


@pytest.mark.parametrize("device", [CPU, CUDA, torch.device("meta")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.float16])
def test_auto_finds_something_everywhere_and_it_can_be_forced(device: torch.device, dtype: torch.dtype) -> None:
    for operation in OPERATIONS:
        found = choose(operation, "auto", device, dtype)
        assert choose(operation, found, device, dtype) == found


def test_auto_on_a_cpu_never_takes_the_interpreter(triton: Callable[..., None]) -> None:
    for interprets in (False, True):
        triton(interprets=interprets)
        assert not set(chosen("cpu").values()) & {"triton", "liger", "apex"}
        dispatch._choose.cache_clear()
        assert choose("rope", "auto", CPU, BF16) == "reference"


def test_interpreter_runs_where_it_is_forced_only(triton: Callable[..., None]) -> None:
    triton(interprets=True)
    assert choose("rope", "triton", CPU, BF16) == "triton"
    # Not on a GPU either, where it would copy every tensor to the host.
    assert "triton" not in chosen("cuda").values()
    assert choose("rope", "triton", CUDA, BF16) == "triton"


def test_interpreter_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    if not dispatch.has_triton():
        pytest.skip("Triton is not installed")
    for value in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert dispatch.is_interpreting() == (value == "1")


def test_gpu_takes_the_kernels_of_a_bf16_run(triton: Callable[..., None]) -> None:
    triton()
    found = chosen("cuda")
    names = ("gmm_nll", "rms_norm", "rope", "mixture_sample")
    assert {name: found[name] for name in names} == dict.fromkeys(names, "triton")
    assert found["geglu"] in ("liger", "triton")


def test_explanation_is_in_the_dtype_that_the_operation_runs_in(triton: Callable[..., None]) -> None:
    """The flow's affine map is fp32 in a bf16 run, and has a kernel for fp32 alone."""
    triton()
    assert chosen("cuda", BF16)["affine_coupling"] == chosen("cuda", torch.float32)["affine_coupling"] == "triton"
    assert choose("affine_coupling", "auto", CUDA, BF16) == "reference"


def test_a_triton_too_old_for_a_kernel_leaves_it_to_the_next_implementation(triton: Callable[..., None]) -> None:
    names = ("affine_coupling", "rope", "gmm_nll")
    for version, expected in {
        (3, 4): ("triton",) * 3,
        (3, 3): ("reference", "triton", "triton"),
        (3, 1): ("reference", "reference", "torch"),
    }.items():
        triton(version=version)
        dispatch._choose.cache_clear()
        assert tuple(chosen("cuda")[name] for name in names) == expected
    triton(version=(3, 3))
    reasons = {choice.operation: choice.reason for choice in explain("cuda", BF16)}
    assert "not triton: Triton permutes through shared memory from 3.4 on, and this is 3.3" in reasons["affine_coupling"]
    with pytest.raises(UserError, match=r"Triton permutes through shared memory from 3\.4 on"):
        choose("affine_coupling", "triton", CUDA, torch.float32)
    triton(version=(3, 1))
    assert "not triton: it needs Triton 3.2 or later, not 3.1" in {choice.operation: choice.reason for choice in explain("cuda", BF16)}["rope"]


def test_version_of_triton_is_read() -> None:
    installed = pytest.importorskip("triton").__version__
    assert installed.startswith("{}.{}.".format(*dispatch.triton_version()))


def test_explanation_names_what_stood_in_the_way(triton: Callable[..., None]) -> None:
    triton(installed=False)
    reasons = {choice.operation: choice.reason for choice in explain("cuda", BF16)}
    assert "not triton: Triton is not installed" in reasons["gmm_nll"]
    assert "not apex: no apex.optimizers.FusedAdam" in reasons["optimizer"]
    assert "not on: no fused_weight_gradient_mlp_cuda" in reasons["gradient_accumulation_fusion"]
    fp32 = {choice.operation: choice.reason for choice in explain("cuda", torch.float32)}
    assert "only a bf16 run has an fp32 accumulator" in fp32["gradient_accumulation_fusion"]


@pytest.mark.parametrize(
    ("operation", "requested", "device", "dtype", "got", "others"),
    [
        ("gmm_nll", "triton", CPU, torch.float64, "the kernel takes bf16 and fp32, not float64 (device cpu, float64)", "auto, torch, reference"),
        ("affine_coupling", "triton", CUDA, BF16, "the kernel takes fp32, not bfloat16", "auto, reference"),
        ("rms_norm", "apex", CPU, BF16, "apex runs on CUDA only", "reference"),
        ("geglu", "liger", CPU, BF16, "Liger's kernels run on GPUs only", "reference"),
        ("optimizer", "apex", CUDA, torch.float32, "no apex.optimizers.FusedAdam and no amp_C.multi_tensor_adam", "auto, torch"),
        ("optimizer", "deepspeed", CPU, torch.float32, "DeepSpeed's FusedAdam runs on CUDA only", "auto, torch"),
        ("gradient_accumulation_fusion", "on", CUDA, BF16, "no fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32", "auto, off"),
    ],
)
def test_forcing_what_cannot_run_says_what_to_do(
    operation: str, requested: str, device: torch.device, dtype: torch.dtype, got: str, others: str
) -> None:
    if not next(one.obstacle(Where(device.type, dtype, forced=True)) for one in OPERATIONS[operation] if one.name == requested):
        pytest.skip("it is installed here")
    with pytest.raises(UserError) as caught:
        choose(operation, requested, device, dtype)
    what, *rest = str(caught.value).splitlines()
    assert what == f"kernels.{operation}={requested} cannot run here"
    assert got in rest[0]
    assert others in rest[1]
    assert f"set kernels.{operation}=auto" in rest[2]


def test_unknown_implementation_is_refused() -> None:
    with pytest.raises(UserError, match=r"kernels\.rope=cuda is no implementation"):
        choose("rope", "cuda", CPU, BF16)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> Callable[[dict[str, str]], None]:
    """Installs packages: path -> text."""

    def install(files: dict[str, str]) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("apex", "amp_C", "fused_weight_gradient_mlp_cuda")]:
            monkeypatch.delitem(sys.modules, name)
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
            monkeypatch.setitem(sys.modules, path.partition("/")[0].removesuffix(".py"), None)  # so that it is taken out again
            monkeypatch.delitem(sys.modules, path.partition("/")[0].removesuffix(".py"))
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


UNRELATED = {"apex/__init__.py": "__version__ = '0.9.10dev'\nclass RootFactory: ...\n", "apex/models.py": ""}
PYTHON_ONLY = {"apex/__init__.py": "", "apex/optimizers/__init__.py": "class FusedAdam: ...\n"}
BROKEN = {**PYTHON_ONLY, "amp_C.py": "raise ImportError('undefined symbol: _ZN2at')\n"}
WHOLE = {
    **PYTHON_ONLY,
    "amp_C.py": "def multi_tensor_adam(): ...\n",
    "fused_weight_gradient_mlp_cuda.py": "def wgrad_gemm_accum_fp32(): ...\n",
}


@pytest.mark.parametrize("files", [UNRELATED, PYTHON_ONLY, BROKEN])
def test_wrong_or_half_built_apex_enables_nothing(packages: Callable[[dict[str, str]], None], files: dict[str, str]) -> None:
    packages(files)
    found = chosen("cuda")
    assert (found["optimizer"], found["gradient_accumulation_fusion"]) == ("torch", "off")
    assert found["rms_norm"] != "apex"
    for operation, requested in (("optimizer", "apex"), ("gradient_accumulation_fusion", "on"), ("rms_norm", "apex")):
        with pytest.raises(UserError, match="cannot run here"):
            choose(operation, requested, CUDA, BF16)


def test_whole_apex_is_taken_on_cuda_alone(packages: Callable[[dict[str, str]], None]) -> None:
    packages(WHOLE)
    found = chosen("cuda")
    assert (found["optimizer"], found["gradient_accumulation_fusion"]) == ("apex", "on")
    assert chosen("cuda", torch.float32)["gradient_accumulation_fusion"] == "off"
    assert (chosen("cpu")["optimizer"], chosen("cpu")["gradient_accumulation_fusion"]) == ("torch", "off")


@pytest.mark.parametrize(
    ("symbols", "has_ninja", "obstacle"),
    [
        ({}, True, "not importable"),
        ({"deepspeed.git_version_info.installed_ops": {"fused_adam": True}}, False, ""),
        ({"deepspeed.git_version_info.installed_ops": {"fused_adam": False}}, True, "no CUDA toolkit"),
        ({"torch.utils.cpp_extension.CUDA_HOME": "/usr/local/cuda"}, True, ""),
        ({"torch.utils.cpp_extension.CUDA_HOME": "/usr/local/cuda"}, False, "no ninja"),
    ],
)
def test_deepspeed_is_offered_where_it_is_built_or_can_be(
    monkeypatch: pytest.MonkeyPatch, symbols: dict[str, object], has_ninja: bool, obstacle: str
) -> None:
    known = {"deepspeed.ops.adam.FusedAdam": object, **symbols} if symbols else {}
    monkeypatch.setattr(dispatch, "find_symbol", known.get)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/ninja" if has_ninja else None)
    found = dispatch._deepspeed(Where("cuda", torch.float32, forced=True))
    assert obstacle in found
    assert bool(found) == bool(obstacle)


def test_configuration_is_frozen_and_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        KernelsConfig().tf32 = False  # type: ignore[misc]
    with pytest.raises(ValueError, match="workspace_mib=0"):
        KernelsConfig(workspace_mib=0)
