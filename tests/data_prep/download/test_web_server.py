"""The server that the other tests trust."""

from collections import Counter
from pathlib import Path

from tests.data_prep.download.conftest import fetch_all, reason
from tests.data_prep.web_server import Fault, ServerProcess, WebServer


def test_a_share_of_the_paths_fails_until_it_heals() -> None:
    pages = {f"/{number}": b"x" for number in range(200)}
    with WebServer(pages, fail_share=0.3, seed=5, fail_with=Fault(kind="status", status=500)) as server:
        urls = [server.url(path) for path in pages]
        first = [reason(answer) for answer in fetch_all(urls, retries=0)]
        assert first == [reason(answer) for answer in fetch_all(reversed(urls), retries=0)][::-1], "the order of requests does not matter"
        assert 40 <= Counter(first)["http_500"] <= 80
        server.heal()
        assert not any(reason(answer) for answer in fetch_all(urls, retries=0))


def test_a_server_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a b.jpg").write_bytes(b"picture")
    (tmp_path / "robots.txt").write_text("User-agent: *\nDisallow: /private\n")
    outside = tmp_path.parent / "outside.txt"
    outside.write_text("secret")
    arguments = ("--hosts", "127.0.0.1", "127.0.0.2", "--robots", str(tmp_path / "robots.txt"), "--fail-share", "1")
    with ServerProcess(tmp_path, *arguments) as server:
        urls = [server.url("/a b.jpg"), server.url("/a b.jpg", "127.0.0.2"), server.url("/private"), server.url("/..%2foutside.txt")]
        assert [reason(answer) for answer in fetch_all(urls, retries=0)] == ["http_503", "http_503", "robots", "http_503"]
        server.heal()
        answers = fetch_all(urls, retries=0)
        assert [reason(answer) for answer in answers] == ["", "", "robots", "http_404"]
        assert answers[0].data == b"picture"
        log = server.log()
        assert {entry[1] for entry in log} == {f"127.0.0.1:{server.port}", f"127.0.0.2:{server.port}"}
        assert server.stats()["num_requests"] == len(log)
    assert server.process.returncode == 0
