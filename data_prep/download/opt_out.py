"""Whether a response says that its content is not for machine learning."""

from collections.abc import Collection

from multidict import CIMultiDictProxy

PRODUCT = "jetway"
"""The product token of our user agent: the name that robots.txt and X-Robots-Tag know us by."""

_WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
"""Directives that are written with a colon, so that what stands before it is no robot's name."""


def opt_out(headers: CIMultiDictProxy[str], tokens: Collection[str]) -> str:
    """The header that opts out, as it came; empty if none does.

    Args:
        headers: of the response.
        tokens: lower-case values of X-Robots-Tag that count; with `noindex` its synonym `none` counts too.
    """
    if "X-Robots-Tag" in headers:
        for value in headers.getall("X-Robots-Tag"):
            if not directives(value).isdisjoint(tokens) or ("noindex" in tokens and "none" in directives(value)):
                return f"X-Robots-Tag: {value}"
    if "TDM-Reservation" in headers and any(value.strip() == "1" for value in headers.getall("TDM-Reservation")):
        return "TDM-Reservation: 1"
    return ""


def directives(value: str) -> set[str]:
    """The lower-case directives of one X-Robots-Tag header that are meant for us.

    A robot's name before a colon (`googlebot: noai, noindex`) holds until the next name or the end of the header.
    """
    found, is_ours = set(), True
    for part in value.lower().split(","):
        name, colon, rest = (piece.strip() for piece in part.partition(":"))
        if colon and (name in _WITH_VALUE or " " in name):  # the latter: a date of unavailable_after, which has a comma
            continue
        if colon:
            is_ours = name in (PRODUCT, "*")
            name = rest
        if is_ours and name:
            found.add(name)
    return found
