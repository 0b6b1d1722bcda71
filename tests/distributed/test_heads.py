"""Both heads with their classes split over three real processes, unevenly, against one process that holds them all."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.parallel import TensorParallel
from tests.distributed.heads_worker import compute

SIZE = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    command = [sys.executable, "-m", "tests.distributed.heads_worker", str(folder)]
    processes = [subprocess.Popen([*command, str(rank), str(SIZE)], cwd=repository, stderr=subprocess.PIPE, text=True) for rank in range(SIZE)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "per token"])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_ranks_compute_what_one_process_computes(folder: Path, impl: str, one_pass: bool) -> None:
    expected = compute(None, TensorParallel.single(), "reference", one_pass=one_pass)
    ranks = [torch.load(folder / f"{impl}-{one_pass}-{rank}.pt", weights_only=True) for rank in range(SIZE)]
    for name, value in expected.items():
        parts = [rank[name] for rank in ranks]
        is_split = name.rpartition(".")[2] in ("weight", "bias", "logit_weight", "logit_bias", "component_weight", "component_bias")
        if is_split:
            torch.testing.assert_close(torch.cat(parts), value, msg=lambda text, name=name: f"{name}: {text}")
        else:  # whole on every rank, to the bit
            assert all(torch.equal(part, parts[0]) for part in parts), name
            torch.testing.assert_close(parts[0], value, msg=lambda text, name=name: f"{name}: {text}")
