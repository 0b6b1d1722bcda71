"""robots.txt after RFC 9309: fetched once per host, read by Protego, remembered for the life of the process."""

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from protego import Protego
from yarl import URL

from data_prep.download.opt_out import PRODUCT
from data_prep.download.retry import Failed
from data_prep.download.urls import origin_of

MOST_BYTES = 500 * 2**10
"""Of a file that are read, the least that RFC 9309 asks for; what comes after is ignored."""
BELIEVED_S = 24 * 3600.0
"""RFC 9309: not to be used for longer."""
MOST_HOSTS = 2_048


@dataclass(frozen=True, slots=True)
class Rules:
    """What one origin allows us: the file's rules, or nothing at all."""

    parser: Protego | None = None
    refusal: tuple[str, str] | None = None
    """(reason, detail) with which every address of the origin is refused."""
    delay_s: float = 0.0
    """Crawl-delay."""

    def check(self, url: URL) -> None:
        """Raises `Failed` if `url` may not be asked for."""
        if self.refusal is not None:
            raise Failed(*self.refusal, is_final=True)
        if self.parser is not None and not self.parser.can_fetch(str(url), PRODUCT):
            raise Failed("robots", f"disallowed by {origin_of(url)}/robots.txt", is_final=True)


EVERYTHING = Rules()


class RobotsCache(dict[str, "tuple[float, Rules]"]):
    """Origin -> (when to forget, by `time.monotonic()`; its rules). Shared by the downloaders of a process."""

    def find(self, origin: str) -> Rules | None:
        """What is known and not too old."""
        entry = self.get(origin)
        return entry[1] if entry is not None and entry[0] > time.monotonic() else None

    def keep(self, origin: str, rules: Rules) -> None:
        """Remembers; of too many origins the oldest are forgotten."""
        self.pop(origin, None)
        self[origin] = (time.monotonic() + BELIEVED_S, rules)
        while len(self) > MOST_HOSTS:
            with contextlib.suppress(KeyError, StopIteration, RuntimeError):  # another thread may be doing the same
                del self[next(iter(self))]


class Robots:
    """Asks each origin for its rules before the first image is asked for.

    A host whose file could not be had is believed to be down for as long as this object lives, and not for the whole process.

    Args:
        fetch: gets an address and returns the first `MOST_BYTES` of its body, having followed redirects and retried; raises `Failed`.
    """

    def __init__(self, fetch: Callable[[URL], Awaitable[bytes]], cache: RobotsCache) -> None:
        self._fetch = fetch
        self._cache = cache
        self._running: dict[str, asyncio.Task[Rules]] = {}
        self._unreachable: dict[str, Rules] = {}

    async def rules_for(self, url: URL) -> Rules:
        """The rules of the origin of `url`."""
        origin = origin_of(url)
        rules = self._cache.find(origin) or self._unreachable.get(origin)
        if rules is None:
            task = self._running.get(origin)
            if task is None:
                task = self._running[origin] = asyncio.ensure_future(self._load(origin, url.with_path("/robots.txt")))
                task.add_done_callback(lambda _: self._running.pop(origin, None))
            rules = await asyncio.shield(task)  # whoever gives up must not take the answer from the others
        return rules

    def cancel(self) -> None:
        """Ends what is being fetched."""
        for task in list(self._running.values()):
            task.cancel()

    async def _load(self, origin: str, url: URL) -> Rules:
        try:
            rules = parse_rules(await self._fetch(url.with_query(None).with_user(None)))
        except Failed as failure:
            rules = rules_without_file(failure)
        if rules.refusal is None:
            self._cache.keep(origin, rules)
        else:
            self._unreachable[origin] = rules
        return rules


def parse_rules(body: bytes) -> Rules:
    """The rules of a robots.txt. Whatever is in it, this does not fail."""
    text = body[:MOST_BYTES].decode("utf-8-sig", "replace")
    if not text.strip():
        return EVERYTHING
    parser = Protego.parse(text)
    delay = parser.crawl_delay(PRODUCT)
    return Rules(parser=parser, delay_s=delay if delay and math.isfinite(delay) else 0.0)


def rules_without_file(failure: Failed) -> Rules:
    """What RFC 9309 says of a file that could not be had: 4xx and endless redirects allow everything, all else nothing.

    A host that cannot be reached keeps its own reason, because that is why its images cannot be had either.
    """
    detail = f"{failure.detail} (robots.txt)"
    if failure.reason == "redirects" or (failure.reason.startswith("http_4") and failure.reason != "http_429"):
        return EVERYTHING
    if failure.reason.startswith("http_"):
        return Rules(refusal=("robots", f"robots.txt answered {failure.status}, which disallows everything for now"))
    if failure.reason in ("connection", "dns", "private_address", "timeout", "tls", "circuit_open"):
        return Rules(refusal=(failure.reason, detail))
    return Rules(refusal=("robots", f"{failure.reason}: {detail}"))
