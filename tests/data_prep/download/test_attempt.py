"""What each thing that a server can do wrong becomes, and how often it is tried."""

import datetime
import ipaddress
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.download.dns import DnsFailed
from tests.conftest import REPOSITORY
from tests.data_prep.download.conftest import fetch_all, fetch_one, reason
from tests.data_prep.web_server import Fault, WebServer

PICTURE = bytes(range(256)) * 20


@pytest.mark.parametrize("status", [204, 206, 300, 304, 400, 401, 403, 404, 410, 418, 451])
def test_statuses_that_cannot_heal_are_asked_once(status: int) -> None:
    with WebServer({}) as server:
        answer = fetch_one(server.fault("/a", Fault(kind="status", status=status)))
        assert (reason(answer), answer.status, answer.num_attempts) == (f"http_{status}", status, 1)
        assert len(server.requests("/a")) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_statuses_that_can_heal_are_asked_again(status: int) -> None:
    with WebServer({"/a": PICTURE}) as server:
        url = server.fault("/a", Fault(kind="status", status=status, times=2))
        answer = fetch_one(url, retries=2)
        assert (answer.data, answer.status, answer.num_attempts) == (PICTURE, 200, 3)
    with WebServer({"/a": PICTURE}) as server:
        server.fault("/a", Fault(kind="status", status=status))
        answer = fetch_one(server.url("/a"), retries=2)
        assert (reason(answer), answer.num_attempts, len(server.requests("/a"))) == (f"http_{status}", 3, 3)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault(kind="hang", times=1), "timeout"),
        (Fault(kind="drip", times=1), "timeout"),
        (Fault(kind="reset", cut=300, times=1), "connection"),
        (Fault(kind="reset", times=2), "connection"),  # aiohttp itself asks once more
        (Fault(kind="short", times=1), "wrong_length"),
    ],
)
def test_broken_answers_heal(fault: Fault, expected: str) -> None:
    with WebServer({"/a": PICTURE}) as server:
        server.fault("/a", fault)
        answer = fetch_one(server.url("/a"), timeout_s=0.5, retries=0)
        assert (reason(answer), answer.num_attempts) == (expected, 1)
    with WebServer({"/a": PICTURE}) as server:
        server.fault("/a", fault)
        answer = fetch_one(server.url("/a"), timeout_s=0.5, retries=1)
        assert (answer.data, answer.num_attempts) == (PICTURE, 2)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault(kind="garbage"), "protocol"),
        (Fault(kind="loop"), "redirects"),
        (Fault(kind="loop", status=308), "redirects"),
        (Fault(kind="redirect", location=""), "redirects"),
        (Fault(kind="redirect", location="ftp://example.org/"), "redirects"),
        (Fault(kind="redirect", location="/a", count=6), "redirects"),
        (Fault(kind="redirect", location="http://10.0.0.1/"), "private_address"),
        (Fault(kind="redirect", location="http://[::ffff:192.168.0.1]/"), "private_address"),
        (Fault(kind="redirect", location="http://0xa000001/"), "private_address"),
        (Fault(kind="headers", headers=(("X-Robots-Tag", "noai"),)), "opt_out"),
        (Fault(kind="headers", headers=(("TDM-Reservation", "1"),)), "opt_out"),
        (Fault(kind="headers", headers=(("X-Robots-Tag", "nofollow"), ("X-Robots-Tag", "jetway: noimageai"))), "opt_out"),
        (Fault(kind="headers", headers=(("X-Robots-Tag", "googlebot: noai"), ("TDM-Reservation", "0"))), ""),
    ],
)
def test_verdicts_are_final(fault: Fault, expected: str) -> None:
    with WebServer({"/a": PICTURE}) as server:
        answer = fetch_one(server.fault("/a", fault))
        assert (reason(answer), answer.num_attempts) == (expected, 1)
        assert answer.data == (b"" if expected else PICTURE)


def test_the_opt_out_header_is_named_and_the_body_not_read() -> None:
    with WebServer({"/a": bytes(900_000)}) as server:
        answer = fetch_one(server.fault("/a", Fault(kind="headers", headers=(("X-Robots-Tag", "index, NoAI"),))))
    assert answer.drop is not None
    assert (answer.drop.reason, answer.drop.detail) == ("opt_out", "X-Robots-Tag: index, NoAI")
    assert answer.num_bytes == 0


def test_opt_outs_can_be_ignored_on_request() -> None:
    with WebServer({"/a": PICTURE}) as server:
        url = server.fault("/a", Fault(kind="headers", headers=(("X-Robots-Tag", "noai"), ("TDM-Reservation", "1"))))
        assert fetch_one(url, respect_opt_out=False).data == PICTURE
        assert reason(fetch_one(url, respect_tokens=("noml",))) == "opt_out"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_as_far_as_allowed(status: int) -> None:
    with WebServer({"/b": PICTURE}) as server:
        url = server.fault("/a", Fault(kind="redirect", location="/b", count=3, status=status))  # four hops
        answer = fetch_one(url, max_redirects=4)
        assert (answer.data, answer.final_url, answer.num_attempts) == (PICTURE, server.url("/b"), 1)
        assert reason(fetch_one(url, max_redirects=3)) == "redirects"
        assert reason(fetch_one(url, max_redirects=0)) == "redirects"


