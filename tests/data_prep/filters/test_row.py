"""All filters of a row together."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from data_prep.config import FilterConfig, ScoreConfig
from data_prep.filters.row import RowFilter, list_digests
from data_prep.reasons import REASONS, Drop

BYTES = hashlib.sha256(b"taken down").digest()


@pytest.fixture
def config(tmp_path: Path) -> FilterConfig:
    """Every list, a score from a column, and lengths."""
    lists = {
        "blocked_urls": "http://a.org/bad.jpg\n",
        "blocked_domains": "spam.org\nboth.org\n",
        "blocked_text": "lorem\n",
        "takedown": f"url http://a.org/gone.jpg\ndomain both.org\nsha256 {BYTES.hex()}\nphash 00000000ffffffff\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
    paths: dict[str, Any] = {name: str(tmp_path / name) for name in lists}
    return FilterConfig(**paths, min_caption_words=2, scores=(ScoreConfig(name="similarity", min=0.3),))


def verdict(check: Any, *arguments: Any) -> tuple[str, str]:
    """Reason and detail; empty if kept."""
    try:
        check(*arguments)
    except Drop as drop:
        return (drop.reason if drop.reason in REASONS else f"unknown {drop.reason}"), drop.detail
    return "", ""


@pytest.mark.parametrize(
    ("url", "caption", "extra", "expected"),
    [
        ("https://a.org/good.jpg", "two words", {"similarity": 0.3}, ("", "")),
        (None, "two words", {"similarity": 0.3}, ("", "")),
        ("https://A.org:443/bad.jpg#x", "two words", {"similarity": 0.3}, ("blocked_url", "")),
        ("https://cdn.Spam.org./x", "two words", {"similarity": 0.3}, ("blocked_domain", "spam.org")),
        ("https://notspam.org/x", "two words", {"similarity": 0.3}, ("", "")),
        ("https://a.org/gone.jpg", "two words", {"similarity": 0.3}, ("takedown", "url")),
        ("https://www.both.org/x", "two words", {"similarity": 0.3}, ("takedown", "domain both.org")),
        (None, "word", {"similarity": 0.3}, ("caption_too_short", "1 words")),
        (None, "Lorem ipsum", {"similarity": 0.3}, ("blocked_text", "line 1")),
        (None, "two words", {"similarity": 0.1}, ("score", "similarity 0.1 < 0.3")),
        (None, "two words", {}, ("score", "similarity missing")),
    ],
)
def test_a_row_is_judged_before_anything_is_fetched(config: FilterConfig, url: Any, caption: str, extra: Any, expected: Any) -> None:
    assert verdict(RowFilter.from_config(config).check_row, url, caption, extra) == expected


def test_content_is_judged_by_bytes_and_by_looks(config: FilterConfig) -> None:
    check = RowFilter.from_config(config, more_takedowns=["phash ffff000000000000 0"]).check_content
    other = hashlib.sha256(b"other").digest()
    assert verdict(check, BYTES, None)[0] == "takedown"
    assert verdict(check, other, None) == ("", "")
    assert verdict(check, other, 0xFFFFFFFF ^ 0b1111 << 40)[1].endswith("4 bits away")
    assert verdict(check, other, 0xFFFFFFFF ^ 0b11111 << 40) == ("", "")
    assert verdict(check, other, 0xFFFF << 48)[0] == "takedown"
    assert verdict(check, other, 0xFFFF << 48 ^ 1) == ("", "")


def test_a_scorer_may_give_what_the_columns_do_not(config: FilterConfig) -> None:
    scores = (ScoreConfig(name="similarity", min=0.3), ScoreConfig(name="beauty", min=5))
    judge = RowFilter.from_config(FilterConfig(scores=scores, scorer="mine:Scorer"))
    assert verdict(judge.check_row, None, "", {"similarity": 0.5}) == ("", "")
    assert verdict(judge.check_row, None, "", {"similarity": 0.2})[0] == "score"
    assert verdict(judge.check_scores, {"similarity": 0.5, "beauty": 6.0}) == ("", "")
    assert verdict(judge.check_scores, {"similarity": 0.5, "beauty": 4.0}) == ("score", "beauty 4 < 5")
    assert verdict(judge.check_scores, {"similarity": 0.5}) == ("score", "beauty missing")


def test_a_copy_in_another_process_judges_the_same(config: FilterConfig) -> None:
    judge = pickle.loads(pickle.dumps(RowFilter.from_config(config)))
    assert verdict(judge.check_row, "http://x.spam.org/", "two words", {"similarity": 1}) == ("blocked_domain", "spam.org")
    assert verdict(judge.check_content, BYTES, None)[0] == "takedown"


def test_lists_are_read_once_as_long_as_they_do_not_change(config: FilterConfig, tmp_path: Path) -> None:
    judge = RowFilter.from_config(config)
    assert RowFilter.from_config(config) is judge
    assert RowFilter.from_config(config, more_takedowns=["domain c.org"]) is not judge
    (tmp_path / "blocked_domains").write_text("a.org\n")
    changed = RowFilter.from_config(config)
    assert verdict(judge.check_url, "http://a.org/x") == ("", "")
    assert verdict(changed.check_url, "http://a.org/x") == ("blocked_domain", "a.org")


def test_no_filter_keeps_everything() -> None:
    judge = RowFilter.from_config(FilterConfig())
    assert verdict(judge.check_row, "not an address", "", {}) == ("", "")
    assert verdict(judge.check_url, None) == ("", "")
    assert verdict(judge.check_content, BYTES, 0) == ("", "")


def test_a_bad_earlier_rule_is_named() -> None:
    with pytest.raises(UserError, match="earlier takedowns, line 2"):
        RowFilter.from_config(FilterConfig(), more_takedowns=["domain a.org", "nonsense"])


def test_digests_change_with_the_lists(config: FilterConfig, tmp_path: Path) -> None:
    before = list_digests(config)
    assert set(before) == {str(tmp_path / name) for name in ("blocked_urls", "blocked_domains", "blocked_text", "takedown")}
    assert before[str(tmp_path / "blocked_text")] == hashlib.sha256(b"lorem\n").hexdigest()
    (tmp_path / "blocked_text").write_text("ipsum\n")
    after = list_digests(config)
    assert {path for path in before if before[path] != after[path]} == {str(tmp_path / "blocked_text")}
    assert list_digests(FilterConfig()) == {}
