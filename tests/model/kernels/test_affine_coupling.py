"""The affine coupling: reference against the formula, kernel against the reference."""

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from model.kernels.affine_coupling import interface, reference
from model.kernels.affine_coupling.interface import affine_coupling, affine_coupling_inverse
from tests.model.kernels.checks import Compilation, assert_as_exact_as_eager, assert_same_twice, compile_for_gpu, permutes_on_chip, strided

NAMES = ("first", "second", "params")
SHAPES = [(768, 1, 1), (768, 1, 5), (3072, 1, 2), (12, 3, 341), (12, 1, 1), (48, 251, 1), (192, 1, 17), (6, 1, 251), (2, 1, 9)]
"""(C, images, tokens). Rows: 1, 1023, 251 and others that fill no tile; halves of odd size."""
GPU_SHAPES = [(768, 64, 256), (3072, 8, 64), (12, 3, 341), (6, 1, 251), (8192, 1, 33)]
EXTREMES = (-1e4, -80.0, -1e-4, 0.0, 1e-4, 80.0, 1e4)


@pytest.fixture
def triton_device(triton_device: torch.device) -> torch.device:
    """As everywhere, but for a Triton that this kernel is not for."""
    obstacle = permutes_on_chip()
    if obstacle:
        pytest.skip(obstacle)
    return triton_device


def permutation(channels: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(channels))
    return order.int().to(device), torch.argsort(order).int().to(device)


