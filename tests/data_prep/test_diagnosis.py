"""The diagnosis names the cause and the remedy, once, and is silent when all is well."""

import io
import socket
from dataclasses import dataclass
from functools import partial

import pytest
from PIL import Image

from data_prep.config import DownloadConfig, PrepConfig
from data_prep.diagnosis import HEALING, Watch, diagnose, findings
from data_prep.download.dns import DnsFailed
from data_prep.download.downloader import Caches, Downloader
from data_prep.download.request import Request
from data_prep.failure_text import host_of, normalise
from data_prep.images.header import judge_header
from data_prep.metadata import Facts
from data_prep.reasons import Drop, is_reason
from data_prep.run_stats import PartCollector, PartStats, merge
from tests.data_prep.web_server import Fault, WebServer

CONFIG = PrepConfig(output="s3://bucket/set", download=DownloadConfig(contact="crawl@example.org"))


@dataclass(frozen=True)
class Fetched:
    status: int = 200
    seconds: float = 0.3
    num_attempts: int = 1
    num_bytes: int = 1000


def run(kept: int = 900, seconds: float = 0.3, **failures: tuple[int, str, str]) -> PartStats:
    """Statistics of a run; failures: reason -> (number, detail, host, where `#` becomes the sample's number)."""
    collector = PartCollector()
    for number in range(kept):
        facts = Facts(
            **{"key": str(number), "source": "", "url": f"https://h{number}.org/x", "caption": "a bus", "width": 640, "height": 480},
            **{"format": "jpeg", "jpeg_quality": 90, "num_bytes": 100, "sha256": bytes(32), "phash": 0},
        )
        collector.kept(facts, num_bytes_out=1, answer=Fetched(seconds=seconds))
    for reason, (count, detail, host) in failures.items():
        for number in range(count):
            collector.dropped(reason, detail, f"https://{host.replace('#', str(number))}/x.jpg", Fetched(status=0))
    return collector.finish()


SPREAD = "h#.example.com"

