"""The failure ledger: which samples were dropped, and why, so that people can look and `jetway retry` can try again.

`ledger/000001/failures-000003.jsonl` holds the failures of task 3 of generation 1, one JSON object a line: key, source, url (where the input
named one), reason, detail. The files are immutable. A later second-chance pass writes its own, which supersede the entries that it tried
again: what fails at present is therefore a list of files read in order (`failing`).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from configs.errors import UserError
from data_prep.reasons import matches
from data_prep.storage import Storage

LEDGER = "ledger"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One dropped sample."""

    number: int
    source: str
    url: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerFile:
    """One file of the history of some samples."""

    path: str
    retried: tuple[str, ...] = ()
    """The reasons that this pass tried again; earlier entries with these are out of date. Empty for a first pass."""


def ledger_path(generation: int, task: int) -> str:
    """Path of the failures of one task inside the data set."""
    return f"{LEDGER}/{generation:06d}/failures-{task:06d}.jsonl"


def to_bytes(failures: Iterable[Failure]) -> bytes:
    """JSON lines in the order of the sample numbers."""
    lines = []
    for failure in sorted(failures, key=lambda failure: failure.number):
        values = {"key": f"{failure.number:010d}", "source": failure.source, "url": failure.url, "reason": failure.reason, "detail": failure.detail}
        lines.append(json.dumps({name: value for name, value in values.items() if value or name != "url"}, ensure_ascii=False))
    return "".join(line + "\n" for line in lines).encode("utf-8", "replace")


def from_bytes(data: bytes, where: str) -> list[Failure]:
    """Reads what `to_bytes` wrote.

    Raises:
        UserError: not such a file.
    """
    try:
        rows = [json.loads(line) for line in data.decode().splitlines() if line]
        return [
            Failure(number=int(row["key"]), source=row["source"], url=row.get("url", ""), reason=row["reason"], detail=row["detail"]) for row in rows
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} is damaged", got=f"{type(error).__name__} {error}", fix="restore it; only `jetway retry` needs it") from None


def failing(storage: Storage, history: Sequence[LedgerFile], numbers: range) -> dict[int, Failure]:
    """The samples among `numbers` that fail after all passes of `history`, by number."""
    found: dict[int, Failure] = {}
    for file in history:
        if file.retried:
            wanted = frozenset(file.retried)
            found = {number: failure for number, failure in found.items() if not matches(failure.reason, wanted)}
        try:
            data = storage.read_bytes(file.path)
        except FileNotFoundError:
            continue  # a task without failures writes none
        found.update((failure.number, failure) for failure in from_bytes(data, f"{storage.url}/{file.path}") if failure.number in numbers)
    return found
