"""The one aiohttp session of a downloader."""

import contextlib
from importlib import metadata

import aiohttp

from data_prep.config import DownloadConfig
from data_prep.download.addresses import AddressGuard
from data_prep.download.dns import Resolver
from data_prep.download.opt_out import PRODUCT

_MOST_FILES = 65_536


def user_agent(contact: str) -> str:
    """`jetway/0.1.0 (+mailto:someone@example.org)`."""
    try:
        version = metadata.version("jetway")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        version = "0"
    contact = " ".join(contact.split())
    if "@" in contact and ":" not in contact:
        contact = f"mailto:{contact}"
    return f"{PRODUCT}/{version} (+{contact})" if contact else f"{PRODUCT}/{version}"


def open_session(config: DownloadConfig, resolver: Resolver, guard: AddressGuard) -> aiohttp.ClientSession:
    """A session without cookies, without proxies from the environment, and without limits of its own: ours come first.

    Must be made inside the event loop.
    """
    connector = aiohttp.TCPConnector(limit=0, use_dns_cache=False, resolver=resolver, socket_factory=guard.open_socket)
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=config.connect_timeout_s),
        headers={"User-Agent": user_agent(config.contact), "Accept": "image/*,*/*;q=0.8", "Accept-Encoding": "identity"},
        auto_decompress=False,
        trust_env=False,
    )


def allow_many_files() -> None:
    """Raises the soft limit of open files as far as this process may: every connection is one."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limit on this system, or not ours to change
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
