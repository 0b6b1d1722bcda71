"""One background thread that prepares items ahead. Its errors reach the consumer; it never outlives its owner; nothing hangs."""

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")

_POLL_S = 0.2
"""How often a blocked side looks whether the other is still there."""


class Prefetcher(Generic[T]):
    """Calls `produce(start)`, `produce(start + 1)`, ... in a thread and hands the results out in that order."""

    def __init__(self, produce: Callable[[int], T], *, start: int, depth: int) -> None:
        """
        Args:
            produce: makes item number n; called from one thread, or from the consumer's if `depth` is 0
            depth: items prepared ahead; 0 starts no thread
        """
        self._produce = produce
        self._next = start
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=max(depth, 1))
        self._thread = threading.Thread(target=self._run, args=(start,), name="jetway-reader", daemon=True) if depth else None
        if self._thread is not None:
            self._thread.start()

    def get(self) -> T:
        """The next item.

        Raises:
            whatever `produce` raised for it, now and at every later call; RuntimeError after `close`.
        """
        if self._error is not None:
            raise self._error
        if self._thread is None:
            item = self._produce(self._next)
            self._next += 1
            return item
        while True:
            if self._stop.is_set():
                raise RuntimeError("this prefetcher was closed")
            try:
                result, self._error = self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    raise RuntimeError("the reader thread is gone without a word (was it forked away?)") from None
                continue
            if self._error is not None:
                raise self._error
            return result  # type: ignore[return-value]  # None comes with an error only

    def close(self) -> None:
        """Stops the thread and waits for it (at most for the item that it is making). May be called twice."""
        self._stop.set()
        with suppress(queue.Empty):
            while True:  # room for what the thread is about to put, so that it need not wait out its poll
                self._queue.get_nowait()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            try:
                item: tuple[T | None, BaseException | None] = (self._produce(number), None)
            except BaseException as error:
                item = (None, error)
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=_POLL_S)
                    break
                except queue.Full:
                    continue
            if item[1] is not None:
                return
            number += 1
