"""Host names to addresses: looked up once, remembered (that there is none, too), and only those that may be connected to."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

from data_prep.download.addresses import AddressGuard, PrivateAddress

FOUND_S = 300.0
"""How long addresses are believed."""
NOT_FOUND_S = 300.0
"""How long it is believed that there is no such name."""
MOST_NAMES = 50_000

Lookup = Callable[[str], Awaitable[list[str]]]
"""Host name -> its addresses, IPv4 and IPv6; raises `DnsFailed`."""


class DnsFailed(OSError):  # noqa: N818 - a verdict, which aiohttp carries through its own exceptions
    """A name did not resolve. `is_final`: there is no such name; else the resolver may know better later."""

    def __init__(self, detail: str, *, is_final: bool) -> None:
        super().__init__(None, detail)
        self.detail = detail
        self.is_final = is_final


class DnsCache(dict[str, "tuple[float, list[str] | DnsFailed]"]):
    """Name -> (when to forget, by `time.monotonic()`; what was found). Shared by the downloaders of a process."""

    def find(self, name: str) -> "list[str] | DnsFailed | None":
        """What is known and not too old."""
        entry = self.get(name)
        return entry[1] if entry is not None and entry[0] > time.monotonic() else None

    def keep(self, name: str, found: "list[str] | DnsFailed", seconds: float) -> None:
        """Remembers; of too many names the oldest are forgotten."""
        self.pop(name, None)
        self[name] = (time.monotonic() + seconds, found)
        while len(self) > MOST_NAMES:
            with contextlib.suppress(KeyError, StopIteration, RuntimeError):  # another thread may be doing the same
                del self[next(iter(self))]


class Resolver(AbstractResolver):
    """For aiohttp's connector, which connects to nothing but what `resolve` returns: a name that changes its mind gains nothing.

    Args:
        failed_s: how long a failure that may heal is remembered. One lookup then serves all who wait for the host.
    """

    def __init__(self, lookup: Lookup, guard: AddressGuard, cache: DnsCache, *, timeout_s: float, failed_s: float) -> None:
        self._lookup = lookup
        self._guard = guard
        self._cache = cache
        self._timeout_s = timeout_s
        self._failed_s = failed_s
        self._running: dict[str, asyncio.Task[list[str] | DnsFailed]] = {}

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        """The addresses of a name that may be connected to.

        Raises:
            DnsFailed: there are none.
            PrivateAddress: there are, but none of them may be connected to.
        """
        found = self._cache.find(host)
        if found is None:
            task = self._running.get(host)
            if task is None:
                task = self._running[host] = asyncio.ensure_future(self._ask(host))
                task.add_done_callback(lambda _: self._running.pop(host, None))
            found = await asyncio.shield(task)  # whoever gives up must not take the answer from the others
        if isinstance(found, DnsFailed):
            raise DnsFailed(found.detail, is_final=found.is_final)
        allowed = [address for address in found if self._guard.allows(address)]
        if not allowed:
            raise PrivateAddress(None, f"{host} is {found[0]}, no public address")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in allowed
        ]

    async def close(self) -> None:
        """Ends the lookups that run."""
        for task in list(self._running.values()):
            task.cancel()

    async def _ask(self, host: str) -> "list[str] | DnsFailed":
        found: list[str] | DnsFailed
        try:
            found = await asyncio.wait_for(self._lookup(host), self._timeout_s) or DnsFailed("no address", is_final=True)
        except asyncio.TimeoutError:
            found = DnsFailed("the resolver did not answer in time", is_final=False)
        except DnsFailed as failure:
            found = failure.with_traceback(None)
        if isinstance(found, DnsFailed):
            self._cache.keep(host, found, NOT_FOUND_S if found.is_final else self._failed_s)
        else:
            self._cache.keep(host, found, FOUND_S)
        return found


class ThreadedLookup:
    """The C library's resolver in threads."""

    _ERRORS = {
        socket.EAI_NONAME: ("NXDOMAIN", True),
        socket.EAI_AGAIN: ("SERVFAIL or timeout", False),
        socket.EAI_FAIL: ("SERVFAIL", False),
    }

    def __init__(self, num_threads: int = 16) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="dns")

    async def __call__(self, host: str) -> list[str]:
        """The addresses of a name; raises `DnsFailed`."""
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._threads, _getaddrinfo, host)
        except socket.gaierror as error:
            detail, is_final = self._ERRORS.get(error.args[0], (str(error.args[-1]), "NODATA" in str(error)))
            raise DnsFailed(detail, is_final=is_final) from None
        except UnicodeError as error:
            raise DnsFailed(f"no host name: {error}", is_final=True) from None
        return list(dict.fromkeys(str(where[0]) for _, _, _, _, where in found))

    async def close(self) -> None:
        """Lets the threads end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class AresLookup:
    """c-ares through aiodns: no thread waits, and NXDOMAIN and SERVFAIL are told apart. Must be made inside the loop.

    Args:
        options: of `aiodns.DNSResolver`, such as `nameservers`.
    """

    _ERRORS = {
        1: ("no address", True),  # ARES_ENODATA
        2: ("FORMERR", False),
        3: ("SERVFAIL", False),
        4: ("NXDOMAIN", True),
        5: ("NOTIMP", False),
        6: ("REFUSED", False),
        8: ("no host name", True),  # ARES_EBADNAME
        11: ("the resolver refused the connection", False),
        12: ("the resolver did not answer in time", False),
    }

    def __init__(self, **options: Any) -> None:
        import aiodns

        self._error = aiodns.error.DNSError
        self._resolver = aiodns.DNSResolver(loop=asyncio.get_running_loop(), **options)

    async def __call__(self, host: str) -> list[str]:
        """The addresses of a name; raises `DnsFailed`."""
        try:
            found = await self._resolver.getaddrinfo(host, family=socket.AF_UNSPEC, port=0, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
        except self._error as error:
            detail, is_final = self._ERRORS.get(error.args[0], (str(error.args[-1]), False))
            raise DnsFailed(detail, is_final=is_final) from None
        except (UnicodeError, ValueError) as error:
            raise DnsFailed(f"no host name: {error}", is_final=True) from None
        return list(dict.fromkeys(_text(node.addr[0]) for node in found.nodes))

    async def close(self) -> None:
        """Ends the lookups that run."""
        if hasattr(self._resolver, "close"):
            await self._resolver.close()
        else:  # aiodns before 3.5
            self._resolver.cancel()


def open_lookup() -> "AresLookup | ThreadedLookup":
    """The better of the two that is installed and works here."""
    try:
        return AresLookup()
    except (ImportError, OSError):  # no aiodns, or c-ares found no resolver configuration to watch
        return ThreadedLookup()


def _getaddrinfo(host: str) -> list[tuple[Any, ...]]:
    return list(socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM))


def _text(address: bytes | str) -> str:
    return address.decode("ascii") if isinstance(address, bytes) else address
