"""The mixture head's likelihood: its reference against torch.distributions, its implementations against the reference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, distributions

from model.kernels.dispatch import has_triton, is_interpreting
from model.kernels.gmm_nll.interface import HeadWeights, linear_gmm_nll, linear_gmm_nll_loss
from model.kernels.gmm_nll.reference import MIN_SCALE, positive_scale
from tests.model.kernels.checks import Compilation, assert_as_exact_as_eager, assert_same_twice, compile_for_gpu, strided

NAMES = ("hidden", "soft", "logit_weight", "logit_bias", "component_weight", "component_bias")
MODULE = "model.kernels.gmm_nll.triton_kernels"

SMALL_SHAPES = [(1, 3, 1, 3), (5, 20, 24, 16), (11, 7, 3, 3), (5, 65, 5, 128), (3, 8, 1024, 2)]
"""(N, D, K, d) for the interpreter, which takes a millisecond per token."""
LARGE_SHAPES = [(251, 100, 24, 16), (1023, 200, 1024, 16), (1023, 1537, 24, 128), (300, 192, 1024, 128), (1, 64, 1, 3), (251, 7, 3, 3)]


def make_inputs(shape: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Leaves in `dtype` (soft in fp32 at least), made on the CPU so that every device sees the same."""
    num_tokens, width, mixtures, soft_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator) * scale

    values = {
        "hidden": normal(num_tokens, width),
        "soft": normal(num_tokens, soft_dim),
        "logit_weight": normal(mixtures, width, scale=width**-0.5),
        "logit_bias": normal(mixtures),
        "component_weight": normal(mixtures, 2, soft_dim, width, scale=0.5 * width**-0.5),
        "component_bias": normal(mixtures, 2, soft_dim),
    }
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {name: value.to(device, wide if name == "soft" else dtype).requires_grad_() for name, value in values.items()}


def weights_of(inputs: dict[str, Tensor]) -> HeadWeights:
    return inputs["logit_weight"], inputs["logit_bias"], inputs["component_weight"], inputs["component_bias"]


