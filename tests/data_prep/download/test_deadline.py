import asyncio

import pytest

from data_prep.download.deadline import Deadline
from data_prep.download.retry import Failed


def test_running_out_of_time_is_a_failure_and_leaves_the_task_usable() -> None:
    async def scenario() -> None:
        deadline = Deadline(0.05)
        deadline.num_bytes = 7
        with pytest.raises(Failed, match="timeout") as caught, deadline:
            await asyncio.sleep(10)
        assert caught.value.detail == "7 bytes after 0.05 s"
        assert caught.value.can_heal
        await asyncio.sleep(0)
        with Deadline(5):
            await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_what_is_used_up_stays_used_up() -> None:
    async def scenario() -> None:
        deadline = Deadline(0.2)
        with deadline:
            await asyncio.sleep(0.12)
        await asyncio.sleep(0.3)  # between two hops: does not count
        with pytest.raises(Failed), deadline:
            await asyncio.sleep(0.15)

    asyncio.run(scenario())


def test_a_paused_clock_does_not_run() -> None:
    async def scenario() -> None:
        deadline = Deadline(0.1)
        with deadline:
            deadline.pause()
            await asyncio.sleep(0.3)
            deadline.resume()
        assert not deadline.is_over

    asyncio.run(scenario())


def test_a_cancellation_from_outside_stays_one() -> None:
    async def scenario() -> None:
        async def work() -> None:
            with Deadline(10):
                await asyncio.sleep(10)

        task = asyncio.ensure_future(work())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())


def test_another_failure_is_not_replaced() -> None:
    async def scenario() -> None:
        with pytest.raises(Failed, match="http_404"), Deadline(10):
            raise Failed("http_404")

    asyncio.run(scenario())
