"""Rules of a takedown: read from text, and compared with tables."""

import hashlib
import re

import numpy as np
import pyarrow as pa
import pytest

from configs.errors import UserError
from data_prep import metadata
from data_prep.images.phash import distance
from data_prep.takedown_rules import Matcher, Rules, domain_among, normal_url
from tests.data_prep.history import facts

TABLE = metadata.table_of([facts(number) for number in range(30)])


def match(*lines: str, table: pa.Table = TABLE) -> tuple[list[int], set[str]]:
    rows, used = Matcher(Rules.parse(lines, "here")).match(table)
    return rows.tolist(), used


def test_text_comes_back_in_one_form() -> None:
    digest, look = "AB" * 32, "0123456789ABCDEF"
    lines = [
        "",
        "  # a comment",
        f"sha256 {digest}",
        f"phash {look}",
        f"phash {look}  7",
        "domain *.Example.ORG.",
        "key 0000000012",
        "key\t0000000012 ",
    ]
    lines += ["url https://example.org/a b#c", "domain bücher.example"]
    rules = Rules.parse(lines, "here")
    expected = [
        "url https://example.org/a b#c",
        "domain example.org",
        "domain xn--bcher-kva.example",
        f"sha256 {digest.lower()}",
        f"phash {look.lower()} 4",
        f"phash {look.lower()} 7",
        "key 0000000012",
    ]
    assert rules.lines() == expected
    assert Rules.parse(rules.lines(), "there") == rules
    assert len(rules) == 7
    assert Rules.parse(lines[:4], "") | Rules.parse(lines[3:], "") == rules
    assert not Rules()


@pytest.mark.parametrize(
    "line",
    [
        "address x",
        "url",
        "url example.org/a",
        "domain a/b",
        "domain a b",
        "sha256 12",
        "phash 0123456789abcdeg",
        "phash 0123456789abcdef 17",
        "key é",
    ],
)
def test_what_is_no_rule_is_named_by_its_line(line: str) -> None:
    with pytest.raises(UserError, match=r"rules\.txt, line 3 is no takedown rule"):
        Rules.parse(["# rules", "key 1", line], "rules.txt")


def test_each_kind_hits_what_it_names() -> None:
    assert match("key 0000000012", "key 0000000099") == ([12], {"key 0000000012"})
    digest = hashlib.sha256(b"original 7").hexdigest()
    assert match(f"sha256 {digest}", f"sha256 {'0' * 64}") == ([7], {f"sha256 {digest}"})
    assert match("url http://OTHER.net:80/picture-5.png#top") == ([5], {"url http://OTHER.net:80/picture-5.png#top"})
    assert match("domain example.org") == ([n for n in range(30) if n % 3 != 2], {"domain example.org"})
    assert match("domain images.example.org") == ([n for n in range(30) if n % 3 == 1], {"domain images.example.org"})
    assert match("domain ample.org", "domain org.example") == ([], set())
    assert match(f"phash {facts(3).phash:016x} 0") == ([3], {f"phash {facts(3).phash:016x} 0"})
    assert match(f"phash {facts(3).phash ^ 0b1111:016x}") == ([3], {f"phash {facts(3).phash ^ 0b1111:016x} 4"})


@pytest.mark.parametrize("limit", [0, 3, 8, 16])
def test_perceptual_hashes_hit_up_to_their_distance(limit: int) -> None:
    hashes = [0, 2**64 - 1, *(facts(number).phash for number in range(30))]
    wanted = facts(4).phash ^ 0b1011 << 30
    table = pa.table({"key": [str(n) for n in range(32)], "phash": pa.array(hashes, pa.uint64())})
    expected = [row for row, value in enumerate(hashes) if distance(value, wanted) <= limit]
    assert match(f"phash {wanted:016x} {limit}", table=table)[0] == expected
    assert (6 in expected) == (limit >= 3)


def test_distances_agree_with_counting_bit_by_bit() -> None:
    words = np.random.default_rng(0).integers(0, 2**64, 2000, dtype=np.uint64)
    table = pa.table({"key": [""] * 2000, "phash": pa.array(words)})
    for wanted in (0, 2**64 - 1, int(words[0])):
        expected = [row for row, word in enumerate(words.tolist()) if distance(word, wanted) <= 16]
        assert match(f"phash {wanted:016x} 16", table=table)[0] == expected


def test_many_kinds_hit_together_and_only_their_columns_are_needed() -> None:
    rules = Rules.parse(["key 0000000001", f"sha256 {facts(2).sha256.hex()}", f"phash {facts(2).phash:016x}"], "here")
    assert rules.columns == ["key", "sha256", "phash"]
    rows, used = Matcher(rules).match(TABLE.select(rules.columns))
    assert rows.tolist() == [1, 2]
    assert len(used) == 3
    assert Rules.parse(["domain a.b", "url http://a.b/c"], "").columns == ["key", "url"]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("HTTPS://Example.org", "http://example.org/"),
        ("https://example.org:443/a?b=1#c", "http://example.org/a?b=1"),
        ("http://example.org:443/", "http://example.org:443/"),
        ("http://example.org./A", "http://example.org/A"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("http://user:pass@example.org/", "http://example.org/"),
        ("no address", "no address"),
        ("http://[broken/", "http://[broken/"),
    ],
)
def test_addresses_are_compared_in_one_form(text: str, same: str) -> None:
    assert normal_url(text) == same
    assert normal_url(same) == same


def test_the_longest_domain_is_named() -> None:
    domains = frozenset(("org", "example.org"))
    assert domain_among(normal_url("https://www.example.org/x"), domains) == "example.org"
    assert domain_among(normal_url("HTTP://user@Example.ORG:81"), domains) == "example.org"
    assert domain_among(normal_url("https://example.com/org"), domains) is None
    assert domain_among(normal_url("https://example.com/?http://example.org/"), domains) is None
    for text in ("http://[broken/", "", "example.org"):
        assert domain_among(normal_url(text), domains) is None


def test_the_quick_form_is_the_thorough_one() -> None:
    from data_prep import takedown_rules

    addresses = [f"{scheme}://{host}{path}" for scheme in ("http", "https") for host in HOSTS for path in PATHS]
    quick = [normal_url(address) for address in addresses]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(takedown_rules, "_SIMPLE_URL", re.compile(r"(?!)(.)"))
        assert [normal_url(address) for address in addresses] == quick


HOSTS = ("example.org", "a-1.example.org", "localhost", "example.org.", "Example.org", "example.org:80", "example.org:8080", "u:p@example.org")
PATHS = ("", "/", "/a", "/a/", "/a?b=c", "/a?", "/a#b", "/A%20b?x=/y", "?b", "//x", "/a b")
