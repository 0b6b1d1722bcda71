"""Details of failures, brought to a form in which equal causes read the same, so that they can be counted."""

import re
from urllib.parse import urlsplit

_KNOWN: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(pattern, re.IGNORECASE))
    for name, pattern in (
        ("SERVFAIL", r"servfail|server (?:returned )?general failure|ares_eservfail|temporary failure in name resolution"),
        ("NXDOMAIN", r"nxdomain|domain name not found|name or service not known|ares_enotfound|no such (?:host|domain)|nodename nor servname"),
        ("no address", r"dns server returned answer with no data|ares_enodata|no address associated"),
        ("name server refused", r"^refused$|query refused|ares_erefused|dns server refused"),
        ("name server timed out", r"resolver did not answer|timeout while contacting dns|dns.{0,30}time(?:d )?out|ares_etimeout"),
        ("name server unreachable", r"resolver refused the connection|could not contact dns|ares_econnrefused"),
        ("certificate verify failed: expired", r"certificate has expired"),
        ("certificate verify failed: other name", r"hostname mismatch|certificate is not valid for|ip address mismatch"),
        ("certificate verify failed: self-signed", r"self[- ]signed certificate"),
        ("certificate verify failed: unknown issuer", r"unable to get (?:local )?issuer certificate"),
        ("certificate verify failed", r"certificate[_ ]verify[_ ]failed"),
        ("TLS handshake failure", r"handshake[_ ]failure|unsupported[_ ]protocol|wrong[_ ]version|tlsv?1?.{0,12}alert|no protocols available"),
        ("too many open files", r"too many open files|errno 24\b"),
        ("Connection refused", r"connection refused|connect call failed|errno 111\b"),
        ("Connection reset", r"connection reset|reset by peer|errno 104\b"),
        ("Network is unreachable", r"network is unreachable|no route to host|host is (?:down|unreachable)|errno 1(?:01|13)\b"),
        ("connect timed out", r"(?:connect|connection).{0,20}time(?:d )?[- ]?out"),
        ("Server disconnected", r"server disconnected|remote end closed|connection (?:was )?closed|broken pipe"),
        ("HTML page", r"\bhtml\b|<head|<body|<script|<meta|<!--"),
        ("XML or SVG", r"<\?xml|<svg"),
    )
)
"""Name -> how resolvers, sockets and TLS libraries write it; the first that fits counts."""

_URL = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>]+", re.IGNORECASE)
_ADDRESS = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b|\[?\b(?:[0-9a-f]{0,4}:){3,}[0-9a-f]{0,4}\]?", re.IGNORECASE)
_HOST = re.compile(r"\b(?:[a-z0-9](?:[a-z0-9_-]*[a-z0-9])?\.)+[a-z][a-z0-9-]*[a-z](?::\d+)?(?![\w(])", re.IGNORECASE)
_HEX = re.compile(r"\b(?:0x[0-9a-f]+|(?=[a-f]*\d)[0-9a-f]{8,})\b", re.IGNORECASE)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_LONGEST = 80


def normalise(detail: str) -> str:
    """The cause in a few words: a known name (`SERVFAIL`), or the text with addresses, host names and numbers replaced."""
    detail = _URL.sub("URL", " ".join(detail.split())[:1000])
    for name, pattern in _KNOWN:
        if pattern.search(detail):
            return name
    for pattern, replacement in ((_ADDRESS, "ADDRESS"), (_HOST, "HOST"), (_HEX, "HEX"), (_NUMBER, "N")):
        detail = pattern.sub(replacement, detail)
    return detail if len(detail) <= _LONGEST else detail[: _LONGEST - 1] + "…"


def host_of(url: str | None) -> str:
    """The host name of an address in lower case (the bucket of `s3://`), without port or user; empty if there is none."""
    try:
        return (urlsplit(url or "").hostname or "")[:253]
    except ValueError:
        return ""
