"""The whole of it: every request gets one answer whatever happens, within the limits, and everything ends."""

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.download.request import Answer, Request
from data_prep.download.session import user_agent
from tests.data_prep.download.conftest import anything, fetch_all, fetch_one, open_downloader, reason
from tests.data_prep.web_server import Fault, ServerProcess, WebServer

PICTURE = bytes(range(256)) * 40


def is_gone(name: str) -> bool:
    """Whether no thread of this name is left, shortly."""
    for _ in range(100):
        if not any(thread.name == name for thread in threading.enumerate()):
            return True
        time.sleep(0.05)
    return False


def requests_to(server: WebServer, count: int, path: str = "/a") -> Iterator[Request]:
    return (Request(number, server.url(f"{path}?{number}")) for number in range(count))


def test_every_request_has_one_answer_whatever_the_server_does() -> None:
    faults = [
        "",
        "",
        "",
        "status&status=404",
        "status&status=500&times=1",
        "status&status=429&retry_after=0&times=1",
        "reset&times=2",
        "reset&cut=100",
    ]
    faults += [
        "short",
        "short&times=1",
        "garbage",
        "loop",
        "redirect&location=/a",
        "gzip",
        "chunked",
        "long",
        "endless",
        "headers&header=X-Robots-Tag:noai",
    ]
    dice = random.Random(0)
    kinds = [dice.choice(faults) for _ in range(300)]
    kinds[10], kinds[11], kinds[12] = "drip", "hang&times=1", "hang&times=1"
    pages = {f"/{number}": PICTURE + b"%d" % number for number in range(300)}
    with WebServer({**pages, "/a": PICTURE}, hosts=("127.0.0.1", "127.0.0.2", "127.0.0.3"), delay_s=(0, 0.02)) as server:
        urls = [server.url(f"/{number}?{number}&fault={kind}", f"127.0.0.{1 + number % 3}") for number, kind in enumerate(kinds)]
        urls = [url.removesuffix("&fault=") for url in urls]
        answers = fetch_all(urls, timeout_s=1.5, retries=2, host_failures=1000, max_file_bytes=2**18)
    expected = {
        "status&status=404": {"http_404"},
        "reset&cut=100": {"connection"},
        "short": {"wrong_length"},
        "garbage": {"protocol"},
        "loop": {"redirects"},
        "long": {"", "protocol"},
        "endless": {"file_too_large"},
        "headers&header=X-Robots-Tag:noai": {"opt_out"},
        "drip": {"timeout"},
    }
    for number, (kind, answer) in enumerate(zip(kinds, answers, strict=True)):
        assert reason(answer) in expected.get(kind, {""}), kind
        if not answer.drop:
            assert answer.data == (PICTURE if kind.startswith("redirect") else PICTURE + b"%d" % number)


def test_answers_come_as_they_arrive_and_carry_the_facts() -> None:
    with WebServer({"/slow": PICTURE, "/fast": PICTURE}) as server:
        server.fault("/slow", Fault(kind="status", status=503, retry_after="1", times=1))
        with open_downloader() as downloader:
            first, second = downloader.fetch([Request(7, server.url("/slow")), Request(9, server.url("/fast"))])
    assert (first.number, second.number) in ((9, 7), (7, 9))
    slow = first if first.number == 7 else second
    assert slow.drop is None
    assert (slow.num_attempts, slow.status, slow.final_url, slow.num_bytes) == (2, 200, server.url("/slow"), len(PICTURE) + len(b"fault"))
    assert slow.seconds >= 1.0


def test_no_requests_no_answers() -> None:
    with open_downloader() as downloader:
        assert list(downloader.fetch([])) == []
        assert list(downloader.fetch(iter(()))) == []


def test_a_downloader_can_be_used_again() -> None:
    with WebServer({"/a": PICTURE}) as server, open_downloader() as downloader:
        for _ in range(3):
            assert sum(len(answer.data) for answer in downloader.fetch(requests_to(server, 5))) == 5 * len(PICTURE)
        assert server.num_connections <= 5, "connections are kept"


def test_requests_are_taken_as_needed() -> None:
    taken = []

    def endless(server: WebServer) -> Iterator[Request]:
        number = 0
        while True:
            taken.append(number)
            yield Request(number, server.url(f"/a?{number}"))
            number += 1

    with WebServer({"/a": PICTURE}) as server, open_downloader(max_concurrency=8, concurrency=8) as downloader:
        answers = downloader.fetch(endless(server))
        for count in range(1, 200):
            next(answers)
            assert len(taken) - count <= 192
        time.sleep(0.2)
        asked = len(server.requests())
        assert asked < 199 + 100, "bodies that nobody takes are not fetched without end"


def test_slow_requests_do_not_hold_up_answers() -> None:
    with WebServer({"/a": PICTURE}) as server, open_downloader() as downloader:

        def trickle() -> Iterator[Request]:
            for number in range(200):
                if number == 150:
                    waited_until = time.monotonic() + 10
                    while len(server.requests()) < 60 and time.monotonic() < waited_until:
                        time.sleep(0.01)
                    assert len(server.requests()) >= 60, "what was taken before is fetched meanwhile"
                yield Request(number, server.url(f"/a?{number}"))

        assert len(list(downloader.fetch(trickle()))) == 200


