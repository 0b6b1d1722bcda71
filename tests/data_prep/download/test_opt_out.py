import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from data_prep.config import DownloadConfig
from data_prep.download.opt_out import directives, opt_out

TOKENS = DownloadConfig().respect_tokens


def headers(*pairs: tuple[str, str]) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict(pairs))


@pytest.mark.parametrize(
    "value",
    [
        *("noai", "NoAI", "noimageai", "noindex", "noimageindex", "none", "index, noai", "nofollow,noimageai ,x", "jetway: noai"),
        *("googlebot: nofollow, jetway: noindex", "*: noai", "unavailable_after: Wed, 25 Jun 2031 15:00:00 GMT, noai"),
        *("max-snippet: 20, noai", "max-image-preview:large,noindex", "JetWay : NOAI"),
    ],
)
def test_values_that_opt_out(value: str) -> None:
    assert opt_out(headers(("x-robots-tag", value)), TOKENS) == f"X-Robots-Tag: {value}"


@pytest.mark.parametrize(
    "value",
    [
        *("", "all", "nofollow", "noarchive", "noaix", "googlebot: noai", "googlebot: noindex, noai", "otherbot: none, nofollow"),
        *("unavailable_after: 25 Jun 2010 15:00:00 PST", "max-snippet: -1", "jetwayx: noai", "jetway: nofollow, otherbot: noai"),
    ],
)
def test_values_that_do_not(value: str) -> None:
    assert opt_out(headers(("X-Robots-Tag", value)), TOKENS) == ""


def test_every_header_counts_and_a_name_holds_within_its_own() -> None:
    assert opt_out(headers(("X-Robots-Tag", "googlebot: noindex"), ("X-Robots-Tag", "noai")), TOKENS) == "X-Robots-Tag: noai"
    assert opt_out(headers(("X-Robots-Tag", "nofollow"), ("X-Robots-Tag", "otherbot: noai")), TOKENS) == ""


def test_only_the_configured_tokens_count() -> None:
    assert opt_out(headers(("X-Robots-Tag", "noindex")), ("noai",)) == ""
    assert opt_out(headers(("X-Robots-Tag", "none")), ("noai",)) == ""
    assert opt_out(headers(("X-Robots-Tag", "noml")), ("noml",)) == "X-Robots-Tag: noml"


@pytest.mark.parametrize(("value", "expected"), [("1", "TDM-Reservation: 1"), (" 1 ", "TDM-Reservation: 1"), ("0", ""), ("", ""), ("11", "")])
def test_tdm_reservation(value: str, expected: str) -> None:
    assert opt_out(headers(("tdm-reservation", value)), TOKENS) == expected


def test_directives_with_values_are_not_robots() -> None:
    assert directives("max-snippet: 20, noai") == {"noai"}
