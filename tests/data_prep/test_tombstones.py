"""Takedown files: merged, complete, and never half."""

from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from data_prep.storage import Storage, open_storage
from data_prep.tombstones import Hits, TombstoneFile, Tombstones, load, load_files, merge, numbers, tombstones_path


def takedown(number: int, **rows: tuple[int, ...]) -> TombstoneFile:
    shards = {name.replace("_", "-"): Hits(rows=found, keys=tuple(f"{row:010d}" for row in found)) for name, found in rows.items()}
    return TombstoneFile(number=number, reason='asked \udc80 "politely"', rules_sha256="", generations=(1, 2), shards=shards)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path)
    for file in (takedown(1, train_0=(3, 5), train_1=(0,)), takedown(2), takedown(3, train_0=(1, 5))):
        storage.put_bytes(tombstones_path(file.number), file.to_bytes())
    return storage


def test_a_file_comes_back_as_it_was_written() -> None:
    for file in (takedown(1, train_0=(3, 5), train_1=(0,)), takedown(2)):
        assert TombstoneFile.from_bytes(file.to_bytes()) == file


def test_files_are_merged_in_order_and_rows_are_unique(storage: Storage) -> None:
    found = load(storage)
    assert found.number == 3
    assert {name: rows.tolist() for name, rows in found.shards.items()} == {"train-0": [1, 3, 5], "train-1": [0]}
    assert found.rows("train-7").tolist() == []
    assert found.rows("train-7").dtype == np.int64
    assert found.kept("train-0", 7).tolist() == [0, 2, 4, 6]
    assert found.count(["train-0", "train-7"]) == 3
    assert found
    assert [file.num_samples for file in load_files(storage)] == [3, 0, 2]


def test_an_older_state_can_be_asked_for(storage: Storage) -> None:
    assert load(storage, 2).rows("train-0").tolist() == [3, 5]
    assert load(storage, 0) == Tombstones()
    assert not load(storage, 0)


def test_a_data_set_without_takedowns_has_none(tmp_path: Path) -> None:
    found = load(open_storage(tmp_path))
    assert (found.number, bool(found), found.count(["train-0"])) == (0, False, 0)
    assert merge([]) == found


@pytest.mark.parametrize("number", [1, 2])
def test_a_lost_file_is_an_error_because_its_samples_would_come_back(storage: Storage, number: int) -> None:
    storage.delete(tombstones_path(number))
    with pytest.raises(UserError, match=f"tombstones/00000{number}.json is missing"):
        load(storage)


def test_a_newest_that_is_not_there_is_an_error(storage: Storage) -> None:
    with pytest.raises(UserError, match=r"tombstones/000004.json is missing"):
        load(storage, 4)


def test_any_change_to_a_file_is_noticed(storage: Storage) -> None:
    data = takedown(1, train_0=(3, 5)).to_bytes()
    for position in range(0, len(data) - 1):
        flipped = bytearray(data)
        flipped[position] ^= 1
        try:
            same = TombstoneFile.from_bytes(bytes(flipped))
        except ValueError:
            continue
        assert same == takedown(1, train_0=(3, 5)), "only white space may differ"
    for length in range(0, len(data) - 2):
        with pytest.raises(ValueError):  # noqa: PT011 - what the message says depends on where it was cut
            TombstoneFile.from_bytes(data[:length])
    storage.put_bytes(tombstones_path(2), data[:40])
    with pytest.raises(UserError, match=r"tombstones/000002.json is damaged"):
        load(storage)


def test_only_takedowns_count(storage: Storage) -> None:
    storage.put_bytes("tombstones/rules-0123.txt", b"url x\n")
    assert numbers(storage) == [1, 2, 3]
