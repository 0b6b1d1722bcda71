"""The line that tells how a run of `jetway prep` is doing.

    images  41% |████▉       | 412,000 of 1,000,000, 612 img/s, 16 min left, 83 % kept (dns 6.2 %, http_404 4.1 %, timeout 2.0 %), ...

On a terminal it is one live line; elsewhere (a log file, a batch system) a plain line every half minute.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

from data_prep.heavy_hitters import ranked
from data_prep.run_stats import PartStats, merge, peak_rss_bytes
from data_prep.units import bytes_text, duration_text, share_text

WINDOW_S = 120.0
"""The speed shown is the mean over this time: tasks report a whole shard at once, so that a shorter one would jump."""
LIVE_S, PLAIN_S = 1.0, 30.0
"""Seconds between two lines, on a terminal and elsewhere."""


class Progress:
    """Shows the progress of `total` samples; a context manager.

    A thread of its own keeps the time left and the speed going between two updates, so that a stall shows.
    """

    def __init__(
        self,
        total: int,
        *,
        before: PartStats | None = None,
        file: TextIO | None = None,
        interval_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`before`: what an earlier run finished; `file`: where to show (stderr); `interval_s`: overrides `LIVE_S` or `PLAIN_S`."""
        self._total = total
        self._stats = merge(before or PartStats())
        self._file = file or sys.stderr
        self._clock = clock
        self._points = deque([(clock(), self._stats.read)])
        self._is_live = _num_columns(self._file) > 0
        self._interval_s = interval_s or (LIVE_S if self._is_live else PLAIN_S)
        self._bar: tqdm[Any] | None = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="progress", daemon=True)

    def __enter__(self) -> "Progress":
        if self._is_live:
            self._bar = tqdm(
                total=self._total,
                initial=self._stats.read,
                bar_format="images {percentage:3.0f}% |{bar:12}| {desc}",
                file=self._file,
                dynamic_ncols=True,
            )
        self._show()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        self._show()
        if self._bar is not None:
            self._bar.close()

    @property
    def stats(self) -> PartStats:
        """Everything so far, the earlier run included."""
        return self._stats

    @property
    def images_per_s(self) -> float:
        """Samples read a second, good and bad, over the last `WINDOW_S`; 0 before the first update."""
        (then, old), now = self._points[0], self._clock()
        return (self._stats.read - old) / (now - then) if now > then else 0.0

    def update(self, stats: PartStats) -> None:
        """Adds what one more task did."""
        with self._lock:
            self._stats = merge(self._stats, stats)
            now = self._clock()
            self._points.append((now, self._stats.read))
            while len(self._points) > 2 and self._points[1][0] <= now - WINDOW_S:
                self._points.popleft()
        if self._is_live:
            self._show()

    def note(self, text: str) -> None:
        """Prints a message above the live line."""
        if self._is_live:
            tqdm.write(text, file=self._file)
        else:
            print(text, file=self._file, flush=True)

    def line(self) -> str:
        """What is shown, without the bar."""
        with self._lock:
            stats, speed = self._stats, self.images_per_s
        parts = [f"{stats.read:,} of {self._total:,}"]
        if speed:
            parts.append(f"{speed:,.0f} img/s" if speed >= 10 else f"{speed:.1f} img/s")
            if left := max(0, self._total - stats.read):
                parts.append(f"{duration_text(left / speed)} left")
        if stats.read:
            lost = ", ".join(f"{reason} {share_text(number, stats.read)}" for reason, number in ranked(stats.dropped.items(), 3))
            parts.append(f"{share_text(stats.kept, stats.read)} kept" + (f" ({lost})" if lost else ""))
        if stats.peak_rss_bytes:
            parts.append(f"{bytes_text(stats.peak_rss_bytes)} a worker")
        parts.append(f"{bytes_text(_rss_bytes())} here")
        return ", ".join(parts)

    def _show(self) -> None:
        if self._bar is None:
            share = share_text(self._stats.read, self._total)
            print(f"images {share}: {self.line()}", file=self._file, flush=True)
            return
        line = self.line()
        with self._lock:
            self._bar.n = self._stats.read
            self._bar.set_description_str(line, refresh=False)
            self._bar.refresh()

    def _tick(self) -> None:
        while not self._closing.wait(self._interval_s):
            self._show()


def _num_columns(file: TextIO) -> int:
    """Width of the terminal that `file` is; 0 if it is none, or does not know its width (some containers): a live line would be empty."""
    if not file.isatty():
        return 0
    try:
        return os.get_terminal_size(file.fileno()).columns
    except (OSError, ValueError):
        return 0


def _rss_bytes() -> int:
    """Resident memory of this process now; its peak where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_rss_bytes()