def test_hosts_are_not_asked_for_more_at_once_than_allowed() -> None:
    with WebServer({"/a": PICTURE}, hosts=("127.0.0.1", "127.0.0.2"), delay_s=(0.02, 0.02)) as server:
        urls = [server.url(f"/a?{number}", f"127.0.0.{1 + number % 2}") for number in range(60)]
        assert not any(map(reason, fetch_all(urls, per_host=6)))
        assert set(server.peak.values()) == {6}
        server.peak.clear()
        fetch_all(urls, per_host=6, share=3)
        assert set(server.peak.values()) == {2}
        server.peak.clear()
        fetch_all(urls[:10], per_host=6, share=100)
        assert set(server.peak.values()) == {1}


def test_no_more_requests_at_once_than_configured() -> None:
    hosts = tuple(f"127.0.0.{number}" for number in range(1, 9))
    with WebServer({"/a": PICTURE}, hosts=hosts, delay_s=(0.02, 0.02)) as server:
        urls = [server.url(f"/a?{number}", hosts[number % 8]) for number in range(48)]
        fetch_all(urls, concurrency=1, max_concurrency=1, respect_robots=False)
        assert server.peak_total == 1
        fetch_all(urls, concurrency=2, max_concurrency=12, respect_robots=False)
        assert 2 < server.peak_total <= 12, "it grows, and not beyond"


def test_a_burst_of_failures_lowers_the_concurrency() -> None:
    hosts = tuple(f"127.0.0.{number}" for number in range(1, 9))
    with WebServer({}, hosts=hosts) as server:
        server.fault("/a", Fault(kind="reset"))
        requests = [Request(number, server.url("/a", hosts[number % 8])) for number in range(64)]
        with open_downloader(concurrency=32, retries=0, respect_robots=False) as downloader:
            assert downloader.concurrency == 32
            assert Counter(map(reason, downloader.fetch(requests))) == {"connection": 64}
            assert downloader.concurrency <= 16


def test_retry_after_is_kept_by_the_whole_host() -> None:
    with WebServer({"/a": PICTURE, "/b": PICTURE}) as server:
        server.fault("/a", Fault(kind="status", status=429, retry_after="1", times=1))
        with open_downloader(respect_robots=False, per_host=1) as downloader:
            answers = list(downloader.fetch([Request(0, server.url("/a")), Request(1, server.url("/b"))]))
        assert not any(map(reason, answers))
        first, *others = server.requests()
        assert all(entry.time - first.time >= 0.99 for entry in others)


def test_a_long_retry_after_ends_the_attempts() -> None:
    with WebServer({"/a": PICTURE}) as server:
        server.fault("/a", Fault(kind="status", status=429, retry_after="3600", times=1))
        answer = fetch_one(server.url("/a"), max_retry_after_s=60)
        assert answer.drop is not None
        assert (answer.drop.reason, answer.num_attempts) == ("http_429", 1)
        assert "3600" in answer.drop.detail


def test_a_host_that_keeps_failing_is_left_alone() -> None:
    with WebServer({"/b": PICTURE}, hosts=("127.0.0.1", "127.0.0.2")) as server:
        server.fault("/a", Fault(kind="status", status=500))
        requests = [Request(number, server.url(f"/a?{number}")) for number in range(50)]
        for request in requests:
            server.fault(request.url.removeprefix(server.url("")), Fault(kind="status", status=500))
        server.faults["/a"] = Fault(kind="status", status=500)
        requests += [Request(number, server.url(f"/b?{number}", "127.0.0.2")) for number in range(50, 60)]
        with open_downloader(retries=0, host_failures=5, per_host=1) as downloader:
            answers = list(downloader.fetch(requests))
        counts = Counter(map(reason, answers))
        assert counts == {"http_500": 5, "circuit_open": 45, "": 10}
        assert len([entry for entry in server.requests() if entry.path.startswith("/a")]) == 5
        with open_downloader(retries=0, host_failures=5, per_host=1) as another:
            assert reason(next(another.fetch(requests[:1]))) == "http_500", "the circuit is open for one downloader only"


def test_missing_pages_do_not_open_the_circuit() -> None:
    with WebServer({}) as server:
        assert {reason(answer) for answer in fetch_all([server.url(f"/{number}") for number in range(30)], host_failures=3)} == {"http_404"}


