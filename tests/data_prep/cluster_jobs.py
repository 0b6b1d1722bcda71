"""What the tasks of `test_cluster` do. A module of its own, because workers import it."""

import ctypes
import os
import signal
import time
from pathlib import Path


def executions(folder: Path, number: int) -> int:
    """How often a task has begun."""
    return len(list(folder.glob(f"{number}.*")))


def run(folder: Path, number: int, how: str, seconds: float = 0.1) -> str:
    """Leaves a mark of this execution and does `how`; gives `NUMBER, EXECUTION`."""
    execution = executions(folder, number)
    (folder / f"{number}.{execution}").touch()
    time.sleep(seconds)
    if how == "fail":
        raise KeyError(f"task {number}")
    if how == "die" or (how == "die once" and execution == 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang" or (how == "hang once" and execution == 0):
        time.sleep(600)
    if how == "hang once with the lock" and execution == 0:
        ctypes.PyDLL(None).sleep(600)  # a PyDLL keeps the interpreter's lock, as a decoder in an endless loop does
    return f"{number}, {execution}"
