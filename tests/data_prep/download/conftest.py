"""A downloader with short patience that may fetch from loopback, and its answers by number."""

from collections.abc import Callable, Iterable
from typing import Any

from data_prep.config import DownloadConfig
from data_prep.download.downloader import Caches, Downloader
from data_prep.download.request import Answer, Request


def settings(**changes: Any) -> DownloadConfig:
    """Loopback allowed, pauses of milliseconds, no patience-testing timeouts unless a test asks for them."""
    values: dict[str, Any] = {
        "contact": "crawler@example.org",
        "allowed_networks": ("127.0.0.0/8", "::1/128"),
        "timeout_s": 10.0,
        "connect_timeout_s": 5.0,
        "backoff_s": 0.01,
    }
    return DownloadConfig(**{**values, **changes})


def anything(prefix: bytes, size: int | None) -> None:
    """A judge that lets everything pass."""


def open_downloader(
    judge: Callable[[bytes, int | None], None] = anything,
    *,
    max_file_bytes: int = 2**20,
    memory_bytes: int = 64 * 2**20,
    share: int = 1,
    caches: Caches | None = None,
    lookup: Any = None,
    needs_stores: bool = True,
    **changes: Any,
) -> Downloader:
    """A downloader with `settings(**changes)` and caches of its own."""
    return Downloader(
        settings(**changes),
        max_file_bytes=max_file_bytes,
        memory_bytes=memory_bytes,
        share=share,
        judge=judge,
        lookup=lookup,
        caches=caches or Caches(),
        needs_stores=needs_stores,
    )


def fetch_all(urls: Iterable[str], **options: Any) -> list[Answer]:
    """The answers in the order of the addresses. Fails if one is missing or comes twice."""
    urls = list(urls)
    with open_downloader(**options) as downloader:
        answers = list(downloader.fetch(Request(number, url) for number, url in enumerate(urls)))
    assert sorted(answer.number for answer in answers) == list(range(len(urls)))
    return sorted(answers, key=lambda answer: answer.number)


def fetch_one(url: str, **options: Any) -> Answer:
    """The answer for one address."""
    return fetch_all([url], **options)[0]


def reason(answer: Answer) -> str:
    """Why there is no data; empty if there is."""
    return answer.drop.reason if answer.drop else ""
