"""Parts -> equally full shards.

With all parts written and their duplicates found, every split is cut in the order of the plan into shards of `samples_per_shard`, and each
shard copies its share from one to a few parts. Copying is cheap beside decoding, and gives the same bytes however often it is done.
"""

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import xxhash

from configs.errors import UserError
from data_prep import ledger, metadata
from data_prep.config import PrepConfig
from data_prep.dedup.run import verdicts
from data_prep.ledger import Failure
from data_prep.part import PARTS, PartRecord, dropped_path, failures_path, is_heldout
from data_prep.run_stats import PartCollector, PartStats
from data_prep.schema import ShardIndex, ShardInfo, shard_name, tar_path
from data_prep.shard_writer import Sample, ShardWriter
from data_prep.storage import Storage, open_storage, writing
from data_prep.task_samples import Job

NUM_THREADS = 16
"""Records read at once: on an object store each costs a round trip, and a large set has a million of them."""
READ_BYTES, GAP_BYTES = 2**23, 2**20
"""Of a part that are held at a time, and of unwanted samples that are read over because a request of its own would take longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCounts:
    """What is left of a part once duplicates are out."""

    name: str
    num_train: int
    num_heldout: int

    @property
    def kept(self) -> int:
        """Samples of both splits."""
        return self.num_train + self.num_heldout


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Samples `start` to `stop` of those samples of a part that are kept and belong to one split."""

    part: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """Which samples make one shard."""

    name: str
    is_heldout: bool
    heldout_permille: int
    has_verdicts: bool
    """Whether duplicates were looked for."""
    work: str
    """Hash of what decides which samples a shard of this name gets: all the parts, and the evaluation sets."""
    pieces: tuple[Piece, ...]


def count_part(config: PrepConfig, name: str) -> PartCounts:
    """Samples of a part by split, after its duplicates are out."""
    storage = open_storage(config.output)
    kept, _ = verdicts(storage, name)
    heldout = is_heldout(ShardIndex.load(storage, name, folder=PARTS).sha256, config.heldout_permille) & kept
    return PartCounts(name=name, num_train=int(kept.sum() - heldout.sum()), num_heldout=int(heldout.sum()))


def publish_failures(config: PrepConfig, job: Job, record: PartRecord, has_verdicts: bool) -> PartStats:
    """Moves the failures of a part (and its dropped images) to their place, with its duplicates added; returns statistics of the duplicates."""
    storage = open_storage(config.output)
    failures: list[Failure] = []
    if sum(record.dropped.values()):
        path = failures_path(record.name)
        failures = ledger.from_bytes(storage.read_bytes(path), f"{storage.url}/{path}")
    collector = PartCollector()
    if has_verdicts and record.kept:
        facts = metadata.load(storage, record.name, columns=["key", "source", "url"], folder=PARTS)
        for row, reason, detail in verdicts(storage, record.name)[1]:
            key, source, url = (facts[column][row].as_py() for column in ("key", "source", "url"))
            failures.append(Failure(number=int(key), source=source, url=url, reason=reason, detail=detail))
            collector.dropped(reason, detail, url=url or None)
    if failures:
        storage.put_bytes(ledger.ledger_path(job.generation, record.number), ledger.to_bytes(failures))
    if config.keep_dropped and storage.exists(dropped_path(record.name)):
        _copy(storage, dropped_path(record.name), f"dropped/{job.generation:06d}/part-{record.number:06d}.tar")
    return collector.finish()


def plan_shards(
    parts: Sequence[PartCounts], config: PrepConfig, generation: int, *, has_verdicts: bool, evaluation: Mapping[str, str] | None = None
) -> list[ShardPlan]:
    """Cuts each split, in the order of the plan, into shards of `samples_per_shard` (the last one takes the rest).

    Where no sample of a first generation hashes to the train split (a folder of one image), everything goes there.

    Args:
        evaluation: hex SHA-256 of the evaluation sets that were compared with, by path.
    """
    work = hashlib.sha256(json.dumps([[asdict(part) for part in parts], evaluation or {}], sort_keys=True).encode()).hexdigest()
    permille = config.heldout_permille
    if generation == 1 and not any(part.num_train for part in parts):
        permille = 0
    shards = []
    for split in ("train", "heldout"):
        counts = [part.num_heldout if permille else 0 for part in parts]
        if split == "train":
            counts = [part.kept - heldout for part, heldout in zip(parts, counts, strict=True)]
        for number, pieces in enumerate(_cut([part.name for part in parts], counts, config.samples_per_shard)):
            shards.append(
                ShardPlan(
                    name=shard_name(split, generation, number),
                    is_heldout=split == "heldout",
                    heldout_permille=permille,
                    has_verdicts=has_verdicts,
                    work=work,
                    pieces=pieces,
                )
            )
    return shards


