"""LayerNorm with the residual addition: torch's own, the formula, the kernels against plain torch, and the code made for the chips."""

import pytest
import torch
from torch.nn import functional

from configs.errors import UserError
from model.kernels.layer_norm.interface import add_layer_norm, layer_norm
from model.kernels.layer_norm.reference import layer_norm_reference
from tests.model.kernels import checks

FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
INPUTS = ("x", "branch", "weight", "bias")
BOTH = ("total", "normed")
SHAPES = [(2, 5, 24), (3, 7, 16), (2, 3, 192), (5, 1, 512), (1, 4, 1000), (1, 2, 2048), (2, 3, 7), (9, 24)]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def inputs(shape, *, dtype=FP32, device="cpu", seed=0, shared=False):
    """What a run whose products are in `dtype` has: the stream in fp32, all else in `dtype`. `shared`: one x for all examples."""
    generator = torch.Generator().manual_seed(seed)
    x, branch, d_total, d_normed = (torch.randn(shape, generator=generator) for _ in range(4))
    weight, bias = 1 + 0.3 * torch.randn(shape[-1], generator=generator), torch.randn(shape[-1], generator=generator)
    x = (x[:1] if shared else x) + 0.5
    wide = {"x": x, "d_total": d_total}
    narrow = {"branch": branch, "weight": weight, "bias": bias, "d_normed": d_normed}
    values = {name: value.to(dtype) for name, value in narrow.items()} | wide
    return {name: value.to(device) for name, value in values.items()}


def results(values, *, impl, dtype=None, prepare=lambda t: t, used=BOTH):
    """Outputs and gradients of the fused operation, all with names; `used`: the outputs that a loss reads."""
    leaves = {name: prepare(values[name].to(dtype or values[name].dtype).clone().requires_grad_()) for name in INPUTS}
    upstream = {name: prepare(values[f"d_{name}"].to(dtype or values[f"d_{name}"].dtype)) for name in BOTH}
    total, normed = add_layer_norm(*leaves.values(), out_dtype=dtype or values["d_normed"].dtype, impl=impl)
    outputs = {"total": total, "normed": normed}
    gradients = torch.autograd.grad([outputs[name] for name in used], list(leaves.values()), [upstream[name] for name in used], allow_unused=True)
    return outputs | {name: gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}


def compare(values, *, dtype, **options):
    found, eager = (results(values, impl=impl, **options) for impl in ("triton", "reference"))
    checks.assert_as_exact_as_eager(found, eager, results(values, impl="reference", dtype=torch.float64, **options), dtype=dtype)
    assert torch.equal(found["total"], eager["total"])
    assert {name: value.dtype for name, value in found.items()} == {name: value.dtype for name, value in eager.items()}
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in eager.items()}


