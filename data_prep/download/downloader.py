"""Fetches many addresses at once: an event loop in a thread of its own, while the caller's thread decodes what has arrived."""

import asyncio
import contextlib
import functools
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType

from data_prep.config import DownloadConfig
from data_prep.download.addresses import AddressGuard
from data_prep.download.body import Judge
from data_prep.download.budget import ByteBudget, Claim
from data_prep.download.dns import DnsCache, Lookup, Resolver, open_lookup
from data_prep.download.fetcher import Fetcher
from data_prep.download.request import Answer, Request
from data_prep.download.robots import RobotsCache
from data_prep.download.session import allow_many_files, open_session

_log = logging.getLogger(__name__)

_STEP = 64
"""Requests that are taken from the caller at a time."""
_PATIENCE_S = 30.0
"""How long closing waits for the loop. Nothing in it takes long; this is for bugs."""

_Item = tuple[Answer, Claim | None] | BaseException


class Caches:
    """What downloaders of one process share: the workers of a cluster serve task after task."""

    def __init__(self) -> None:
        self.robots = RobotsCache()
        self.dns = DnsCache()


@functools.cache
def process_caches() -> Caches:
    """The caches of this process."""
    return Caches()


class Downloader:
    """A context manager that fetches. Use one per task; one `fetch` at a time.

    Args:
        config: every setting of `download`.
        max_file_bytes: a larger body is refused (reason `file_too_large`).
        memory_bytes: of bodies, received or being received, that the consumer has not taken (see `budget.ByteBudget`).
        share: tasks that run at once over the whole job; `config.per_host` is divided by it.
        judge: called in the loop's thread with the first `config.header_bytes` of a file (fewer if it is shorter) and its size in
            bytes, None if that is unknown; raises `Drop` to have the rest left where it is. Must be quick.
        lookup: resolves host names in place of the system's resolver.
        caches: of robots.txt and DNS, in place of those of the process.
        needs_stores: whether an object store that cannot be used at all (no client, no credentials) is an error, and not just the end of
            every request to it.
    """

    def __init__(
        self,
        config: DownloadConfig,
        *,
        max_file_bytes: int,
        memory_bytes: int,
        share: int,
        judge: Judge,
        lookup: Lookup | None = None,
        caches: Caches | None = None,
        needs_stores: bool = True,
    ) -> None:
        if max_file_bytes < 1 or memory_bytes < 1 or share < 1:
            raise ValueError("max_file_bytes, memory_bytes and share must be at least 1")
        self._config = config
        self._max_file_bytes = max_file_bytes
        self._share = share
        self._judge = judge
        self._lookup = lookup
        self._needs_stores = needs_stores
        self._caches = caches or process_caches()
        self._budget = ByteBudget(memory_bytes, max_file_bytes)
        self._answers: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._window = max(2 * _STEP, 4 * config.max_concurrency)
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_fetching = False
        self._fetcher: Fetcher
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._thread = threading.Thread(target=self._run, name="downloader", daemon=True)
        self._started: Future[None] = Future()

    def __enter__(self) -> "Downloader":
        self._thread.start()
        self._started.result()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(_PATIENCE_S)
            if self._thread.is_alive():
                _log.warning("the downloader's thread does not end; it is left behind")

    @property
    def concurrency(self) -> int:
        """Requests in flight that the network is trusted with at this moment."""
        return int(self._fetcher.concurrency.limit)

    def fetch(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Yields one answer for every request, in the order in which they arrive.

        Requests are taken from the iterable as needed, in this thread. What comes out is the caller's: it no longer counts as memory
        held. Closing the generator, or leaving the `with` block, abandons what is under way.

        Raises:
            UserError: an object store cannot be used at all.
        """
        if self._is_fetching:
            raise RuntimeError("this downloader is fetching already")
        self._is_fetching = True
        iterator = iter(requests)
        num_pending, is_exhausted = 0, False
        try:
            while True:
                has_room = not is_exhausted and num_pending + _STEP <= self._window
                if has_room:
                    batch = list(itertools.islice(iterator, _STEP))
                    is_exhausted = len(batch) < _STEP
                    num_pending += len(batch)
                    if batch:
                        self._call(self._begin, batch)
                if not num_pending:
                    if is_exhausted:
                        return
                    continue
                try:
                    item = self._next(wait=not has_room)
                except queue.Empty:
                    continue
                if isinstance(item, BaseException):
                    raise item
                num_pending -= 1
                answer, claim = item
                if claim is not None:
                    self._budget.take(claim, self._wake)
                del item, claim
                yield answer
                del answer
        finally:
            if num_pending:
                self._abandon()
            self._is_fetching = False

    def _next(self, *, wait: bool) -> _Item:
        """The next answer; raises `queue.Empty` if there is none and we are not to wait."""
        while True:
            try:
                return self._answers.get(timeout=1.0) if wait else self._answers.get_nowait()
            except queue.Empty:
                if not self._thread.is_alive():
                    raise RuntimeError("the downloader is closed") from None
                if not wait:
                    raise

    def _abandon(self) -> None:
        """Ends the tasks of an unfinished `fetch` and forgets their answers."""
        if self._thread.is_alive():
            done: Future[None] = Future()
            try:
                self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._cancel(done)))
                done.result(_PATIENCE_S)
            except RuntimeError:  # the loop has just been closed
                return
        while not self._answers.empty():
            item = self._answers.get_nowait()
            if not isinstance(item, BaseException) and item[1] is not None:
                self._budget.take(item[1], self._wake)

    def _wake(self, function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function)

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            raise RuntimeError("the downloader is closed") from None

    # From here on: the loop's thread.

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if not self._started.done():
                self._started.set_exception(error)
            self._answers.put(error)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        allow_many_files()
        config = self._config
        own_lookup = open_lookup() if self._lookup is None else None
        lookup = self._lookup or own_lookup
        assert lookup is not None
        guard = AddressGuard(config.allowed_networks)
        resolver = Resolver(lookup, guard, self._caches.dns, timeout_s=config.connect_timeout_s, failed_s=config.backoff_s)
        session = open_session(config, resolver, guard)
        self._fetcher = Fetcher(
            config,
            session,
            budget=self._budget,
            max_file_bytes=self._max_file_bytes,
            judge=self._judge,
            share=self._share,
            robots_cache=self._caches.robots,
            is_wanted=self._answers.empty,
            needs_store=self._needs_stores,
        )
        self._started.set_result(None)
        try:
            await self._stop.wait()
        finally:
            await self._cancel(Future())
            self._fetcher.close()
            await session.close()
            await resolver.close()
            if own_lookup is not None:
                await own_lookup.close()

    def _begin(self, batch: list[Request]) -> None:
        for request in batch:
            task = self._loop.create_task(self._serve_one(request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve_one(self, request: Request) -> None:
        try:
            self._answers.put(await self._fetcher.fetch(request))
        except Exception as error:  # a bug, or a store that cannot be used: the consumer must hear of it, not wait for ever
            self._answers.put(error)

    async def _cancel(self, done: "Future[None]") -> None:
        """Cancels until nothing runs: a deadline that expires in the same moment would swallow a single cancellation."""
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=0.1)
        done.set_result(None)