def token_weights(num_tokens: int, device: torch.device) -> Tensor:
    """Different for every token, one of them 0."""
    weight = torch.linspace(0.2, 1.7, num_tokens)
    weight[num_tokens // 2] = 0.0
    return weight.to(device)


def per_token(inputs: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Likelihood and every gradient of a weighted sum, by the function whose gradient may differ per token."""
    nll = linear_gmm_nll(inputs["hidden"], inputs["soft"], weights_of(inputs), **options)  # type: ignore[arg-type]
    weight = token_weights(len(nll), nll.device)
    return {"nll": nll, **gradients(torch.where(weight == 0, 0, nll * weight).sum(), inputs)}


def one_pass(inputs: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """The same by the function of the training loss."""
    weight = token_weights(len(inputs["hidden"]), inputs["hidden"].device)
    loss, nll = linear_gmm_nll_loss(inputs["hidden"], inputs["soft"], weights_of(inputs), weight, **options)  # type: ignore[arg-type]
    return {"nll": nll, **gradients(loss, inputs)}


def gradients(loss: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))


def truth_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference in fp64 on the same numbers."""
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    return per_token(exact, impl="reference")


# The reference


def test_reference_equals_torch_distributions() -> None:
    inputs = make_inputs((9, 6, 5, 4), dtype=torch.float64, device=torch.device("cpu"))
    raw = torch.einsum("krjd,nd->nkrj", inputs["component_weight"], inputs["hidden"]) + inputs["component_bias"]
    logits = inputs["hidden"] @ inputs["logit_weight"].T + inputs["logit_bias"]
    components = distributions.Independent(distributions.Normal(raw[:, :, 0], positive_scale(raw[:, :, 1])), 1)
    expected = -distributions.MixtureSameFamily(distributions.Categorical(logits=logits), components).log_prob(inputs["soft"])
    torch.testing.assert_close(linear_gmm_nll(inputs["hidden"], inputs["soft"], weights_of(inputs), impl="reference"), expected)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradients_pass_gradcheck(impl: str) -> None:
    inputs = make_inputs((4, 3, 3, 2), dtype=torch.float64, device=torch.device("cpu"))

    def nll(hidden: Tensor, soft: Tensor, *weights: Tensor) -> Tensor:
        return linear_gmm_nll(hidden, soft, weights, impl=impl, workspace_bytes=1)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(nll, tuple(inputs.values()))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_loss_has_the_gradients_of_the_weighted_sum(impl: str) -> None:
    """gradcheck itself runs backward several times through one forward pass, which the loss does not allow."""
    inputs = make_inputs((7, 3, 3, 2), dtype=torch.float64, device=torch.device("cpu"))
    expected, found = per_token(inputs, impl="reference"), one_pass(inputs, impl=impl, workspace_bytes=7 * 8 * 3 * 2 * 3)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_scale_is_square_plus_with_a_floor() -> None:
    raw = torch.tensor([-2e6, -1e3, -1.0, 0.0, 1.0, 1e4], dtype=torch.float64)
    expected = ((raw + torch.sqrt(raw * raw + 4)) / 2).clamp(min=MIN_SCALE)
    # The plain form cancels where r is large and negative, hence the tolerance there.
    torch.testing.assert_close(positive_scale(raw), expected, rtol=1e-6, atol=1e-9)


# Implementations against it


def check_both(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, **options: object) -> None:
    """The three-way rule over several draws at once: the gradient of five logit biases alone is five roundings, which is luck."""
    draws = [make_inputs(shape, dtype=dtype, device=device, seed=seed) for seed in range(3)]
    truth, eager = together(truth_of, draws), together(per_token, draws, impl="reference")
    assert_as_exact_as_eager(together(per_token, draws, **options), eager, truth, dtype=dtype)
    assert_as_exact_as_eager(together(one_pass, draws, **options), eager, truth, dtype=dtype)


def together(run: Callable[..., dict[str, Tensor]], draws: list[dict[str, Tensor]], **options: object) -> dict[str, Tensor]:
    results = [run(inputs, **options) for inputs in draws]
    return {name: torch.stack([result[name].detach().double().cpu() for result in results]) for name in results[0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
def test_torch_is_as_exact_as_eager(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_both(shape, dtype, torch.device("cpu"), impl="torch", workspace_bytes=7 * 4 * shape[2] * shape[3] * 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
def test_triton_is_as_exact_as_eager(shape: tuple[int, int, int, int], dtype: torch.dtype, triton_device: torch.device) -> None:
    check_both(shape, dtype, triton_device, impl="triton", workspace_bytes=2 * 2 * shape[2] * shape[3] * 40)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_triton_is_as_exact_as_eager_at_size(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_both(shape, dtype, torch.device("cuda"), impl="triton", workspace_bytes=2 * 2 * shape[2] * shape[3] * 256)


@pytest.mark.skipif(not is_interpreting(), reason="Triton is not interpreting")
def test_more_tokens_than_one_program_takes() -> None:
    inputs = make_inputs((131, 7, 1, 3), dtype=torch.float32, device=torch.device("cpu"))
    found = one_pass(inputs, impl="triton", workspace_bytes=2 * 4 * 3 * 100)
    assert_as_exact_as_eager(found, one_pass(inputs, impl="reference"), truth_of(inputs), dtype=torch.float32)


@pytest.fixture(params=["torch", "triton"])
def any_impl(request: pytest.FixtureRequest) -> str:
    if request.param == "triton" and not is_interpreting():
        pytest.skip("Triton is not interpreting")
    return str(request.param)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_change_nothing_and_leave_no_memory_unwritten(chunk: int, any_impl: str) -> None:
    shape = (7, 12, 5, 3)
    inputs = make_inputs(shape, dtype=torch.float32, device=torch.device("cpu"))
    per_token_bytes = (7 if any_impl == "torch" else 2) * 4 * shape[2] * shape[3]
    expected = per_token(inputs, impl="reference")
    for run in (per_token, one_pass):
        found = run(inputs, impl=any_impl, workspace_bytes=chunk * per_token_bytes)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=2e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("extreme", ["floor", "wide", "mixed"])
def test_extremes_are_finite_and_as_exact_as_eager(extreme: str, any_impl: str) -> None:
    """Scales at the 1e-6 floor and at 1e4, mixture logits of +-80."""
    inputs = make_inputs((6, 8, 6, 4), dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        raw = inputs["component_bias"][:, 1]
        raw.copy_(
            {"floor": torch.full_like(raw, -2e6), "wide": torch.full_like(raw, 1e4), "mixed": torch.linspace(-2e6, 1e4, 24).view(6, 4)}[extreme]
        )
        inputs["logit_bias"][::2], inputs["logit_bias"][1::2] = 80.0, -80.0
    truth, eager = truth_of(inputs), per_token(inputs, impl="reference")
    for run in (per_token, one_pass):
        found = run(inputs, impl=any_impl)
        assert all(value.isfinite().all() for value in found.values())
        assert_as_exact_as_eager(found, eager, truth, dtype=torch.float32)


def test_enormous_raw_scales_stay_finite(any_impl: str) -> None:
    inputs = make_inputs((2, 3, 4, 3), dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        inputs["component_bias"][:, 1] = torch.tensor([1e30, -1e30, 1e12, 0.0])[:, None]
    assert all(value.isfinite().all() for value in one_pass(inputs, impl=any_impl).values())


def test_strided_inputs(any_impl: str) -> None:
    inputs = make_inputs((5, 12, 6, 4), dtype=torch.float32, device=torch.device("cpu"))
    wide = {name: strided(value) for name, value in inputs.items()}
    expected = one_pass(inputs, impl=any_impl)
    found = one_pass(wide, impl=any_impl)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_same_twice(any_impl: str) -> None:
    inputs = make_inputs((20, 12, 20, 5), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert_same_twice(lambda: one_pass(inputs, impl=any_impl, workspace_bytes=2 * 2 * 20 * 5 * 8))


@pytest.mark.gpu
def test_same_twice_on_a_gpu() -> None:
    inputs = make_inputs((700, 192, 200, 64), dtype=torch.bfloat16, device=torch.device("cuda"))
    assert_same_twice(lambda: one_pass(inputs, impl="triton", workspace_bytes=2 * 2 * 200 * 64 * 256))


# What the loss promises


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_token_of_weight_zero_counts_nothing_whatever_its_likelihood(impl: str) -> None:
    inputs = make_inputs((4, 3, 2, 2), dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        inputs["soft"][1] = 1e30
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0])
    loss, nll = linear_gmm_nll_loss(inputs["hidden"], inputs["soft"], weights_of(inputs), weight, impl=impl)
    assert not nll[1].isfinite()
    assert loss.isfinite()


def test_loss_hands_out_its_gradients_once() -> None:
    inputs = make_inputs((4, 3, 2, 2), dtype=torch.float32, device=torch.device("cpu"))
    loss, nll = linear_gmm_nll_loss(inputs["hidden"], inputs["soft"], weights_of(inputs), torch.ones(4))
    assert not nll.requires_grad
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out once"):
        loss.backward()


def test_without_gradients_none_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from model.kernels.gmm_nll.torch_passes import TorchPasses

    def refuse(*arguments: object) -> None:
        raise AssertionError("gradients were computed")

    monkeypatch.setattr(TorchPasses, "gradients", refuse)
    inputs = make_inputs((4, 3, 2, 2), dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        linear_gmm_nll_loss(inputs["hidden"], inputs["soft"], weights_of(inputs), torch.ones(4))
    frozen = {name: value.detach() for name, value in inputs.items()}
    linear_gmm_nll_loss(frozen["hidden"], frozen["soft"], weights_of(frozen), torch.ones(4))


@pytest.mark.parametrize("wanted", [("hidden",), ("soft",), ("component_weight",), ("logit_bias", "soft")], ids=str)
@pytest.mark.parametrize("run", [per_token, one_pass])
def test_only_some_gradients(run: Callable[..., dict[str, Tensor]], wanted: tuple[str, ...]) -> None:
    inputs = make_inputs((5, 6, 4, 3), dtype=torch.float32, device=torch.device("cpu"))
    expected = one_pass(inputs, impl="torch")
    some = {name: value.detach().requires_grad_(name in wanted) for name, value in inputs.items()}
    weight = token_weights(5, torch.device("cpu"))
    if run is one_pass:
        loss = linear_gmm_nll_loss(some["hidden"], some["soft"], weights_of(some), weight, impl="torch")[0]
    else:
        nll = linear_gmm_nll(some["hidden"], some["soft"], weights_of(some), impl="torch")
        loss = (nll * weight).sum()
    for name, found in zip(wanted, torch.autograd.grad(loss, [some[name] for name in wanted]), strict=True):
        torch.testing.assert_close(found, expected[name], msg=name)


def test_no_tokens(any_impl: str) -> None:
    inputs = make_inputs((1, 6, 4, 3), dtype=torch.float32, device=torch.device("cpu"))
    hidden, soft = inputs["hidden"][:0], inputs["soft"][:0]
    loss, nll = linear_gmm_nll_loss(hidden, soft, weights_of(inputs), torch.ones(0), impl=any_impl)
    loss.backward()
    assert nll.shape == (0,)
    assert all(float(weight.grad.abs().sum()) == 0 for weight in weights_of(inputs) if weight.grad is not None)


@pytest.mark.parametrize("function", [linear_gmm_nll, linear_gmm_nll_loss])
def test_gradients_of_gradients_are_refused(function: Callable[..., Tensor]) -> None:
    """In the loss they would come out wrong without a word: its gradients are finished numbers. Also where a constant 1 arrives."""
    inputs = make_inputs((3, 6, 4, 3), dtype=torch.float64, device=torch.device("cpu"))
    extra = () if function is linear_gmm_nll else (torch.ones(3),)
    for last in (Tensor.sum, lambda nll: nll.square().sum()):
        found = function(inputs["hidden"], inputs["soft"], weights_of(inputs), *extra, impl="torch")
        with pytest.raises(RuntimeError, match="create_graph=True asks for gradients"):
            torch.autograd.grad(last(found if isinstance(found, Tensor) else found[0]), inputs["hidden"], create_graph=True)


@pytest.mark.parametrize("run", [per_token, one_pass])
def test_autocast_changes_nothing(run: Callable[..., dict[str, Tensor]]) -> None:
    """It would round fp32 products to bf16, and add bf16 to fp32 sums."""
    inputs = make_inputs((5, 6, 4, 3), dtype=torch.float32, device=torch.device("cpu"))
    expected = run(inputs, impl="torch")
    with torch.autocast("cpu", torch.bfloat16):
        found = run(inputs, impl="torch")
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_what_does_not_fit_is_named() -> None:
    inputs = make_inputs((4, 3, 2, 2), dtype=torch.float32, device=torch.device("cpu"))
    weights = weights_of(inputs)
    with pytest.raises(ValueError, match=r"hidden must be \[N, 3\] and soft \[N, 2\], got \[4, 3\] and \[4, 3\]"):
        linear_gmm_nll(inputs["hidden"], inputs["hidden"], weights)
    swapped, half = (weights[2], weights[1], weights[0], weights[3]), (weights[0], weights[1].bfloat16(), weights[2], weights[3])
    for wrong in ((weights[0], weights[0], weights[2], weights[3]), swapped, weights[:3], tuple(weight[:0] for weight in weights)):
        with pytest.raises(ValueError, match="head weights must be"):
            linear_gmm_nll(inputs["hidden"], inputs["soft"], wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"head weights must have one dtype, got torch\.bfloat16, torch\.float32"):
        linear_gmm_nll(inputs["hidden"], inputs["soft"], half)
    with pytest.raises(ValueError, match=r"token_weight must be \[4\] constants"):
        linear_gmm_nll_loss(inputs["hidden"], inputs["soft"], weights, torch.ones(3))


def test_memory_held_between_the_passes_is_small() -> None:
    """With three chunks, what autograd keeps is the gradients: D and d numbers per token, and one set of weights."""
    shape = (48, 4, 32, 16)
    inputs = make_inputs(shape, dtype=torch.float32, device=torch.device("cpu"))
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        linear_gmm_nll_loss(inputs["hidden"], inputs["soft"], weights_of(inputs), torch.ones(48), impl="torch", workspace_bytes=7 * 4 * 32 * 16 * 16)
    outputs_of_the_head = shape[0] * shape[2] * (1 + 2 * shape[3])
    assert sum(kept) < outputs_of_the_head / 10


def compilations(dtype: str, *, soft_dim: int) -> list[Compilation]:
    from model.kernels.gmm_nll.triton_kernels import block_sizes

    common = {"num_tokens": "i32", "num_mixtures": "i32", "soft_dim": "i32"}
    constants: dict[str, object] = dict(zip(("BLOCK_K", "BLOCK_D"), block_sizes(1024, soft_dim), strict=True))
    constexpr = {"TOKENS": "constexpr", "BLOCK_K": "constexpr", "BLOCK_D": "constexpr"}
    forward = {"RAW": f"*{dtype}", "LOGITS": "*fp32", "SOFT": "*fp32", "LOG_JOINT": "*fp32"}
    backward = {"RAW": f"*{dtype}", **dict.fromkeys(("LOG_JOINT", "JOINT", "WEIGHT", "SOFT", "D_SOFT", "D_BIAS"), "*fp32")}
    counts = ("num_mixtures", "soft_dim") if soft_dim % 16 == 0 else ()
    return [
        Compilation(
            f"{MODULE}:gmm_log_joint_kernel",
            {**forward, **common, "constant": "fp32", **constexpr, "FAST": "constexpr"},
            {**constants, "TOKENS": 8, "FAST": True},
            aligned=(*forward, *counts),
        ),
        Compilation(f"{MODULE}:gmm_gradient_kernel", {**backward, **common, **constexpr}, {**constants, "TOKENS": 64}, aligned=(*backward, *counts)),
    ]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_kernels_compile_without_spilling(capability: int) -> None:
    wanted = [*compilations("bf16", soft_dim=128), *(one for soft_dim in (128, 16, 3) for one in compilations("fp32", soft_dim=soft_dim))]
    for one, compiled in zip(wanted, compile_for_gpu(wanted, capability=capability), strict=True):
        assert compiled.fits, (one.kernel, compiled)
        assert compiled.registers <= 255, (one.kernel, compiled)
