"""GeGLU: the formula, the kernel against plain torch, the library that is preferred to it, and the code made for the chips."""

import math

import pytest
import torch

from model.kernels.geglu import interface
from model.kernels.geglu.interface import geglu
from tests.model.kernels import checks

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def inputs(shape, *, dtype=torch.float32, device="cpu", magnitude=2.0):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator) * magnitude).to(device, dtype) for _ in range(3)]


def results(values, *, impl, dtype=None, prepare=lambda t: t):
    gate, up, grad = (prepare(value.to(dtype or value.dtype).clone()) for value in values)
    gate.requires_grad_(), up.requires_grad_()
    out = geglu(gate, up, impl=impl)
    return {"out": out} | dict(zip(("gate", "up"), torch.autograd.grad(out, (gate, up), grad), strict=True))


def test_reference_is_the_formula():
    gate, up, _ = inputs((3, 7), dtype=torch.float64)
    expected = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    assert torch.allclose(geglu(gate, up, impl="reference"), expected, rtol=1e-12)


def test_gradients_of_the_reference_are_right():
    gate, up, _ = inputs((3, 4), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: geglu(a, b, impl="reference"), (gate.requires_grad_(), up.requires_grad_()))


@DTYPES
@pytest.mark.parametrize("shape", [(2, 5, 24), (1, 1), (3, 1000), (0, 4), (1025,), pytest.param((8, 321, 6144), marks=pytest.mark.gpu)])
def test_kernel_is_as_exact_as_plain_torch(triton_device, dtype, shape):
    if len(shape) == 3 and shape[-1] > 1000 and triton_device.type == "cpu":
        pytest.skip("too large for the interpreter")
    values = inputs(shape, dtype=dtype, device=triton_device)
    found, eager = results(values, impl="triton"), results(values, impl="reference")
    checks.assert_as_exact_as_eager(found, eager, results(values, impl="reference", dtype=torch.float64), dtype=dtype)
    assert all(value.dtype == dtype for value in found.values())


@DTYPES
def test_extremes_are_those_of_plain_torch(triton_device, dtype):
    gate = torch.tensor([0.0, -0.0, 1e-38, 8.0, -8.0, 40.0, -40.0, 1e10, -1e10, 1e18, -1e18, math.inf, -math.inf, math.nan], device=triton_device).to(
        dtype
    )
    values = [gate, torch.full_like(gate, 1.5), torch.ones_like(gate)]
    found, eager = results(values, impl="triton"), results(values, impl="reference")
    for name in found:
        assert not (found[name].isnan() & ~eager[name].isnan()).any(), name
        finite = ~eager[name].isnan()
        assert torch.allclose(found[name][finite], eager[name][finite], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6), name


@DTYPES
def test_strides_do_not_matter(triton_device, dtype):
    values = inputs((3, 5, 24), dtype=dtype, device=triton_device)
    plain = results(values, impl="triton")
    for prepare in (checks.strided, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)):
        found = results(values, impl="triton", prepare=prepare)
        assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_same_twice(triton_device):
    values = inputs((3, 1000), dtype=torch.bfloat16, device=triton_device)
    checks.assert_same_twice(lambda: results(values, impl="triton"))


def test_two_tensors_are_kept(triton_device):
    gate, up, _ = inputs((3, 8), device=triton_device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        geglu(gate.requires_grad_(), up.requires_grad_(), impl="triton")
    assert len(kept) == 2


def test_liger_is_called_with_gate_and_up(monkeypatch):
    class StandIn:
        @staticmethod
        def apply(gate, up):
            return "liger", gate, up

    monkeypatch.setattr(interface, "choose", lambda *arguments: "liger")
    monkeypatch.setattr(interface, "find_symbol", lambda path: StandIn if path == "liger_kernel.ops.geglu.LigerGELUMulFunction" else None)
    gate, up, _ = inputs((3, 8))
    name, *arguments = geglu(gate, up, impl="auto")
    assert name == "liger"
    assert arguments[0] is gate
    assert arguments[1] is up


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="one shape and dtype"):
        geglu(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus_without_spills(capability):
    pytest.importorskip("triton")
    from model.kernels.geglu import triton_kernels

    requests = []
    for dtype in ("bf16", "fp32"):
        for kernel in ("geglu_fwd_kernel", "geglu_bwd_kernel"):
            names = getattr(triton_kernels, kernel).arg_names
            constants = {"BLOCK_N": triton_kernels.BLOCK_N}
            signature = {name: "constexpr" if name in constants else f"*{dtype}" if name.isupper() else "i32" for name in names}
            aligned = tuple(name for name in names if name not in constants)
            requests.append(checks.Compilation(f"{triton_kernels.__name__}:{kernel}", signature, constants, aligned=aligned))
    for request, compiled in zip(requests, checks.compile_for_gpu(requests, capability=capability), strict=True):
        assert compiled.fits, (request, compiled)
        assert compiled.registers <= 64, (request, compiled)
