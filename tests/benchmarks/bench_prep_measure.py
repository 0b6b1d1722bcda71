"""What a command costs, with all processes that it starts: wall time, CPU time, memory. Linux only.

CPU time is the larger of two counts, because each misses something: what the kernel charged to the command and to every orphan that
it left behind (`wait4`; without children whose parent never waited for them), and the sum of the last reading of every process that
was seen (`/proc`, every fifth of a second; without what came after the last reading).
"""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

INTERVAL_S = 0.2
"""Between two readings of CPU time and resident memory."""
PSS_EVERY = 5
"""Proportional memory walks page tables: only every so many readings."""
ORPHANS_S = 15.0
"""How long processes that the command left behind may take to end before they are killed."""

_PR_SET_CHILD_SUBREAPER = 36
_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Cost of one command, its descendants included."""

    returncode: int
    wall_s: float
    cpu_s: float
    peak_rss: int
    """Largest sum of resident bytes over the processes; memory that several share counts for each."""
    peak_pss: int
    """Largest sum of proportional bytes: shared memory counts once."""
    peak_main_rss: int
    """Largest resident bytes of the command's own process alone."""


@dataclass(slots=True, kw_only=True)
class _Peaks:
    rss: int = 0
    pss: int = 0
    main: int = 0


def measure(command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None, stop_after_s: float | None = None) -> Usage:
    """Runs a command to its end (or for `stop_after_s`, then ends its whole tree) and returns what it took.

    Output goes to `log`. The command inherits this process's CPU affinity.
    """
    _adopt_orphans()
    before = set(descendants(os.getpid()))
    peaks, cpu = _Peaks(), dict[tuple[int, int], float]()
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})})
        usages, turn = {}, 0
        while True:
            pids = [pid for pid in descendants(os.getpid()) if pid not in before]
            _read(pids, process.pid, peaks, cpu, with_pss=turn % PSS_EVERY == 0)
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if stop_after_s is not None and time.perf_counter() - start > stop_after_s:
                _kill(pids)
            turn += 1
            time.sleep(INTERVAL_S)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)  # Popen must not wait for a process that is gone
        usages[process.pid] = used.ru_utime + used.ru_stime
        usages |= _reap_orphans(before, peaks, cpu, process.pid)
    return Usage(
        returncode=process.returncode,
        wall_s=wall,
        cpu_s=max(sum(usages.values()), sum(cpu.values())),
        peak_rss=peaks.rss,
        peak_pss=peaks.pss,
        peak_main_rss=peaks.main,
    )


def cpu_seconds(pid: int) -> float:
    """CPU time of one running process, without its children."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICK


def _adopt_orphans() -> None:
    """Makes this process the parent of whatever its descendants leave behind, so that their time is charged here."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _reap_orphans(before: set[int], peaks: _Peaks, cpu: dict[tuple[int, int], float], main: int) -> dict[int, float]:
    """Waits for what the command left behind, kills what does not end, and returns their CPU seconds by process id."""
    usages: dict[int, float] = {}
    deadline = time.monotonic() + ORPHANS_S
    while pids := [pid for pid in descendants(os.getpid()) if pid not in before]:
        _read(pids, main, peaks, cpu, with_pss=False)
        if time.monotonic() > deadline:
            _kill(pids)
        for pid in pids:
            with suppress(ChildProcessError):  # a grandchild: its turn comes when its parent has ended
                ended, _, used = os.wait4(pid, os.WNOHANG)
                if ended:
                    usages[pid] = used.ru_utime + used.ru_stime
        time.sleep(0.05)
    return usages


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _read(pids: Sequence[int], main: int, peaks: _Peaks, cpu: dict[tuple[int, int], float], *, with_pss: bool) -> None:
    rss = pss = 0
    for pid in pids:
        with suppress(OSError, IndexError, ValueError):  # it may end between two reads
            fields = _stat(pid)
            cpu[pid, int(fields[19])] = (int(fields[11]) + int(fields[12])) / _TICK  # process ids come round: so does the start time
            resident = int(fields[21]) * _PAGE
            rss += resident
            if pid == main:
                peaks.main = max(peaks.main, resident)
            if with_pss:
                pss += _pss(pid)
    peaks.rss, peaks.pss = max(peaks.rss, rss), max(peaks.pss, pss)


def descendants(root: int) -> list[int]:
    """Processes that a process started, and those that they started, and so on."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with suppress(OSError, IndexError, ValueError):
                children.setdefault(int(_stat(int(name))[1]), []).append(int(name))
    found, waiting = [], [root]
    while waiting:
        for pid in children.get(waiting.pop(), ()):
            found.append(pid)
            waiting.append(pid)
    return found


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third (state) on; the second, the name, may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
