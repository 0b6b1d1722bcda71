"""What a takedown names: addresses, domains, contents, look-alikes, keys; and which rows of a table of samples that hits.

As text, one rule a line, in the form that `filters.takedown` takes as well:

    url https://example.org/a.jpg      this address; http and https are one, a fragment does not count
    domain example.org                 the host and all below it
    sha256 HEX                         the original file's bytes
    phash HEX 6                        perceptual hashes at most 6 bits away (4 without the number)
    key 0000000012                     one sample of this data set
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from configs.errors import UserError

DISTANCE = 4
"""Bits, where a rule gives none."""
MAX_DISTANCE = 16
"""Bits; at 16 of 64 unrelated pictures begin to match."""

_HEX = {"sha256": re.compile(r"[0-9a-f]{64}"), "phash": re.compile(r"[0-9a-f]{16}")}
_SIMPLE_URL = re.compile(r"https?(://[a-z0-9-]+(?:\.[a-z0-9-]+)*/[^\s#]*[^\s#?])")
_HOST = re.compile(r"://([^/:?#]*)")
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """A set of rules; each field is sorted and free of repeats."""

    url: tuple[str, ...] = ()
    domain: tuple[str, ...] = ()
    sha256: tuple[str, ...] = ()
    phash: tuple[str, ...] = ()
    """`HEX DISTANCE`"""
    key: tuple[str, ...] = ()

    @classmethod
    def parse(cls, lines: Iterable[str], where: str) -> "Rules":
        """Rules from text; empty lines and lines that begin with # do not count.

        Raises:
            UserError: a line is no rule; says which.
        """
        found: dict[str, set[str]] = {field.name: set() for field in fields(cls)}
        for number, line in enumerate(lines, start=1):
            kind, *rest = line.split(maxsplit=1)[:2] or ("#",)
            if kind.startswith("#"):
                continue
            value = _checked(kind, rest[0].strip() if rest else "")
            if value is None:
                raise UserError(
                    f"{where}, line {number} is no takedown rule",
                    got=line.strip()[:200],
                    expected=f"`url ADDRESS`, `domain NAME`, `sha256 HEX`, `phash HEX DISTANCE` (0-{MAX_DISTANCE}) or `key KEY`",
                )
            found[kind].add(value)
        return cls(**{kind: tuple(sorted(values)) for kind, values in found.items()})

    def lines(self) -> list[str]:
        """The rules as text; `parse` reads them."""
        return [f"{field.name} {value}" for field in fields(self) for value in getattr(self, field.name)]

    def __len__(self) -> int:
        return sum(len(getattr(self, field.name)) for field in fields(self))

    def __or__(self, other: "Rules") -> "Rules":
        return Rules.parse([*self.lines(), *other.lines()], "the rules")

    @property
    def columns(self) -> list[str]:
        """Columns of the sidecar that have to be read, `key` first."""
        wanted = {"url": self.url or self.domain, "sha256": self.sha256, "phash": self.phash}
        return ["key", *(name for name, rules in wanted.items() if rules)]


class Matcher:
    """Rules made ready to be compared with many tables."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._keys = {text: f"key {text}" for text in rules.key}
        self._sha256 = {bytes.fromhex(text): f"sha256 {text}" for text in rules.sha256}
        self._urls = {normal_url(text): f"url {text}" for text in rules.url}
        self._domains = frozenset(rules.domain)
        parts = [text.split() for text in rules.phash]
        self._hashes = np.array([int(text, 16) for text, _ in parts], dtype=np.uint64)
        self._distances = np.array([int(distance) for _, distance in parts], dtype=np.int64)

    def match(self, table: Any) -> tuple[npt.NDArray[np.int64], set[str]]:
        """The rows of a `pyarrow.Table` with the columns `Rules.columns` that any rule hits, ascending, and the rules that hit (as lines)."""
        hit = np.zeros(table.num_rows, dtype=bool)
        used: set[str] = set()
        if self._keys:
            self._match_values(table.column("key"), self._keys, hit, used)
        if self._sha256:
            self._match_values(table.column("sha256"), self._sha256, hit, used)
        if self._urls or self._domains:
            self._match_addresses(table.column("url").to_pylist(), hit, used)
        if len(self._hashes):
            self._match_hashes(table.column("phash").to_numpy(), hit, used)
        return np.flatnonzero(hit), used

    def _match_values(self, column: Any, wanted: Mapping[Any, str], hit: npt.NDArray[np.bool_], used: set[str]) -> None:
        for row, value in enumerate(column.to_pylist()):
            if value in wanted:
                hit[row] = True
                used.add(wanted[value])

    def _match_addresses(self, addresses: Sequence[str], hit: npt.NDArray[np.bool_], used: set[str]) -> None:
        for row, address in enumerate(addresses):
            normal = normal_url(address)
            if (rule := self._urls.get(normal)) is not None:
                hit[row] = True
                used.add(rule)
            if self._domains and (domain := domain_among(normal, self._domains)) is not None:
                hit[row] = True
                used.add(f"domain {domain}")

    def _match_hashes(self, hashes: npt.NDArray[np.uint64], hit: npt.NDArray[np.bool_], used: set[str]) -> None:
        for wanted, distance in zip(self._hashes, self._distances.tolist(), strict=True):
            near = _num_bits(hashes ^ wanted) <= distance
            if near.any():
                hit |= near
                used.add(f"phash {int(wanted):016x} {distance}")


