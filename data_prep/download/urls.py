"""From the text of an input to an address that can be asked, and from one address to where it redirects."""

import functools
import re

from yarl import URL

from data_prep.download.addresses import literal_address
from data_prep.download.retry import Failed

OBJECT_SCHEMES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs"})
"""Object stores that fsspec opens with the job's own credentials. Never `file` and the like: the list is not to be trusted that far."""

_MAX_CHARS = 16_384
_HOST = re.compile(r"[a-z0-9._:-]+", re.IGNORECASE)


def parse_url(text: str) -> URL | str:
    """The address to ask for, with a numeric host in its plain spelling; a `str` if it is an object store's.

    Raises:
        Failed: `bad_url`.
    """
    text = text.strip()
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    if not separator or not rest or len(text) > _MAX_CHARS:
        raise Failed("bad_url", text)
    if scheme in OBJECT_SCHEMES:
        bucket, _, key = rest.partition("/")
        if not bucket or not key:
            raise Failed("bad_url", f"{text} names no object")
        return f"{scheme}://{rest}"
    if scheme not in ("http", "https"):
        raise Failed("bad_url", text)
    try:
        return _plain(URL(text))
    except ValueError as error:
        raise Failed("bad_url", f"{text[:100]}: {error}") from None


def follow(url: URL, location: str | None) -> URL:
    """Where a redirect from `url` leads.

    Raises:
        Failed: `redirects`, if it leads nowhere that can be asked.
    """
    if not location or len(location) > _MAX_CHARS:
        raise Failed("redirects", "a redirect without an address")
    try:
        target = url.join(URL(location.strip()))
        if target.scheme not in ("http", "https"):
            raise Failed("redirects", f"a redirect to {location}")
        return _plain(target)
    except ValueError as error:
        raise Failed("redirects", f"a redirect to {location[:100]!r}: {error}") from None


def origin_of(url: URL) -> str:
    """`https://example.org:443`: what one robots.txt speaks for."""
    return f"{url.scheme}://{url.raw_host}:{url.port}"


def _plain(url: URL) -> URL:
    """Without fragment, and with the host's plain spelling where it is an address: `http://127.1/` is `http://127.0.0.1/`."""
    host, port = url.raw_host, url.port
    if not host or not port:
        raise ValueError("no host or no port")
    plain = _plain_host(host)
    if plain != host:
        url = url.with_host(plain)
    return url.with_fragment(None) if url.raw_fragment else url


@functools.lru_cache(maxsize=16384)
def _plain_host(host: str) -> str:
    if not _HOST.fullmatch(host):
        raise ValueError(f"{host!r} is no host")
    address = literal_address(host)
    return host if address is None else str(address)
