import pytest
from yarl import URL

from data_prep.download.retry import Failed
from data_prep.download.urls import follow, origin_of, parse_url


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://example.org/a b.jpg", "http://example.org/a%20b.jpg"),
        (" HTTPS://Example.ORG/A ", "https://example.org/A"),
        ("http://example.org/a.jpg#part", "http://example.org/a.jpg"),
        ("http://example.org?x", "http://example.org/?x"),
        ("http://bücher.example/ä?q=ö", "http://xn--bcher-kva.example/%C3%A4?q=%C3%B6"),
        ("http://example.org/a%2Fb?x=%2B1", "http://example.org/a%2Fb?x=%2B1"),
        ("http://2130706433/", "http://127.0.0.1/"),
        ("http://0x7f.1:8080/x", "http://127.0.0.1:8080/x"),
        ("http://１２７.0.0.1/", "http://127.0.0.1/"),
        ("http://[0:0:0:0:0:0:0:1]/", "http://[::1]/"),
        ("http://example.org/a\r\nHost: evil", "http://example.org/aHost:%20evil"),
        ("s3://bucket/a key#1.jpg", "s3://bucket/a key#1.jpg"),
        ("S3://Bucket/Key", "s3://Bucket/Key"),
    ],
)
def test_what_can_be_asked_for(text: str, url: str) -> None:
    assert str(parse_url(text)) == url


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "   ",
            "example.org/a.jpg",
            "//example.org/a",
            "http://",
            "http:///a.jpg",
            "http://?q",
            "http://example.org:99999/",
            "http://example.org:x/",
        ),
        *("ftp://example.org/a", "file:///etc/passwd", "data:image/png;base64,AAAA", "javascript://x/y", "memory://a/b", "s3://bucket", "s3:///key"),
        *("http://[::1/", "http://exa mple.org/", "http://" + "a" * 20_000, "http://example.org:0/"),
    ],
)
def test_what_cannot_is_a_bad_address(text: str) -> None:
    with pytest.raises(Failed) as caught:
        parse_url(text)
    assert caught.value.reason == "bad_url"
    assert not caught.value.can_heal


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/b", "http://example.org/b"),
        ("b?x=1#y", "http://example.org/d/b?x=1"),
        ("https://other.example/c d", "https://other.example/c%20d"),
        ("//other.example/e", "http://other.example/e"),
        ("http://0x7f.1/", "http://127.0.0.1/"),
    ],
)
def test_redirects_are_relative_to_where_they_stand(location: str, target: str) -> None:
    assert str(follow(URL("http://example.org/d/a.jpg"), location)) == target


@pytest.mark.parametrize("location", [None, "", "ftp://example.org/", "file:///etc/passwd", "http://[::1/", "s3://bucket/key"])
def test_redirects_to_nowhere(location: str | None) -> None:
    with pytest.raises(Failed) as caught:
        follow(URL("http://example.org/a"), location)
    assert caught.value.reason == "redirects"


def test_an_origin_is_scheme_host_and_port() -> None:
    assert origin_of(URL("http://a.example/x")) == "http://a.example:80"
    assert origin_of(URL("https://a.example/x")) != origin_of(URL("http://a.example/x"))
