"""The process launcher, with small programs in place of training."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import processes
from launch.processes import run_workers

pytestmark = pytest.mark.distributed


def python(program: str) -> list[str]:
    return [sys.executable, "-c", "import os, signal, sys, time\nfrom pathlib import Path\nrank = int(os.environ['RANK'])\n" + program]


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SETTLE_S", 0.5)
    monkeypatch.setattr(processes, "GRACE_S", 1.0)


def test_each_rank_gets_its_place_in_the_world(tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    program = f"Path({str(tmp_path)!r}, f'seen-{{rank}}').write_text(' '.join(os.environ[name] for name in {names!r}))"
    assert run_workers(python(program), num_processes=3, log_dir=tmp_path / "logs") == 0
    seen = [(tmp_path / f"seen-{rank}").read_text().split() for rank in range(3)]
    assert [fields[:5] for fields in seen] == [[str(rank), str(rank), "3", "3", "127.0.0.1"] for rank in range(3)]
    assert len({fields[5] for fields in seen}) == 1


def test_first_rank_owns_the_terminal_and_others_a_log(tmp_path: Path, capfd) -> None:
    assert run_workers(python("print('hello from', rank)"), num_processes=2, log_dir=tmp_path) == 0
    assert capfd.readouterr().out == "hello from 0\n"
    assert (tmp_path / "rank-0001.log").read_text() == "hello from 1\n"


def test_failing_rank_is_named_with_its_last_words_and_others_are_ended(tmp_path: Path, capfd) -> None:
    started = time.monotonic()
    code = run_workers(python("if rank == 1: sys.exit('disk on fire')\ntime.sleep(60)"), num_processes=2, log_dir=tmp_path)
    assert code == 1
    assert time.monotonic() - started < 30  # it waited for rank 0's minute otherwise
    error = capfd.readouterr().err
    assert "rank 1 failed: exit code 1" in error
    assert "disk on fire" in error


def test_killed_rank_is_named_by_signal(tmp_path: Path, capfd) -> None:
    code = run_workers(python("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"), num_processes=2, log_dir=tmp_path)
    assert code == 128 + signal.SIGKILL
    assert "rank 1 failed: killed by SIGKILL" in capfd.readouterr().err


def test_rank_deaf_to_sigterm_is_killed(tmp_path: Path) -> None:
    program = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif rank == 1: time.sleep(0.5); sys.exit(3)\ntime.sleep(60)"
    assert run_workers(python(program), num_processes=2, log_dir=tmp_path) == 3


def test_users_mistake_is_not_reported_twice(tmp_path: Path, capfd) -> None:
    assert run_workers(python("print('jetway: wrong key', file=sys.stderr); sys.exit(2)"), num_processes=2, log_dir=tmp_path) == 2
    assert capfd.readouterr().err == "jetway: wrong key\n"


@pytest.mark.parametrize(
    ("sent", "received", "code"),
    [
        (signal.SIGTERM, signal.SIGTERM, 0),
        (signal.SIGUSR1, signal.SIGUSR1, 0),
        (signal.SIGINT, signal.SIGTERM, 130),  # Ctrl-C asks the ranks for an orderly end, and still tells the shell
    ],
)
def test_signal_reaches_every_worker_and_the_launcher_survives_it(
    tmp_path: Path, repository: Path, sent: signal.Signals, received: signal.Signals, code: int
) -> None:
    worker = f"""
def stop(number, frame):
    Path({str(tmp_path)!r}, f'stopped-{{rank}}').write_text(str(number))
    sys.exit(0)
signal.signal({int(received)}, stop)
Path({str(tmp_path)!r}, f'ready-{{rank}}').touch()
time.sleep(60)
"""
    process = start_launcher(worker, tmp_path, repository)
    wait_for(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in range(2)))
    process.send_signal(sent)
    assert process.wait(timeout=30) == code
    assert [(tmp_path / f"stopped-{rank}").read_text() for rank in range(2)] == [str(int(received))] * 2


def test_second_interrupt_kills(tmp_path: Path, repository: Path) -> None:
    worker = f"""
signal.signal(signal.SIGTERM, lambda number, frame: Path({str(tmp_path)!r}, f'asked-{{rank}}').touch())
Path({str(tmp_path)!r}, f'ready-{{rank}}').touch()
for _ in range(600): time.sleep(0.1)
"""
    process = start_launcher(worker, tmp_path, repository)
    wait_for(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in range(2)))
    process.send_signal(signal.SIGINT)
    wait_for(lambda: all((tmp_path / f"asked-{rank}").exists() for rank in range(2)))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells children of a parent's death on Linux only")
def test_workers_do_not_outlive_a_killed_launcher(tmp_path: Path, repository: Path) -> None:
    worker = f"Path({str(tmp_path)!r}, f'pid-{{rank}}').write_text(str(os.getpid()))\ntime.sleep(60)"
    process = start_launcher(worker, tmp_path, repository)
    wait_for(lambda: all((tmp_path / f"pid-{rank}").exists() and (tmp_path / f"pid-{rank}").read_text() for rank in range(2)))
    process.kill()
    process.wait()
    wait_for(lambda: not any(is_running(int((tmp_path / f"pid-{rank}").read_text())) for rank in range(2)))


def start_launcher(worker: str, folder: Path, repository: Path) -> "subprocess.Popen[bytes]":
    """A launcher of two workers, in a process of its own that the test can signal."""
    program = "import sys; from pathlib import Path; from launch.processes import run_workers\n"
    program += f"sys.exit(run_workers({python(worker)!r}, num_processes=2, log_dir=Path({str(folder)!r})))"
    return subprocess.Popen([sys.executable, "-c", program], cwd=repository)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # a zombie has ended; whoever adopted it has not looked yet


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.05)


def test_thread_count_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert processes.rendezvous_environment(4)["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert processes.rendezvous_environment(4)["OMP_NUM_THREADS"] == "3"
