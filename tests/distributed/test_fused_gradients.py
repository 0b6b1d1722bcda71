"""Weight gradients added inside the matrix product are those of the plain path: real ranks, real engine, a stand-in for apex's product."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from configs.loader import build_config
from pipeline.config import RunConfig
from pipeline.engine import fuses_weight_gradients
from pipeline.parallel.layout import Layout
from tests.distributed.worker import BASE, merged

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

NUM_PROCESSES = 2
STAND_IN = '''
"""apex's extension in torch. The real one keeps the product in fp32; this one rounds it to bf16 first, as the plain path does."""
CALLS = []


def wgrad_gemm_accum_fp32(total_input, grad_output, main_grad):
    assert total_input.dim() == grad_output.dim() == 2 and main_grad.shape == (grad_output.shape[1], total_input.shape[1])
    assert str(main_grad.dtype) == "torch.float32" and str(grad_output.dtype) == "torch.bfloat16" and main_grad.is_contiguous()
    main_grad.add_(grad_output.t().matmul(total_input))
    CALLS.append(main_grad.shape)
'''


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> list[dict[str, Any]]:
    """What each rank saw."""
    out = tmp_path_factory.mktemp("fused")
    (out / "fused_weight_gradient_mlp_cuda.py").write_text(STAND_IN)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(out), os.environ["PYTHONPATH"]])}
    command = [sys.executable, "-m", "tests.distributed.fused_gradients", str(out)]
    workers = [
        subprocess.Popen([*command, str(rank), str(NUM_PROCESSES), str(port)], cwd=repository, env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(NUM_PROCESSES)
    ]
    try:
        errors = [worker.communicate(timeout=240)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert not any(worker.returncode for worker in workers), "\n".join(error[-2000:] for error in errors)
    return [json.loads((out / f"found-{rank}.json").read_text()) for rank in range(NUM_PROCESSES)]


@pytest.mark.parametrize("way", ["fused", "fused and recomputed"])
def test_losses_norms_and_weights_equal_those_of_the_plain_path(found: list[dict[str, Any]], way: str) -> None:
    for rank in found:
        assert rank[way]["record"]["losses"] == rank["plain"]["record"]["losses"]
        assert rank[way]["record"]["norms"] == rank["plain"]["record"]["norms"]
        assert rank[way]["weights"] == rank["plain"]["weights"]


def test_every_tensor_parallel_linear_is_fused_once_per_micro_batch(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["plain"]["calls"] == rank["plain"]["with_main_grad"] == 0
        # Two blocks of q, out, gate, up and down; k and v are whole on each rank, as there is one head of them.
        assert rank["fused"]["with_main_grad"] == 10
        assert rank["fused"]["calls"] == 10 * rank["fused"]["micro_batches"]


def test_accumulators_start_every_step_at_zero(found: list[dict[str, Any]]) -> None:
    assert [rank[way]["left_in_accumulators"] for rank in found for way in rank] == [0.0] * 6


def layout(tensor: int, device: str) -> Layout:
    return Layout(rank=0, world_size=tensor, local_rank=0, tensor=tensor, data=1, pipe=1, device=torch.device(device))


def config(**kernels: str) -> RunConfig:
    return build_config(RunConfig, merged(BASE, {"parallel": {"precision": "bf16"}, "kernels": kernels}))


@pytest.mark.parametrize(
    ("tensor", "device", "kernels", "named"),
    [
        (1, "cuda", {}, "no Megatron-core linears"),
        (2, "cpu", {}, "apex runs on CUDA only"),
        (2, "cuda", {"compile": "layers"}, "kernels.compile=layers"),
    ],
)
def test_forced_where_it_cannot_be_is_refused_and_auto_goes_without(tensor: int, device: str, kernels: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        fuses_weight_gradients(config(gradient_accumulation_fusion="on", **kernels), layout(tensor, device))
    assert not fuses_weight_gradients(config(gradient_accumulation_fusion="auto", **kernels), layout(tensor, device))
    assert not fuses_weight_gradients(config(gradient_accumulation_fusion="off", **kernels), layout(tensor, device))


@pytest.mark.gpu
def test_apex_adds_the_product_in_fp32() -> None:
    extension = pytest.importorskip("fused_weight_gradient_mlp_cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    x, grad = (torch.randn(96, width, device="cuda", generator=generator).bfloat16() for width in (64, 40))
    total = torch.ones(40, 64, device="cuda")
    extension.wgrad_gemm_accum_fp32(x, grad, total)
    torch.testing.assert_close(total.double(), 1 + grad.double().t() @ x.double(), rtol=1e-5, atol=1e-4)
