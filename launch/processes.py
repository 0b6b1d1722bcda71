"""Starts the processes of one run on this machine, passes signals on to them, and names the one that fails.

Rank 0 owns the terminal; the others write to a log file each, shown when one of them is at fault.
Every process is in a session of its own, so that Ctrl-C and USR1 reach it once, from here, and never the launcher alone.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
POLL_S = 0.05
SETTLE_S = 10.0
"""After the first failure: time for the others to fail of themselves, with messages of their own, on a busy machine too."""
GRACE_S = 10.0
"""After SIGTERM: time to end before SIGKILL."""
NUM_TAIL_LINES = 15

_PR_SET_PDEATHSIG = 1


@dataclass(slots=True)
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None
    log_start: int

    def tail(self) -> list[str]:
        """The last lines that it wrote since this start."""
        if self.log is None:
            return []
        with self.log.open("rb") as stream:
            stream.seek(self.log_start)
            return stream.read().decode(errors="replace").splitlines()[-NUM_TAIL_LINES:]


def run_workers(command: Sequence[str], *, num_processes: int, log_dir: Path) -> int:
    """Runs `command` once per rank and waits for all.

    Args:
        command: what to execute; the rank arrives in the environment, as under torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ...).
        num_processes: how many.
        log_dir: where ranks other than 0 write `rank-0001.log` and so on.

    Returns:
        0 when all ended well; 130 after Ctrl-C; otherwise the exit code of the first that failed (128 + N when signal N killed it).
    """
    with ExitStack() as stack:
        workers = _start(command, num_processes=num_processes, log_dir=log_dir, stack=stack)
        num_interrupts = 0

        def forward(signum: int, frame: FrameType | None) -> None:
            nonlocal num_interrupts
            num_interrupts += signum == signal.SIGINT
            # Ctrl-C asks for an orderly end, as SIGTERM does; pressed again, it means now.
            if num_interrupts > 1:
                passed_on = signal.SIGKILL
            else:
                passed_on = signal.SIGTERM if signum == signal.SIGINT else signal.Signals(signum)
            for worker in workers:
                if worker.process.poll() is None:
                    worker.process.send_signal(passed_on)

        previous = {signum: signal.signal(signum, forward) for signum in FORWARDED_SIGNALS}
        try:
            failed = _wait(workers)
            if failed is not None:
                _end(workers)
        finally:
            _kill(workers)
            for signum, handler in previous.items():
                signal.signal(signum, handler)
        if num_interrupts:
            return 128 + signal.SIGINT
        if failed is None:
            return 0
        code = failed.process.returncode
        _report(failed, code)
        return code if code > 0 else 128 - code


def rendezvous_environment(num_processes: int) -> dict[str, str]:
    """What all ranks of a run on this machine share, in torchrun's names."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "PYTHONUNBUFFERED": "1",
    }


def _start(command: Sequence[str], *, num_processes: int, log_dir: Path, stack: ExitStack) -> list[_Worker]:
    shared = {**os.environ, **rendezvous_environment(num_processes)}
    workers = []
    for rank in range(num_processes):
        log: Path | None = None
        output: IO[bytes] | None = None
        if rank > 0:
            log_dir.mkdir(parents=True, exist_ok=True)
            log = log_dir / f"rank-{rank:04d}.log"
            output = stack.enter_context(log.open("ab"))
        process = subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        workers.append(_Worker(rank=rank, process=process, log=log, log_start=output.tell() if output else 0))
    return workers


def _end_with_parent() -> None:
    """In the child: be told to stop (and save) when the launcher is killed, rather than run on unseen."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(workers: Sequence[_Worker]) -> _Worker | None:
    """Returns once all have ended well (None), or with the first that did not."""
    while True:
        codes = {worker.rank: worker.process.poll() for worker in workers}
        failed = [worker for worker in workers if codes[worker.rank] not in (None, 0)]
        if failed:
            # A killed rank takes its peers' connections down: when several are found together, it is the cause.
            return min(failed, key=lambda worker: (worker.process.returncode > 0, worker.rank))
        if all(code == 0 for code in codes.values()):
            return None
        time.sleep(POLL_S)


def _end(workers: Sequence[_Worker]) -> None:
    if _all_ended_within(workers, SETTLE_S):
        return
    for worker in workers:
        if worker.process.poll() is None:
            worker.process.terminate()
    _all_ended_within(workers, GRACE_S)


def _kill(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        if worker.process.poll() is None:
            worker.process.kill()
        worker.process.wait()


def _all_ended_within(workers: Sequence[_Worker], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if all(worker.process.poll() is not None for worker in workers):
            return True
        time.sleep(POLL_S)
    return False


def _report(failed: _Worker, code: int) -> None:
    """Says on stderr which rank failed; rank 0 has already said why on the terminal."""
    how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        how += " (often: out of memory)"
    if failed.rank == 0 and code > 0:
        if code != 2:
            print(f"jetway: rank 0 failed with {how}; the other processes were ended", file=sys.stderr)
        return
    lines = [f"jetway: rank {failed.rank} failed: {how}; the other processes were ended"]
    if failed.log is not None:
        lines += [f"  the last lines of {failed.log}:", *(f"  | {line}" for line in failed.tail())]
    print("\n".join(lines), file=sys.stderr)
