"""One draw of the image head: the law it follows, the kernel against plain torch, and the code made for the chips."""

import itertools

import pytest
import torch
from torch import distributions

from model.kernels.mixture_sample.interface import Gaussian, component_gaussian, mixture_sample
from model.kernels.mixture_sample.reference import MIN_TEMPERATURE, analytic, clipped
from tests.model.kernels import checks

RULES = ["none", "analytic", "clipped"]


def inputs(
    *, size=3, mixtures=24, soft_dim=16, width=40, copies=2, dtype=torch.float32, device="cpu", seed=0, raw_scale=0.0, spread=1.0
) -> dict[str, torch.Tensor]:
    """Random arguments; `raw_scale` shifts the raw scales, `spread` multiplies the weights."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(mixtures, 2, soft_dim, width, generator=generator) * spread / width**0.5
    bias = torch.randn(mixtures, 2, soft_dim, generator=generator) * 0.1
    bias[:, 1] += raw_scale
    return {
        "hidden": torch.randn(copies * size, width, generator=generator).to(device, dtype),
        "weight": weight.to(device, dtype),
        "bias": bias.to(device, dtype),
        "component": torch.randint(0, mixtures, (size,), generator=generator).to(device),
        "noise": torch.randn(size, soft_dim, generator=generator).to(device),
    }


def wide(arguments):
    return {name: x.double() if x.is_floating_point() else x for name, x in arguments.items()}


def options(rule, *, cfg_scale=3.0, temperature=0.9):
    return {"temperature": temperature} if rule == "none" else {"cfg_scale": cfg_scale, "cfg_rule": rule, "temperature": temperature}


def chosen(arguments, temperature=0.9):
    """The pair of Gaussians from every output of the head at once, in fp64, by torch's own linear layer."""
    x = wide(arguments)
    mixtures, _, soft_dim, width = x["weight"].shape
    raw = torch.nn.functional.linear(x["hidden"], x["weight"].reshape(-1, width), x["bias"].flatten()).view(-1, mixtures, 2, soft_dim)
    copies = len(raw) // len(x["component"])
    rows = raw[torch.arange(len(raw), device=raw.device), x["component"].repeat_interleave(copies)]
    scale = torch.exp(torch.asinh(rows[:, 1] / 2)).clamp(min=1e-6) * temperature
    return [Gaussian(rows[copy::copies, 0], scale[copy::copies]) for copy in range(copies)]


@pytest.mark.parametrize("mixtures", [1, 24])
def test_a_plain_draw_is_the_quantile_of_the_chosen_component(mixtures):
    """Noise = the standard normal quantile of u gives the component's quantile of u."""
    arguments = wide(inputs(mixtures=mixtures, copies=1))
    (gaussian,) = chosen(arguments)
    quantile = distributions.Normal(0.0, 1.0).cdf(arguments["noise"])
    expected = distributions.Normal(gaussian.loc, gaussian.scale).icdf(quantile)
    torch.testing.assert_close(mixture_sample(**arguments, **options("none")), expected)


@pytest.mark.parametrize("weight", [0.3, 3.0, 9.0])
def test_a_guided_draw_follows_the_product_of_densities(weight):
    """log N_guided - (1 + w) log N_c + w log N_u is the same everywhere, where the target is a Gaussian at all."""
    arguments = wide(inputs(size=8))
    conditional, unconditional = chosen(arguments)
    guided = analytic(conditional, unconditional, weight)
    normalisable = (1 + weight) / conditional.scale**2 > weight / unconditional.scale**2
    assert normalisable.any()
    assert not normalisable.all()

    def log_prob(gaussian, x):
        return distributions.Normal(gaussian.loc, gaussian.scale).log_prob(x)

    differences = []
    for offset in (-1.0, 0.0, 0.7):
        x = guided.loc + offset * guided.scale
        differences.append(log_prob(guided, x) - (1 + weight) * log_prob(conditional, x) + weight * log_prob(unconditional, x))
    for difference in differences[1:]:
        torch.testing.assert_close(difference[normalisable], differences[0][normalisable])
    expected = torch.where(normalisable, guided.at(arguments["noise"]), conditional.at(arguments["noise"]))
    torch.testing.assert_close(mixture_sample(**arguments, **options("analytic", cfg_scale=weight)), expected)


