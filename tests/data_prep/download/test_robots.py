import pytest
from yarl import URL

from data_prep.download.downloader import Caches
from data_prep.download.retry import Failed
from data_prep.download.robots import EVERYTHING, MOST_BYTES, RobotsCache, parse_rules, rules_without_file
from tests.data_prep.download.conftest import fetch_all, fetch_one, reason
from tests.data_prep.web_server import Fault, WebServer

PAGES = {"/a.jpg": b"a picture", "/b.jpg": b"another", "/private/c.jpg": b"secret"}


def allows(text: str, path: str) -> bool:
    try:
        parse_rules(text.encode()).check(URL(f"http://example.org{path}"))
    except Failed as failure:
        return failure.reason != "robots" or failure.can_heal
    return True


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("User-agent: *\nDisallow: /", "/a.jpg", False),
        ("User-agent: *\nDisallow:", "/a.jpg", True),
        ("User-agent: *\nDisallow: /x", "/a.jpg", True),
        ("User-agent: *\nDisallow: /x", "/xy/z.jpg", False),
        ("user-agent: JETWAY\ndisallow: /", "/a.jpg", False),
        ("User-agent: googlebot\nDisallow: /", "/a.jpg", True),
        ("User-agent: *\nDisallow: /\n\nUser-agent: jetway\nAllow: /", "/a.jpg", True),
        ("User-agent: jetway\nUser-agent: other\nDisallow: /x\n\nUser-agent: jetway\nDisallow: /y", "/y/1", False),
        ("User-agent: *\nDisallow: /x\nAllow: /x/open", "/x/open/1.jpg", True),
        ("User-agent: *\nAllow: /x\nDisallow: /x", "/x/1.jpg", True),
        ("User-agent: *\nDisallow: /*.gif$", "/a/b.gif", False),
        ("User-agent: *\nDisallow: /*.gif$", "/a/b.gif?x=1", True),
        ("User-agent: *\nDisallow: /a*b", "/a/c/b.jpg", False),
        ("User-agent: *\nDisallow: /*?print=", "/x?print=1", False),
        ("User-agent: *\nDisallow: /ä", "/%C3%A4/1.jpg", False),
        ("User-agent: *\nDisallow: /a%3Cd", "/a%3cd.jpg", False),
        ("\ufeffUser-agent: *\r\nDisallow: /x # why\r\n", "/x", False),
        ("User-agent: *\rDisallow: /x", "/x", False),
        ("<html><body>no such page</body></html>", "/a.jpg", True),
        ("Disallow: /", "/a.jpg", True),
        ("", "/a.jpg", True),
    ],
)
def test_rules(text: str, path: str, expected: bool) -> None:
    assert allows(text, path) is expected


def test_whatever_is_in_the_file_it_is_read() -> None:
    parse_rules(bytes(range(256)) * 100).check(URL("http://example.org/a"))
    parse_rules(b"User-agent: *\nCrawl-delay: nan\nDisallow: /" + b"*a" * 10_000 + b"b").check(URL("http://example.org/" + "a" * 8000))


def test_crawl_delay_is_read() -> None:
    assert parse_rules(b"User-agent: *\nCrawl-delay: 2.5").delay_s == 2.5
    assert parse_rules(b"User-agent: other\nCrawl-delay: 2.5").delay_s == 0


def test_what_comes_after_the_limit_is_ignored() -> None:
    padding = "# x\n" * (MOST_BYTES // 4)
    assert allows("User-agent: *\n" + padding + "Disallow: /", "/a.jpg")
    assert not allows("User-agent: *\nDisallow: /\n" + padding, "/a.jpg")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451])
def test_no_file_allows_everything(status: int) -> None:
    assert rules_without_file(Failed(f"http_{status}", status=status)) is EVERYTHING


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (Failed("http_500", status=500), "robots"),
        (Failed("http_503", status=503), "robots"),
        (Failed("http_429", status=429), "robots"),
        (Failed("protocol", "garbage"), "robots"),
        (Failed("dns", "NXDOMAIN"), "dns"),
        (Failed("timeout", "slow"), "timeout"),
        (Failed("tls", "expired"), "tls"),
        (Failed("private_address", "10.0.0.1"), "private_address"),
    ],
)
def test_an_unreachable_file_disallows_everything(failure: Failed, expected: str) -> None:
    with pytest.raises(Failed) as caught:
        rules_without_file(failure).check(URL("http://example.org/a"))
    assert caught.value.reason == expected
    assert not caught.value.can_heal, "the file was tried often enough"


def test_the_cache_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.download.robots.MOST_HOSTS", 2)
    cache = RobotsCache()
    for number in range(4):
        cache.keep(f"http://{number}:80", EVERYTHING)
    assert [cache.find(f"http://{number}:80") is not None for number in range(4)] == [False, False, True, True]


