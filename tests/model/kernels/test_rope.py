"""Rotary embedding: rotation of complex numbers, the kernel against plain torch for any strides, and the code made for the chips."""

import pytest
import torch

from model.decoder.rope import rope_tables
from model.kernels.rope.interface import apply_rope
from tests.model.kernels import checks

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def inputs(batch, heads, length, head_dim, *, rows=1, dtype=torch.float32, device="cpu"):
    """As the projections leave them: heads and positions swapped in memory."""
    generator = torch.Generator().manual_seed(head_dim + heads)
    x, grad = (torch.randn(batch, length, heads, head_dim, generator=generator).to(device, dtype).transpose(1, 2) for _ in range(2))
    positions = torch.arange(length, device=device)[None] + torch.arange(rows, device=device)[:, None] * 5
    return x, grad, *rope_tables(positions, head_dim)


def results(x, grad, cos, sin, *, impl, dtype):
    x, grad = (t.detach().to(dtype) if t.dtype != dtype else t.detach() for t in (x, grad))
    leaf = x.requires_grad_()
    out = apply_rope(leaf, cos, sin, impl=impl)
    return {"out": out, "x": torch.autograd.grad(out, leaf, grad)[0]}


def test_reference_multiplies_complex_numbers():
    x, _, cos, sin = inputs(2, 3, 5, 6, rows=2)
    rotated = torch.complex(*x.double().chunk(2, -1)) * torch.complex(cos.double(), sin.double())
    assert torch.allclose(apply_rope(x.double(), cos, sin, impl="reference"), torch.cat([rotated.real, rotated.imag], -1), rtol=1e-12)


def test_gradient_of_the_reference_is_right():
    x, _, cos, sin = inputs(2, 3, 4, 6)
    assert torch.autograd.gradcheck(lambda t: apply_rope(t, cos.double(), sin.double(), impl="reference"), x.double().requires_grad_())


@DTYPES
@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (2, 1, 9, 64), (1, 3, 7, 96), (3, 2, 1, 2), (0, 2, 3, 6)])
@pytest.mark.parametrize("per_example", [False, True], ids=["one table", "a table each"])
def test_kernel_is_as_exact_as_plain_torch(triton_device, dtype, shape, per_example):
    values = inputs(*shape, rows=max(shape[0], 1) if per_example else 1, dtype=dtype, device=triton_device)
    found, eager = (results(*values, impl=impl, dtype=dtype) for impl in ("triton", "reference"))
    checks.assert_as_exact_as_eager(found, eager, results(*values, impl="reference", dtype=torch.float64), dtype=dtype)
    assert found["out"].dtype == dtype


@pytest.mark.gpu
@DTYPES
def test_heads_of_the_published_sizes(dtype):
    values = inputs(4, 16, 321, 96, dtype=dtype, device="cuda")
    found, eager = (results(*values, impl=impl, dtype=dtype) for impl in ("triton", "reference"))
    checks.assert_as_exact_as_eager(found, eager, results(*values, impl="reference", dtype=torch.float64), dtype=dtype)


@DTYPES
def test_strides_do_not_matter(triton_device, dtype):
    x, grad, cos, sin = inputs(2, 3, 5, 6, rows=2, dtype=dtype, device=triton_device)
    plain = results(x.contiguous(), grad.contiguous(), cos, sin, impl="triton", dtype=dtype)
    for other in (x, checks.strided(x), x.transpose(0, 1).contiguous().transpose(0, 1)):
        for table in (lambda t: t, checks.strided):
            found = results(other, checks.strided(grad), table(cos), table(sin), impl="triton", dtype=dtype)
            assert all(torch.equal(plain[name], found[name]) for name in plain)
    broadcast = grad[:1, :, :1].expand(2, -1, 5, -1)  # the gradient of a sum
    found, eager = (results(x, broadcast, cos, sin, impl=impl, dtype=dtype) for impl in ("triton", "reference"))
    assert torch.allclose(found["x"], eager["x"], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_output_keeps_the_memory_order_of_the_projections(triton_device):
    x, _, cos, sin = inputs(2, 3, 5, 6, device=triton_device)
    assert apply_rope(x, cos, sin, impl="triton").transpose(1, 2).is_contiguous()


@DTYPES
def test_extremes_are_those_of_plain_torch(triton_device, dtype):
    x, grad, cos, sin = inputs(1, 1, 7, 6, dtype=dtype, device=triton_device)
    for position, value in enumerate([0.0, 1e-38, 1e38, float("inf"), float("-inf"), float("nan")]):
        x[:, :, position] = value
    found, eager = (results(x, grad, cos, sin, impl=impl, dtype=dtype) for impl in ("triton", "reference"))
    assert torch.allclose(found["out"], eager["out"], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6, equal_nan=True)


def test_same_twice(triton_device):
    values = inputs(2, 3, 5, 64, dtype=torch.bfloat16, device=triton_device)
    checks.assert_same_twice(lambda: results(*values, impl="triton", dtype=torch.bfloat16))


def test_tables_that_do_not_fit_are_refused():
    x, _, cos, sin = inputs(2, 3, 5, 6)
    with pytest.raises(ValueError, match="tables"):
        apply_rope(x, cos[:, :, :-1], sin[:, :, :-1])
    with pytest.raises(ValueError, match="tables"):
        apply_rope(x, cos.expand(3, -1, -1, -1), sin.expand(3, -1, -1, -1))
    with pytest.raises(ValueError, match=r"x must be \[B, heads, S, H\]"):
        apply_rope(x[0], cos, sin)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus_without_spills(capability):
    pytest.importorskip("triton")
    from model.kernels.rope import triton_kernels

    requests = []
    for dtype in ("bf16", "fp32"):
        for head_dim, reverse in ((96, False), (64, True), (128, False)):
            constants = triton_kernels.tile(head_dim) | {"REVERSED": reverse}
            types = {"X": f"*{dtype}", "OUT": f"*{dtype}", "COS": "*fp32", "SIN": "*fp32"}
            # Torch's launch specialises the stride between elements of a head, which is 1.
            constants |= {"x_stride_h": 1, "out_stride_h": 1}
            names = triton_kernels.rope_kernel.arg_names
            signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
            aligned = tuple(name for name in names if name in types or "stride" in name and name not in constants)
            requests.append(checks.Compilation(f"{triton_kernels.__name__}:rope_kernel", signature, constants, aligned=aligned))
    for request, compiled in zip(requests, checks.compile_for_gpu(requests, capability=capability), strict=True):
        assert compiled.fits, (request, compiled)
        assert compiled.registers <= 128, (request, compiled)