def make_inputs(channels: int, images: int, tokens: int, device: torch.device | str = "cpu", *, extreme: bool = False) -> dict[str, Tensor]:
    """fp32 first and second [images, tokens, C / 2], params [images, tokens, C]."""
    generator = torch.Generator().manual_seed(channels + images + tokens)
    x = torch.randn(images, tokens, 2 * channels, generator=generator) * 2
    if extreme:
        picks = torch.randint(len(EXTREMES), (images, tokens, channels // 2), generator=generator)
        x[..., -(channels // 2) :] = torch.tensor(EXTREMES)[picks]
    x = x.to(device)
    first, second = x[..., :channels].clone().chunk(2, dim=-1)
    return {"first": first.contiguous(), "second": second, "params": x[..., channels:].clone()}


def evaluate(inputs: dict[str, Tensor], *, joined: bool, impl: str, dtype: torch.dtype = torch.float32, pick: str = "all") -> dict[str, Tensor]:
    """Outputs and every gradient; `pick`: which outputs the gradient comes from."""
    leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in inputs.items()}
    order, inverse = permutation(2 * inputs["first"].shape[-1], inputs["first"].device)
    out, logdet = affine_coupling(*leaves.values(), order, inverse, joined=joined, impl=impl)
    assert len(out) == (1 if joined else 2)
    outputs = {f"out{k}": part for k, part in enumerate(out)} | {"logdet": logdet}
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(value.shape, generator=generator).to(value) for name, value in outputs.items()}
    total = sum((outputs[name] * weights[name]).sum() for name in outputs if pick in ("all", name))
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = {f"d_{name}": torch.zeros_like(leaves[name]) if gradient is None else gradient for name, gradient in zip(NAMES, gradients, strict=True)}
    return {name: value.detach() for name, value in outputs.items()} | found


def compare(inputs: dict[str, Tensor], *, joined: bool, pick: str = "all") -> None:
    found = evaluate(inputs, joined=joined, impl="triton", pick=pick)
    eager = evaluate(inputs, joined=joined, impl="reference", pick=pick)
    truth = evaluate(inputs, joined=joined, impl="reference", dtype=torch.float64, pick=pick)
    assert_as_exact_as_eager(found, eager, truth, dtype=torch.float32)


def test_reference_is_the_formula() -> None:
    inputs = {name: value.double() for name, value in make_inputs(12, 2, 5).items()}
    first, second, params = inputs.values()
    shift, raw_scale = params.chunk(2, dim=-1)
    order, inverse = permutation(12)
    moved = (second + shift) * 2 * torch.sigmoid(raw_scale)
    expected = torch.cat([first, moved], -1)[..., order.long()]
    (y,), logdet = reference.affine_coupling(*inputs.values(), order, joined=True)
    torch.testing.assert_close(y, expected)
    halves, _ = reference.affine_coupling(*inputs.values(), order, joined=False)
    assert torch.equal(torch.cat(halves, -1), y)

    def coupling(x: Tensor) -> Tensor:
        parts = x.view(1, 1, 12).chunk(2, dim=-1)
        return reference.affine_coupling(*parts, params[:1, :1], order, joined=True)[0][0].flatten()

    jacobian = torch.autograd.functional.jacobian(coupling, torch.cat([first, second], -1)[0, 0])
    one = reference.affine_coupling(*(value[:1, :1] for value in inputs.values()), order, joined=True)[1]
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, one[0])
    torch.testing.assert_close(logdet, torch.log(2 * torch.sigmoid(raw_scale)).sum((1, 2)))
    (x,) = reference.affine_coupling_inverse(*y[..., inverse.long()].chunk(2, dim=-1), params, inverse.flip(0), joined=True)
    torch.testing.assert_close(x, torch.cat([first, second], -1)[..., inverse.flip(0).long()])


@pytest.mark.parametrize("joined", [False, True])
def test_gradients_of_the_reference(joined: bool) -> None:
    leaves = [value.double().requires_grad_() for value in make_inputs(6, 2, 3).values()]
    order, _ = permutation(6)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        out, logdet = reference.affine_coupling(*inputs, order, joined=joined)
        return *out, logdet

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradcheck(lambda *inputs: reference.affine_coupling_inverse(*inputs, order, joined=joined), leaves)


def test_what_does_not_fit_is_refused() -> None:
    inputs = make_inputs(12, 2, 5)
    order, inverse = permutation(12)
    with pytest.raises(ValueError, match="takes two halves"):
        affine_coupling(*inputs.values(), order[:6], inverse[:6], joined=True)
    with pytest.raises(ValueError, match=r"inverse_order must be \[12\]"):
        affine_coupling(*inputs.values(), order, inverse[:6], joined=True)
    with pytest.raises(ValueError, match="takes two halves"):
        affine_coupling_inverse(inputs["first"][:1], *list(inputs.values())[1:], order, joined=True)


def test_long_rows_and_double_precision_go_to_the_reference(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(12, 1, 2, triton_device)
    order, inverse = permutation(12, triton_device)
    with pytest.raises(UserError, match="fp32, not float64"):
        affine_coupling(*(value.double() for value in inputs.values()), order, inverse, joined=True, impl="triton")
    monkeypatch.setattr(interface, "MAX_CHANNELS", 10)
    affine_coupling(*inputs.values(), order, inverse, joined=True)
    with pytest.raises(UserError, match="12 channels per token"):
        affine_coupling(*inputs.values(), order, inverse, joined=True, impl="triton")


@pytest.mark.parametrize("half", range(3))
def test_one_tensor_of_another_dtype_goes_to_the_reference(triton_device: torch.device, half: int) -> None:
    """The kernel computes in what it reads, and there is no exponential of bf16 on a GPU."""
    inputs = list(make_inputs(12, 1, 2, triton_device).values())
    inputs[half] = inputs[half].bfloat16()
    order, inverse = permutation(12, triton_device)
    affine_coupling(*inputs, order, inverse, joined=True)
    with pytest.raises(UserError, match="fp32, not bfloat16"):
        affine_coupling(*inputs, order, inverse, joined=True, impl="triton")


def shapes_on(device: torch.device) -> list[tuple[int, int, int]]:
    return GPU_SHAPES if device.type == "cuda" else SHAPES


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_kernel_is_as_exact_as_eager(triton_device: torch.device, poisoned_memory: None, index: int, joined: bool) -> None:
    shapes = shapes_on(triton_device)
    if index < len(shapes):
        compare(make_inputs(*shapes[index], triton_device), joined=joined)


@pytest.mark.parametrize("joined", [False, True])
def test_extreme_scales(triton_device: torch.device, poisoned_memory: None, joined: bool) -> None:
    inputs = make_inputs(48, 3, 7, triton_device, extreme=True)
    compare(inputs, joined=joined)
    for value in EXTREMES:
        inputs["params"][..., 24:] = value
        compare(inputs, joined=joined)


def test_the_start_is_exactly_the_identity(triton_device: torch.device) -> None:
    inputs = make_inputs(768, 1, 3, triton_device)
    inputs["params"].zero_()
    order, inverse = permutation(768, triton_device)
    (y,), logdet = affine_coupling(*inputs.values(), order, inverse, joined=True, impl="triton")
    assert torch.equal(y, torch.cat([inputs["first"], inputs["second"]], -1)[..., order.long()])
    assert torch.equal(logdet, torch.zeros_like(logdet))


def test_log_determinant_of_small_scales_keeps_its_digits(triton_device: torch.device) -> None:
    """Where the reference, logsigmoid(a) + ln 2, cancels."""
    raw_scale = torch.linspace(-0.3, 0.3, 4001, device=triton_device).view(-1, 1)
    raw_scale = torch.cat([raw_scale, torch.logspace(-30, 0, 999, device=triton_device).view(-1, 1)])
    order = torch.arange(2, device=triton_device)
    zero = torch.zeros_like(raw_scale)
    logdet = affine_coupling(zero, zero, torch.cat([zero, raw_scale], -1), order, order, joined=True, impl="triton")[1]
    half = raw_scale[:, 0].double() / 2
    truth = half - torch.special.log1p(2 * torch.sinh(half / 2) ** 2)  # ln cosh t = log1p(2 sinh^2(t/2))
    torch.testing.assert_close(logdet.double(), truth, rtol=2e-6, atol=0)


@pytest.mark.parametrize("layout", ["elements", "rows", "images", "broadcast"])
def test_strided_inputs(triton_device: torch.device, poisoned_memory: None, layout: str) -> None:
    inputs = make_inputs(12, 3, 5, triton_device)
    change = {
        "elements": strided,
        "rows": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        "images": lambda x: torch.stack([x, x], 1)[:, 0],
        "broadcast": lambda x: x[:, :1].expand(x.shape),
    }[layout]
    for joined in (False, True):
        compare({name: change(value) for name, value in inputs.items()}, joined=joined)


@pytest.mark.parametrize("pick", ["out0", "out1", "logdet"])
def test_gradients_from_one_output_alone(triton_device: torch.device, poisoned_memory: None, pick: str) -> None:
    compare(make_inputs(12, 2, 9, triton_device), joined=False, pick=pick)


def test_gradients_of_outputs_in_other_layouts(triton_device: torch.device) -> None:
    """What autograd hands back may be expanded or strided."""
    inputs, (order, inverse) = make_inputs(12, 2, 5, triton_device), permutation(12, triton_device)
    found = []
    for impl in ("triton", "reference"):
        leaves = [value.detach().requires_grad_() for value in inputs.values()]
        (first, second), logdet = affine_coupling(*leaves, order, inverse, joined=False, impl=impl)
        total = first.sum() + (second * strided(torch.ones_like(second) * 3)).sum() + logdet.sum() * 0.5
        found.append(torch.autograd.grad(total, leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_same_twice(triton_device: torch.device) -> None:
    inputs = make_inputs(768, *((64, 256) if triton_device.type == "cuda" else (2, 3)), triton_device)
    assert_same_twice(lambda: evaluate(inputs, joined=False, impl="triton"))


@pytest.mark.parametrize("channels", [6, 768])
@pytest.mark.parametrize("joined", [False, True])
def test_inverse_recovers_input(triton_device: torch.device, poisoned_memory: None, channels: int, joined: bool) -> None:
    inputs = make_inputs(channels, 2, 3, triton_device)
    order, inverse = permutation(channels, triton_device)
    first, second, params = inputs.values()
    (y,), _ = affine_coupling(first, second, params, order, inverse, joined=True, impl="triton")
    halves = y[..., inverse.long()].chunk(2, dim=-1)
    back = affine_coupling_inverse(*halves, params, order, joined=joined, impl="triton")
    expected = torch.cat([first, second], -1)[..., order.long()]
    torch.testing.assert_close(torch.cat(back, -1), expected, rtol=1e-4, atol=1e-4)
    eager = affine_coupling_inverse(*halves, params, order, joined=joined, impl="reference")
    truth = affine_coupling_inverse(*(x.double() for x in (*halves, params)), order, joined=joined, impl="reference")
    names = [f"x{k}" for k in range(len(back))]
    assert_as_exact_as_eager(*(dict(zip(names, values, strict=True)) for values in (back, eager, truth)), dtype=torch.float32)


def test_inverse_at_extreme_scales(triton_device: torch.device) -> None:
    inputs = make_inputs(48, 2, 3, triton_device, extreme=True)
    order, _ = permutation(48, triton_device)
    (found,), (eager,) = (affine_coupling_inverse(*inputs.values(), order, joined=True, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert found.isinf().any()


def test_inverse_with_gradients_wanted_is_the_reference(triton_device: torch.device) -> None:
    leaves = [value.detach().requires_grad_() for value in make_inputs(12, 1, 3, triton_device).values()]
    (x,) = affine_coupling_inverse(*leaves, permutation(12, triton_device)[0], joined=True, impl="triton")
    assert x.requires_grad


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_composed_chain_equals_uncomposed_chain(triton_device: torch.device, impl: str) -> None:
    """Four couplings in turn: each restores the order, or each hands over in the order of the next one. Equal to the bit."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(12, generator=generator).to(triton_device) for _ in range(4)]
    inverses = [torch.argsort(order) for order in orders]
    params = [make_inputs(12, 2, k + 1, triton_device)["params"][:, :1] for k in range(4)]
    start = torch.randn(2, 1, 12, generator=generator).to(triton_device)
    x, total = start, torch.zeros(2, device=triton_device)
    for k, (order, inverse) in enumerate(zip(orders, inverses, strict=True)):
        (x,), logdet = affine_coupling(*x[..., order].chunk(2, dim=-1), params[k], inverse, order, joined=True, impl=impl)
        total = total + logdet
    halves, composed_total = start[..., orders[0]].chunk(2, dim=-1), torch.zeros(2, device=triton_device)
    for k in range(4):
        last = k == 3
        order = inverses[k] if last else inverses[k][orders[k + 1]]
        halves, logdet = affine_coupling(*halves, params[k], order, torch.argsort(order), joined=last, impl=impl)
        composed_total = composed_total + logdet
    assert torch.equal(halves[0], x)
    assert torch.equal(composed_total, total)
    halves = x[..., orders[3]].chunk(2, dim=-1)
    for k in reversed(range(4)):
        order = inverses[k] if k == 0 else inverses[k][orders[k - 1]]
        halves = affine_coupling_inverse(*halves, params[k], order, joined=k == 0, impl=impl)
    torch.testing.assert_close(halves[0], start, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus_without_spills(capability: int) -> None:
    triton_kernels = pytest.importorskip("model.kernels.affine_coupling.triton_kernels")
    if permutes_on_chip():
        pytest.skip(permutes_on_chip())
    compilations = []
    for channels in (768, 3072, interface.MAX_CHANNELS):
        block_r, block_c, num_warps = triton_kernels.block_sizes(channels)
        for name, constants in (
            ("affine_coupling_fwd_kernel", {"INVERSE": False}),
            ("affine_coupling_fwd_kernel", {"INVERSE": True}),
            ("affine_coupling_bwd_kernel", {}),
        ):
            values: dict[str, object] = constants | {"BLOCK_R": block_r, "BLOCK_C": block_c}
            kinds = {}
            for argument in getattr(triton_kernels, name).arg_names:
                pointer = "*i32" if argument.endswith("ORDER") else "*fp32"
                kinds[argument] = "constexpr" if argument in values else pointer if argument.isupper() else "i32"
            aligned = tuple(argument for argument in kinds if argument not in values and argument not in ("num_rows", "rows_per_image"))
            compilations.append(Compilation(f"{triton_kernels.__name__}:{name}", kinds, values, num_warps=num_warps, aligned=aligned))
    for one, compiled in zip(compilations, compile_for_gpu(compilations, capability=capability), strict=True):
        assert compiled.fits, (one, compiled)
        assert compiled.registers <= 96, (one, compiled)
        assert compiled.shared_bytes <= 48 * 1024, (one, compiled)
        print(capability, one.kernel.rpartition(":")[2], one.constants, compiled)