def test_memory_stays_bounded_while_the_consumer_is_slow(tmp_path: Path) -> None:
    """2 GB would fit through the loopback in the time that the consumer sleeps."""
    (tmp_path / "a").write_bytes(bytes(5_000_000))
    with ServerProcess(tmp_path) as server:
        urls = [server.url(f"/a?{number}{'&fault=chunked' if number % 3 == 0 else ''}") for number in range(40)]
        with open_downloader(max_file_bytes=8_000_000, memory_bytes=32_000_000, per_host=32, respect_robots=False) as downloader:
            answers = downloader.fetch(Request(number, url) for number, url in enumerate(urls))
            before = resident_bytes()
            seen, most = 0, 0
            for answer in answers:
                assert len(answer.data) == 5_000_000, answer.drop
                seen += 1
                if seen in (5, 20):
                    time.sleep(0.4)
                most = max(most, resident_bytes() - before)
        assert seen == 40
        # Beside the budget: what the socket layers hold of up to 32 connections (256 KiB each and more), and the allocator's leftovers.
        assert most < 110_000_000
        assert most > 10_000_000, "nothing was measured"


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_a_pause_of_the_consumer_times_nothing_out() -> None:
    with WebServer({"/a": bytes(400_000)}, delay_s=(0, 0.01)) as server:
        urls = [server.url(f"/a?{number}{'&fault=chunked' if number % 2 else ''}") for number in range(60)]
        with open_downloader(memory_bytes=1_500_000, max_file_bytes=500_000, timeout_s=1.0, retries=0, per_host=32) as downloader:
            answers = []
            for answer in downloader.fetch(Request(number, url) for number, url in enumerate(urls)):
                answers.append(answer)
                if len(answers) == 3:
                    time.sleep(1.5)
        assert Counter(map(reason, answers)) == {"": 60}


@pytest.mark.parametrize("how", ["close", "leave", "raise", "forget"])
def test_everything_ends_in_the_middle(how: str) -> None:
    with WebServer({"/a": PICTURE}) as server:
        requests = [*requests_to(server, 100), *(Request(number, server.url(f"/a?fault=hang&{number}")) for number in range(100, 300))]
        started = time.monotonic()
        answers: Iterator[Answer] = iter(())
        try:
            with open_downloader(timeout_s=60.0, respect_robots=False) as downloader:
                answers = downloader.fetch(requests)
                for _ in range(10):
                    next(answers)
                if how == "close":
                    answers.close()  # type: ignore[attr-defined]
                    assert sum(1 for _ in downloader.fetch(requests_to(server, 70))) == 70, "and is usable after"
                if how == "raise":
                    raise KeyError("the consumer's own")
        except KeyError:
            assert how == "raise"
        if how == "leave":
            with pytest.raises(RuntimeError, match="closed"):
                list(answers)
        del answers
        assert is_gone("downloader")
        assert time.monotonic() - started < 20


def test_an_error_of_the_judge_reaches_the_consumer() -> None:
    def broken(prefix: bytes, size: int | None) -> None:
        raise OSError("a bug, and not the network's")

    with WebServer({"/a": PICTURE}) as server, open_downloader(broken) as downloader, pytest.raises(OSError, match="a bug"):
        list(downloader.fetch(requests_to(server, 50)))
    assert is_gone("downloader")


def test_an_error_of_the_requests_reaches_the_consumer() -> None:
    def broken(server: WebServer) -> Iterator[Request]:
        yield from requests_to(server, 100)
        raise KeyError("no such column")

    with WebServer({"/a": PICTURE}) as server, open_downloader() as downloader:
        with pytest.raises(KeyError, match="column"):
            list(downloader.fetch(broken(server)))
        assert len(list(downloader.fetch(requests_to(server, 3)))) == 3
    assert is_gone("downloader")


def test_an_error_of_the_loop_reaches_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    with WebServer({"/a": PICTURE}) as server, open_downloader() as downloader:
        monkeypatch.setattr(downloader._fetcher, "fetch", None)
        with pytest.raises(TypeError):
            list(downloader.fetch(requests_to(server, 500)))
    assert is_gone("downloader")


def test_one_fetch_at_a_time() -> None:
    with WebServer({"/a": PICTURE}) as server, open_downloader() as downloader:
        answers = downloader.fetch(requests_to(server, 100))
        next(answers)
        with pytest.raises(RuntimeError, match="already"):
            next(iter(downloader.fetch(requests_to(server, 1))))


def test_settings_that_make_no_sense() -> None:
    changes: dict[str, Any]
    for changes in ({"share": 0}, {"max_file_bytes": 0}, {"memory_bytes": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            open_downloader(anything, **changes)


def test_hosts_that_are_asked_once_keep_no_connection() -> None:
    hosts = tuple(f"127.0.1.{number}" for number in range(1, 41))
    with WebServer({"/a": PICTURE}, hosts=hosts) as server:
        with open_downloader(respect_robots=False) as downloader:
            answers = list(downloader.fetch(Request(number, server.url("/a", host)) for number, host in enumerate(hosts)))
        assert not any(map(reason, answers))
        assert {entry.headers.get("connection") for entry in server.log} == {"close"}


@pytest.mark.parametrize(
    ("contact", "expected"),
    [
        ("a@example.org", " (+mailto:a@example.org)"),
        ("https://example.org/crawl", " (+https://example.org/crawl)"),
        ("", ""),
        ("a\r\nX: y", " (+a X: y)"),
    ],
)
def test_the_user_agent_says_whom_to_ask(contact: str, expected: str) -> None:
    name, _, rest = user_agent(contact).partition("/")
    assert name == "jetway"
    assert rest.endswith(expected)
    assert rest.removesuffix(expected).replace(".", "").isalnum()
