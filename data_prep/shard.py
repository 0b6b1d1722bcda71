"""Parts -> equally full shards.

With all parts written and their duplicates found, every split is cut in the order of the plan into shards of `samples_per_shard`, and each
shard copies its share from one to a few parts. Copying is cheap beside decoding, and gives the same bytes however often it is done.
"""

import json
import secrets
from collections.abc import Iterator, Sequence
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
        storage.put_bytes(f"dropped/{job.generation:06d}/part-{record.number:06d}.tar", storage.read_bytes(dropped_path(record.name)))
    return collector.finish()


def plan_shards(parts: Sequence[PartCounts], config: PrepConfig, generation: int, *, has_verdicts: bool) -> list[ShardPlan]:
    """Cuts each split, in the order of the plan, into shards of `samples_per_shard` (the last one takes the rest).

    Where no sample of a first generation hashes to the train split (a folder of one image), everything goes there.
    """
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
    storage.put_bytes(shard_record_path(job.generation, shard.name), json.dumps(asdict(info)).encode())
    return info


def finished_parts(storage: Storage, generation: int) -> Iterator[PartRecord]:
    """Records of the parts that an earlier run finished."""
    for path in storage.list(f"{PARTS}/{generation:06d}/part-"):
        if path.endswith(".json"):
            yield PartRecord(**json.loads(storage.read_bytes(path)))


def finished_shards(storage: Storage, generation: int) -> dict[str, ShardInfo]:
    """Records of the shards that an earlier run finished, by name."""
    paths = storage.list(f"{PARTS}/{generation:06d}/shard-")
    records = [ShardInfo(**json.loads(storage.read_bytes(path))) for path in paths]
    return {record.name: record for record in records}


def shard_record_path(generation: int, name: str) -> str:
    """Path of the record of a shard."""
    return f"{PARTS}/{generation:06d}/shard-{name}.json"


def _rows_of(storage: Storage, piece: Piece, shard: ShardPlan) -> tuple[ShardIndex, np.ndarray]:
    """(index of the part, rows of the piece in it)."""
    index = ShardIndex.load(storage, piece.part, folder=PARTS)
    chosen = is_heldout(index.sha256, shard.heldout_permille) == shard.is_heldout
    if shard.has_verdicts:
        chosen &= verdicts(storage, piece.part)[0]
    return index, np.flatnonzero(chosen)[piece.start : piece.stop]


def _part_samples(storage: Storage, name: str, index: ShardIndex, rows: np.ndarray) -> Iterator[Sample]:
    begin = int(index.offsets[rows[0], 0])
    data = storage.read_range(tar_path(name, PARTS), begin, int(index.offsets[rows[-1], 2] + index.sizes[rows[-1], 2]) - begin)
    for row in rows:
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
