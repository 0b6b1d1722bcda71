"""RMSNorm with residual and dropout: the formula, the masks of the streams, the kernels against plain torch, and the code made for the chips."""

import itertools

import pytest
import torch
from torch.nn import functional

from configs.errors import UserError
from model import streams
from model.kernels.rms_norm import interface
from model.kernels.rms_norm.interface import add_dropout, add_dropout_rms_norm, rms_norm
from model.kernels.rms_norm.reference import add_dropout_reference, rms_norm_reference
from model.kernels.splitmix import DropoutKey, keep_mask
from model.streams import Stream
from tests.model.kernels import checks

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
INPUTS = ("x", "branch", "scale")


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def dropout_key(positions, *, probability=0.3, seed=5, substream=3, device="cpu"):
    keys = streams.substream_keys(seed, Stream.DROPOUT, torch.as_tensor(positions), substream + 1)[substream]
    return DropoutKey(keys.to(device), probability)


def inputs(shape, *, dtype=torch.float32, device="cpu", seed=0, magnitude=1.0):
    generator = torch.Generator().manual_seed(seed)
    x, branch, d_total, d_normed = (torch.randn(shape, generator=generator) * magnitude for _ in range(4))
    scale = torch.randn(shape[-1], generator=generator)
    values = {"x": x, "branch": branch, "scale": scale, "d_total": d_total, "d_normed": d_normed}
    return {name: value.to(device, dtype) for name, value in values.items()}


def results(values, dropout, *, impl, dtype=None, prepare=lambda t: t):
    """Outputs and gradients of the fused operation, all with names."""
    leaves = {name: prepare(values[name].to(dtype or values[name].dtype).clone().requires_grad_()) for name in INPUTS}
    upstream = [prepare(values[name].to(dtype or values[name].dtype)) for name in ("d_total", "d_normed")]
    total, normed = add_dropout_rms_norm(leaves["x"], leaves["branch"], leaves["scale"], dropout, impl=impl)
    gradients = torch.autograd.grad([total, normed], list(leaves.values()), upstream)
    return {"total": total, "normed": normed} | dict(zip(leaves, gradients, strict=True))


def exact(values, dropout):
    return results(values, dropout, impl="reference", dtype=torch.float64)


