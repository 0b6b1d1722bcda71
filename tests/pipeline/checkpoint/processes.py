"""Scenarios with real processes that are really killed, for test_writer.py: `python processes.py SCENARIO FOLDER` prints one JSON line.

Runs as a program of its own because it forks, which a test process full of threads should not.
"""

import itertools
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.checkpoint.folder import CheckpointFolder, KeepPolicy
from pipeline.checkpoint.format import Fragment
from pipeline.checkpoint.reader import open_latest
from pipeline.checkpoint.writer import SaveFailed, save

KEEP = KeepPolicy(keep_last=2)
SYSTEM_CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def content(step: int) -> torch.Tensor:
    return torch.arange(50_000, dtype=torch.float32) + step


def save_step(run: Path, step: int) -> None:
    save(run, step, [Fragment.whole("param/x", content(step)), Fragment.whole("ema/x", -content(step))], {"at": step}, keep=KEEP)


def good_step(run: Path) -> int:
    """The step that a restart would take up, its content checked; 0 if there is none."""
    reader = open_latest(run)
    if reader is None:
        return 0
    assert reader.state == {"at": reader.step}
    assert torch.equal(reader.read_full("param/x"), content(reader.step))
    assert torch.equal(reader.read_full("ema/x"), -content(reader.step))
    return reader.step


def fork(action: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return pid


def kill_at_random_moments(run: Path) -> dict[str, Any]:
    """A run that is killed 20 times somewhere in its saves, and restarted from what it finds."""
    rng, reached, interrupted = random.Random(0), 0, 0

    def train(first: int) -> None:
        for step in itertools.count(first):
            save_step(run, step)

    for _ in range(20):
        pid = fork(lambda: train(good_step(run) + 1))
        time.sleep(rng.uniform(0.0, 0.08))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        interrupted += any(run.glob("checkpoints/step_*.tmp-*"))
        found = good_step(run)
        assert found >= reached, f"fell back from {reached} to {found}"
        reached = found
    leftovers = [path.name for path in (run / "checkpoints").iterdir() if ".tmp-" in path.name and "latest" not in path.name]
    return {"interrupted": interrupted, "reached": reached, "leftovers": leftovers, "corrupt": len(CheckpointFolder(run).corrupt())}


def kill_at_every_call(run: Path) -> dict[str, Any]:
    """One save of step 4 over 3, 2 (and again over 4), killed before its 1st, 2nd, ... change of the disk, until it gets through."""
    results = []
    for number in itertools.count():
        own = run / str(number)
        for step in (2, 3, 4) if number % 2 else (2, 3):
            save_step(own, step)
        pid = fork(lambda own=own, number=number: (arm(number), save_step(own, 4)))
        status = os.waitpid(pid, 0)[1]
        found = good_step(own)
        assert found >= 3, f"killed at call {number}: only step {found} is left"
        assert not CheckpointFolder(own).corrupt(), f"killed at call {number}: damage"
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            assert found == 4
            results.append(number)
            if len(results) == 2:
                break
    return {"calls": results}


def arm(number: int) -> None:
    """This process is killed instead of its `number`-th call that changes the disk."""
    calls = itertools.count()

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(os, name, call)

    for name in SYSTEM_CALLS:
        wrap(name)


def two_ranks(run: Path, action: Callable[[int], Any]) -> list[int]:
    """Exit codes of `action(rank)` on two gloo ranks."""
    store = run.parent / f"{run.name}-store"

    def rank_main(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=20))
        action(rank)

    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in [fork(lambda rank=rank: rank_main(rank)) for rank in range(2)]]