def test_disallowed_images_are_never_asked_for_and_the_file_once_per_process() -> None:
    caches = Caches()
    with WebServer(PAGES, robots="User-agent: *\nDisallow: /private/") as server:
        urls = [server.url(path) for path in (*PAGES, *PAGES)]
        for _ in range(2):
            answers = fetch_all(urls, caches=caches)
            assert [reason(answer) for answer in answers] == ["", "", "robots"] * 2
            assert answers[2].num_attempts == 0
        assert [entry.path for entry in server.log].count("/robots.txt") == 1
        assert not server.requests("/private/c.jpg")
        assert server.log[0].path == "/robots.txt", "the rules come before the first image"
        assert all(entry.user_agent.startswith("jetway/") and entry.user_agent.endswith("(+mailto:crawler@example.org)") for entry in server.log)


def test_robots_can_be_ignored_on_request() -> None:
    with WebServer(PAGES, robots="User-agent: *\nDisallow: /") as server:
        assert fetch_one(server.url("/a.jpg"), respect_robots=False).data == PAGES["/a.jpg"]
        assert [entry.path for entry in server.log] == ["/a.jpg"]


def test_a_redirect_obeys_the_rules_of_where_it_leads() -> None:
    with (
        WebServer(PAGES, hosts=("127.0.0.2",), robots="User-agent: jetway\nDisallow: /private") as target,
        WebServer({}) as server,
    ):
        url = server.fault("/moved", Fault(kind="redirect", location=target.url("/private/c.jpg")))
        assert reason(fetch_one(url)) == "robots"
        assert not target.requests("/private/c.jpg")


@pytest.mark.parametrize(("status", "expected"), [(403, ""), (404, ""), (500, "robots"), (429, "robots")])
def test_statuses_of_the_file(status: int, expected: str) -> None:
    with WebServer(PAGES, robots_fault=Fault(kind="status", status=status)) as server:
        assert reason(fetch_one(server.url("/a.jpg"), retries=1)) == expected
        assert len(server.requests("/a.jpg")) == (0 if expected else 1)
        assert [entry.path for entry in server.log].count("/robots.txt") == (2 if expected else 1)


def test_a_file_that_hangs_stops_the_host_under_its_own_reason() -> None:
    with WebServer(PAGES, robots_fault=Fault(kind="hang")) as server:
        answers = fetch_all([server.url("/a.jpg"), server.url("/b.jpg")], timeout_s=0.2, retries=1)
        assert [reason(answer) for answer in answers] == ["timeout", "timeout"]
        assert not server.requests()


def test_a_file_that_heals_is_not_held_against_the_host() -> None:
    caches = Caches()
    with WebServer(PAGES, robots_fault=Fault(kind="status", status=500)) as server:
        assert reason(fetch_one(server.url("/a.jpg"), retries=0, caches=caches)) == "robots"
        server.options.robots_fault = None
        server.options.robots = "User-agent: *\nDisallow: /private"
        assert reason(fetch_one(server.url("/a.jpg"), retries=0, caches=caches)) == ""


def test_redirects_of_the_file_are_followed_and_too_many_mean_none() -> None:
    with WebServer({"/rules": b"User-agent: *\nDisallow: /a"}, hosts=("127.0.0.2",)) as other:
        with WebServer(PAGES, robots_fault=Fault(kind="redirect", location=other.url("/rules"))) as server:
            answers = fetch_all([server.url("/a.jpg"), server.url("/b.jpg")])
            assert [reason(answer) for answer in answers] == ["robots", ""]
        with WebServer(PAGES, robots_fault=Fault(kind="loop")) as server:
            assert reason(fetch_one(server.url("/a.jpg"))) == ""


def test_an_endless_file_is_cut() -> None:
    with WebServer(PAGES, robots="User-agent: *\nDisallow: /a\n" + "# x\n" * 500_000) as server:
        answers = fetch_all([server.url("/a.jpg"), server.url("/b.jpg")])
        assert [reason(answer) for answer in answers] == ["robots", ""]
    with WebServer(PAGES, robots_fault=Fault(kind="endless", size=2**28)) as server:
        assert reason(fetch_one(server.url("/a.jpg"))) == ""


def test_requests_keep_their_distance_where_the_file_asks_for_it() -> None:
    with WebServer(PAGES, robots="User-agent: *\nCrawl-delay: 0.15") as server:
        answers = fetch_all([server.url("/a.jpg"), server.url("/b.jpg"), server.url("/private/c.jpg")])
        assert not any(map(reason, answers))
        times = [entry.time for entry in server.requests()]
        assert min(later - earlier for earlier, later in zip(times, times[1:], strict=False)) > 0.1
        assert reason(fetch_all([server.url("/a.jpg")] * 2, max_retry_after_s=0.1)[1]) == "robots"
