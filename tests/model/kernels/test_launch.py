"""What a launch meets on a GPU and not in the interpreter: integers that are 1 become constants, large ones 64 bits wide; an empty grid is an
error; a kernel runs on the current device, wherever its tensors are."""

import ast
from pathlib import Path

import pytest
import torch

from model.kernels.affine_coupling.interface import affine_coupling, affine_coupling_inverse
from model.kernels.dispatch import triton_version
from model.kernels.geglu.interface import geglu
from model.kernels.gmm_nll.interface import linear_gmm_nll, linear_gmm_nll_loss
from model.kernels.mixture_sample.interface import component_gaussian, mixture_sample
from model.kernels.rms_norm.interface import add_dropout, add_dropout_rms_norm, rms_norm
from model.kernels.rope.interface import apply_rope
from model.kernels.splitmix import DropoutKey
from tests.model.kernels import checks

SOURCES = sorted((checks.REPOSITORY / "model" / "kernels").glob("*/triton_kernels.py"))

VARIANTS: dict[str, list[dict[str, object]]] = {
    "affine_coupling_fwd_kernel": [{"INVERSE": inverse, "BLOCK_R": 4, "BLOCK_C": 2} for inverse in (False, True)],
    "affine_coupling_bwd_kernel": [{"BLOCK_R": 4, "BLOCK_C": 2}],
    "geglu_fwd_kernel": [{"BLOCK_N": 1024}],
    "geglu_bwd_kernel": [{"BLOCK_N": 1024}],
    "gmm_log_joint_kernel": [{"TOKENS": 8, "BLOCK_K": 1, "BLOCK_D": 1, "FAST": True}],
    "gmm_gradient_kernel": [{"TOKENS": 64, "BLOCK_K": 1, "BLOCK_D": 1}],
    "layer_norm_fwd_kernel": [{"WIDTH": 1, "BLOCK_R": 1, "BLOCK_W": 1, "GROUP": 1, "HAS_BRANCH": branch} for branch in (True, False)],
    "layer_norm_bwd_kernel": [
        {"WIDTH": 1, "BLOCK_R": 1, "BLOCK_W": 1, "GROUP": 1, "HAS_TOTAL": total, "WRITES_X": x, "WRITES_BRANCH": branch}
        for total, x, branch in ((True, True, True), (False, True, False), (True, False, True))
    ],
    "mixture_sample_kernel": [{"COPIES": copies, "EPILOGUE": rule, "BLOCK_C": 2, "BLOCK_W": 1} for copies, rule in ((1, 0), (2, 1), (2, 2), (2, 3))],
    "norm_fwd_kernel": [
        {"WIDTH": 1, "BLOCK_W": 1, "GROUP": 1, "HAS_BRANCH": branch, "HAS_DROPOUT": dropout, "HAS_NORM": norm}
        for branch, dropout, norm in ((True, True, True), (True, True, False), (True, False, True), (False, False, True))
    ],
    "norm_bwd_kernel": [
        {"WIDTH": 1, "BLOCK_W": 1, "GROUP": 1, "HAS_BRANCH": branch, "HAS_DROPOUT": dropout} for branch, dropout in ((True, True), (False, False))
    ],
    "dropout_bwd_kernel": [{"WIDTH": 1, "BLOCK_W": 1, "GROUP": 1}],
    "rope_kernel": [{"HALF": 1, "REVERSED": reverse, "BLOCK_N": 2048, "BLOCK_H": 1} for reverse in (False, True)],
}
"""Kernel -> constants of its smallest tiles, with every flag on and off."""
WHOLE_NUMBERS = {"ORDER": "*i32", "INVERSE_ORDER": "*i32", "KEYS": "*i64", "COMPONENT": "*i64"}
SINGLE = {"LOGITS", "SOFT", "LOG_JOINT", "JOINT", "WEIGHT", "D_SOFT", "D_BIAS", "MEAN", "RSTD", "D_WEIGHT", "D_SCALE", "COS", "SIN", "NOISE", "SCALE"}
FRACTIONS = {"constant", "keep_probability", "cfg_scale", "min_scale", "temperature"}


def kernels_of(path: Path) -> list[ast.FunctionDef]:
    """Its jitted functions that are launched."""
    found = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")]
    assert found, path
    return found


