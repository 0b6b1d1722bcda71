"""Every layout trains the same model: real processes, real engine, the real model in a tiny size, both orders, dropout on.

One set of processes runs everything (see worker.py); the tests below read what it left.
"""

import hashlib
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.checkpoint.reader import CheckpointReader
from tests.distributed.worker import LAYOUTS, MORE_LAYOUTS, NUM_STEPS, SAVED_STEP, SCENARIOS, Record

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

NUM_PROCESSES = 4
NAMES = ["-".join(map(str, degrees)) for degrees in LAYOUTS]
ALL_NAMES = NAMES + ["-".join(map(str, degrees)) for degrees in MORE_LAYOUTS]
REFERENCE = NAMES[0]
FP32_SCENARIOS = [name for name in SCENARIOS if name != "bf16"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """The folder that the processes filled."""
    out = tmp_path_factory.mktemp("layouts")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [(out / f"log-{rank}.txt").open("w") for rank in range(NUM_PROCESSES)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.worker", str(out), str(rank), str(NUM_PROCESSES), str(port)],
            cwd=repository,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [worker.wait(timeout=500) for worker in workers]
    finally:
        for worker, log in zip(workers, logs, strict=True):
            worker.kill()
            log.close()
    tails = "\n".join(f"rank {rank}: {(out / f'log-{rank}.txt').read_text()[-1500:]}" for rank, code in enumerate(codes) if code)
    assert not any(codes), tails
    return out


def records(results: Path, layout: str, scenario: str) -> list[Record]:
    """What each rank of a layout saw."""
    paths = sorted((results / layout / scenario).glob("record-*.json"))
    return [Record(**json.loads(path.read_text())) for path in paths]


def tensors(results: Path, layout: str, scenario: str, kind: str) -> dict[str, Tensor]:
    """All tensors of a kind in the checkpoint at the end of a scenario."""
    (manifest,) = (results / layout / scenario / "final").rglob("manifest.json")
    with CheckpointReader(manifest.parent) as reader:
        return {name.removeprefix(f"{kind}/"): reader.read_full(name) for name in reader.names(f"{kind}/")}


def worst_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Largest relative difference (by norm) of any tensor, and its name.

    The bias of attention keys is left out: softmax does not depend on it, so its gradient is rounding noise around zero, which
    Adam blows up to the size of the learning rate in any layout.
    """
    assert found.keys() == expected.keys()
    return max((relative_difference(determined(name, found[name]), determined(name, value)), name) for name, value in expected.items())


def relative_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def determined(name: str, value: Tensor) -> Tensor:
    """The part of a tensor that the loss determines."""
    if not name.endswith("attention.qkv.bias"):
        return value
    query, _, values = value.chunk(3)
    return torch.cat([query, values])


def total_norm(values: dict[str, Tensor]) -> float:
    """Euclidean norm over all tensors."""
    return float(torch.stack([value.double().norm() for value in values.values()]).norm())


@pytest.mark.parametrize("scenario", FP32_SCENARIOS)
@pytest.mark.parametrize("layout", ALL_NAMES[1:])
def test_losses_and_gradient_norms_agree_with_one_process(results: Path, layout: str, scenario: str) -> None:
    (expected,) = records(results, REFERENCE, scenario)
    found = records(results, layout, scenario)[0]
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-5)


@pytest.mark.parametrize("scenario", FP32_SCENARIOS)
@pytest.mark.parametrize("layout", ALL_NAMES[1:])
def test_parameters_agree_with_one_process(results: Path, layout: str, scenario: str) -> None:
    difference, name = worst_difference(tensors(results, layout, scenario, "param"), tensors(results, REFERENCE, scenario, "param"))
    assert difference < 1e-5, name


@pytest.mark.parametrize("layout", ALL_NAMES)
def test_all_ranks_see_the_same_norm_and_loss(results: Path, layout: str) -> None:
    first, *others = records(results, layout, "base")
    assert all(other.norms == first.norms and other.losses == first.losses for other in others)


def test_one_process_agrees_with_a_plain_pytorch_loop(results: Path) -> None:
    plain = Record(**json.loads((results / "plain" / "record-0.json").read_text()))
    (engine,) = records(results, REFERENCE, "base")
    assert engine.losses == pytest.approx(plain.losses, rel=1e-5)
    assert engine.norms == pytest.approx(plain.norms, rel=1e-5)
    weights = torch.load(results / "plain" / "weights.pt", weights_only=True)
    difference, name = worst_difference(tensors(results, REFERENCE, "base", "param"), weights)
    assert difference < 1e-5, name


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("layout", ALL_NAMES)
def test_flow_backward_runs_once_per_micro_batch(results: Path, layout: str, scenario: str) -> None:
    num_steps, _ = SCENARIOS[scenario]
    tensor, pipeline, data = map(int, layout.split("-"))
    per_rank = num_steps * 4 // data
    on_first_stage = tensor * data
    counts = [record.flow_backwards for record in records(results, layout, scenario)]
    assert counts == [per_rank] * on_first_stage + [0] * (on_first_stage * (pipeline - 1))


def test_recomputation_changes_nothing(results: Path) -> None:
    (plain,), (recomputed,) = records(results, REFERENCE, "base"), records(results, REFERENCE, "recompute")
    num_steps, _ = SCENARIOS["recompute"]
    assert recomputed.losses == plain.losses[:num_steps]
    assert recomputed.norms == plain.norms[:num_steps]


@pytest.mark.parametrize("layout", [name for name in ALL_NAMES if name.split("-")[1] != "1"])
@pytest.mark.parametrize("scenario", ["base", "bf16"])
def test_latents_and_soft_tokens_cross_an_edge_bit_by_bit(results: Path, layout: str, scenario: str) -> None:
    ranks = records(results, layout, scenario)
    tensor, pipeline, data = map(int, layout.split("-"))
    per_stage = tensor * data
    for rank in range(per_stage * (pipeline - 1)):
        assert ranks[rank].bits_sent, "every stage but the last sends"
        assert ranks[rank].bits_sent == ranks[rank + per_stage].bits_received


@pytest.mark.parametrize("layout", ALL_NAMES)
def test_bf16_stays_within_rounding_of_fp32(results: Path, layout: str) -> None:
    found, expected = records(results, layout, "bf16")[0], records(results, REFERENCE, "smooth")[0]
    # A bf16 product is off by up to 2^-8; losses average many of them, gradients pass through several layers of them.
    assert found.losses == pytest.approx(expected.losses, rel=2**-8)
    assert found.norms[0] == pytest.approx(expected.norms[0], rel=4 * 2**-8)
    # From the first update on the weights differ too, as bf16 rounds what the layers read. Over 16 seeds these norms scatter by 0.8 %, up to 2 %
    # (LOG.md, 2026-11-22).
    assert found.norms == pytest.approx(expected.norms, rel=10 * 2**-8)
    assert found.losses != expected.losses, "bf16 must differ from fp32 in something"


def test_clipping_is_in_force(results: Path) -> None:
    (clipped,), (free,) = records(results, REFERENCE, "base"), records(results, REFERENCE, "unclipped")
    assert clipped.norms[0] == free.norms[0] > 1.0, "the reported norm is that before clipping"
    # Momentum averages clipped gradients, each of norm at most 0.1, so it cannot be longer.
    for layout in ALL_NAMES:
        assert total_norm(tensors(results, layout, "base", "exp_avg")) <= 0.1
    assert total_norm(tensors(results, REFERENCE, "unclipped", "exp_avg")) > 0.1


@pytest.mark.parametrize("layout", ALL_NAMES[1:])
def test_weight_average_agrees_with_one_process(results: Path, layout: str) -> None:
    average, expected = tensors(results, layout, "base", "ema"), tensors(results, REFERENCE, "base", "ema")
    difference, name = worst_difference(average, expected)
    assert difference < 1e-5, name
    weights = tensors(results, layout, "base", "param")
    assert worst_difference(average, weights)[0] > 1e-3, "the average lags behind the weights"


@pytest.mark.parametrize("layout", NAMES)
def test_resume_on_the_same_layout_is_bit_exact(results: Path, layout: str) -> None:
    straight, resumed = records(results, layout, "base")[0], records(results, layout, f"resume-{layout}")[0]
    assert len(resumed.losses) == NUM_STEPS - SAVED_STEP
    assert resumed.losses == straight.losses[SAVED_STEP:]
    assert resumed.norms == straight.norms[SAVED_STEP:]
    for kind in ("param", "exp_avg", "exp_avg_sq", "ema", "buffer"):
        before, after = tensors(results, layout, "base", kind), tensors(results, layout, f"resume-{layout}", kind)
        assert before
        assert digests(before) == digests(after)


def digests(values: dict[str, Tensor]) -> dict[str, str]:
    """sha256 of every tensor's bytes."""
    return {name: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for name, value in values.items()}


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("layout", NAMES)
def test_resume_on_another_layout_goes_on_alike(results: Path, layout: str, source: str) -> None:
    straight, resumed = records(results, source, "base")[0], records(results, layout, f"resume-{source}")[0]
    assert resumed.losses == pytest.approx(straight.losses[SAVED_STEP:], rel=1e-5)
    assert resumed.norms == pytest.approx(straight.norms[SAVED_STEP:], rel=1e-5)
    for kind in ("param", "ema"):
        difference, name = worst_difference(tensors(results, layout, f"resume-{source}", kind), tensors(results, source, "base", kind))
        assert difference < 1e-5, f"{kind} {name}"
