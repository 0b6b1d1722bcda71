"""A function run in a child process, so that input which kills it (a fault in a decoder, memory) costs one sample and not the job.

Slow (every call crosses a process border), hence only for tasks whose worker has died before.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, Generic, TypeVar

from data_prep.reasons import Drop

Result = TypeVar("Result")


class Isolated(Generic[Result]):
    """Callable that runs `function(data)` in a child; a context manager, because it owns the child."""

    def __init__(self, function: Callable[[bytes], Result]) -> None:
        self._function = function
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Isolated[Result]":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, data: bytes) -> Result:
        """Raises:
        Drop: what the function raised; `corrupt` where the child died of it.
        """
        if self._pool is None:
            # spawn: a fork would copy the threads' locks of a Ray worker.
            self._pool = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))
        try:
            return self._pool.submit(self._function, data).result()
        except BrokenProcessPool:
            self._pool = None
            raise Drop("corrupt", "it killed the decoder") from None
