"""One request from its address to its answer: redirects, robots.txt, limits, retries. Runs in the event loop."""

import asyncio
import functools
from collections.abc import Awaitable, Callable

import aiohttp
from yarl import URL

from data_prep.config import DownloadConfig
from data_prep.download.addresses import AddressGuard, literal_address
from data_prep.download.attempt import Receiver, exchange
from data_prep.download.body import BodyReader, Judge
from data_prep.download.budget import ByteBudget, Claim
from data_prep.download.deadline import Deadline
from data_prep.download.hosts import SICK, Host, Hosts
from data_prep.download.limits import Concurrency
from data_prep.download.objects import ObjectReader
from data_prep.download.request import Answer, Request
from data_prep.download.retry import Failed, backoff
from data_prep.download.robots import MOST_BYTES, Robots, RobotsCache
from data_prep.download.urls import parse_url
from data_prep.reasons import Drop

_ROBOTS_REDIRECTS = 5
_CONGESTION = frozenset({"connection", "dns", "http_429", "timeout"})


class Tally:
    """What is counted while one request is served."""

    __slots__ = ("final_url", "is_last_attempt", "is_under_way", "num_attempts", "num_bytes", "started", "status")

    def __init__(self, url: str) -> None:
        self.status = 0
        self.num_attempts = 0
        self.num_bytes = 0
        self.final_url = url
        self.started = 0.0
        self.is_last_attempt = False
        self.is_under_way = False

    def begin_hop(self) -> None:
        """Something is asked for: counts as an attempt if it is the first time in this one."""
        if not self.num_attempts:
            self.started = asyncio.get_running_loop().time()
        if not self.is_under_way:
            self.num_attempts += 1
        self.is_under_way = True