def fragments_of_rank(rank: int, step: int) -> list[Fragment]:
    """A tensor-parallel matrix, a flat-partitioned vector, and a replicated tensor that both offer."""
    matrix, vector = torch.arange(70.0).reshape(10, 7) + step, torch.arange(11.0) * step
    start, size = ((0, 3), (3, 4))[rank]
    return [
        Fragment(
            name="param/matrix",
            global_shape=(10, 7),
            tensor=matrix[:, start : start + size].reshape(-1),
            shard_dim=1,
            shard_start=start,
            shard_size=size,
        ),
        Fragment(name="param/vector", global_shape=(11,), tensor=(vector[:4], vector[4:])[rank], flat_start=4 * rank),
        Fragment.whole("buffer/both", torch.full((100,), float(step))),
    ]


def check_two(run: Path) -> int:
    reader = open_latest(run)
    assert reader is not None
    assert torch.equal(reader.read_full("param/matrix"), torch.arange(70.0).reshape(10, 7) + reader.step)
    assert torch.equal(reader.read_full("param/vector"), torch.arange(11.0) * reader.step)
    assert len(reader.manifest.tensors["buffer/both"].fragments) == 1
    return reader.step


def ranks_save_together(run: Path) -> dict[str, Any]:
    def action(rank: int) -> None:
        for step in (1, 2):
            save(run, step, fragments_of_rank(rank, step), {"from": rank}, keep=KEEP)
        reader = open_latest(run)
        assert reader is not None
        assert reader.step == 2
        assert reader.state == {"from": 0}

    codes = two_ranks(run, action)
    files = sorted(path.name for path in (run / "checkpoints" / "step_00000002").iterdir())
    return {"codes": codes, "step": check_two(run), "files": files}


def ranks_agree_on_the_fallback(run: Path) -> dict[str, Any]:
    """Damage that only the rank which checks that file can see."""

    def action(rank: int) -> None:
        for step in (1, 2):
            save(run, step, fragments_of_rank(rank, step), {})
        if rank == 0:
            victim = run / "checkpoints" / "step_00000002" / "rank-00001-000.safetensors"
            victim.write_bytes(victim.read_bytes()[:-1] + b"!")
        dist.barrier()
        reader = open_latest(run)
        assert reader is not None
        assert reader.step == 1

    return {"codes": two_ranks(run, action), "step": check_two(run)}


def one_rank_is_killed(run: Path) -> dict[str, Any]:
    """Rank 1 dies while it writes: rank 0 gets an error, not a hang, and nothing is published."""

    def action(rank: int) -> None:
        save(run, 1, fragments_of_rank(rank, 1), {})
        if rank == 1:
            arm(0)
        save(run, 2, fragments_of_rank(rank, 2), {})

    codes = two_ranks(run, action)
    latest = (run / "checkpoints" / "latest").read_text()
    step = check_two(run)
    leftovers = [path.name for path in (run / "checkpoints").iterdir() if ".tmp-" in path.name]
    return {"codes": codes, "latest": latest, "step": step, "leftovers": leftovers}


def one_rank_has_no_disk(run: Path) -> dict[str, Any]:
    """Files of rank 1 may not grow for one save: both ranks hear of it, go on, and save again later."""

    def action(rank: int) -> None:
        save(run, 1, fragments_of_rank(rank, 1), {})
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        with pytest.raises(SaveFailed, match=r"(?s)disk is full.*rank 1"):
            save(run, 2, fragments_of_rank(rank, 2), {}, keep=KeepPolicy(keep_last=1))
        if rank == 0:
            assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["latest", "step_00000001"]
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        dist.barrier()
        assert open_latest(run).step == 1  # type: ignore[union-attr]
        save(run, 3, fragments_of_rank(rank, 3), {})

    return {"codes": two_ranks(run, action), "step": check_two(run)}


SCENARIOS = (
    *(kill_at_random_moments, kill_at_every_call, ranks_save_together),
    *(ranks_agree_on_the_fallback, one_rank_is_killed, one_rank_has_no_disk),
)

if __name__ == "__main__":
    scenario = {function.__name__: function for function in SCENARIOS}[sys.argv[1]]
    print(json.dumps(scenario(Path(sys.argv[2]))))
