import asyncio
import random
from collections.abc import Callable

import pytest

from data_prep.download.budget import BASE_BYTES, MOST_READY, ByteBudget, Claim

KIB = 2**10
MIB = 2**20


class Clock:
    """Remembers whether it runs."""

    def __init__(self) -> None:
        self.is_running = True

    def pause(self) -> None:
        self.is_running = False

    def resume(self) -> None:
        self.is_running = True


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_requests_wait_for_room_and_enter_when_something_ends() -> None:
    async def scenario() -> None:
        budget = ByteBudget(4 * BASE_BYTES, BASE_BYTES)  # three in the pool, one in the lane
        waiting = [asyncio.ensure_future(budget.admit()) for _ in range(6)]
        await settle()
        assert [task.done() for task in waiting] == [True] * 4 + [False] * 2
        budget.release(waiting[0].result())
        await settle()
        assert [task.done() for task in waiting] == [True] * 5 + [False]
        waiting[5].cancel()

    asyncio.run(scenario())


def test_a_body_that_waits_for_memory_does_not_run_out_of_time_and_takes_the_lane() -> None:
    async def scenario() -> None:
        budget = ByteBudget(2 * MIB, MIB)
        first, second, third = [await budget.admit() for _ in range(3)]
        clock = Clock()
        await budget.grow(first, MIB - 2 * BASE_BYTES, clock)  # fills the pool
        await budget.grow(second, MIB, clock)  # the lane
        assert second.in_lane
        await budget.grow(second, 10 * MIB, clock)  # where nobody waits
        growing = asyncio.ensure_future(budget.grow(third, MIB, clock))
        await settle()
        assert not growing.done()
        assert not clock.is_running
        budget.release(second)
        await settle()
        assert growing.done()
        assert clock.is_running

    asyncio.run(scenario())


def test_growing_bodies_come_before_new_requests() -> None:
    async def scenario() -> None:
        budget = ByteBudget(4 * BASE_BYTES, BASE_BYTES)
        held = [await budget.admit() for _ in range(4)]
        entering = asyncio.ensure_future(budget.admit())
        growing = asyncio.ensure_future(budget.grow(held[0], 2 * BASE_BYTES, Clock()))
        await settle()
        budget.release(held[1])
        await settle()
        assert growing.done()
        assert not entering.done()
        entering.cancel()

    asyncio.run(scenario())


def test_no_request_is_sent_while_many_bodies_wait() -> None:
    async def scenario() -> None:
        budget = ByteBudget(1000 * MIB, MIB)
        ready = [await budget.admit() for _ in range(MOST_READY)]
        for claim in ready:
            budget.settle(claim, 10)
        entering = asyncio.ensure_future(budget.admit())
        await settle()
        assert not entering.done()
        woken: list[Callable[[], None]] = []
        for claim in ready:
            budget.take(claim, woken.append)
        assert len(woken) >= 1, "the consumer took everything and woke nobody"
        woken[0]()
        await settle()
        assert entering.done()

    asyncio.run(scenario())


def test_settling_gives_back_what_was_reserved_too_much() -> None:
    async def scenario() -> None:
        budget = ByteBudget(64 * MIB, MIB)
        claim = await budget.admit()
        assert budget.used_bytes == BASE_BYTES
        budget.settle(claim, 1000)
        assert budget.used_bytes == 1000
        budget.take(claim, lambda function: function())
        budget.collect()
        assert (budget.used_bytes, budget.num_ready) == (0, 0)

    asyncio.run(scenario())


def test_a_cancelled_wait_holds_nothing() -> None:
    async def scenario() -> None:
        budget = ByteBudget(2 * BASE_BYTES, BASE_BYTES)
        held = [await budget.admit() for _ in range(2)]
        entering = asyncio.ensure_future(budget.admit())
        growing = asyncio.ensure_future(budget.grow(held[0], 10 * BASE_BYTES, Clock()))
        await settle()
        entering.cancel()
        growing.cancel()
        await asyncio.gather(entering, growing, return_exceptions=True)
        for claim in held:
            budget.release(claim)
        assert budget.used_bytes == 0
        assert len([await budget.admit() for _ in range(2)]) == 2

    asyncio.run(scenario())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("memory_bytes", [BASE_BYTES // 2, 2 * MIB, 12 * MIB])
def test_every_body_passes_and_memory_stays_within_its_bound(memory_bytes: int, seed: int) -> None:
    """Bodies of random sizes, growing in random steps, known and unknown lengths, a consumer that takes in bursts: no deadlock."""
    dice = random.Random(seed)
    max_file_bytes = 4 * MIB

    async def scenario() -> None:
        budget = ByteBudget(memory_bytes, max_file_bytes)
        ready: list[Claim] = []
        sizes: dict[Claim, int] = {}
        bound = max(memory_bytes, memory_bytes // 2 + max_file_bytes)

        async def body(size: int, is_known: bool) -> None:
            claim = await budget.admit()
            received = 0
            if is_known:
                await budget.grow(claim, size, Clock())
            while received < size:
                step = min(size - received, dice.choice([10 * KIB, 300 * KIB, MIB]))
                if not is_known:
                    await budget.grow(claim, min(2 * (received + step), max_file_bytes), Clock())
                received += step
                sizes[claim] = received
                assert sum(sizes.values()) <= bound
                await asyncio.sleep(0)
            if dice.random() < 0.2:
                del sizes[claim]
                budget.release(claim)
            else:
                budget.settle(claim, size)
                ready.append(claim)

        async def consumer() -> None:
            while True:
                for _ in range(dice.randrange(6)):
                    if ready:
                        claim = ready.pop(0)
                        del sizes[claim]
                        budget.take(claim, lambda function: function())
                await asyncio.sleep(0)

        taking = asyncio.ensure_future(consumer())
        bodies = [body(dice.choice([1, 50 * KIB, 200 * KIB, MIB, max_file_bytes]), dice.random() < 0.7) for _ in range(60)]
        await asyncio.wait_for(asyncio.gather(*bodies), 30)
        while ready:
            await asyncio.sleep(0)
        taking.cancel()
        budget.collect()
        assert (budget.used_bytes, budget.num_ready) == (0, 0)

    asyncio.run(scenario())
