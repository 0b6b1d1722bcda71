import asyncio

import pytest

from data_prep.download.hosts import Host, Hosts
from data_prep.download.retry import Failed


def test_the_circuit_opens_after_so_many_failures_in_a_row() -> None:
    host = Host(8, 3)
    for _ in range(2):
        host.failed(Failed("timeout", "30 s"))
    host.succeeded()
    for _ in range(2):
        host.failed(Failed("timeout", "30 s"))
        host.check()
    host.failed(Failed("http_500"))
    with pytest.raises(Failed, match="circuit_open") as caught:
        host.check()
    assert "http_500" in caught.value.detail


def test_a_429_halves_the_slots_and_successes_bring_them_back() -> None:
    async def scenario() -> None:
        host = Host(8, 20)
        for expected in (4, 2, 1, 1):
            host.slow_down(0)
            assert host.slots.limit == expected
        for _ in range(200):
            host.succeeded()
        assert host.slots.limit == 8

    asyncio.run(scenario())


def test_a_pause_holds_everybody_and_ends() -> None:
    async def scenario() -> None:
        host, loop = Host(8, 20), asyncio.get_running_loop()
        host.slow_down(0.1)
        host.slow_down(0.01)  # a shorter wish does not undo the longer one
        started = loop.time()
        await asyncio.gather(host.rest(), host.rest())
        assert loop.time() - started >= 0.099

    asyncio.run(scenario())


def test_turns_are_apart_and_not_too_far_in_the_future() -> None:
    async def scenario() -> None:
        host, loop = Host(8, 20), asyncio.get_running_loop()
        started = loop.time()
        times = []

        async def turn() -> None:
            await host.wait_turn(0.05, 0.12)
            times.append(loop.time() - started)

        results = await asyncio.gather(*(turn() for _ in range(5)), return_exceptions=True)
        assert [result is None for result in results] == [True, True, True, False, False]
        assert all(isinstance(result, Failed) and result.reason == "robots" and not result.can_heal for result in results[3:])
        for number, at in enumerate(times):
            assert at >= 0.05 * number - 0.005

    asyncio.run(scenario())


def test_connections_are_kept_only_where_they_will_be_used() -> None:
    host = Host(8, 20)
    host.num_pending = 1
    assert not host.keeps_alive
    host.num_pending = 2
    assert host.keeps_alive
    host.num_pending, host.num_responses = 1, 2
    assert host.keeps_alive


def test_hosts_are_made_once_each() -> None:
    hosts = Hosts(2, 3)
    assert hosts["a"] is hosts["a"]
    assert hosts["a"] is not hosts["b"]
    assert hosts["a"].slots.limit == 2