SYSTEMATIC = {
    "dns-resolver": (
        run(600, dns=(250, "SERVFAIL from 127.0.0.53", SPREAD), http_404=(150, "", SPREAD)),
        ["62 % of the failures are DNS SERVFAIL", "250 samples (25 %)", "unbound or knot-resolver", "download.max_concurrency (256 now)"],
    ),
    "dns-gone": (run(600, dns=(400, "NXDOMAIN", SPREAD)), ["400 samples (40 %)", "NXDOMAIN", "dig @9.9.9.9"]),
    "http-429": (
        run(940, http_429=(60, "", "api.photos.net")),
        ["60 samples (6.0 %)", "mostly from api.photos.net", "lower download.per_host (8 now)"],
    ),
    "http-403-cdn.shop.com": (run(900, http_403=(100, "", "cdn.shop.com")), ["cdn.shop.com refuses", "100 %", "filters.blocked_domains"]),
    "http-403": (run(800, http_403=(200, "", SPREAD)), ["200 samples (20 %)", "many hosts", "block list"]),
    "timeout-link": (
        run(800, seconds=14, timeout=(200, "", SPREAD)),
        ["200 samples (20 %)", "max_concurrency (256 now)", "download.timeout_s (30 now)"],
    ),
    "timeout-hosts": (run(800, timeout=(200, "", "old.org")), ["mostly from old.org", "connect_timeout_s (10 now)"]),
    "tls": (
        run(
            900, tls=(100, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get local issuer certificate (_ssl.c:1006)", SPREAD)
        ),
        ["100 samples (10 %)", "ca-certificates"],
    ),
    "open-files": (run(970, connection=(30, "[Errno 24] Too many open files", SPREAD)), ["ulimit -n", "30 samples (3.0 %)"]),
    "no-route": (run(900, connection=(100, "[Errno 101] Network is unreachable", SPREAD)), ["found no route"]),
    "connection": (run(800, connection=(200, "Connect call failed ('10.0.0.1', 80)", SPREAD)), ["Connection refused", "200 samples (20 %)"]),
    "circuit-open": (run(900, circuit_open=(100, "", "down.org")), ["100 samples (10 %) of down.org", "20 times in a row"]),
    "robots": (
        run(800, robots=(120, "", SPREAD), opt_out=(80, "noai", SPREAD)),
        ["200 samples (20 %)", "robots and opt_out", "nothing needs mending"],
    ),
    "web-pages": (run(900, not_an_image=(100, "text/html: <!doctype html>", "login.org")), ["web pages", "login forms", "mostly from login.org"]),
    "copies-img.gone.net": (
        run(900, near_duplicate_image=(100, "3 bits from 0000000017", "img.gone.net")),
        ["100 samples (10 %) from img.gone.net", "placeholder", "filters.takedown"],
    ),
    "too_small": (run(600, too_small=(400, "120x90", SPREAD)), ["400 samples (40 %)", "thumbnails", "limits.min_side"]),
    "missing_caption": (run(600, missing_caption=(400, "", SPREAD)), ["columns.caption", "missing_caption=empty"]),
    "http_404": (run(500, http_404=(500, "", SPREAD)), ["500 samples (50 %)", "links are gone"]),
    "5xx": (run(800, http_503=(150, "", SPREAD), http_500=(50, "", SPREAD)), ["200 samples (20 %)", "http_503 and http_500", "per_host"]),
    "filter-language": (run(400, language=(600, "de", SPREAD)), ["600 samples (60 %)", "one filter (language"]),
    "low-success": (
        run(300, http_404=(250, "", SPREAD), corrupt=(30, "", SPREAD), animated=(90, "", SPREAD), blank=(300, "", SPREAD), score=(30, "", SPREAD)),
        ["only 30 % of 1,000 samples are kept", "no single cause"],
    ),
}


@pytest.mark.parametrize("code", SYSTEMATIC)
def test_a_systematic_failure_is_named_with_its_remedy(code: str) -> None:
    stats, phrases = SYSTEMATIC[code]
    found = {finding.code: finding.text for finding in findings(stats, CONFIG)}
    assert set(found) - {"retry"} == {code}, found
    for phrase in phrases:
        assert phrase in found[code], found[code]


def test_nothing_is_said_when_all_is_well() -> None:
    assert diagnose(run(1000), CONFIG) == []
    assert diagnose(PartStats(), CONFIG) == []


def test_a_usual_crawl_of_an_old_list_is_not_nagged_about() -> None:
    usual = run(
        8300,
        http_404=(900, "", SPREAD),
        dns=(90, "NXDOMAIN", SPREAD),
        timeout=(60, "", SPREAD),
        too_small=(400, "8x8", SPREAD),
        http_403=(150, "", SPREAD),
    )
    assert diagnose(usual, CONFIG) == []


def test_few_samples_are_chance() -> None:
    assert diagnose(run(10, dns=(10, "SERVFAIL", SPREAD)), CONFIG) == []


def test_retry_names_what_may_heal_and_nothing_else() -> None:
    stats = run(600, timeout=(100, "", SPREAD), http_404=(100, "", SPREAD), http_502=(150, "", SPREAD), http_403=(50, "", SPREAD))
    text = diagnose(stats, CONFIG)[-1]
    assert text == "250 samples (25 %) may succeed on another day: `jetway retry s3://bucket/set --reason 5xx,timeout`"
    gone = run(600, dns=(400, "NXDOMAIN", SPREAD))
    assert "retry" not in [finding.code for finding in findings(gone, CONFIG)], "a domain that is gone does not come back"
    assert all(is_reason(name) for name in HEALING)


def test_findings_come_in_the_order_of_what_they_cost() -> None:
    stats = run(300, http_404=(400, "", SPREAD), http_429=(100, "", "a.org"), tls=(200, "self-signed certificate", SPREAD))
    assert [finding.code for finding in findings(stats, CONFIG)] == ["http_404", "tls", "http-429", "retry"]


def test_watch_tells_each_thing_once_and_only_on_good_evidence() -> None:
    watch = Watch(CONFIG)
    early = run(60, dns=(40, "SERVFAIL", SPREAD))
    assert findings(early, CONFIG) != []
    assert watch.new(early) == [], "40 samples are not enough while the run goes on"
    later = merge(*[early] * 5)
    (first,) = watch.new(later)
    assert "SERVFAIL" in first
    assert watch.new(merge(later, early)) == []
    (second,) = watch.new(merge(later, run(0, http_429=(150, "", "api.net"))))
    assert "429" in second


async def resolve(host: str) -> list[str]:
    """A resolver that fails on some names, as overloaded ones do."""
    if host.startswith("lost"):
        raise DnsFailed("SERVFAIL", is_final=False)
    return ["127.0.0.1"]


def test_causes_are_recognised_in_what_the_downloader_says() -> None:
    """The real downloader against a server on loopback: its words must be those that the diagnosis groups by."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "JPEG")
    pages = {f"/{name}{number}": data for number in range(30) for name, data in (("good", picture.getvalue()), ("page", b"<!DOCTYPE html><p>log in"))}
    config = PrepConfig(download=DownloadConfig(allowed_networks=("127.0.0.0/8",), retries=0, backoff_s=0, host_failures=10_000, timeout_s=10))
    collector = PartCollector()
    with socket.socket() as closed, WebServer(pages) as server:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: refuses
        for number in range(30):
            server.fault(f"/reset{number}", Fault(kind="reset"))
            server.fault(f"/many{number}", Fault(kind="status", status=429))
        urls = [server.url(f"/{name}{number}") for name in ("good", "page", "reset", "many", "gone") for number in range(30)]
        urls += [f"http://lost{number}.example.org:{server.port}/x.jpg" for number in range(30)]
        urls += [f"http://127.0.0.1:{closed.getsockname()[1]}/{number}" for number in range(30)]
        options = {"max_file_bytes": 2**20, "memory_bytes": 2**24, "share": 1, "lookup": resolve, "caches": Caches()}
        judge = partial(judge_header, image=config.image, limits=config.limits)
        with Downloader(config.download, judge=judge, **options) as downloader:  # type: ignore[arg-type]
            for answer in downloader.fetch(Request(number, url) for number, url in enumerate(urls)):
                drop = answer.drop or Drop("missing_caption")
                collector.dropped(drop.reason, drop.detail, urls[answer.number], answer)
    stats = collector.finish()
    expected = {"missing_caption": 30, "not_an_image": 30, "connection": 60, "http_429": 30, "http_404": 30, "dns": 30}
    assert dict(stats.dropped) == expected
    assert stats.failed_details["dns"] == {"SERVFAIL": 30}
    assert stats.failed_details["not_an_image"] == {"HTML page": 30}
    assert stats.failed_details["connection"]["Connection refused"] == 30
    assert sum(stats.failed_details["connection"].values()) == 60
    assert len(stats.failed_details["connection"]) <= 2, "all resets read the same"
    assert stats.failed_hosts["http_429"] == {"127.0.0.1": 30}
    assert stats.statuses["429"] == 30
    codes = {finding.code for finding in findings(stats, config)}
    assert {"dns-resolver", "http-429", "web-pages", "connection"} <= codes, codes


@pytest.mark.parametrize(
    ("detail", "cause"),
    [
        ("Cannot connect to host a.b.org:443 ssl:True [SSLCertVerificationError: (1, '[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed:"
         " certificate has expired (_ssl.c:1006)')]", "certificate verify failed: expired"),
        ("[Errno 111] Connect call failed ('93.184.216.34', 443)", "Connection refused"),
        ("the resolver did not answer in time", "name server timed out"),
        ("REFUSED", "name server refused"),
        ("SERVFAIL or timeout", "SERVFAIL"),
        ("not enough data from https://a.org/index.html", "not enough data from URL"),
        ("(11, 'Could not contact DNS servers')", "name server unreachable"),
        ("(4, 'Domain name not found')", "NXDOMAIN"),
        ("(1, 'DNS server returned answer with no data')", "no address"),
        ("(12, 'Timeout while contacting DNS servers')", "name server timed out"),
        ("[Errno -3] Temporary failure in name resolution", "SERVFAIL"),
        ("12,345 bytes of 23,456", "N bytes of N"),
        ("host img7.example.org answered 10.2.3.4:80 with https://b.com/a?b=c twice", "host HOST answered ADDRESS with URL twice"),
        ("120x90", "NxN"),
        ("cannot identify image file <_io.BytesIO object at 0x7f2a11bc>", "cannot identify image file <_io.BytesIO object at HEX>"),
        ("", ""),
        ("x" * 500, "x" * 79 + "…"),
    ],
)  # fmt: skip
def test_equal_causes_read_the_same(detail: str, cause: str) -> None:
    assert normalise(detail) == cause


def test_hosts_are_read_from_any_address() -> None:
    assert host_of("https://User@CDN.Example.org:8443/a b.jpg?x") == "cdn.example.org"
    assert host_of("s3://bucket/key") == "bucket"
    for nothing in (None, "", "no address", "http://[broken", "/a/b.jpg"):
        assert host_of(nothing) == ""
