"""The failure ledger: written, read back, and what fails after several passes."""

from pathlib import Path

import pytest

from configs.errors import UserError
from data_prep.ledger import Failure, LedgerFile, failing, from_bytes, ledger_path, to_bytes
from data_prep.storage import open_storage


def failure(number: int, reason: str) -> Failure:
    return Failure(number=number, source=f"a.csv#{number}", url="http://host/ü" if number % 2 else "", reason=reason, detail="why \ud800")


def test_failures_are_read_back_in_the_order_of_their_numbers() -> None:
    found = from_bytes(to_bytes([failure(7, "dns"), failure(2, "timeout")]), "here")
    assert [(entry.number, entry.reason, entry.url) for entry in found] == [(2, "timeout", ""), (7, "dns", "http://host/ü")]


def test_a_damaged_ledger_is_named() -> None:
    with pytest.raises(UserError, match=r"ledger/x is damaged"):
        from_bytes(b'{"key": 3}\n', "ledger/x")


def test_later_passes_supersede_what_they_tried(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    passes = {1: [failure(1, "dns"), failure(2, "http_503"), failure(3, "http_404"), failure(9, "dns")], 2: [failure(2, "http_500")]}
    for generation, failures in passes.items():
        storage.put_bytes(ledger_path(generation, 0), to_bytes(failures))
    history = [
        LedgerFile(path=ledger_path(1, 0)),
        LedgerFile(path=ledger_path(2, 0), retried=("dns", "5xx")),
        LedgerFile(path=ledger_path(3, 0), retried=("http_404",)),  # wrote none: all of them succeeded
    ]
    assert {number: entry.reason for number, entry in failing(storage, history[:1], range(5)).items()} == {1: "dns", 2: "http_503", 3: "http_404"}
    assert {number: entry.reason for number, entry in failing(storage, history[:2], range(5)).items()} == {2: "http_500", 3: "http_404"}
    assert {number: entry.reason for number, entry in failing(storage, history, range(5)).items()} == {2: "http_500"}
