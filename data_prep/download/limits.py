"""How many requests are in flight: slots that tasks wait for in turn, and the number of them that adapts to what the network takes."""

import asyncio
from collections import deque


class Slots:
    """A semaphore whose limit may change at any time. First come, first served. For one event loop."""

    def __init__(self, limit: float) -> None:
        self.limit = float(limit)
        self.num_active = 0
        self._waiters: deque[asyncio.Future[None]] = deque()

    @property
    def num_waiting(self) -> int:
        """Tasks that wait for a slot (and some that gave up)."""
        return len(self._waiters)

    async def acquire(self) -> None:
        """Takes a slot, waiting for one if need be. A cancelled wait takes none."""
        if not self._waiters and self.num_active < int(self.limit):
            self.num_active += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiters.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release()
            raise

    def release(self) -> None:
        """Gives a slot back."""
        self.num_active -= 1
        self.wake()

    def wake(self) -> None:
        """Lets in whoever the limit now has room for."""
        while self._waiters and self.num_active < int(self.limit):
            turn = self._waiters.popleft()
            if not turn.done():
                self.num_active += 1
                turn.set_result(None)


class Concurrency(Slots):
    """The slots of a whole downloader: additive increase, multiplicative decrease, between 1 and `most`.

    While nothing has gone wrong yet every success adds one; after the first burst of failures a whole round of successes does.
    A burst is a round of outcomes (as many as there are slots) of which at least half were timeouts, broken connections, failing
    resolvers or 429: single hosts that are down do not reach that, a line or a resolver that is overrun does.
    """

    _LEAST_ROUND = 16

    def __init__(self, start: int, most: int) -> None:
        super().__init__(min(start, most))
        self._most = most
        self._is_exploring = True
        self._num_outcomes = 0
        self._num_congested = 0

    def succeeded(self, *, is_wanted: bool) -> None:
        """A response arrived. `is_wanted`: the consumer waits for more; if it does not, more requests at once would only cost memory."""
        if is_wanted and self.limit < self._most and self.num_active + 1 >= int(self.limit):
            self.limit = min(float(self._most), self.limit + (1.0 if self._is_exploring else 1.0 / self.limit))
            self.wake()
        self._count(0)

    def congested(self) -> None:
        """A timeout, a broken connection, a resolver that failed, or a 429."""
        self._count(1)

    def _count(self, congested: int) -> None:
        self._num_outcomes += 1
        self._num_congested += congested
        if self._num_outcomes >= max(self._LEAST_ROUND, int(self.limit)):
            if 2 * self._num_congested >= self._num_outcomes:
                self.limit = max(1.0, self.limit / 2)
                self._is_exploring = False
            self._num_outcomes = self._num_congested = 0