def compilation(path: Path, kernel: ast.FunctionDef, constants: dict[str, object], *, integers: str) -> checks.Compilation:
    """One kernel with bf16 tensors where it takes them, whose integers are all 1 or all of one type."""
    signature, values = {}, dict(constants)
    for argument in (one.arg for one in kernel.args.args):
        if argument.isupper() and argument not in constants:
            narrow = "*fp32" if argument in SINGLE or "affine" in kernel.name else "*bf16"
            signature[argument] = WHOLE_NUMBERS.get(argument, narrow)
        elif argument in FRACTIONS:
            signature[argument] = "fp32"
        elif argument in constants or integers == "1":
            signature[argument] = "constexpr"
            values.setdefault(argument, 1)
        else:
            signature[argument] = integers
    return checks.Compilation(f"model.kernels.{path.parent.name}.triton_kernels:{kernel.name}", signature, values)


@pytest.mark.parametrize("integers", ["1", "i64"])
def test_kernels_compile_for_every_kind_of_integer(integers: str) -> None:
    pytest.importorskip("triton")
    compilations = []
    for path in SOURCES:
        if path.parent.name == "affine_coupling" and triton_version() < (3, 4):
            continue
        for kernel in kernels_of(path):
            assert kernel.name in VARIANTS, f"add the smallest tile and the flags of {kernel.name} to VARIANTS"
            compilations += [compilation(path, kernel, constants, integers=integers) for constants in VARIANTS[kernel.name]]
    assert len(checks.compile_for_gpu(compilations)) == len(compilations)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.parent.name)
def test_kernels_are_launched_on_the_device_of_their_tensors(path: Path) -> None:
    """Triton launches on the current device, and a pointer into the memory of another one is no error there."""
    names, launched, guarded = {kernel.name for kernel in kernels_of(path)}, set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        launches = {
            one.func.value.id
            for one in ast.walk(node)
            if isinstance(one, ast.Call) and isinstance(one.func, ast.Subscript) and isinstance(one.func.value, ast.Name)
        }
        launched |= launches & names
        if isinstance(node, ast.With) and any("torch.cuda.device_of" in ast.unparse(item) for item in node.items):
            guarded |= launches
    assert launched == names
    assert guarded >= names


def test_nothing_is_launched_where_there_is_nothing(triton_device: torch.device) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=triton_device, requires_grad=True)

    keys = DropoutKey(torch.zeros(0, dtype=torch.int64, device=triton_device), 0.1)
    x, scale = empty(0, 3, 8), torch.zeros(8, device=triton_device, requires_grad=True)
    found = [
        rms_norm(x, scale, impl="triton"),
        add_dropout(x, empty(0, 3, 8), keys, impl="triton"),
        *add_dropout_rms_norm(x, empty(0, 3, 8), scale, keys, impl="triton"),
        geglu(empty(0, 5), empty(0, 5), impl="triton"),
        apply_rope(empty(0, 2, 3, 8), empty(1, 1, 3, 4).detach(), empty(1, 1, 3, 4).detach(), impl="triton"),
        apply_rope(empty(2, 2, 0, 8), empty(1, 1, 0, 4).detach(), empty(1, 1, 0, 4).detach(), impl="triton"),
    ]
    if triton_version() >= (3, 4):
        order = torch.arange(8, device=triton_device)
        inputs = empty(0, 3, 4), empty(0, 3, 4), empty(0, 3, 8)
        out, logdet = affine_coupling(*inputs, order, order, joined=True, impl="triton")
        found += [*out, logdet]
        affine_coupling_inverse(*(x.detach() for x in inputs), order, joined=True, impl="triton")
    weights = tuple(torch.ones(*shape, device=triton_device, requires_grad=True) for shape in ((2, 5), (2,), (2, 2, 3, 5), (2, 2, 3)))
    found.append(linear_gmm_nll(empty(0, 5), empty(0, 3), weights, impl="triton"))
    found.append(linear_gmm_nll_loss(empty(0, 5), empty(0, 3), weights, empty(0).detach(), impl="triton")[0])
    component = torch.zeros(0, dtype=torch.int64, device=triton_device)
    arguments = [tensor.detach() for tensor in (empty(0, 5), weights[2], weights[3])]
    assert mixture_sample(*arguments, component, empty(0, 3).detach(), impl="triton").shape == (0, 3)
    assert component_gaussian(*arguments, component, impl="triton")[0].loc.shape == (0, 3)
    for result in found:
        assert result.sum() == 0
    sum(result.sum() for result in found).backward()
    assert scale.grad is not None
    assert not scale.grad.any()
