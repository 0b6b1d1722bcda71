"""How many bytes of bodies are held: those being received and those that the consumer has not taken yet."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Protocol

BASE_BYTES = 256 * 2**10
"""What a request reserves before it is sent: most images fit, and about what the socket layers buffer by themselves."""

MOST_READY = 64
"""No new request is sent while so many bodies wait for the consumer. More would be colder memory, not more speed."""


class Clock(Protocol):
    """The deadline of an attempt, which must not run while it waits for us and not for the server."""

    def pause(self) -> None:
        """Stops the clock."""

    def resume(self) -> None:
        """Lets it run on."""


class Claim:
    """What one body holds of a budget."""

    __slots__ = ("held", "in_lane", "is_ready")

    def __init__(self) -> None:
        self.held = 0
        self.in_lane = False
        self.is_ready = False


class ByteBudget:
    """A pool that everybody draws from, and beside it a lane for one body at a time, which may grow to `max_file_bytes` there.

    Whoever waits longest gets the lane when it is free, so something always proceeds: its holder never waits for memory, ends by
    its deadline, and leaves when the consumer takes it. Pool and lane together are `memory_bytes`; if that is less than two of the
    largest files, half of it is the pool, and one large body may exceed the whole.

    All for one event loop, except `take`, which the consumer's thread calls.
    """

    def __init__(self, memory_bytes: int, max_file_bytes: int) -> None:
        self.pool_bytes = max(memory_bytes - max_file_bytes, memory_bytes // 2)
        self.used_bytes = 0
        self.num_ready = 0
        self._lane: Claim | None = None
        self._growing: deque[tuple[Claim, int, asyncio.Future[None]]] = deque()
        self._entering: deque[tuple[Claim, int, asyncio.Future[None]]] = deque()
        self._taken: deque[Claim] = deque()
        self._wants_wake = False
        self._wake_after = 1

    async def admit(self) -> Claim:
        """Waits until another request may be sent."""
        claim = Claim()
        if self._growing or self._entering or self.num_ready >= MOST_READY or not self._fits(claim, BASE_BYTES):
            await self._wait(self._entering, claim, BASE_BYTES)
        return claim

    async def grow(self, claim: Claim, size: int, clock: Clock) -> None:
        """Waits until `claim` covers `size` bytes."""
        if claim.in_lane or size <= claim.held or (not self._growing and self._fits(claim, size)):
            return
        clock.pause()
        try:
            await self._wait(self._growing, claim, size)
        finally:
            clock.resume()

    def settle(self, claim: Claim, size: int) -> None:
        """The body is complete and waits for the consumer: holds its `size` from now on."""
        claim.is_ready = True
        self.num_ready += 1
        if not claim.in_lane:
            self.used_bytes += size - claim.held
            claim.held = size
        self._grant()

    def release(self, claim: Claim) -> None:
        """Gives everything back."""
        self._return(claim)
        self._grant()

    def take(self, claim: Claim, wake: Callable[[Callable[[], None]], object]) -> None:
        """As `release`, but from the consumer's thread. `wake` is called with what the loop is to run, if anybody waits there."""
        self._taken.append(claim)
        # The wish is set before the loop looks into `_taken` for the last time: either it sees the claim or we see the wish.
        if self._wants_wake and len(self._taken) >= self._wake_after:
            self._wants_wake = False
            wake(self.collect)

    def collect(self) -> None:
        """Books what the consumer has taken."""
        while True:
            try:
                claim = self._taken.popleft()
            except IndexError:
                break
            self._return(claim)
        self._grant()

    async def _wait(self, queue: deque[tuple[Claim, int, asyncio.Future[None]]], claim: Claim, size: int) -> None:
        turn = asyncio.get_running_loop().create_future()
        queue.append((claim, size, turn))
        self._wish()
        self.collect()
        try:
            await turn
        except asyncio.CancelledError:
            with contextlib.suppress(ValueError):
                queue.remove((claim, size, turn))
            self.release(claim)  # it may have been granted in the same moment
            raise

    def _grant(self) -> None:
        while self._growing and self._serve(self._growing):
            pass
        while self._entering and not self._growing and self.num_ready < MOST_READY and self._serve(self._entering):
            pass
        if self._growing or self._entering:
            self._wish()

    def _wish(self) -> None:
        """Asks the consumer to wake us: at its next take, or where bodies abound, after so many that the loop wakes once for all."""
        self._wake_after = MOST_READY // 2 if self.num_ready >= MOST_READY and not self._growing else 1
        self._wants_wake = True

    def _serve(self, queue: deque[tuple[Claim, int, asyncio.Future[None]]]) -> bool:
        """Serves the first in the queue if there is room; tells whether it left."""
        claim, size, turn = queue[0]
        if not turn.done() and not self._fits(claim, size):
            if self._lane is not None:
                return False
            self._lane = claim
            claim.in_lane = True
        queue.popleft()
        if not turn.done():
            turn.set_result(None)
        return True

    def _fits(self, claim: Claim, size: int) -> bool:
        """Books `size` for `claim` if the pool has room."""
        if self.used_bytes + size - claim.held > self.pool_bytes:
            return False
        self.used_bytes += size - claim.held
        claim.held = size
        return True

    def _return(self, claim: Claim) -> None:
        self.used_bytes -= claim.held
        claim.held = 0
        if claim.is_ready:
            claim.is_ready = False
            self.num_ready -= 1
        if self._lane is claim:
            self._lane = None
            claim.in_lane = False