def test_the_clipped_rule_by_its_formula():
    arguments, weight = wide(inputs(size=8)), 4.0
    c, u = chosen(arguments)
    s = ((c.scale / u.scale) ** 2).clamp(0, 1)
    loc = ((1 + weight) * c.loc - weight * s * u.loc) / (1 + weight - weight * s)
    expected = loc + c.scale / torch.sqrt(1 + weight - weight * s) * arguments["noise"]
    torch.testing.assert_close(mixture_sample(**arguments, **options("clipped", cfg_scale=weight)), expected)


def test_gaussians_of_the_chosen_component():
    for copies in (1, 2):
        arguments = wide(inputs(copies=copies))
        noise = arguments.pop("noise")
        found, expected = component_gaussian(**arguments, temperature=0.9), chosen(arguments)
        assert len(found) == len(expected) == copies
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.at(noise), other.at(noise))
            torch.testing.assert_close(one.scale, other.scale)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_the_reference(rule):
    arguments = wide(inputs(size=2, mixtures=2, soft_dim=2, width=3, copies=1 if rule == "none" else 2))
    names = ("hidden", "weight", "bias", "noise")

    def run(*values):
        return mixture_sample(**dict(zip(names, values, strict=True)), component=arguments["component"], **options(rule), impl="reference")

    assert torch.autograd.gradcheck(run, tuple(arguments[name].requires_grad_() for name in names))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("rule", RULES)
def test_temperature_0_takes_the_mean(rule, impl, triton_device):
    arguments = inputs(copies=1 if rule == "none" else 2, raw_scale=1.0, device=triton_device)
    cold = mixture_sample(**arguments, **options(rule, temperature=0.0), impl=impl)
    pair = chosen(arguments, temperature=1.0)
    guided = pair[0] if rule == "none" else (analytic if rule == "analytic" else clipped)(*pair, 3.0)
    near = guided.scale < 50  # beside the pole of the analytic rule a millionth of the scale shows
    torch.testing.assert_close(cold.double()[near], guided.loc[near], rtol=1e-4, atol=1e-4)
    assert near.float().mean() > 0.8
    assert MIN_TEMPERATURE == 1e-6


SHAPES = [
    {"size": 1, "mixtures": 1, "soft_dim": 3, "width": 8},
    {"size": 3, "mixtures": 24, "soft_dim": 16, "width": 200},
    {"size": 1, "mixtures": 24, "soft_dim": 128, "width": 65},
    {"size": 2, "mixtures": 3, "soft_dim": 5, "width": 1100},
    {"size": 1, "mixtures": 1024, "soft_dim": 128, "width": 8},
]
GPU_SHAPES = [{"size": 256, "mixtures": 64, "soft_dim": 128, "width": 1536}, {"size": 16, "mixtures": 24, "soft_dim": 100, "width": 1000}]


