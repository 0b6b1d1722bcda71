import math
from email.utils import formatdate

import pytest

from data_prep.download.retry import Failed, backoff, parse_retry_after


@pytest.mark.parametrize("reason", ["timeout", "connection", "wrong_length", "dns", "http_429", "http_500", "http_503"])
def test_what_may_pass_is_tried_again(reason: str) -> None:
    assert Failed(reason).can_heal
    assert not Failed(reason, is_final=True).can_heal


@pytest.mark.parametrize(
    "reason", ["http_404", "http_403", "http_410", "bad_url", "tls", "opt_out", "robots", "private_address", "redirects", "protocol", "too_small"]
)
def test_what_cannot_heal_is_not_tried_again(reason: str) -> None:
    assert not Failed(reason).can_heal


def test_backoff_doubles_with_jitter_that_depends_on_the_address_alone() -> None:
    pauses = [backoff("http://a/1", attempt, 0.5) for attempt in (1, 2, 3)]
    assert pauses == [backoff("http://a/1", attempt, 0.5) for attempt in (1, 2, 3)]
    for attempt, pause in enumerate(pauses):
        assert 0.25 * 2**attempt <= pause <= 0.75 * 2**attempt
    first = {backoff(f"http://a/{number}", 1, 0.5) for number in range(50)}
    assert len(first) > 45
    assert max(first) - min(first) > 0.3


def test_retry_after_in_both_forms() -> None:
    now = 1_700_000_000.0
    assert parse_retry_after("120", now) == 120
    assert parse_retry_after(" 0 ", now) == 0
    assert parse_retry_after(formatdate(now + 90, usegmt=True), now) == 90
    assert parse_retry_after(formatdate(now - 90, usegmt=True), now) == 0
    assert parse_retry_after("9" * 400, now) == math.inf


@pytest.mark.parametrize("value", [None, "", "soon", "-5", "1.5", "²", "Mon, 99 Foo 2024 99:00:00 GMT"])
def test_retry_after_that_says_nothing(value: str | None) -> None:
    assert parse_retry_after(value, 1_700_000_000.0) is None


def test_details_are_one_short_line() -> None:
    detail = Failed("protocol", "Bad\n\n  status" + "x" * 10_000).detail
    assert detail.startswith("Bad status")
    assert "\n" not in detail
    assert len(detail) <= 200
