"""Samples of published shards that must not be used any more: the takedown files of a data set.

`tombstones/000001.json` names, by shard, the rows and keys that one takedown hit. The files are numbered, immutable and only ever added to;
a reader takes all of them together. They belong to no generation: a shard keeps its name for ever, so a sample stays taken down after a
rollback too. Nothing is rewritten for it: training leaves out these rows from its next start on, and a compaction removes their bytes.

Every file carries the SHA-256 of its own content, and a gap in the numbers is an error, because a tombstone that is lost silently
brings a sample back. The rules that were given lie beside, in `tombstones/rules-*.txt`: they are for later preparation, not for readers.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.errors import UserError
from data_prep.storage import Storage

FORMAT = "jetway-tombstones/1"
FOLDER = "tombstones"

Rows = npt.NDArray[np.int64]


def tombstones_path(number: int) -> str:
    """Path of one takedown inside the data set."""
    return f"{FOLDER}/{number:06d}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hits:
    """The samples of one shard that one takedown hit."""

    rows: tuple[int, ...]
    """Numbers of the samples in the shard, ascending."""
    keys: tuple[str, ...]
    """Their keys, in the same order: for people, and for `jetway verify`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TombstoneFile:
    """One takedown."""

    number: int
    reason: str
    """Why, in the words of whoever asked for it."""
    rules_sha256: str
    """Hex SHA-256 of the rules; empty where stored rules were only applied to newer shards."""
    generations: tuple[int, ...]
    """The generations whose shards were searched."""
    shards: Mapping[str, Hits]
    """What was hit and had not been hit before, by shard; may be empty."""

    @property
    def num_samples(self) -> int:
        """Samples that this takedown hit."""
        return sum(len(hits.rows) for hits in self.shards.values())

    def to_bytes(self) -> bytes:
        """JSON, one shard a line, with its own checksum last."""
        values = {"format": FORMAT, **asdict(self)}
        lines = [f' "{name}": {json.dumps(value)},' for name, value in values.items() if name != "shards"]
        shards = ",\n".join(f"  {json.dumps(name)}: {json.dumps(hits)}" for name, hits in values["shards"].items())
        lines += [' "shards": {', *([shards] if shards else []), " },", f' "sha256": "{_checksum(values)}"']
        return "\n".join(["{", *lines, "}\n"]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "TombstoneFile":
        """Reads what `to_bytes` wrote.

        Raises:
            ValueError: not such a file, one of another format version, or one with other content than its checksum says.
        """
        try:
            values = json.loads(data)
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']!r}, this version reads {FORMAT!r}")
            stored = values.pop("sha256")
            if stored != (found := _checksum(values)):
                raise ValueError(f"its content has sha256 {found}, it says {stored}")
            return cls(
                number=values["number"],
                reason=values["reason"],
                rules_sha256=values["rules_sha256"],
                generations=tuple(values["generations"]),
                shards={name: Hits(rows=tuple(hits["rows"]), keys=tuple(hits["keys"])) for name, hits in values["shards"].items()},
            )
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise ValueError(f"not a takedown file: {type(error).__name__} {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Tombstones:
    """All takedowns of a data set together."""

    number: int = 0
    """Of the newest takedown; 0 where there was none."""
    shards: Mapping[str, Rows] = field(default_factory=dict)
    """Rows that must not be used, by shard, ascending; shards without any are left out."""

    def __bool__(self) -> bool:
        return bool(self.shards)

    def rows(self, shard: str) -> Rows:
        """Numbers of the samples of `shard` that must not be used, int64, ascending; most often empty."""
        return self.shards.get(shard, np.empty(0, dtype=np.int64))

    def count(self, shards: Iterable[str]) -> int:
        """Samples that must not be used, over the shards of these names."""
        return sum(len(self.shards[name]) for name in shards if name in self.shards)

    def kept(self, shard: str, num_samples: int) -> Rows:
        """Numbers of the samples of a shard of `num_samples` that may be used, int64, ascending."""
        return np.delete(np.arange(num_samples, dtype=np.int64), self.rows(shard))


def merge(files: Sequence[TombstoneFile]) -> Tombstones:
    """What these takedowns say together."""
    found: dict[str, list[int]] = {}
    for file in files:
        for name, hits in file.shards.items():
            found.setdefault(name, []).extend(hits.rows)
    return Tombstones(
        number=max((file.number for file in files), default=0),
        shards={name: np.unique(np.array(rows, dtype=np.int64)) for name, rows in found.items() if rows},
    )


def load(storage: Storage, newest: int | None = None) -> Tombstones:
    """The takedowns of a data set, all of them or those up to number `newest`.

    Raises:
        UserError: one is damaged or missing; also a `newest` that is not there.
    """
    return merge(load_files(storage, newest))


def load_files(storage: Storage, newest: int | None = None) -> list[TombstoneFile]:
    """The same, one by one, in the order of their numbers."""
    found = numbers(storage)
    last = newest if newest is not None else found[-1] if found else 0
    missing = sorted(set(range(1, last + 1)) - set(found))
    if missing:
        raise UserError(
            f"{storage.url}/{tombstones_path(missing[0])} is missing",
            expected=f"every takedown from 1 to {last}: without it, samples that were taken down would come back",
            fix="restore the file from where the data set was copied",
        )
    return [load_file(storage, number) for number in found if number <= last]


def load_file(storage: Storage, number: int) -> TombstoneFile:
    """One takedown.

    Raises:
        UserError: missing or damaged.
    """
    path = tombstones_path(number)
    fix = "restore the file from where the data set was copied; samples that were taken down would come back without it"
    try:
        return TombstoneFile.from_bytes(storage.read_bytes(path))
    except FileNotFoundError:
        raise UserError(f"{storage.url}/{path} is missing", fix=fix) from None
    except ValueError as error:
        raise UserError(f"{storage.url}/{path} is damaged", got=error, fix=fix) from None


def numbers(storage: Storage) -> list[int]:
    """Numbers of the takedowns that are there, ascending."""
    names = (path.removeprefix(f"{FOLDER}/").removesuffix(".json") for path in storage.list(f"{FOLDER}/"))
    return sorted(int(name) for name in names if name.isdecimal())


def _checksum(values: Mapping[str, Any]) -> str:
    """Of the content, however it is laid out in the file."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