class Fetcher:
    """Serves requests one by one; what they share (hosts, limits, memory) is kept here.

    Args:
        share: tasks that run at once over the whole job; `per_host` is divided by it.
        is_wanted: whether the consumer waits for answers at this moment.
    """

    def __init__(
        self,
        config: DownloadConfig,
        session: aiohttp.ClientSession,
        *,
        budget: ByteBudget,
        max_file_bytes: int,
        judge: Judge,
        share: int,
        robots_cache: RobotsCache,
        is_wanted: Callable[[], bool],
        needs_store: bool = True,
    ) -> None:
        self._config = config
        self._session = session
        self._guard = AddressGuard(config.allowed_networks)
        self._budget = budget
        self._is_wanted = is_wanted
        self._hosts = Hosts(max(1, config.per_host // share), config.host_failures)
        self._robots = Robots(self._fetch_robots, robots_cache)
        self.concurrency = Concurrency(config.concurrency, config.max_concurrency)
        tokens = frozenset(token.lower() for token in config.respect_tokens) if config.respect_opt_out else None
        images = BodyReader(budget, max_bytes=max_file_bytes, header_bytes=config.header_bytes, judge=judge)
        self._image = Receiver(images, tokens)
        files = BodyReader(budget, max_bytes=MOST_BYTES, header_bytes=MOST_BYTES, judge=_anything, cuts=True)
        self._robots_file = Receiver(files, None)
        self._objects = ObjectReader(
            budget, max_bytes=max_file_bytes, header_bytes=config.header_bytes, judge=judge, timeout_s=config.timeout_s, needs_store=needs_store
        )

    async def fetch(self, request: Request) -> tuple[Answer, Claim | None]:
        """The answer to a request, and what its body holds of the budget. Raises nothing but bugs and `UserError`."""
        tally = Tally(request.url)
        data, claim, drop = b"", None, None
        try:
            url = parse_url(request.url)
            attempt = functools.partial(self._follow, url) if isinstance(url, URL) else functools.partial(self._read_object, url)
            data, claim = await self._persist(tally, attempt)
        except Failed as failure:
            tally.status = failure.status
            drop = Drop(failure.reason, failure.detail)
        answer = Answer(
            number=request.number,
            data=data,
            drop=drop,
            status=tally.status,
            seconds=asyncio.get_running_loop().time() - tally.started if tally.num_attempts else 0.0,
            num_attempts=tally.num_attempts,
            num_bytes=tally.num_bytes,
            final_url=tally.final_url,
        )
        return answer, claim

    def close(self) -> None:
        """Ends what runs on its own."""
        self._robots.cancel()
        self._objects.close()

    async def _persist(self, tally: Tally, attempt: Callable[[Tally], Awaitable[tuple[bytes, Claim]]]) -> tuple[bytes, Claim]:
        """Attempts until it succeeds, cannot heal, or `retries` are used up."""
        number = 0
        while True:
            tally.is_last_attempt = number == self._config.retries
            tally.is_under_way = False
            try:
                return await attempt(tally)
            except Failed as failure:
                if tally.is_last_attempt or not failure.can_heal:
                    raise
                pause_s = failure.retry_after_s
            number += 1
            if pause_s is None:
                pause_s = backoff(tally.final_url, number, self._config.backoff_s)
            await asyncio.sleep(pause_s)

    async def _follow(self, url: URL, tally: Tally) -> tuple[bytes, Claim]:
        """One attempt: the address and whatever it redirects to, within one deadline."""
        deadline = Deadline(self._config.timeout_s)
        seen = {url}
        try:
            while True:
                host = self._hosts[url.raw_host or ""]
                host.num_pending += 1
                try:
                    self._check_address(url)
                    host.check()
                    if self._config.respect_robots:
                        await self._check_robots(url, host)
                    result = await self._ask(url, host, self._image, deadline, tally)
                finally:
                    host.num_pending -= 1
                if not isinstance(result, URL):
                    tally.status = 200
                    return result
                url = result
                if url in seen:
                    raise Failed("redirects", f"a loop through {url}")
                if len(seen) > self._config.max_redirects:
                    raise Failed("redirects", f"more than {self._config.max_redirects}")
                seen.add(url)
                tally.final_url = str(url)
        finally:
            tally.num_bytes += deadline.num_bytes

    async def _fetch_robots(self, url: URL) -> bytes:
        """The body of a robots.txt, for `Robots`."""
        tally = Tally(str(url))

        async def attempt(tally: Tally) -> tuple[bytes, Claim]:
            deadline, where = Deadline(self._config.timeout_s), url
            for _ in range(_ROBOTS_REDIRECTS + 1):
                self._check_address(where)
                host = self._hosts[where.raw_host or ""]
                host.num_pending += 1
                try:
                    result = await self._ask(where, host, self._robots_file, deadline, tally)
                finally:
                    host.num_pending -= 1
                if not isinstance(result, URL):
                    return result
                where = result
            raise Failed("redirects", f"more than {_ROBOTS_REDIRECTS}")

        body, claim = await self._persist(tally, attempt)
        self._budget.release(claim)
        return body

    async def _check_robots(self, url: URL, host: Host) -> None:
        rules = await self._robots.rules_for(url)
        rules.check(url)
        if rules.delay_s:
            await host.wait_turn(rules.delay_s, self._config.max_retry_after_s)

    def _check_address(self, url: URL) -> None:
        """Addresses in figures are decided here, names where they are resolved."""
        host = url.raw_host or ""
        if host[-1:].isdigit() or ":" in host:
            address = literal_address(host)
            if address is not None and not self._guard.allows(host):
                raise Failed("private_address", f"{address} is no public address")

    async def _ask(self, url: URL, host: Host, receiver: Receiver, deadline: Deadline, tally: Tally) -> "tuple[bytes, Claim] | URL":
        """One exchange, when host, concurrency and memory permit. A body comes with its claim.

        The three are taken in this order and all given back after every hop, so that nobody waits for one while holding a later one.
        """
        await host.slots.acquire()
        try:
            await host.rest()
            host.check()  # it may have broken down while we waited
            await self.concurrency.acquire()
            try:
                claim = await self._budget.admit()
                try:
                    return await self._exchange(url, host, receiver, claim, deadline, tally)
                except BaseException:
                    self._budget.release(claim)
                    raise
            finally:
                self.concurrency.release()
        finally:
            host.slots.release()

    async def _exchange(
        self, url: URL, host: Host, receiver: Receiver, claim: Claim, deadline: Deadline, tally: Tally
    ) -> "tuple[bytes, Claim] | URL":
        tally.begin_hop()
        try:
            with deadline:
                result = await exchange(self._session, url, lambda response: receiver.receive(response, claim, deadline), keep_alive=host.keeps_alive)
        except Failed as failure:
            self._learn(host, failure, tally)
            raise
        host.num_responses += 1
        host.succeeded()
        self.concurrency.succeeded(is_wanted=self._is_wanted())
        if isinstance(result, URL):
            self._budget.release(claim)
            return result
        self._budget.settle(claim, len(result))
        return result, claim

    def _learn(self, host: Host, failure: Failed, tally: Tally) -> None:
        """What a failure says about the host and about the network."""
        longest_s = self._config.max_retry_after_s
        if failure.retry_after_s is not None and failure.retry_after_s > longest_s:
            failure.is_final = True
            failure.detail = f"Retry-After: {failure.retry_after_s:.0f} s is more than download.max_retry_after_s"
        if failure.status:
            host.num_responses += 1
        if failure.reason == "http_429" or failure.retry_after_s is not None:
            host.slow_down(0.0 if failure.is_final else failure.retry_after_s or 0.0)
        if failure.reason in _CONGESTION and not failure.is_final:
            self.concurrency.congested()
        else:
            self.concurrency.succeeded(is_wanted=False)
        if failure.reason not in SICK and not failure.reason.startswith("http_5"):
            host.succeeded()
        elif failure.is_unreachable or tally.is_last_attempt or (failure.is_final and failure.reason != "dns"):
            host.failed(failure)  # a name that does not exist is remembered by the resolver, and keeps its own reason

    async def _read_object(self, url: str, tally: Tally) -> tuple[bytes, Claim]:
        """One attempt at an object store. Its own client spreads the load over hosts, so there is no limit per host."""
        await self.concurrency.acquire()
        try:
            claim = await self._budget.admit()
            try:
                tally.begin_hop()
                deadline = Deadline(self._config.timeout_s)
                try:
                    with deadline:
                        data = await self._objects.read(url, claim, deadline)
                finally:
                    tally.num_bytes += deadline.num_bytes
            except BaseException as error:
                self._budget.release(claim)
                if isinstance(error, Failed) and error.reason in _CONGESTION:
                    self.concurrency.congested()
                raise
            self.concurrency.succeeded(is_wanted=self._is_wanted())
            self._budget.settle(claim, len(data))
            return data, claim
        finally:
            self.concurrency.release()


def _anything(prefix: bytes, size: int | None) -> None:
    """A judge that lets everything pass."""
