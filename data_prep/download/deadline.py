"""The time that one attempt may take."""

import asyncio
import sys
from types import TracebackType

from data_prep.download.retry import Failed


class Deadline:
    """Cancels the task that it was made in when `seconds` of running time are used up, which becomes a `Failed` with `timeout`.

    `with deadline:` runs the clock, and may be entered again for what is left; `pause` and `resume` stop it meanwhile, while we wait
    for our own memory and not for the server. Counts the bytes that were received, for the message and the statistics.
    """

    def __init__(self, seconds: float) -> None:
        self.is_over = False
        self.num_bytes = 0
        self._seconds = seconds
        self._left_s = seconds
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None
        self._started = 0.0

    def __enter__(self) -> "Deadline":
        self.resume()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.pause()
        if self.is_over:
            assert self._task is not None
            if sys.version_info >= (3, 11):
                self._task.uncancel()
            if kind is asyncio.CancelledError:
                raise Failed("timeout", f"{self.num_bytes} bytes after {self._seconds:g} s") from None

    def pause(self) -> None:
        """Stops the clock."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._left_s -= self._loop.time() - self._started

    def resume(self) -> None:
        """Lets it run on."""
        self._started = self._loop.time()
        self._timer = self._loop.call_at(self._started + max(0.0, self._left_s), self._expire)

    def _expire(self) -> None:
        assert self._task is not None
        self._timer = None
        self.is_over = True
        self._task.cancel()
