"""Signals that ask a run to stop: remembered, agreed on by all ranks after a step, answered with a checkpoint and exit code 0."""

import signal
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""SLURM sends USR1 some time before the limit; SIGTERM comes from schedulers and launchers, SIGINT from Ctrl-C."""


class StopRequest:
    """Remembers a stop signal. As a context manager it installs the handlers, and restores the old ones on leaving.

    A signal may reach one rank only, or all at different moments: `agreed` makes it the same step for all.
    """

    def __init__(self, signals: Sequence[signal.Signals] = STOP_SIGNALS) -> None:
        self._signals = signals
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def received(self) -> str | None:
        """Name of the signal that reached this process, if any."""
        return None if self._received is None else self._received.name

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank has been asked to stop. Collective over all ranks; every rank gets the same answer."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self._received is not None
        flag = torch.tensor([float(self._received is not None)], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def __enter__(self) -> "StopRequest":
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # Nothing else: a signal during a save must not disturb it. Only a person who presses Ctrl-C twice is in a hurry.
        if number == signal.SIGINT and self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number)
