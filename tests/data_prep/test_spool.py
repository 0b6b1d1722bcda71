"""Samples come back by number, whatever order they came in and wherever they were kept."""

import itertools
from pathlib import Path

import pytest

from data_prep import spool
from data_prep.metadata import Facts
from data_prep.spool import Prepared, Spool


def sample(number: int, size: int = 5) -> Prepared:
    facts = Facts(
        key=f"{number:010d}", source="", url="", caption="", width=1, height=1, format="png", jpeg_quality=-1, num_bytes=1, sha256=bytes(32), phash=0
    )
    return Prepared(number=number, image=bytes([number]) * size, values={"n": number}, facts=facts)


@pytest.mark.parametrize("limit", [1, 2**20])
@pytest.mark.parametrize("order", list(itertools.permutations((3, 1, 2))))
def test_order_of_arrival_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...], limit: int) -> None:
    monkeypatch.setattr(spool, "IN_MEMORY_BYTES", limit)
    with Spool(tmp_path) as spooled:
        for number in order:
            spooled.add(sample(number, size=number))
        spooled.note(2, "more", True)
        assert [(entry.number, entry.image) for entry in spooled] == [(1, b"\1"), (2, b"\2\2"), (3, b"\3\3\3")]
        assert [entry.values for entry in spooled][1] == {"n": 2, "more": True}
        spooled.remove(1)
        assert len(spooled) == 2


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with Spool(tmp_path) as spooled:
        for number in range(200):
            spooled.add(sample(number, size=2**18))
    assert not list(tmp_path.iterdir())
