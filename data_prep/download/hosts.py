"""What the downloader knows of each host: how much it may be asked at once, when again, and whether it is worth asking at all."""

import asyncio

from data_prep.download.limits import Slots
from data_prep.download.retry import Failed

SICK = frozenset({"connection", "dns", "http_429", "protocol", "timeout", "tls", "wrong_length"})
"""The reasons, beside `http_5..`, that speak against the host and not only against one address."""


class Host:
    """One host name or address, whatever the port.

    Attributes:
        slots: requests in flight; halved after a 429, and slowly back up.
        num_pending: requests that were begun and are not answered yet, most of them waiting.
        num_responses: whatever their status.
    """

    def __init__(self, most: int, most_failures: int) -> None:
        self.slots = Slots(most)
        self.num_pending = 0
        self.num_responses = 0
        self._most = most
        self._most_failures = most_failures
        self._failures_in_row = 0
        self._last_failure = ""
        self._resume_at = 0.0
        self._next_turn = 0.0

    @property
    def keeps_alive(self) -> bool:
        """Whether a connection is likely to be used again. Thousands of hosts asked once would otherwise exhaust the file descriptors."""
        return self.num_pending > 1 or self.num_responses > 1

    def check(self) -> None:
        """Raises `Failed` with `circuit_open` once the host has failed too often in a row."""
        if self._failures_in_row >= self._most_failures:
            raise Failed("circuit_open", f"{self._failures_in_row} failures in a row, the last: {self._last_failure}")

    def succeeded(self) -> None:
        """The host answered sensibly, be it with 404."""
        self._failures_in_row = 0
        if self.slots.limit < self._most:
            self.slots.limit = min(float(self._most), self.slots.limit + 1.0 / self.slots.limit)
            self.slots.wake()

    def failed(self, failure: Failed) -> None:
        """A request to the host failed for good, or nothing listens there."""
        self._failures_in_row += 1
        self._last_failure = f"{failure.reason} {failure.detail}".strip()

    def slow_down(self, pause_s: float) -> None:
        """After a 429: half as many requests at once, and none for `pause_s`."""
        self.slots.limit = max(1.0, self.slots.limit / 2)
        self._resume_at = max(self._resume_at, asyncio.get_running_loop().time() + pause_s)

    async def rest(self) -> None:
        """Waits until the host may be asked again."""
        while (pause := self._resume_at - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(pause)

    async def wait_turn(self, delay_s: float, longest_s: float) -> None:
        """Waits so that requests start `delay_s` apart, as a Crawl-delay asks.

        Raises:
            Failed: the turn would come only after `longest_s`.
        """
        now = asyncio.get_running_loop().time()
        turn = max(now, self._next_turn)
        if turn - now > longest_s:
            raise Failed("robots", f"Crawl-delay: {delay_s:g} leaves no turn within {longest_s:g} s", is_final=True)
        self._next_turn = turn + delay_s
        if turn > now:
            await asyncio.sleep(turn - now)


class Hosts(dict[str, Host]):
    """Host name -> what is known of it; made on first use."""

    def __init__(self, most: int, most_failures: int) -> None:
        super().__init__()
        self._settings = (most, most_failures)

    def __missing__(self, name: str) -> Host:
        self[name] = host = Host(*self._settings)
        return host