def normal_url(text: str) -> str:
    """An address in the form in which two are compared: without fragment, user, default port and the difference of http and https."""
    if (simple := _SIMPLE_URL.fullmatch(text)) is not None:
        return f"http{simple[1]}"  # most are in that form already, and this takes a tenth of the time
    try:
        parts = urlsplit(text.strip())
        port = parts.port
    except ValueError:
        return text.strip()
    if not parts.hostname:
        return text.strip()
    scheme = "http" if parts.scheme == "https" else parts.scheme
    host = _ascii_host(parts.hostname) + (f":{port}" if port is not None and port != _DEFAULT_PORTS.get(parts.scheme) else "")
    return f"{scheme}://{host}{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"


def domain_among(normal: str, domains: frozenset[str]) -> str | None:
    """The longest of `domains` that the host of an address in its `normal_url` form is or lies below; None if there is none."""
    found = _HOST.search(normal)
    host = found[1] if found else ""
    while host:
        if host in domains:
            return host
        host = host.partition(".")[2]
    return None


def _ascii_host(host: str) -> str:
    """Lower case, without the dot at the end, other alphabets as IDNA."""
    host = host.lower().rstrip(".")
    if host.isascii():
        return host
    try:
        return host.encode("idna").decode()
    except UnicodeError:
        return host


def _checked(kind: str, text: str) -> str | None:
    """The value of a rule in its one form; None if it is no rule."""
    if kind == "url":
        return text if "://" in text else None
    if kind == "phash":
        value, _, distance = text.partition(" ")
        distance = distance.strip() or str(DISTANCE)
        is_good = _HEX["phash"].fullmatch(value.lower()) and distance.isdecimal() and int(distance) <= MAX_DISTANCE
        return f"{value.lower()} {int(distance)}" if is_good else None
    if not text or len(text.split()) != 1:
        return None
    if kind == "sha256":
        return text.lower() if _HEX["sha256"].fullmatch(text.lower()) else None
    if kind == "domain":
        name = _ascii_host(text.removeprefix("*.").strip("."))
        return name if name and not re.search(r"[/:@?#]", name) else None
    return text if kind == "key" and text.isascii() else None


def _num_bits(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Bits set in each word. (numpy 1.26 has no `bitwise_count`.)"""
    pairs = words - ((words >> np.uint64(1)) & np.uint64(0x5555555555555555))
    fours = (pairs & np.uint64(0x3333333333333333)) + ((pairs >> np.uint64(2)) & np.uint64(0x3333333333333333))
    bytes_ = (fours + (fours >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((bytes_ * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.int64)