def test_reference_is_the_norm_of_torch_with_one_added_to_the_scale():
    x, scale = torch.randn(3, 5, 24, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    assert torch.allclose(rms_norm_reference(x, scale), functional.rms_norm(x, (24,), 1 + scale, 1e-6), rtol=1e-12)


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_gradients_of_the_reference_are_right(probability):
    values = inputs((2, 3, 5), dtype=torch.float64)
    dropout = dropout_key([1, 2], probability=probability)
    arguments = [values[name].requires_grad_() for name in INPUTS]
    assert torch.autograd.gradcheck(lambda x, branch, scale: add_dropout_rms_norm(x, branch, scale, dropout, impl="reference"), arguments)


def test_mean_over_masks_is_the_sum_without_dropout():
    x, branch = torch.zeros(4000, 1, 8), torch.ones(4000, 1, 8)
    mean = add_dropout_reference(x, branch, dropout_key(torch.arange(4000), probability=0.25)).double().mean()
    assert abs(float(mean) - 1) < 5 * (0.25 / 0.75 / 32_000) ** 0.5


@pytest.mark.parametrize(("seed", "substream", "probability"), [(0, 0, 0.1), (2**63 + 11, 95, 0.5), (7, 1, 0.0), (-3, 2, 0.999)])
@pytest.mark.parametrize("shape", [(5, 8), (3, 6), (2, 3, 7), (4, 1), (1, 24)])
def test_kernel_drops_what_the_streams_drop(triton_device, seed, substream, probability, shape):
    """Rows whose elements share words with their neighbours, samples whose last word is not used up, and the plain case."""
    positions = torch.tensor([0, 3, 2**40, 2**62 + 1])
    expected = streams.keep_mask(seed, Stream.DROPOUT, positions, shape, drop_probability=probability, substream=substream)
    dropout = dropout_key(positions, probability=probability, seed=seed, substream=substream, device=triton_device)
    assert torch.equal(keep_mask(dropout, shape).cpu(), expected)
    zeros, ones = torch.zeros(4, *shape, device=triton_device), torch.ones(4, *shape, device=triton_device, requires_grad=True)
    dropped = add_dropout(zeros, ones, dropout, impl="triton")
    assert torch.equal(dropped.cpu() != 0, expected)
    fused, _ = add_dropout_rms_norm(zeros, ones, torch.zeros(shape[-1], device=triton_device), dropout, impl="triton")
    assert torch.equal(fused, dropped)
    for output in (dropped, fused):
        (gradient,) = torch.autograd.grad(output.sum(), ones, retain_graph=True)
        assert torch.equal(gradient.cpu() != 0, expected)


@DTYPES
@pytest.mark.parametrize("shape", [(3, 5, 24), (2, 4, 1000), (2, 9, 7), (2, 3, 1536), (5, 64)])
@pytest.mark.parametrize("dropped", [True, False], ids=["dropout", "plain"])
def test_kernel_is_as_exact_as_plain_torch(triton_device, dtype, shape, dropped):
    values = inputs(shape, dtype=dtype, device=triton_device)
    dropout = dropout_key(range(shape[0]), device=triton_device) if dropped else None
    found, eager = results(values, dropout, impl="triton"), results(values, dropout, impl="reference")
    checks.assert_as_exact_as_eager(found, eager, exact(values, dropout), dtype=dtype)
    assert all(found[name].dtype == dtype for name in found)
    if triton_device.type == "cpu":  # CUDA multiplies by 1 / (1 - p) where the CPU and the kernel divide by 1 - p
        assert torch.equal(found["total"], eager["total"])


@DTYPES
def test_plain_norm_is_as_exact_as_plain_torch(triton_device, dtype):
    for shape in ((7, 24), (2, 3, 1001), (4, 2, 2048), (24,), (0, 8)):
        values = inputs(shape, dtype=dtype, device=triton_device)

        def run(impl, cast, values=values):
            x, scale = values["x"].to(cast).requires_grad_(), values["scale"].to(cast).requires_grad_()
            normed = rms_norm(x, scale, impl=impl)
            return {"normed": normed} | dict(zip(("x", "scale"), torch.autograd.grad(normed, (x, scale), values["d_normed"].to(cast)), strict=True))

        checks.assert_as_exact_as_eager(run("triton", dtype), run("reference", dtype), run("reference", torch.float64), dtype=dtype)


@DTYPES
def test_addition_alone_rounds_as_plain_torch(triton_device, dtype):
    values = inputs((3, 5, 24), dtype=dtype, device=triton_device)
    dropout, found = dropout_key(range(3), device=triton_device), {}
    for impl in ("triton", "reference"):
        x, branch = (values[name].clone().requires_grad_() for name in ("x", "branch"))
        total = add_dropout(x, branch, dropout, impl=impl)
        found[impl] = [total, *torch.autograd.grad(total, (x, branch), values["d_total"])]
    for ours, theirs in zip(found["triton"], found["reference"], strict=True):
        assert torch.equal(ours, theirs) if triton_device.type == "cpu" else torch.allclose(ours, theirs, rtol=1e-2)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("width", [1536, 4096, 8192])
def test_rows_of_the_published_sizes(dtype, width):
    values = inputs((4, 321, width), dtype=dtype, device="cuda")
    dropout = dropout_key(range(4), probability=0.1, device="cuda")
    truth = exact(values, dropout)
    checks.assert_as_exact_as_eager(results(values, dropout, impl="triton"), results(values, dropout, impl="reference"), truth, dtype=dtype)


@DTYPES
@pytest.mark.parametrize("magnitude", [0.0, 1e-20, 1e15, 1e30, float("inf"), float("nan")])
def test_extremes_are_those_of_plain_torch(triton_device, dtype, magnitude):
    values = inputs((2, 3, 24), dtype=dtype, device=triton_device)
    values["x"] = values["x"] * magnitude
    dropout = dropout_key(range(2), device=triton_device)
    found, eager = results(values, dropout, impl="triton"), results(values, dropout, impl="reference")
    for name in found:
        assert torch.equal(found[name].isfinite(), eager[name].isfinite()), name
        assert torch.allclose(found[name], eager[name], rtol=2e-5 if dtype == torch.float32 else 3e-2, atol=1e-6, equal_nan=True), name


@DTYPES
def test_strides_do_not_matter(triton_device, dtype):
    values = inputs((2, 3, 24), dtype=dtype, device=triton_device)
    dropout = dropout_key(range(2), device=triton_device)
    plain, strided = results(values, dropout, impl="triton"), results(values, dropout, impl="triton", prepare=checks.strided)
    assert all(torch.equal(plain[name], strided[name]) for name in plain)


def test_same_twice(triton_device):
    values = inputs((3, 40, 24), dtype=torch.bfloat16, device=triton_device)
    dropout = dropout_key(range(3), device=triton_device)
    checks.assert_same_twice(lambda: results(values, dropout, impl="triton"))


def test_nothing_but_sums_and_one_number_per_row_is_kept(triton_device):
    values = inputs((3, 4, 24), device=triton_device)
    leaves = [values[name].requires_grad_() for name in INPUTS]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        add_dropout_rms_norm(*leaves, dropout_key(range(3), device=triton_device), impl="triton")
    assert sorted(t.numel() for t in kept) == sorted([3 * 4 * 24, 24, 3 * 4, 3])


def test_apex_gets_one_plus_scale_in_fp32(monkeypatch):
    seen = []

    class StandIn:
        @staticmethod
        def apply(x, weight, shape, eps):
            seen.append((weight, shape, eps))
            return functional.rms_norm(x.float(), shape, weight, eps)  # apex returns the dtype of its weight

    monkeypatch.setattr(interface, "choose", lambda *arguments: "apex")
    monkeypatch.setattr(interface, "find_symbol", lambda path: StandIn if path.endswith("FusedRMSNormAffineMixedDtypesFunction") else None)
    values = inputs((2, 3, 24), dtype=torch.bfloat16)
    normed = rms_norm(values["x"], values["scale"], impl="apex")
    assert torch.equal(normed, rms_norm(values["x"], values["scale"], impl="auto"))
    weight, shape, eps = seen[0]
    assert weight.dtype == torch.float32
    assert (shape, eps) == ((24,), 1e-6)
    dropout = dropout_key(range(2))
    total, normed = add_dropout_rms_norm(values["x"], values["branch"], values["scale"], dropout, impl="apex")
    assert torch.equal(total, add_dropout_reference(values["x"], values["branch"], dropout))
    assert torch.equal(normed, rms_norm_reference(total, values["scale"]))


def test_rows_too_wide_for_the_kernel_go_to_plain_torch(triton_device, monkeypatch):
    x, scale = torch.randn(1, 8200, device=triton_device), torch.zeros(8200, device=triton_device)
    with pytest.raises(ValueError, match="8192"):
        rms_norm(x, scale, impl="triton")
    assert torch.equal(rms_norm(x, scale), rms_norm_reference(x, scale))


def test_what_does_not_fit_is_refused():
    values = inputs((2, 3, 24))
    with pytest.raises(ValueError, match="scale"):
        rms_norm(values["x"], torch.zeros(23))
    with pytest.raises(ValueError, match="one shape and dtype"):
        add_dropout(values["x"], values["branch"].bfloat16(), None)
    with pytest.raises(ValueError, match="keys"):
        add_dropout(values["x"], values["branch"], dropout_key([1, 2, 3]))
    with pytest.raises(UserError, match="rms_norm"):
        rms_norm(values["x"].double(), values["scale"], impl="triton")


def compilation(kernel, dtype, width, **flags):
    """One kernel at a width; `flags` are those it has."""
    from model.kernels.rms_norm import triton_kernels

    tile = triton_kernels.tile(width, has_dropout=flags.get("HAS_DROPOUT", True))
    warps, constants = tile.pop("num_warps"), tile | flags
    pointers = {"KEYS": "*i64", "RSTD": "*fp32", "D_SCALE": "*fp32", "keep_probability": "fp32"}
    names = getattr(triton_kernels, kernel).arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, f"*{dtype}" if name.isupper() else "i32") for name in names}
    aligned = tuple(name for name in names if signature[name].startswith("*"))
    return checks.Compilation(f"{triton_kernels.__name__}:{kernel}", signature, constants, num_warps=warps, aligned=aligned)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus_without_spills(capability):
    pytest.importorskip("triton")
    kinds = [
        ("norm_fwd_kernel", {"HAS_BRANCH": True, "HAS_DROPOUT": True, "HAS_NORM": True}),
        ("norm_fwd_kernel", {"HAS_BRANCH": False, "HAS_DROPOUT": False, "HAS_NORM": True}),
        ("norm_bwd_kernel", {"HAS_BRANCH": True, "HAS_DROPOUT": True}),
        ("norm_bwd_kernel", {"HAS_BRANCH": False, "HAS_DROPOUT": False}),
        ("dropout_bwd_kernel", {}),
    ]
    requests = [
        compilation(kernel, dtype, width, **flags) for dtype, width, (kernel, flags) in itertools.product(("bf16", "fp32"), (1536, 8192), kinds)
    ]
    for request, compiled in zip(requests, checks.compile_for_gpu(requests, capability=capability), strict=True):
        assert compiled.fits, (request, compiled)
        assert compiled.registers <= 128, (request, compiled)
