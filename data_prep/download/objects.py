"""Objects of s3:// and the like, through fsspec and in threads, under the same limits as http."""

import asyncio
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from configs.errors import UserError
from data_prep.download.body import Judge
from data_prep.download.budget import BASE_BYTES, ByteBudget, Claim
from data_prep.download.deadline import Deadline
from data_prep.download.retry import Failed
from data_prep.reasons import Drop

NUM_THREADS = 32
"""Objects in flight at most. Threads, because fsspec's own asynchronous side differs between file systems."""


class ObjectReader:
    """Reads objects whole: most in one ranged request, larger ones in three (beginning, size, rest).

    Credentials and endpoint come from the usual environment of the store's client.

    Args:
        needs_store: False: an object whose store cannot be used at all costs only itself.
    """

    def __init__(self, budget: ByteBudget, *, max_bytes: int, header_bytes: int, judge: Judge, timeout_s: float, needs_store: bool = True) -> None:
        self._budget = budget
        self._max_bytes = max_bytes
        self._header_bytes = header_bytes
        self._judge = judge
        self._timeout_s = timeout_s
        self._needs_store = needs_store
        self._threads: ThreadPoolExecutor | None = None
        self._stores: dict[str, Any] = {}

    async def read(self, url: str, claim: Claim, deadline: Deadline) -> bytes:
        """The object, judged by its beginning.

        Raises:
            Failed: it is not there, too large, not wanted, or the store did not deliver.
            UserError: the store cannot be used at all: no client, no credentials.
        """
        try:
            return await self._read(url, claim, deadline)
        except UserError as error:
            if self._needs_store:
                raise
            raise Failed("unreadable", str(error)) from None

    async def _read(self, url: str, claim: Claim, deadline: Deadline) -> bytes:
        store = self._store(url.partition("://")[0])
        first_bytes = max(BASE_BYTES, self._header_bytes)
        if first_bytes > claim.held:
            await self._budget.grow(claim, first_bytes, deadline)
        data: bytes = await self._call(url, store.cat_file, url, start=0, end=first_bytes)
        deadline.num_bytes += len(data)
        if len(data) < first_bytes:
            size = len(data)
        else:
            size = int((await self._call(url, store.info, url))["size"])
        if size > self._max_bytes:
            raise Failed("file_too_large", f"{size} bytes announced")
        try:
            self._judge(data[: self._header_bytes], size)
        except Drop as drop:
            raise Failed(drop.reason, drop.detail) from None
        if size > len(data):
            await self._budget.grow(claim, size, deadline)
            rest: bytes = await self._call(url, store.cat_file, url, start=len(data), end=size)
            deadline.num_bytes += len(rest)
            data += rest
        if len(data) != size:
            raise Failed("wrong_length", f"{len(data)} of {size} bytes")
        return data

    def close(self) -> None:
        """Starts nothing more; what is running ends by the store's own timeouts."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def _call(self, url: str, function: Any, *arguments: Any, **named: Any) -> Any:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="objects")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(function, *arguments, **named))
        except Exception as error:
            raise failure_of(error, url) from error

    def _store(self, scheme: str) -> Any:
        if scheme not in self._stores:
            try:
                import fsspec

                options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
                if scheme in ("s3", "s3a"):
                    limits = {"connect_timeout": self._timeout_s, "read_timeout": self._timeout_s}
                    options["config_kwargs"] = {**limits, "max_pool_connections": NUM_THREADS, "retries": {"max_attempts": 0}}
                store = fsspec.filesystem(scheme, **options)
                if hasattr(store, "retries"):  # s3fs: we do that ourselves, counted and with jitter
                    store.retries = 1
                self._stores[scheme] = store
            except (ImportError, ValueError) as error:
                raise UserError(
                    f"cannot open {scheme}:// addresses", got=error, fix='pip install -e ".[s3]", or remove them from the inputs'
                ) from None
        return self._stores[scheme]


def failure_of(error: Exception, url: str) -> Exception:
    """What an exception of a store's client means for one object; `UserError` where it means the whole store."""
    name = type(error).__name__
    if isinstance(error, FileNotFoundError):
        return Failed("missing_file", url)
    if isinstance(error, PermissionError):
        return Failed("http_403", str(error), status=403)
    if "Credentials" in name or "TokenRetrieval" in name:
        return UserError(f"cannot read {url}", got=error, fix="check AWS_PROFILE or AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL")
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)) or "Timeout" in name:
        return Failed("timeout", f"{name}: {error}")
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("aiobotocore", "aiohttp", "botocore"):
        return Failed("connection", f"{name}: {error}")
    return error
