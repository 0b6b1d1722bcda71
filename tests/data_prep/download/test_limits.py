import asyncio

import pytest

from data_prep.download.limits import Concurrency, Slots


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_slots_serve_in_turn_and_never_more_than_the_limit() -> None:
    async def scenario() -> list[int]:
        slots, order, most = Slots(2), [], 0

        async def use(number: int) -> None:
            nonlocal most
            await slots.acquire()
            most = max(most, slots.num_active)
            order.append(number)
            await asyncio.sleep(0)
            slots.release()

        await asyncio.gather(*(use(number) for number in range(20)))
        assert most == 2
        assert slots.num_active == 0
        return order

    assert asyncio.run(scenario()) == list(range(20))


def test_a_cancelled_wait_takes_no_slot() -> None:
    async def scenario() -> None:
        slots = Slots(1)
        await slots.acquire()
        waiting = [asyncio.ensure_future(slots.acquire()) for _ in range(3)]
        await settle()
        waiting[0].cancel()
        slots.release()  # the second is let in ...
        waiting[1].cancel()  # ... and cancelled in the same moment: the third must come in
        await settle()
        assert waiting[2].done()
        assert not waiting[2].cancelled()
        assert slots.num_active == 1
        slots.release()
        assert slots.num_active == 0

    asyncio.run(scenario())


def test_a_raised_limit_lets_waiters_in() -> None:
    async def scenario() -> None:
        slots = Slots(1)
        waiting = [asyncio.ensure_future(slots.acquire()) for _ in range(4)]
        await settle()
        assert [task.done() for task in waiting] == [True, False, False, False]
        slots.limit = 3.9
        slots.wake()
        await settle()
        assert [task.done() for task in waiting] == [True, True, True, False]
        waiting[3].cancel()

    asyncio.run(scenario())


async def busy(concurrency: Concurrency) -> None:
    """Makes the limit the bottleneck, as it is while there is more to fetch."""
    while concurrency.num_active < int(concurrency.limit):
        await concurrency.acquire()


def test_concurrency_grows_while_the_consumer_waits_and_not_otherwise() -> None:
    async def scenario() -> None:
        concurrency = Concurrency(4, 10)
        await busy(concurrency)
        concurrency.succeeded(is_wanted=False)
        assert concurrency.limit == 4
        for _ in range(50):
            await busy(concurrency)
            concurrency.succeeded(is_wanted=True)
        assert concurrency.limit == 10

    asyncio.run(scenario())


def test_concurrency_does_not_grow_while_it_is_not_used() -> None:
    concurrency = Concurrency(8, 64)
    for _ in range(100):
        concurrency.succeeded(is_wanted=True)
    assert concurrency.limit == 8


def test_a_burst_halves_down_to_one_and_success_adds_slowly_after() -> None:
    async def scenario() -> None:
        concurrency = Concurrency(32, 256)
        for _ in range(32):
            concurrency.congested()
        assert concurrency.limit == 16
        for _ in range(1000):
            concurrency.congested()
        assert concurrency.limit == 1
        await busy(concurrency)
        limits = []
        for _ in range(3):
            for _ in range(round(concurrency.limit)):
                concurrency.succeeded(is_wanted=True)
                await busy(concurrency)
            limits.append(concurrency.limit)
        assert limits == pytest.approx([2, 3, 4], abs=0.4)

    asyncio.run(scenario())


@pytest.mark.parametrize(("share", "expected"), [(0.3, 64.0), (0.7, 32.0)])
def test_only_a_burst_counts_as_congestion(share: float, expected: float) -> None:
    concurrency = Concurrency(64, 64)
    for number in range(64):
        if number % 10 < 10 * share:
            concurrency.congested()
        else:
            concurrency.succeeded(is_wanted=True)
    assert concurrency.limit == expected


def test_the_start_is_not_above_the_most() -> None:
    assert Concurrency(32, 4).limit == 4
