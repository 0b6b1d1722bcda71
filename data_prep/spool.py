"""Prepared samples in the order in which they arrive, given back in the order of their numbers.

Downloads finish in any order and the bytes of a part must not depend on it. What is prepared goes to one temporary file (in memory while
it is small), and is read back by number.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_prep.metadata import Facts

IN_MEMORY_BYTES = 2 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One sample that passed every check, before it has a place in a tar."""

    number: int
    image: bytes
    """As stored."""
    values: dict[str, Any]
    """What becomes the JSON member."""
    facts: Facts


class Spool:
    """Holds prepared samples until all of a part are there; a context manager, because it may own a temporary file."""

    def __init__(self, folder: Path) -> None:
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES, dir=str(folder))  # noqa: SIM115 - closed by __exit__
        self._end = 0
        self._entries: dict[int, tuple[int, int, dict[str, Any], Facts]] = {}

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, sample: Prepared) -> None:
        """Takes one sample in."""
        self._file.write(sample.image)
        self._entries[sample.number] = (self._end, len(sample.image), sample.values, sample.facts)
        self._end += len(sample.image)

    def remove(self, number: int) -> None:
        """Forgets a sample after all, for example for its score."""
        del self._entries[number]

    def note(self, number: int, name: str, value: Any) -> None:
        """Adds an entry to a sample's JSON."""
        self._entries[number][2][name] = value

    def __iter__(self) -> Iterator[Prepared]:
        """The samples by ascending number. Those that were given already may be removed meanwhile."""
        for number in sorted(self._entries):
            offset, size, values, facts = self._entries[number]
            self._file.seek(offset)
            yield Prepared(number=number, image=self._file.read(size), values=values, facts=facts)