def against_eager(arguments, dtype, device, **how):
    """Kernel, eager and truth on the same (rounded) inputs."""
    found = {"sample": mixture_sample(**arguments, **how, impl="triton")}
    eager = {"sample": mixture_sample(**arguments, **how, impl="reference")}
    truth = {"sample": mixture_sample(**wide(arguments), **how)}
    assert found["sample"].dtype == torch.float32
    checks.assert_as_exact_as_eager(found, eager, truth, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rule", RULES)
def test_kernel_is_as_exact_as_eager(rule, dtype, triton_device, poisoned_memory):
    for shape in SHAPES + (GPU_SHAPES if triton_device.type == "cuda" else []):
        # A wide unconditional Gaussian keeps the analytic rule off its pole, where no arithmetic is exact.
        arguments = inputs(**shape, copies=1 if rule == "none" else 2, dtype=dtype, device=triton_device)
        if rule == "analytic":
            arguments["weight"][:, 1] *= 0.2
        against_eager(arguments, dtype, triton_device, **options(rule, cfg_scale=2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_kernel_gives_the_gaussians_for_other_rules(dtype, triton_device, poisoned_memory):
    for shape, copies in itertools.product(SHAPES[:2], (1, 2)):
        arguments = inputs(**shape, copies=copies, dtype=dtype, device=triton_device)
        del arguments["noise"]
        runs = [component_gaussian(**arguments, temperature=0.9, impl=impl) for impl in ("triton", "reference")]
        runs.append(component_gaussian(**wide(arguments), temperature=0.9))
        named = [{f"{i} {name}": getattr(one, name) for i, one in enumerate(run) for name in ("loc", "scale")} for run in runs]
        checks.assert_as_exact_as_eager(named[0], named[1], named[2], dtype=dtype)


@pytest.mark.parametrize("raw_scale", [1e4, -1e4, -5e6, 1e20])
@pytest.mark.parametrize("rule", RULES)
def test_extreme_scales(rule, raw_scale, triton_device, poisoned_memory):
    """Down to the floor of 1e-6, at it, and where the square overflows: finite or infinite as the reference is."""
    arguments = inputs(copies=1 if rule == "none" else 2, raw_scale=raw_scale, device=triton_device)
    for temperature in (0.0, 0.9):
        found, expected = (mixture_sample(**arguments, **options(rule, temperature=temperature), impl=impl) for impl in ("triton", "reference"))
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-6, equal_nan=True)
        if raw_scale < 1e20:
            assert found.isfinite().all()


def test_nan_is_passed_on(triton_device):
    arguments = inputs(copies=2, device=triton_device)
    arguments["weight"][:, 1, 2] = float("nan")
    found = mixture_sample(**arguments, **options("clipped"), impl="triton")
    assert found[:, 2].isnan().all()
    assert found[:, 3:].isfinite().all()


def test_strided_arguments(triton_device):
    arguments = inputs(copies=2, device=triton_device)
    expected = mixture_sample(**arguments, **options("clipped"), impl="triton")
    given = {name: checks.strided(x) for name, x in arguments.items()}
    assert torch.equal(mixture_sample(**given, **options("clipped"), impl="triton"), expected)


def test_a_sample_depends_on_its_own_rows_only_and_is_the_same_twice(triton_device, poisoned_memory):
    arguments = inputs(size=6, copies=2, device=triton_device, dtype=torch.bfloat16)

    def run(first=0, last=6):
        some = arguments | {
            "hidden": arguments["hidden"][2 * first : 2 * last],
            "component": arguments["component"][first:last],
            "noise": arguments["noise"][first:last],
        }
        return {"sample": mixture_sample(**some, **options("analytic"), impl="triton")}

    checks.assert_same_twice(run)
    assert torch.equal(run(4, 5)["sample"], run()["sample"][4:5])
    assert run(3, 3)["sample"].shape == (0, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 40)}, "hidden"),
        ({"noise": torch.zeros(3, 15)}, "noise"),
        ({"component": torch.zeros(3, dtype=torch.int32)}, "component"),
        ({"bias": torch.zeros(24, 2, 15)}, "bias"),
        ({"cfg_rule": "rejection"}, "closed form"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        mixture_sample(**{**inputs(), **options("clipped"), **change})


@pytest.mark.parametrize("capability", [80, 90])
def test_kernel_compiles_for_the_chips_without_spills(capability):
    pytest.importorskip("triton")
    from model.kernels.mixture_sample.triton_kernels import EPILOGUES, NUM_WARPS, block_shape

    compilations = []
    for dtype, (epilogue, copies) in itertools.product(("bf16", "fp32"), [("none", 1), ("analytic", 2), ("clipped", 2), ("gaussians", 2)]):
        pointers = {"HIDDEN": dtype, "WEIGHT": dtype, "BIAS": dtype, "COMPONENT": "i64", "NOISE": "fp32", "OUT": "fp32", "SCALE": "fp32"}
        constants = {"COPIES": copies, "EPILOGUE": EPILOGUES[epilogue], **block_shape(1536)}
        signature = {name: f"*{kind}" for name, kind in pointers.items()}
        signature |= {"width": "i32", "soft_dim": "i32", "cfg_scale": "fp32", "min_scale": "fp32", "temperature": "fp32"}
        signature |= dict.fromkeys(constants, "constexpr")
        kernel = "model.kernels.mixture_sample.triton_kernels:mixture_sample_kernel"
        aligned = (*pointers, "width", "soft_dim")
        compilations.append(checks.Compilation(kernel, signature, constants, num_warps=NUM_WARPS, aligned=aligned))
    compiled = checks.compile_for_gpu(compilations, capability=capability)
    assert [one.spilled_bytes for one in compiled] == [0] * len(compiled), compiled
    assert max(one.registers for one in compiled) <= 96, compiled