def test_a_redirect_to_another_host_is_followed_with_its_own_limits() -> None:
    with WebServer({"/b": PICTURE}, hosts=("127.0.0.1", "127.0.0.2")) as server:
        url = server.fault("/a", Fault(kind="redirect", location=server.url("/b", "127.0.0.2")))
        answers = fetch_all([f"{url}?{number}" for number in range(10)], per_host=1, concurrency=1, max_concurrency=1)
        assert all(answer.data == PICTURE for answer in answers)
        assert len(server.requests("/b")) == 10


def test_a_deadline_holds_over_all_redirects() -> None:
    with WebServer({}, delay_s=(0.15, 0.15)) as server:
        answer = fetch_one(server.fault("/a", Fault(kind="redirect", location="/a", count=100)), max_redirects=100, timeout_s=0.5, retries=0)
        assert reason(answer) == "timeout"
        assert len(server.requests()) <= 4


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/", "http://2130706433:9/", "http://0x7f.1:9/", "http://[::1]:9/", "http://localhost:9/", "http://0/"]
)
def test_loopback_is_refused_unless_allowed(url: str) -> None:
    assert reason(fetch_one(url, allowed_networks=())) == "private_address"
    assert reason(fetch_one(url, retries=0, allowed_networks=("127.0.0.0/8", "::1/128", "0.0.0.0/8"))) == "connection"


def test_a_name_that_leads_inside_is_refused_and_asked_nothing() -> None:
    async def lookup(host: str) -> list[str]:
        return ["127.0.0.1"]

    with WebServer({"/a": PICTURE}) as server:
        url = server.url("/a", "rebound.test")
        assert reason(fetch_one(url, allowed_networks=(), lookup=lookup)) == "private_address"
        assert not server.log
        assert fetch_one(url, lookup=lookup).data == PICTURE
        assert server.log[-1].host == f"rebound.test:{server.port}"


def test_environment_proxies_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with WebServer({"/a": PICTURE}) as server:
        assert fetch_one(server.url("/a")).data == PICTURE


