"""The network of a coupling: the formula, whatever the order in which sums are left to norms, and how often memory is passed over."""

import pytest
import torch
from torch.nn import functional

from model.config import FlowConfig
from model.flow import vit
from model.flow.vit import CouplingNetwork
from model.kernels.config import KernelsConfig
from model.kernels.dispatch import is_interpreting
from tests.model.kernels.checks import assert_as_exact_as_eager

CONFIG = FlowConfig(depth=1, block_depth=3, width=24, num_heads=2)


def network_of(config=CONFIG, *, impl="reference", dtype=torch.float32, seed=0):
    network = CouplingNetwork(config, in_dim=6, num_tokens=5, kernels=KernelsConfig(layer_norm=impl))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.3, generator=generator)
    return network.to(dtype)


def plain(network, x):
    """Pre-norm blocks, one sum after the other (spec 1.3)."""

    def norm(module, x):
        return functional.layer_norm(x, x.shape[-1:], module.weight, module.bias, 1e-6)

    x = network.init_proj(x) + network.posemb
    for block in network.blocks:
        x = x + block.attention(norm(block.norm1, x))
        x = x + block.fc2(functional.gelu(block.fc1(norm(block.norm2, x)), approximate="tanh"))
    return network.final_proj(norm(network.norm, x))


def results(network, x, dtype=None):
    x = x.to(dtype or x.dtype).requires_grad_()
    out = network(x)
    upstream = torch.arange(out.numel(), dtype=out.dtype).view(out.shape) % 7 - 3
    gradients = torch.autograd.grad(out, [x, *network.parameters()], upstream)
    return {"out": out, "gradients": torch.cat([gradient.double().flatten() for gradient in gradients])}


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("images", [1, 4])
def test_network_is_the_formula_to_the_bit(depth, images):
    network = network_of(FlowConfig(depth=1, block_depth=depth, width=24, num_heads=2))
    x = torch.randn(images, 5, 6, generator=torch.Generator().manual_seed(1))
    leaves = list(network.parameters())
    found, expected = ([run(x), *torch.autograd.grad(run(x).square().sum(), leaves)] for run in (network, lambda x: plain(network, x)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("depth", [1, 3])
def test_every_sum_is_made_by_the_norm_that_reads_it(monkeypatch, depth):
    """Two in a block and one at the end; products in half precision read what the norm rounded, the last one reads fp32."""
    seen = []

    def note(x, branch, *parameters, out_dtype, impl):
        seen.append((x.dtype, branch.dtype, out_dtype))
        return found(x, branch, *parameters, out_dtype=out_dtype, impl=impl)

    found = vit.add_layer_norm
    monkeypatch.setattr(vit, "add_layer_norm", note)
    network = network_of(FlowConfig(depth=1, block_depth=depth, width=24, num_heads=2), dtype=torch.bfloat16)
    params = network(torch.randn(2, 5, 6))
    half, single = torch.bfloat16, torch.float32
    assert seen == [(single, half, half)] * 2 * depth + [(single, half, single)]
    assert params.dtype == single


@pytest.mark.skipif(not is_interpreting(), reason="Triton is not interpreting")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.usefixtures("poisoned_memory")
def test_fused_network_is_as_exact_as_eager(dtype):
    """All gradients as one vector: a parameter of a few elements has a few roundings, which is luck."""
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2))
    runs = [
        results(network_of(impl="triton", dtype=dtype), x),
        results(network_of(dtype=dtype), x),
        results(network_of(dtype=dtype).double(), x, torch.float64),
    ]
    assert_as_exact_as_eager(*runs, dtype=dtype)


def test_names_of_the_parameters_are_those_of_checkpoints():
    names = {name for name, _ in network_of(FlowConfig(depth=1, block_depth=1, width=24, num_heads=2)).named_parameters()}
    block = ("norm1", "attention.qkv", "attention.out", "norm2", "fc1", "fc2")
    modules = ["init_proj", *(f"blocks.0.{name}" for name in block), "norm", "final_proj"]
    assert names == {"posemb"} | {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