def test_reference_is_the_layer_norm_of_torch():
    """Also that of the formula."""
    x, module = torch.randn(3, 5, 24, dtype=torch.float64), torch.nn.LayerNorm(24, eps=1e-6, dtype=torch.float64)
    torch.nn.init.normal_(module.weight), torch.nn.init.normal_(module.bias)
    found = layer_norm_reference(x, module.weight, module.bias, torch.float64)
    assert torch.equal(found, module(x))
    assert layer_norm_reference(x.float(), module.weight, module.bias, FP32).allclose(found.float(), atol=1e-5), "parameters of any dtype"
    variance = x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True).square()
    formula = (x - x.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt() * module.weight + module.bias
    assert torch.allclose(found, formula, rtol=1e-10)


def test_half_precision_is_rounded_once():
    values = inputs((3, 24), dtype=BF16)
    total, normed = add_layer_norm(*(values[name] for name in INPUTS), out_dtype=BF16)
    wide = functional.layer_norm(values["x"] + values["branch"].float(), (24,), values["weight"].float(), values["bias"].float(), 1e-6)
    assert total.dtype == FP32
    assert torch.equal(normed, wide.to(BF16))


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_of_the_reference_are_right(shared):
    values = inputs((3, 2, 5), shared=shared)
    arguments = [values[name].double().requires_grad_() for name in INPUTS]
    assert torch.autograd.gradcheck(lambda *leaves: add_layer_norm(*leaves, out_dtype=torch.float64, impl="reference"), arguments)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
def test_kernel_is_as_exact_as_plain_torch(triton_device, dtype, shape, shared):
    compare(inputs(shape, dtype=dtype, device=triton_device, shared=shared), dtype=dtype)


@DTYPES
@pytest.mark.parametrize("used", [("total",), ("normed",)], ids="".join)
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
def test_one_output_alone_has_its_gradients(triton_device, dtype, used, shared):
    compare(inputs((2, 3, 24), dtype=dtype, device=triton_device, shared=shared), dtype=dtype, used=used)


@DTYPES
def test_rows_far_from_zero_keep_their_variance(triton_device, dtype):
    """Where E[x^2] - E[x]^2 in fp32 has nothing left of it. In pairs around 4096 on a grid, so that fp32 holds the values and their mean exactly."""
    values = inputs((2, 5, 192), dtype=dtype, device=triton_device)
    steps = (values["x"][..., :96] * 8).round() / 8
    values["x"], values["branch"] = torch.cat([4096 + steps, 4096 - steps], dim=-1), torch.zeros_like(values["branch"])
    compare(values, dtype=dtype)


@pytest.mark.parametrize(("x_dtype", "dtype", "out_dtype"), [(FP32, BF16, FP32), (BF16, BF16, BF16), (BF16, FP32, BF16)], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
def test_dtypes_mix_as_in_plain_torch(triton_device, x_dtype, dtype, out_dtype, shared):
    """The last norm of a network feeds a product in fp32."""
    values = inputs((2, 5, 24), dtype=dtype, device=triton_device, shared=shared)
    values["x"], values["d_normed"] = values["x"].to(x_dtype), values["d_normed"].to(out_dtype)
    values["d_total"] = values["d_total"].to(torch.promote_types(x_dtype, dtype))
    compare(values, dtype=BF16)


@DTYPES
@pytest.mark.parametrize("shape", [(7, 24), (2, 3, 1001), (4, 2, 2048), (24,), (0, 8)], ids=str)
def test_norm_alone_is_as_exact_as_plain_torch(triton_device, dtype, shape):
    values = inputs(shape, dtype=dtype, device=triton_device)

    def run(impl, cast=None):
        leaves = {name: values[name].to(cast or values[name].dtype).requires_grad_() for name in ("x", "weight", "bias")}
        normed = layer_norm(*leaves.values(), out_dtype=cast or dtype, impl=impl)
        return {"normed": normed} | dict(
            zip(leaves, torch.autograd.grad(normed, list(leaves.values()), values["d_normed"].to(cast or dtype)), strict=True)
        )

    checks.assert_as_exact_as_eager(run("triton"), run("reference"), run("reference", torch.float64), dtype=dtype)
    assert {name: value.dtype for name, value in run("triton").items()} == {"normed": dtype, "x": FP32, "weight": dtype, "bias": dtype}


def test_no_gradient_is_made_for_what_wants_none(triton_device):
    values = inputs((2, 3, 24), dtype=BF16, device=triton_device)
    for wanted in INPUTS:
        found = []
        for impl in ("triton", "reference"):
            leaves = {name: values[name].clone().requires_grad_(name == wanted) for name in INPUTS}
            total, normed = add_layer_norm(*leaves.values(), out_dtype=BF16, impl=impl)
            ((total * values["d_total"]).sum() + (normed * values["d_normed"]).sum()).backward()
            assert [name for name in INPUTS if leaves[name].grad is not None] == [wanted]
            found.append(leaves[wanted].grad)
        assert torch.allclose(*found, rtol=3e-2, atol=1e-2), wanted


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("shape", [(64, 256, 512), (3, 257, 2048), (5, 33, 4096)], ids=str)
def test_rows_of_the_published_sizes(dtype, shape, shared):
    compare(inputs(shape, dtype=dtype, device="cuda", shared=shared), dtype=dtype)


@DTYPES
@pytest.mark.parametrize("magnitude", [0.0, 1e-20, 1e15, 1e30, float("inf"), float("nan")])
def test_extremes_are_those_of_plain_torch(triton_device, dtype, magnitude):
    values = inputs((2, 3, 24), dtype=dtype, device=triton_device)
    values["x"] = values["x"] * magnitude
    values["branch"] = values["branch"] * min(magnitude, 1.0)
    found, eager = ({name: value.detach().float() for name, value in results(values, impl=impl).items()} for impl in ("triton", "reference"))
    for name in found:
        finite = eager[name].isfinite()
        assert found[name][finite].isfinite().all(), name
        if magnitude != 1e30:  # the variance overflows: 1 / sqrt(inf) is 0 in the kernel, and NaN in torch on a CPU
            assert torch.equal(found[name].isfinite(), finite), name
        scale = float(eager[name][finite].abs().max()) if finite.any() else 0.0
        tolerance = {"rtol": 2e-5, "atol": 2e-6 * scale} if dtype == FP32 else {"rtol": 3e-2, "atol": 4e-3 * scale}
        assert torch.allclose(found[name][finite], eager[name][finite], **tolerance), name


@DTYPES
def test_strides_do_not_matter(triton_device, dtype):
    values = inputs((2, 3, 24), dtype=dtype, device=triton_device)
    plain, strided = results(values, impl="triton"), results(values, impl="triton", prepare=checks.strided)
    assert all(torch.equal(plain[name], strided[name]) for name in plain)


@pytest.mark.parametrize("shared", [False, True])
def test_same_twice(triton_device, shared):
    values = inputs((3, 40, 24), dtype=BF16, device=triton_device, shared=shared)
    checks.assert_same_twice(lambda: results(values, impl="triton"))


def test_programs_of_the_backward_pass_share_the_rows(triton_device):
    """Several programs of several tiles, and a last tile with rows missing."""
    from model.kernels.layer_norm.triton_kernels import backward_tile, num_backward_programs

    shape = (5, 41, 24)
    assert 1 < num_backward_programs(5 * 41, backward_tile(24)["BLOCK_R"]) < 5 * 41 / backward_tile(24)["BLOCK_R"] / 2
    compare(inputs(shape, device=triton_device), dtype=FP32)


def test_nothing_but_sums_and_two_numbers_per_row_is_kept(triton_device):
    values = inputs((3, 4, 24), dtype=BF16, device=triton_device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        add_layer_norm(*(values[name].requires_grad_() for name in INPUTS), out_dtype=BF16, impl="triton")
    assert sorted(t.numel() * t.element_size() for t in kept) == sorted([3 * 4 * 24 * 4, 24 * 2, 3 * 4 * 4, 3 * 4 * 4])


def test_nothing_is_launched_where_there_is_nothing(triton_device):
    found = results(inputs((0, 3, 8), device=triton_device), impl="triton")
    assert found["normed"].shape == (0, 3, 8)
    assert not found["weight"].any()
    assert not found["bias"].any()


def test_compiled_code_has_plain_torch_in_it(triton_device):
    """Where it would not be captured otherwise."""
    values = inputs((2, 3, 24), device=triton_device)
    captured = torch.compile(lambda *leaves: add_layer_norm(*leaves, out_dtype=FP32, impl="triton"), backend="eager", fullgraph=True)
    expected = add_layer_norm(*(values[name] for name in INPUTS), out_dtype=FP32, impl="reference")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(captured(*(values[name] for name in INPUTS)), expected, strict=True))
    torch._dynamo.reset()


def test_rows_too_wide_for_the_kernel_go_to_plain_torch(triton_device):
    x, weight = torch.randn(1, 4100, device=triton_device), torch.ones(4100, device=triton_device)
    with pytest.raises(ValueError, match="4096"):
        layer_norm(x, weight, weight, out_dtype=FP32, impl="triton")
    assert torch.equal(layer_norm(x, weight, weight, out_dtype=FP32), layer_norm_reference(x, weight, weight, FP32))


def test_what_does_not_fit_is_refused():
    values = inputs((2, 3, 24))
    x, branch, weight, bias = (values[name] for name in INPUTS)
    with pytest.raises(ValueError, match="weight"):
        layer_norm(x, weight[1:], bias, out_dtype=FP32)
    with pytest.raises(ValueError, match="bias"):
        layer_norm(x, weight, bias[1:], out_dtype=FP32)
    for misfit in (x[:, :1], x[0], x[:, :, :1]):
        with pytest.raises(ValueError, match="branch"):
            add_layer_norm(misfit, branch, weight, bias, out_dtype=FP32)
    for arguments, out_dtype in ((x.double(), FP32), (x, torch.float64)):
        with pytest.raises(UserError, match="layer_norm"):
            layer_norm(arguments, weight, bias, out_dtype=out_dtype, impl="triton")
    with pytest.raises(UserError, match="layer_norm"):
        add_layer_norm(x, branch.half(), weight, bias, out_dtype=FP32, impl="triton")


def compilation(kernel, width, narrow, tile, **flags):
    """One kernel at a width, with the stream in fp32 and the rest in `narrow`."""
    from model.kernels.layer_norm import triton_kernels

    constants = dict(tile)
    warps = constants.pop("num_warps")
    constants |= flags
    names = getattr(triton_kernels, kernel).arg_names
    narrow_names = ("BRANCH", "WEIGHT", "BIAS", "NORMED", "D_NORMED", "D_BRANCH")
    types = {name: f"*{narrow if name in narrow_names else 'fp32'}" if name.isupper() else "i32" for name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = tuple(name for name in names if signature[name].startswith("*"))
    return checks.Compilation(f"{triton_kernels.__name__}:{kernel}", signature, constants, num_warps=warps, aligned=aligned)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus_without_spills(capability):
    pytest.importorskip("triton")
    from model.kernels.layer_norm.triton_kernels import backward_tile, forward_tile

    requests = []
    for width in (512, 2048, 4096):
        forward, backward = forward_tile(width), backward_tile(width)
        for narrow in ("bf16", "fp32"):
            requests.append(compilation("layer_norm_fwd_kernel", width, narrow, forward, HAS_BRANCH=True))
            flags = {"HAS_TOTAL": True, "WRITES_X": True, "WRITES_BRANCH": narrow == "bf16"}
            requests.append(compilation("layer_norm_bwd_kernel", width, narrow, backward, **flags))
    requests.append(compilation("layer_norm_fwd_kernel", 512, "bf16", forward_tile(512), HAS_BRANCH=False))
    requests.append(compilation("layer_norm_bwd_kernel", 512, "fp32", backward_tile(512), HAS_TOTAL=False, WRITES_X=True, WRITES_BRANCH=False))
    for request, compiled in zip(requests, checks.compile_for_gpu(requests, capability=capability), strict=True):
        assert compiled.fits, (request, compiled)
        assert compiled.registers <= 96, (request, compiled)
        assert compiled.shared_bytes <= 64, (request, compiled)
