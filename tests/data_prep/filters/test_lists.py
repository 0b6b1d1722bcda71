"""Files of addresses, domains, expressions and takedown rules."""

import gzip
import hashlib
from pathlib import Path

import pytest

from configs.errors import UserError
from data_prep.filters.lists import (
    digest_of,
    domains_of,
    host_of,
    load_domains,
    load_expressions,
    load_takedowns,
    load_urls,
    read_lines,
)
from data_prep.storage import open_storage
from data_prep.takedown_rules import normal_url


@pytest.fixture
def write(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Writes a list; returns its path."""

    def write(text: str | bytes, name: str = "list.txt") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_hosts_and_the_domains_above_them() -> None:
    assert host_of(normal_url("https://A.Bücher.example:81/x")) == "a.xn--bcher-kva.example"
    assert host_of("nonsense") == ""
    assert list(domains_of("a.b.org")) == ["a.b.org", "b.org", "org"]


def test_addresses_match_whatever_their_scheme_case_port_and_fragment(write) -> None:  # type: ignore[no-untyped-def]
    found = load_urls(write("# mine\n\n  https://Example.org:443/a.jpg#x  \r\nhttp://b.org\n"))
    assert len(found) == 2
    for address in ("http://example.org/a.jpg", "https://example.org/a.jpg", "http://b.org/"):
        assert normal_url(address) in found
    for address in ("http://example.org/A.jpg", "http://example.org/a.jpg?", "http://example.org/a.jpg?x", "http://www.example.org/a.jpg"):
        assert (normal_url(address) in found) == (address == "http://example.org/a.jpg?")


def test_domains_in_every_spelling(write) -> None:  # type: ignore[no-untyped-def]
    found = load_domains(write("Example.ORG\n*.b.org\n.c.org.\nBÜCHER.example\n10.0.0.1\n"))
    assert len(found) == 5
    for domain in ("example.org", "b.org", "c.org", "xn--bcher-kva.example", "10.0.0.1"):
        assert domain in found


@pytest.mark.parametrize(
    ("load", "line"),
    [
        (load_urls, "example.org/a.jpg"),
        (load_urls, "http:///a.jpg"),
        (load_domains, "http://example.org"),
        (load_domains, "example.org/a"),
        (load_domains, "example org"),
        (load_domains, "a..b"),
        (load_expressions, "(unclosed"),
        (load_takedowns, "hello"),
        (load_takedowns, "sha256 abc"),
        (load_takedowns, "phash 0123456789abcdef 17"),
        (load_takedowns, "phash 0123456789abcde"),
        (load_takedowns, "key 0000000001"),
        (load_takedowns, "url"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(write, load, line: str) -> None:  # type: ignore[no-untyped-def]
    good = {load_urls: "http://a.org/b", load_domains: "a.org", load_expressions: "a+", load_takedowns: "domain a.org"}[load]
    with pytest.raises(UserError, match=r"list.txt, line 3") as caught:
        load(write(f"# comment\n{good}\n{line}\n{good}\n"))
    assert line in str(caught.value)


def test_what_is_not_text_is_named_by_its_line(write) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="line 2"):
        load_domains(write(b"a.org\n\xff\xfe\n"))


def test_a_missing_file_is_the_users_to_mend(tmp_path: Path) -> None:
    for load in (load_urls, load_domains, load_expressions, load_takedowns, digest_of):
        with pytest.raises(UserError, match="cannot read"):
            load(str(tmp_path / "none.txt"))


def test_expressions_ignore_case_and_keep_their_line_numbers(write) -> None:  # type: ignore[no-untyped-def]
    found = load_expressions(write("# words\nstock\\s+photo\n\nÜBER\n"))
    assert [number for number, _ in found] == [2, 4]
    assert found[0][1].search("Free STOCK  Photo")
    assert found[1][1].search("über uns")


def test_takedown_rules_of_every_kind(write) -> None:  # type: ignore[no-untyped-def]
    digest = hashlib.sha256(b"x").digest()
    text = f"url http://a.org/b\ndomain c.org\nsha256 {digest.hex().upper()}\nphash 00000000000000FF\nphash 000000000000ff00 0\n"
    found = load_takedowns(write(text), more=["phash 00000000ffffffff 7", "", "domain d.org"])
    assert found.addresses.find_url("http://a.org/b")
    assert found.addresses.find_domain("http://x.c.org/y") == "c.org"
    assert found.addresses.find_domain("http://d.org/") == "d.org"
    assert found.addresses.find_domain("http://xc.org/") is None
    assert digest in found.contents
    assert [looks.distance for looks in found.looks] == [0, 4, 7]
    assert found.looks[1].nearest(0xFF ^ 0b1111 << 20) == 4
    assert found.looks[1].nearest(0xFF ^ 0b11111 << 20) is None


def test_packed_lists_and_a_byte_order_mark(write) -> None:  # type: ignore[no-untyped-def]
    assert "a.org" in load_domains(write(gzip.compress(b"\xef\xbb\xbfa.org\nb.org"), "list.txt.gz"))


def test_lists_on_an_object_store(s3_url: str) -> None:
    storage = open_storage(s3_url)
    storage.put_bytes("lists/domains.txt", b"a.org\nb.org\n")
    path = f"{s3_url}/lists/domains.txt"
    assert [line for _, line in read_lines(path)] == ["a.org", "b.org"]
    assert digest_of(path) == hashlib.sha256(b"a.org\nb.org\n").hexdigest()
    with pytest.raises(UserError, match="cannot read"):
        load_domains(f"{s3_url}/lists/none.txt")
