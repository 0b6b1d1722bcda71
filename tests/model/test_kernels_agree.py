"""The whole model computes the same loss and gradients with fused kernels and without."""

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch

from model.batch import Batch
from model.config import JetFormerConfig
from model.jetformer import JetFormer
from model.kernels.config import KernelsConfig
from model.kernels.dispatch import is_interpreting
from tests.model.kernels.checks import REFERENCE, assert_as_exact_as_eager, permutes_on_chip

FUSED = KernelsConfig(
    gmm_nll="triton",
    linear_cross_entropy="torch",
    affine_coupling="reference" if permutes_on_chip() else "triton",
    rms_norm="triton",
    layer_norm="triton",
    rope="triton",
    geglu="triton",
)

Build = Callable[[KernelsConfig], JetFormer]


def loss_and_gradients(model: JetFormer, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(batch).total_loss()
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}}


@pytest.fixture
def build(small_config: JetFormerConfig, randomise: Callable[[JetFormer], JetFormer]) -> Build:
    return lambda kernels: randomise(JetFormer(small_config, kernels=kernels))


def test_every_kernel_of_a_training_step_is_compared() -> None:
    """A field that somebody adds to the configuration must be added here, or to the exceptions."""
    elsewhere = {"mixture_sample", "optimizer", "gradient_accumulation_fusion", "compile", "tf32", "workspace_mib"}
    compared = {field.name for field in fields(KernelsConfig) if getattr(FUSED, field.name) != "auto"} - elsewhere
    assert compared == {field.name for field in fields(KernelsConfig)} - elsewhere


@pytest.mark.skipif(not is_interpreting(), reason="Triton is not interpreting")
@pytest.mark.parametrize("prefix", [False, True], ids=["skipping heads", "scoring the prefix"])
def test_fused_equals_reference_in_fp32(build: Build, small_config: JetFormerConfig, build_batch: Callable[..., Batch], prefix: bool) -> None:
    batch = build_batch(small_config, sigma=20.0)
    batch.score_all = prefix
    expected, found = loss_and_gradients(build(REFERENCE), batch), loss_and_gradients(build(FUSED), batch)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        error = float((found[name] - value).norm() / value.norm().clamp(min=1e-12))
        assert error < 2e-5, (name, error)


@pytest.mark.skipif(not is_interpreting(), reason="Triton is not interpreting")
def test_fused_is_as_exact_as_eager_in_bf16(build: Build, small_config: JetFormerConfig, build_batch: Callable[..., Batch]) -> None:
    """All gradients as one vector: a parameter of a few elements has a few roundings, which is luck."""
    batch = build_batch(small_config, sigma=20.0)
    truth_model = build(REFERENCE).to(torch.bfloat16).double()
    results = {
        "truth": loss_and_gradients(truth_model, batch),
        "eager": loss_and_gradients(build(REFERENCE).to(torch.bfloat16), batch),
        "fused": loss_and_gradients(build(FUSED).to(torch.bfloat16), batch),
    }
    joined = {
        name: {"loss": result["loss"], "gradients": torch.cat([value.double().flatten() for key, value in result.items() if key != "loss"])}
        for name, result in results.items()
    }
    assert_as_exact_as_eager(joined["fused"], joined["eager"], joined["truth"], dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fused_is_as_exact_as_eager_on_a_gpu(
    build: Build, small_config: JetFormerConfig, build_batch: Callable[..., Batch], dtype: torch.dtype
) -> None:
    batch = build_batch(small_config, sigma=20.0).to(torch.device("cuda"))
    truth = loss_and_gradients(build(REFERENCE).to(dtype).double().cuda(), batch)
    eager, fused = (loss_and_gradients(build(kernels).to(dtype).cuda(), batch) for kernels in (REFERENCE, FUSED))
    joined = [
        {"loss": result["loss"], "gradients": torch.cat([value.double().flatten() for key, value in result.items() if key != "loss"])}
        for result in (fused, eager, truth)
    ]
    assert_as_exact_as_eager(*joined, dtype=dtype)


def test_automatic_choice_on_a_cpu_is_the_reference_to_rounding(
    build: Build, small_config: JetFormerConfig, build_batch: Callable[..., Batch]
) -> None:
    batch = build_batch(small_config, sigma=20.0)
    expected, found = loss_and_gradients(build(REFERENCE), batch), loss_and_gradients(build(replace(KernelsConfig())), batch)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
