"""All filters of `filters` that need no pixels, made ready once and asked for every sample."""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from data_prep.config import FilterConfig
from data_prep.filters.lists import AddressList, TakedownList, digest_of, load_domains, load_expressions, load_takedowns, load_urls
from data_prep.filters.scores import check_bounds
from data_prep.filters.sets import HashSet
from data_prep.filters.text import check_caption, check_languages
from data_prep.reasons import Drop
from data_prep.takedown_rules import normal_url


class RowFilter:
    """The filters before an image is fetched, and those on its hashes and scores after.

    Holds arrays and compiled expressions only: it can be pickled, and Ray shares its arrays between the workers of a machine.
    """

    def __init__(
        self, config: FilterConfig, *, blocked: AddressList, expressions: tuple[tuple[int, re.Pattern[str]], ...], takedown: TakedownList
    ) -> None:
        self._config = config
        self._blocked = blocked
        self._expressions = expressions
        self._takedown = takedown
        addresses = (blocked, takedown.addresses)
        self._has_addresses = any(len(found.urls) or len(found.domains) for found in addresses)

    @classmethod
    def from_config(cls, config: FilterConfig, more_takedowns: Iterable[str] = ()) -> "RowFilter":
        """Reads the lists, once per process as long as they do not change.

        Args:
            more_takedowns: rules as lines of `filters.takedown`, such as those of takedowns of an earlier generation; rules on keys,
                which name published samples, do not count.

        Raises:
            UserError: a list is missing or has a malformed line, or a language is not known.
        """
        check_languages(config)
        return _load(config, tuple(more_takedowns), tuple(list_digests(config).items()))

    def check_row(self, url: str | None, caption: str, extra: Mapping[str, Any]) -> None:
        """Judges what the input says of a sample, before anything is fetched; what costs most comes last.

        Args:
            url: address of the image; None or empty for a file.
            caption: cleaned.
            extra: the other columns. A score that is not among them is dropped here, unless there is a scorer, which may give it.

        Raises:
            Drop: takedown, blocked_url, blocked_domain, score, caption_too_short, caption_too_long, blocked_text or language.
        """
        self.check_url(url)
        if self._config.scores:
            check_bounds(self._config.scores, extra, may_miss=self._config.scorer is not None)
        for number, expression in self._expressions:
            if expression.search(caption):
                raise Drop("blocked_text", f"line {number}")
        check_caption(caption, self._config)

    def check_url(self, url: str | None) -> None:
        """Judges an address alone: that of the input, or where it redirected to.

        Raises:
            Drop: takedown, blocked_url or blocked_domain.
        """
        if not url or not self._has_addresses:
            return
        address = normal_url(url)
        if self._takedown.addresses.find_url(address):
            raise Drop("takedown", "url")
        if (domain := self._takedown.addresses.find_domain(address)) is not None:
            raise Drop("takedown", f"domain {domain}")
        if self._blocked.find_url(address):
            raise Drop("blocked_url")
        if (domain := self._blocked.find_domain(address)) is not None:
            raise Drop("blocked_domain", domain)

    def check_content(self, sha256: bytes, phash: int | None) -> None:
        """Judges the hashes of an image.

        Args:
            sha256: of the original file, 32 bytes.
            phash: of the stored picture; None if it is not known yet.

        Raises:
            Drop: takedown: the same bytes, or a perceptual hash within the bits that its rule allows (4 if it says nothing).
        """
        if sha256 in self._takedown.contents:
            raise Drop("takedown", f"sha256 {sha256.hex()}")
        if phash is not None:
            for hashes in self._takedown.looks:
                if (distance := hashes.nearest(phash)) is not None:
                    raise Drop("takedown", f"phash {phash:016x}, {distance} bits away")

    def check_scores(self, scores: Mapping[str, Any]) -> None:
        """Judges all scores of a sample: those among its columns together with those that the scorer gave.

        Raises:
            Drop: score, also for one that neither gives.
        """
        check_bounds(self._config.scores, scores)


def list_digests(config: FilterConfig) -> dict[str, str]:
    """Path, as configured -> hex SHA-256 of every list, so that a run can tell whether one has changed.

    Raises:
        UserError: a list is missing.
    """
    paths = (config.blocked_urls, config.blocked_domains, config.blocked_text, config.takedown)
    return {path: digest_of(path) for path in paths if path is not None}


@functools.lru_cache(maxsize=2)
def _load(config: FilterConfig, more_takedowns: tuple[str, ...], digests: tuple[tuple[str, str], ...]) -> RowFilter:
    """Many tasks of one process share a filter; `digests` only makes that of other lists another one."""
    blocked = AddressList(
        urls=load_urls(config.blocked_urls) if config.blocked_urls is not None else HashSet(),
        domains=load_domains(config.blocked_domains) if config.blocked_domains is not None else HashSet(),
    )
    return RowFilter(
        config,
        blocked=blocked,
        expressions=load_expressions(config.blocked_text) if config.blocked_text is not None else (),
        takedown=load_takedowns(config.takedown, more_takedowns),
    )
