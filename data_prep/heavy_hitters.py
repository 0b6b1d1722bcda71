"""The most frequent of many names in bounded memory, mergeable over tasks.

Misra and Gries (1982), in the mergeable form of Agarwal et al. (2012): when there are too many names, the first count that
does not fit is subtracted from all. Every count is then too small by at most `missed`, which is at most the number of things
counted divided by the capacity: a name of a larger share is always there.
"""

from collections.abc import Iterable, Mapping


class HeavyHitters:
    """Counts names, and keeps about `capacity` of them; no clock and no chance in it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.counts: dict[str, int] = {}
        self.missed = 0
        """How much too small a count may be."""

    def add(self, name: str, number: int = 1) -> None:
        """Counts `name` `number` times more."""
        self.counts[name] = self.counts.get(name, 0) + number
        if len(self.counts) > 4 * self.capacity:
            self._shrink()

    def merge(self, counts: Mapping[str, int], missed: int = 0) -> None:
        """Adds what another one found."""
        self.missed += missed
        for name, number in counts.items():
            self.counts[name] = self.counts.get(name, 0) + number
        if len(self.counts) > 4 * self.capacity:
            self._shrink()

    def top(self) -> dict[str, int]:
        """At most `capacity` names, the most frequent first, ties by name."""
        self._shrink()
        return dict(ranked(self.counts.items()))

    def _shrink(self) -> None:
        if len(self.counts) <= self.capacity:
            return
        threshold = sorted(self.counts.values(), reverse=True)[self.capacity]
        self.counts = {name: number - threshold for name, number in self.counts.items() if number > threshold}
        self.missed += threshold


def ranked(counts: Iterable[tuple[str, int]], most: int | None = None) -> list[tuple[str, int]]:
    """(name, number) pairs, the largest number first, ties by name; at most `most` of them."""
    return sorted(counts, key=lambda item: (-item[1], item[0]))[:most]