def write_shard(config: PrepConfig, job: Job, shard: ShardPlan) -> ShardInfo:
    """Copies the samples of one shard from the parts and publishes it with its index, its sidecar and its record.

    Raises:
        UserError: the output is full or not writable, or a part is damaged.
    """
    import pyarrow as pa

    storage = open_storage(config.output)
    scratch = storage.scratch() / f"{shard.name}.{secrets.token_hex(6)}"  # unique: a killed run's worker may still be writing its own
    tables = []
    with writing(f"{config.output}/{tar_path(shard.name)}"), ShardWriter(scratch, config.image.format) as writer:
        for piece in shard.pieces:
            index, rows = _rows_of(storage, piece, shard)
            for sample in _part_samples(storage, piece.part, index, rows):
                writer.add(sample)
            tables.append(metadata.load(storage, piece.part, folder=PARTS).take(pa.array(rows)))
        info = writer.publish(storage, shard.name)
    info = replace(info, metadata_sha256=metadata.dump(storage, shard.name, pa.concat_tables(tables).combine_chunks()))
    storage.put_bytes(shard_record_path(job.generation, shard.name), json.dumps({"work": shard.work, "shard": asdict(info)}).encode())
    return info


def finished_parts(storage: Storage, generation: int) -> Iterator[PartRecord]:
    """Records of the parts that an earlier run finished."""
    paths = [path for path in storage.list(f"{PARTS}/{generation:06d}/part-") if path.endswith(".json")]
    for data in _read_each(storage, paths):
        yield PartRecord(**json.loads(data))


def finished_shards(storage: Storage, generation: int, work: str) -> dict[str, ShardInfo]:
    """Records of the shards that an earlier run finished, by name; those cut from other parts (`ShardPlan.work`) do not count."""
    found = (json.loads(data) for data in _read_each(storage, storage.list(f"{PARTS}/{generation:06d}/shard-")))
    records = [ShardInfo(**values["shard"]) for values in found if values["work"] == work]
    return {record.name: record for record in records}


def shard_record_path(generation: int, name: str) -> str:
    """Path of the record of a shard."""
    return f"{PARTS}/{generation:06d}/shard-{name}.json"


def _read_each(storage: Storage, paths: Sequence[str]) -> Iterator[bytes]:
    """The contents of many small files, in their order."""
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        for begin in range(0, len(paths), 1000):  # not all at once, for the memory
            yield from threads.map(storage.read_bytes, paths[begin : begin + 1000])


def _copy(storage: Storage, source: str, target: str) -> None:
    """Copies a file of any size."""
    scratch = storage.scratch() / f"{target.replace('/', '-')}.{secrets.token_hex(6)}"
    try:
        with open(scratch, "wb") as file:
            for begin in range(0, storage.size(source), READ_BYTES):
                file.write(storage.read_range(source, begin, READ_BYTES))
        storage.put_file(scratch, target, move=True)
    finally:
        scratch.unlink(missing_ok=True)


def _rows_of(storage: Storage, piece: Piece, shard: ShardPlan) -> tuple[ShardIndex, np.ndarray]:
    """(index of the part, rows of the piece in it)."""
    index = ShardIndex.load(storage, piece.part, folder=PARTS)
    chosen = is_heldout(index.sha256, shard.heldout_permille) == shard.is_heldout
    if shard.has_verdicts:
        chosen &= verdicts(storage, piece.part)[0]
    return index, np.flatnonzero(chosen)[piece.start : piece.stop]


def _part_samples(storage: Storage, name: str, index: ShardIndex, rows: np.ndarray) -> Iterator[Sample]:
    for run in _runs(index, rows):
        begin, end = int(index.offsets[run[0], 0]), int(index.offsets[run[-1], 2] + index.sizes[run[-1], 2])
        data = storage.read_range(tar_path(name, PARTS), begin, end - begin)
        for row in run:
            members: list[Any] = []
            for offset, size, checksum in zip(index.offsets[row] - begin, index.sizes[row], index.xxh3[row], strict=True):
                member = data[offset : offset + size]
                if xxhash.xxh3_64_intdigest(member) != int(checksum):
                    raise UserError(
                        f"{storage.url}/{tar_path(name, PARTS)} is damaged",
                        got=f"other bytes for {index.keys[row].decode()}",
                        fix=f"delete {PARTS}/{name.rpartition('.')[0]}.json below the output, then run the same command again",
                    )
                members.append(member)
            yield Sample(key=index.keys[row].decode(), image=members[0], txt=members[1], json=members[2], sha256=index.sha256[row].tobytes())


def _runs(index: ShardIndex, rows: np.ndarray) -> Iterator[list[int]]:
    """Rows that are read with one request: a part may be larger than memory, and held-out samples are few and far between."""
    run: list[int] = []
    for row in rows.tolist():
        if run:
            last = int(index.offsets[run[-1], 2] + index.sizes[run[-1], 2])
            end = int(index.offsets[row, 2] + index.sizes[row, 2])
            if int(index.offsets[row, 0]) - last > GAP_BYTES or end - int(index.offsets[run[0], 0]) > READ_BYTES:
                yield run
                run = []
        run.append(row)
    if run:
        yield run


def _cut(names: Sequence[str], counts: Sequence[int], size: int) -> Iterator[tuple[Piece, ...]]:
    """Runs of `size` samples through parts that hold `counts`; the last run may be shorter, none is empty."""
    pieces: list[Piece] = []
    room = size
    for name, count in zip(names, counts, strict=True):
        start = 0
        while start < count:
            stop = min(count, start + room)
            pieces.append(Piece(part=name, start=start, stop=stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield tuple(pieces)
                pieces, room = [], size
    if pieces:
        yield tuple(pieces)
