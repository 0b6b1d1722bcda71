"""Numbers as people read them."""

import pytest

from data_prep.units import bytes_text, count_text, duration_text, share_text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1536, "1.5 KiB"),
        (102_400, "100 KiB"),
        (1_000_000, "977 KiB"),
        (1_023_999, "1,000 KiB"),
        (1.5 * 2**40, "1.5 TiB"),
    ],
)
def test_bytes(number: float, text: str) -> None:
    assert bytes_text(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.254, "0.25 s"), (45, "45 s"), (89.4, "89 s"), (90, "2 min"), (3000, "50 min"), (12_000, "3 h 20 min"), (86_400 * 6.5, "6.5 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (950, "950"), (12_345, "12.3 k"), (4.1e6, "4.1 M"), (5.9e9, "5.9 G"), (2e15, "2e+03 T")])
def test_counts(number: float, text: str) -> None:
    assert count_text(number) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0, 0, "0 %"), (0, 5, "0 %"), (1, 1, "100 %"), (62, 100, "62 %"), (2, 100, "2.0 %"), (1, 10**6, "<0.1 %"), (999_999, 10**6, "99.99 %")],
)
def test_shares_round_neither_something_to_nothing_nor_most_to_all(part: int, whole: int, text: str) -> None:
    assert share_text(part, whole) == text
