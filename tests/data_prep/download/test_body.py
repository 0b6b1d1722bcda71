import gzip
import os
import zlib

import pytest

from data_prep.reasons import Drop
from tests.data_prep.download.conftest import fetch_all, fetch_one, reason
from tests.data_prep.web_server import Fault, WebServer

KIB = 2**10


class Judge:
    """Remembers what it was asked; drops files that begin with `no`."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, int | None]] = []

    def __call__(self, prefix: bytes, size: int | None) -> None:
        self.asked.append((prefix, size))
        if prefix.startswith(b"no"):
            raise Drop("too_small", "1x1")


@pytest.mark.parametrize("size", [1, 1000, 4096, 4097, 300_000])
def test_the_judge_sees_the_beginning_and_the_size(size: int) -> None:
    data = os.urandom(size)
    judge = Judge()
    with WebServer({"/a": data}) as server:
        answer = fetch_one(server.url("/a"), judge=judge, header_bytes=4096)
    assert answer.data == data
    assert judge.asked == [(data[:4096], size)]
    assert (answer.status, answer.num_bytes, answer.num_attempts) == (200, size, 1)


def test_without_a_length_the_size_is_unknown_until_the_end() -> None:
    data = os.urandom(100_000)
    judge = Judge()
    with WebServer({"/a": data, "/b": data[:1000]}) as server:
        answers = fetch_all([server.url(f"{path}?fault=chunked") for path in ("/a", "/b")], judge=judge, header_bytes=4096)
    assert [answer.data for answer in answers] == [data, data[:1000]]
    assert sorted(judge.asked, key=lambda asked: len(asked[0])) == [(data[:1000], 1000), (data[:4096], None)]


def test_what_the_judge_drops_is_not_fetched_whole() -> None:
    with WebServer({"/large": b"no" + bytes(50_000_000), "/small": b"no" + bytes(9000), "/ok": b"yes"}) as server:
        large, small, ok = fetch_all([server.url(path) for path in ("/large", "/small", "/ok")], judge=Judge(), max_file_bytes=2**26, per_host=1)
        assert (reason(large), large.drop and large.drop.detail) == ("too_small", "1x1")
        assert large.num_bytes < 5_000_000
        assert large.data == b""
        assert reason(small) == "too_small"
        assert ok.data == b"yes"
        assert server.num_connections == 2, "kept after the small one, given up after the large one"


def test_a_verdict_stands_though_the_rest_never_comes() -> None:
    with WebServer({"/a": b"no" + bytes(9000)}) as server:
        answer = fetch_one(server.fault("/a", Fault(kind="drip", pause_s=0.01)), judge=Judge(), header_bytes=20)
        assert reason(answer) == "too_small"
        assert answer.num_attempts == 1


def test_an_announced_size_above_the_limit_is_refused_before_the_body() -> None:
    judge = Judge()
    with WebServer({"/a": bytes(5_000_000)}) as server:
        answer = fetch_one(server.url("/a"), judge=judge, max_file_bytes=4_999_999)
    assert reason(answer) == "file_too_large"
    assert not judge.asked


@pytest.mark.parametrize("fault", ["endless", "chunked", "bomb&size=50000000", "gzip"])
def test_a_size_that_was_not_announced_is_refused_when_it_is_reached(fault: str) -> None:
    with WebServer({"/a": bytes(5_000_000)}) as server:
        answer = fetch_one(server.url(f"/a?fault={fault}"), max_file_bytes=200_000)
    assert reason(answer) == "file_too_large"
    assert answer.num_bytes < 5_000_000
    assert answer.num_attempts == 1


@pytest.mark.parametrize("size", [10, 100_000, 900_000])
def test_compression_that_was_not_asked_for_is_undone(size: int) -> None:
    data = os.urandom(size // 2) + bytes(size // 2)
    with WebServer({"/a": data}) as server:
        judge = Judge()
        answer = fetch_one(server.url("/a?fault=gzip"), judge=judge)
        assert answer.data == data
        assert answer.num_bytes == len(gzip.compress(data))
        assert judge.asked == [(data[: 32 * KIB], None if size > 32 * KIB else size)]
        assert all(entry.headers["accept-encoding"] == "identity" for entry in server.log)


@pytest.mark.parametrize(
    ("body", "encoding", "expected"),
    [
        (zlib.compress(b"picture"), "deflate", ""),
        (gzip.compress(b"picture"), "X-Gzip", ""),
        (b"picture", "identity", ""),
        (gzip.compress(bytes(10_000))[:-9], "gzip", "wrong_length"),
        (b"not compressed at all", "gzip", "protocol"),
        (b"picture", "br", "protocol"),
        (b"picture", "gzip, gzip", "protocol"),
    ],
)
def test_encodings(body: bytes, encoding: str, expected: str) -> None:
    with WebServer({"/a": body}) as server:
        answer = fetch_one(server.fault("/a", Fault(kind="headers", headers=(("Content-Encoding", encoding),))), retries=0)
    assert reason(answer) == expected
    assert expected or answer.data == b"picture"


def test_an_empty_body_is_judged_as_such() -> None:
    judge = Judge()
    with WebServer({"/a": b""}) as server:
        assert fetch_one(server.url("/a"), judge=judge).data == b""
    assert judge.asked == [(b"", 0)]


def test_a_large_body_passes_alone_though_it_exceeds_the_memory() -> None:
    data = os.urandom(3_000_000)
    with WebServer({"/a": data}) as server:
        urls = [server.url(f"/a?{number}{fault}") for number in range(4) for fault in ("", "&fault=chunked", "&fault=gzip")]
        answers = fetch_all(urls, max_file_bytes=4_000_000, memory_bytes=1_000_000)
    assert all(answer.data == data for answer in answers)