@pytest.mark.parametrize(("is_final", "num_lookups"), [(True, 1), (False, 3)])
def test_names_that_do_not_resolve(is_final: bool, num_lookups: int) -> None:
    asked = []

    async def lookup(host: str) -> list[str]:
        asked.append(host)
        raise DnsFailed("NXDOMAIN" if is_final else "SERVFAIL", is_final=is_final)

    answers = fetch_all(
        [f"http://nowhere.test/{number}" for number in range(30)], lookup=lookup, retries=2, backoff_s=0.05, respect_robots=False, host_failures=100
    )
    assert {reason(answer) for answer in answers} == {"dns"}
    assert answers[0].drop is not None
    assert answers[0].drop.detail == ("NXDOMAIN" if is_final else "SERVFAIL")
    assert answers[0].num_attempts == (1 if is_final else 3)
    assert num_lookups <= len(asked) <= 2 * num_lookups, "one lookup serves all who wait"


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", {"connection"}),
        (b"\r\n\r\n", {"connection", "protocol"}),
        (b"HTTP/1.1", {"connection", "protocol"}),
        (b"HTTP/1.1 200", {"connection", "protocol"}),
        (b"HTTP/9.9 200 OK\r\n\r\nx", {"protocol", ""}),
        (b"HTTP/1.1 99 Low\r\n\r\n", {"protocol", "http_99"}),
        (b"HTTP/1.1 1000 High\r\n\r\n", {"protocol"}),
        (b"HTTP/1.1 abc\r\n\r\n", {"protocol"}),
        (b"HTTP/1.1 999 Denied\r\nContent-Length: 0\r\n\r\n", {"http_999"}),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 50, {"connection", "protocol"}),
        (b"HTTP/1.1 103 Early\r\n\r\n" + OK + b"Content-Length: 4\r\n\r\nabcd", {""}),
        (b"HTTP/1.0 200 OK\r\n\r\nabcd", {""}),
        (b"HTTP/1.1 200\r\n\r\nabcd", {""}),
        (OK + b"Content-Length: -5\r\n\r\nabcd", {"protocol"}),
        (OK + b"Content-Length: 4, 5\r\n\r\nabcd", {"protocol"}),
        (OK + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcd", {"protocol", "wrong_length"}),
        (OK + b"Content-Length: " + b"9" * 30 + b"\r\n\r\nabcd", {"protocol", "file_too_large"}),
        (OK + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n", {"protocol", ""}),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabcd", {"protocol", "wrong_length"}),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcd", {"wrong_length"}),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffff\r\nabcd", {"protocol", "wrong_length"}),
        (OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n", {"protocol", "wrong_length", ""}),
        (OK + b"Transfer-Encoding: rot13\r\n\r\nabcd", {"protocol", "wrong_length", ""}),
        (OK + b"X: " + b"y" * 100_000 + b"\r\n\r\n", {"protocol"}),
        (OK + b"".join(b"X%d: y\r\n" % number for number in range(5000)) + b"\r\nabcd", {"protocol", ""}),  # refused since aiohttp 3.14
        (OK + b"No colon here\r\n\r\nabcd", {"protocol"}),
        (OK + b": no name\r\n\r\nabcd", {"protocol"}),
        (OK + b"X-Robots-Tag: \xff\xfe\xc3\r\nRetry-After: \xff\r\nContent-Encoding: \xff\r\n\r\nabcd", {"protocol"}),
        (OK + b"X-Robots-Tag: \xff\xfe\xc3\r\nTDM-Reservation: \xff\r\nContent-Length: 4\r\n\r\nabcd", {"", "protocol"}),
        (OK + b"Set-Cookie: a=b; Domain=\xff; Expires=never\r\nContent-Length: 4\r\n\r\nabcd", {"", "protocol"}),
        (b"HTTP/1.1 302 Found\r\nLocation: http://\xff\xfe/\r\nContent-Length: 0\r\n\r\n", {"redirects", "dns", "protocol"}),
        (b"HTTP/1.1 302 Found\r\nLocation: http://a b/\r\nContent-Length: 0\r\n\r\n", {"redirects"}),
        (b"HTTP/1.1 302 Found\r\nLocation: " + b"x" * 8000 + b"\r\nContent-Length: 0\r\n\r\n", {"http_404"}),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\nabcd", {"protocol", "http_101"}),
        (b"HTTP/1.1 429 Wait\r\nRetry-After: " + b"9" * 5000 + b"\r\nContent-Length: 0\r\n\r\n", {"http_429"}),
        (b"SSH-2.0-OpenSSH_9.0\r\n", {"protocol", "connection"}),
        (b"ICY 200 OK\r\n\r\nabcd", {"protocol"}),
        (b"\x00" * 1000, {"protocol", "connection"}),
    ],
)
def test_hostile_responses_are_verdicts_and_never_errors(raw: bytes, expected: set[str]) -> None:
    async def lookup(host: str) -> list[str]:
        raise DnsFailed("NXDOMAIN", is_final=True)

    with WebServer({}) as server:
        answer = fetch_one(server.fault("/a", Fault(kind="raw", raw=raw)), retries=0, timeout_s=5.0, respect_robots=False, lookup=lookup)
    assert reason(answer) in expected
    if not answer.drop:
        assert answer.data == b"abcd" or raw.startswith(b"HTTP/9.9")


def test_nothing_listens() -> None:
    with WebServer({}) as server:
        port = server.port
    answer = fetch_one(f"http://127.0.0.1:{port}/a", retries=1, respect_robots=False)
    assert (reason(answer), answer.num_attempts, answer.status) == ("connection", 2, 0)


@pytest.mark.parametrize("kind", ["long", "long&size=1"])
def test_bytes_beyond_the_announced_length_reach_no_other_answer(kind: str) -> None:
    pages = {f"/{number}": bytes([number]) * 100_000 for number in range(8)}
    with WebServer(pages) as server:
        urls = [server.url(path + query) for path in pages for query in (f"?fault={kind}", "")]
        for answer, url in zip(fetch_all(urls, per_host=1), urls, strict=True):
            if "fault" in url:
                assert reason(answer) in ("", "protocol", "wrong_length")
            else:
                assert reason(answer) == ""
            assert answer.data in (b"", pages[f"/{answer.number // 2}"])


def self_signed(folder: Path) -> Path:
    """A certificate and its key for 127.0.0.1, in one file."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now - datetime.timedelta(1), now + datetime.timedelta(1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
    certificate = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, hashes.SHA256())
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "certificate.pem"
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


def test_certificates_are_checked(tmp_path: Path) -> None:
    path = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    program = (
        "import sys; from tests.data_prep.download.conftest import fetch_one, reason\n"
        "answer = fetch_one(sys.argv[1], respect_robots=False); print(reason(answer) or answer.data.decode(), answer.num_attempts)"
    )
    with WebServer({"/a": b"trusted"}, tls=context) as server, WebServer({}) as plain:
        refused = fetch_one(server.url("/a"), respect_robots=False)
        assert (reason(refused), refused.num_attempts) == ("tls", 1)
        assert not server.log
        no_tls = fetch_one(plain.url("/a").replace("http:", "https:"), respect_robots=False, timeout_s=1.0, retries=0)
        assert reason(no_tls) in ("tls", "timeout")
        done = subprocess.run(
            [sys.executable, "-c", program, server.url("/a")],
            env={"SSL_CERT_FILE": str(path), "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.split() == ["trusted", "1"], done.stderr
