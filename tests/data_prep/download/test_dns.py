import ast
import asyncio
import contextlib
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from data_prep.download.addresses import AddressGuard, PrivateAddress
from data_prep.download.dns import AresLookup, DnsCache, DnsFailed, Resolver, ThreadedLookup, open_lookup


class Lookup:
    """Answers from a table and counts the questions."""

    def __init__(self, answers: dict[str, list[str] | DnsFailed]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    async def __call__(self, host: str) -> list[str]:
        self.asked.append(host)
        await asyncio.sleep(0.01)
        answer = self.answers[host]
        if isinstance(answer, DnsFailed):
            raise answer
        return answer


def make_resolver(lookup: Lookup, *, allowed: tuple[str, ...] = (), failed_s: float = 60.0, cache: DnsCache | None = None) -> Resolver:
    return Resolver(lookup, AddressGuard(allowed), cache if cache is not None else DnsCache(), timeout_s=5, failed_s=failed_s)


def test_a_name_is_looked_up_once_for_all_who_ask() -> None:
    async def scenario() -> None:
        lookup = Lookup({"a.test": ["8.8.8.8", "2606:4700::1111"]})
        cache = DnsCache()
        resolver = make_resolver(lookup, cache=cache)
        found = await asyncio.gather(*(resolver.resolve("a.test", 80) for _ in range(5)))
        assert [result["host"] for result in found[0]] == ["8.8.8.8", "2606:4700::1111"]
        assert [result["family"] for result in found[0]] == [socket.AF_INET, socket.AF_INET6]
        assert (found[0][0]["hostname"], found[0][0]["port"]) == ("a.test", 80)
        await make_resolver(lookup, cache=cache).resolve("a.test", 443)  # another downloader of the process
        assert lookup.asked == ["a.test"]

    asyncio.run(scenario())


@pytest.mark.parametrize("is_final", [True, False])
def test_failures_are_remembered_as_well(is_final: bool) -> None:
    async def scenario() -> None:
        lookup = Lookup({"a.test": DnsFailed("NXDOMAIN", is_final=is_final)})
        resolver = make_resolver(lookup, failed_s=0.2)
        for _ in range(3):
            with pytest.raises(DnsFailed) as caught:
                await resolver.resolve("a.test", 80)
            assert (caught.value.detail, caught.value.is_final) == ("NXDOMAIN", is_final)
        assert len(lookup.asked) == 1
        await asyncio.sleep(0.25)
        with pytest.raises(DnsFailed):
            await resolver.resolve("a.test", 80)
        assert len(lookup.asked) == (1 if is_final else 2)

    asyncio.run(scenario())


def test_private_answers_are_left_out() -> None:
    async def scenario() -> None:
        lookup = Lookup({"mixed.test": ["10.0.0.1", "8.8.8.8", "::1"], "inside.test": ["10.0.0.1", "fe80::1"], "none.test": []})
        resolver = make_resolver(lookup)
        assert [result["host"] for result in await resolver.resolve("mixed.test", 80)] == ["8.8.8.8"]
        with pytest.raises(PrivateAddress, match=r"10\.0\.0\.1"):
            await resolver.resolve("inside.test", 80)
        with pytest.raises(DnsFailed, match="no address"):
            await resolver.resolve("none.test", 80)
        allowed = make_resolver(lookup, allowed=("10.0.0.0/8",))
        assert [result["host"] for result in await allowed.resolve("inside.test", 80)] == ["10.0.0.1"]

    asyncio.run(scenario())


def test_whoever_gives_up_does_not_take_the_answer_from_the_others() -> None:
    async def scenario() -> None:
        lookup = Lookup({"a.test": ["8.8.8.8"]})
        resolver = make_resolver(lookup)
        first, second = (asyncio.ensure_future(resolver.resolve("a.test", 80)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert [result["host"] for result in await second] == ["8.8.8.8"]
        assert len(lookup.asked) == 1

    asyncio.run(scenario())


def test_a_resolver_that_hangs_is_given_up() -> None:
    async def scenario() -> None:
        async def hang(host: str) -> list[str]:
            await asyncio.sleep(60)
            return []

        resolver = Resolver(hang, AddressGuard(), DnsCache(), timeout_s=0.05, failed_s=1)
        with pytest.raises(DnsFailed, match="in time") as caught:
            await resolver.resolve("a.test", 80)
        assert not caught.value.is_final

    asyncio.run(scenario())


def test_the_cache_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.download.dns.MOST_NAMES", 3)
    cache = DnsCache()
    for number in range(5):
        cache.keep(f"{number}.test", ["8.8.8.8"], 60)
    assert [cache.find(f"{number}.test") is not None for number in range(5)] == [False, False, True, True, True]


@pytest.mark.parametrize("kind", [ThreadedLookup, open_lookup])
def test_the_system_knows_localhost(kind: Callable[[], AresLookup | ThreadedLookup]) -> None:
    async def scenario() -> list[str]:
        lookup = kind()
        try:
            return await lookup("localhost")
        finally:
            await lookup.close()

    found = asyncio.run(scenario())
    assert set(found) <= {"127.0.0.1", "::1"}
    assert found


@contextlib.contextmanager
def name_server() -> Iterator[int]:
    """A DNS server on loopback: `fine.test` is 192.0.2.7, `broken.test` SERVFAIL, `empty.test` has no address, all else NXDOMAIN."""
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                question, client = server.recvfrom(2048)
                end = question.index(b"\0", 12) + 5
                name, kind = question[12 : end - 5], struct.unpack(">H", question[end - 4 : end - 2])[0]
                code = {b"\x04fine": 0, b"\x05empt": 0, b"\x06brok": 2}.get(name[:5], 3)
                answer = b""
                if name.startswith(b"\x04fine") and kind == 1:
                    answer = b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 60, 4) + socket.inet_aton("192.0.2.7")
                head = question[:2] + struct.pack(">HHHHH", 0x8180 | code, 1, bool(answer), 0, 0)
                server.sendto(head + question[12:end] + answer, client)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield server.getsockname()[1]
    finally:
        server.close()


async def ares_results(port: int) -> list[Any]:
    """What c-ares says of five names, asking the server at `port`."""
    lookup = AresLookup(nameservers=["127.0.0.1"], udp_port=port, tcp_port=port, timeout=5.0, tries=1, lookups="b")
    results: list[Any] = []
    for name in ("fine.test", "nowhere.test", "broken.test", "empty.test", "bad..name"):
        try:
            results.append(await lookup(name))
        except DnsFailed as failure:
            results.append((failure.detail, failure.is_final))
    await lookup.close()
    return results


ASK = """
import asyncio, sys
from tests.data_prep.download.test_dns import ares_results
print(asyncio.run(ares_results(int(sys.argv[1]))))
"""


def test_c_ares_tells_kinds_of_failure_apart() -> None:
    """In a process of its own: c-ares works on bare descriptors, which a late close elsewhere in a long test run would take from it."""
    pytest.importorskip("aiodns")
    with name_server() as port:
        done = subprocess.run([sys.executable, "-c", ASK, str(port)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    fine, nowhere, broken, empty, bad = ast.literal_eval(done.stdout)
    assert fine == ["192.0.2.7"]
    assert nowhere == ("NXDOMAIN", True)
    assert broken == ("SERVFAIL", False)
    assert empty == ("no address", True)
    assert isinstance(bad, tuple)
    assert bad[1], "a name that cannot exist does not heal"
