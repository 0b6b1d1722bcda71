"""Files of what is not wanted: addresses, domains, words, takedowns. Read once, line by line, into compact sets.

In all of them, empty lines and lines that begin with # do not count; names that end in `.gz` are unpacked.
"""

import gzip
import hashlib
import io
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, cast

from configs.errors import UserError
from data_prep.filters.sets import HashSet, NearSet, hash_of
from data_prep.inputs import open_input
from data_prep.takedown_rules import DISTANCE, MAX_DISTANCE, normal_url

_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s/?#]")
_HOST = re.compile(r"://([^/:?#]*)")
_DOMAIN = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")
_PHASH = re.compile(r"([0-9a-fA-F]{16})(?:\s+(\d+))?")


def host_of(address: str) -> str:
    """Host of an address in its `normal_url` form, as ASCII in lower case without port; empty if there is none."""
    found = _HOST.search(address)
    return found[1] if found else ""


def domains_of(host: str) -> Iterator[str]:
    """The host and every domain above it: `a.b.org`, `b.org`, `org`."""
    while host:
        yield host
        host = host.partition(".")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressList:
    """Addresses and domains."""

    urls: HashSet = field(default_factory=HashSet)
    domains: HashSet = field(default_factory=HashSet)

    def find_url(self, address: str) -> bool:
        """Whether this very address, in its `normal_url` form, is listed."""
        return address in self.urls

    def find_domain(self, address: str) -> str | None:
        """The listed domain that the address lies in, itself or below it."""
        if not len(self.domains):
            return None
        return next((domain for domain in domains_of(host_of(address)) if domain in self.domains), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TakedownList:
    """All that takedown rules name, but keys, which are of one finished data set."""

    addresses: AddressList = field(default_factory=AddressList)
    contents: HashSet = field(default_factory=HashSet)
    """SHA-256 of original files, as bytes."""
    looks: tuple[NearSet, ...] = ()


def load_urls(path: str) -> HashSet:
    """A file of addresses, one a line.

    Raises:
        UserError: no such file, or a line is no address; says which.
    """
    found = array("Q")
    for number, line in read_lines(path):
        if not _ADDRESS.match(line):
            raise _malformed(path, number, line, "an address such as https://example.org/picture.jpg")
        found.append(hash_of(normal_url(line)))
    return HashSet(found)


def load_domains(path: str) -> HashSet:
    """A file of domains, one a line.

    Raises:
        UserError: no such file, or a line is no domain; says which.
    """
    found = array("Q")
    for number, line in read_lines(path):
        found.append(hash_of(_domain(line) or _refuse(path, number, line, "a domain such as example.org")))
    return HashSet(found)


def load_expressions(path: str) -> tuple[tuple[int, re.Pattern[str]], ...]:
    """A file of regular expressions, one a line, with their line numbers; case does not count.

    Raises:
        UserError: no such file, or a line is no regular expression; says which.
    """
    found = []
    for number, line in read_lines(path):
        try:
            found.append((number, re.compile(line, re.IGNORECASE)))
        except (re.error, RecursionError, OverflowError) as error:
            raise _malformed(path, number, line, f"a regular expression ({error})") from None
    return tuple(found)


def load_takedowns(path: str | None, more: Iterable[str] = ()) -> TakedownList:
    """A file of takedown rules, and further rules of the same form.

    Raises:
        UserError: no such file, or a line is no rule; says which.
    """
    urls, domains, contents = array("Q"), array("Q"), array("Q")
    looks: dict[int, list[int]] = {}
    more_lines = ((number, line) for number, line in enumerate(map(str.strip, more), start=1) if line and not line.startswith("#"))
    for where, lines in ((path, read_lines(path) if path is not None else ()), ("earlier takedowns", more_lines)):
        for number, line in lines:
            kind, _, value = line.partition(" ")
            value = value.strip()
            if kind == "url" and _ADDRESS.match(value):
                urls.append(hash_of(normal_url(value)))
            elif kind == "domain" and (domain := _domain(value)):
                domains.append(hash_of(domain))
            elif kind == "sha256" and re.fullmatch(r"[0-9a-fA-F]{64}", value):
                contents.append(hash_of(bytes.fromhex(value)))
            elif kind == "phash" and (found := _PHASH.fullmatch(value)) and (distance := int(found[2] or DISTANCE)) <= MAX_DISTANCE:
                looks.setdefault(distance, []).append(int(found[1], 16))
            else:
                _refuse(str(where), number, line, f"`url ADDRESS`, `domain NAME`, `sha256 HEX` or `phash HEX [0-{MAX_DISTANCE}]`")
    return TakedownList(
        addresses=AddressList(urls=HashSet(urls), domains=HashSet(domains)),
        contents=HashSet(contents),
        looks=tuple(NearSet(hashes, distance) for distance, hashes in sorted(looks.items())),
    )


def read_lines(path: str) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines of a text file that count, stripped; local or on an object store.

    Raises:
        UserError: no such file, or it is not UTF-8.
    """
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                raise _malformed(path, number, repr(line), "UTF-8 text") from None
            if text and not text.startswith("#"):
                yield number, text


def digest_of(path: str) -> str:
    """Hex SHA-256 of a file, as it lies there.

    Raises:
        UserError: no such file.
    """
    digest = hashlib.sha256()
    with _opened(path, unpack=False) as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _opened(path: str, *, unpack: bool = True) -> IO[bytes]:
    try:
        file = open_input(path.removeprefix("file://"))
    except OSError as error:
        raise UserError(f"cannot read {path}", got=error.strerror or error, fix="check filters.* in the configuration") from None
    if unpack and path.endswith(".gz"):
        return cast(IO[bytes], io.BufferedReader(gzip.GzipFile(fileobj=file)))
    return file


def _domain(text: str) -> str | None:
    """A domain in its one form; None if it is none."""
    if _DOMAIN.fullmatch(text):
        return text
    host = host_of(normal_url(f"http://{text.removeprefix('*.').strip('.')}/")) if not re.search(r"[\s/:@?#]", text) else ""
    return host if _DOMAIN.fullmatch(host) else None


def _refuse(path: str, number: int, line: str, expected: str) -> str:
    raise _malformed(path, number, line, expected)


def _malformed(path: str, number: int, line: str, expected: str) -> UserError:
    return UserError(f"{path}, line {number} is malformed", got=line[:200], expected=expected, fix="mend or remove the line")
