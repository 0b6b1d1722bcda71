"""Compaction: the shards that hold samples which were taken down are replaced by full ones without them; all others stay.

    newest manifest + tombstones -> compaction/ (records of finished shards) -> shards/, metadata/ -> manifests/ (last)

The samples that remain of such shards are cut, in their order, into new shards; members are copied byte for byte. What is made follows
from the newest generation and the tombstones alone, so a rerun after `kill -9` ends with the bytes of an uninterrupted run. Old
shards stay for the older generations, until `delete_old`.
"""

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import xxhash
from tqdm import tqdm

from configs.errors import UserError
from data_prep import metadata
from data_prep.cluster import ray_session, run_tasks
from data_prep.config import RayConfig
from data_prep.lease import Lease
from data_prep.schema import (
    Counts,
    Manifest,
    ShardIndex,
    ShardInfo,
    Split,
    base_of,
    generation_of,
    generations,
    manifest_path,
    read_lineage,
    shard_name,
    tar_path,
    write_lineage,
)
from data_prep.shard_writer import Sample, ShardWriter
from data_prep.storage import LocalStorage, Storage, open_storage, writing
from data_prep.tombstones import Rows, Tombstones

RECORDS = "compaction"
"""Folder of the records that say which new shards are finished; deleted at the end."""

NUM_SHARDS_IN_PROCESS = 8
"""Up to so many new shards are copied by this process; Ray, which takes seconds to start, copies more."""
_READ_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Samples of one old shard that go into one new one."""

    shard: ShardInfo
    rows: tuple[int, ...]
    """Their numbers in the old shard, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewShard:
    """One shard to be written."""

    name: str
    split: str
    pieces: tuple[Piece, ...]

    @property
    def num_samples(self) -> int:
        """Samples that it will hold."""
        return sum(len(piece.rows) for piece in self.pieces)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compaction:
    """What a compaction will do."""

    base: Manifest
    generation: int
    replaced: tuple[ShardInfo, ...]
    """Old shards that the new generation does without."""
    shards: tuple[NewShard, ...]
    num_removed: int
    """Samples that were taken down."""

    @property
    def digest(self) -> str:
        """Hash of everything that decides the bytes of the new shards."""
        content = [hashlib.sha256(self.base.to_bytes()).hexdigest(), self.generation, [asdict(shard) for shard in self.shards]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def plan_compaction(base: Manifest, tombstones: Tombstones, generation: int) -> Compaction | None:
    """What to do so that generation `generation` is `base` without what was taken down; None if it holds none of it.

    Raises:
        UserError: no sample would be left.
    """
    size = int(base.config.get("samples_per_shard", 0)) or max(shard.num_samples for split in base.splits.values() for shard in split.shards)
    replaced: list[ShardInfo] = []
    shards: list[NewShard] = []
    for name, split in base.splits.items():
        hit = [shard for shard in split.shards if len(tombstones.rows(shard.name))]
        replaced += hit
        left = [(shard, tombstones.kept(shard.name, shard.num_samples)) for shard in hit]
        for number, pieces in enumerate(_cut(left, size)):
            shards.append(NewShard(name=shard_name(name, generation, number), split=name, pieces=pieces))
    if not replaced:
        return None
    num_removed = tombstones.count(shard.name for shard in replaced)
    if num_removed == sum(split.num_samples for split in base.splits.values()):
        raise UserError(f"every sample of generation {base.generation} was taken down: nothing would be left", fix="delete the data set as a whole")
    return Compaction(base=base, generation=generation, replaced=tuple(replaced), shards=tuple(shards), num_removed=num_removed)


def compact(storage: Storage, plan: Compaction, ray: RayConfig, lease: Lease) -> Manifest:
    """Writes the new shards that are not finished yet, then the manifest. The caller is the only writer, by this lease.

    Raises:
        UserError: an old shard is missing or damaged, or the storage is full.
    """
    storage.clear_scratch()
    finished = _finished(storage, plan)
    remaining = [shard for shard in plan.shards if shard.name not in finished]
    # Workers have another current folder.
    url = str(storage.root) if isinstance(storage, LocalStorage) else storage.url
    arguments = [(url, shard, plan.base.image.extension, plan.digest) for shard in remaining]
    with tqdm(total=len(plan.shards), initial=len(finished), desc="shards", unit="shard") as progress:
        for info in _written(arguments, ray):
            finished[info.name] = info
            progress.update()
    _write_ledger(storage, plan)
    manifest = _manifest(plan, finished)
    lease.check()
    manifest.dump(storage)
    clear_records(storage)
    return manifest


def write_shard(url: str, shard: NewShard, extension: str, digest: str) -> ShardInfo:
    """Copies the samples of one new shard, publishes it with index and sidecar, and then its record.

    Raises:
        UserError: an old shard is missing or damaged, or the storage is full.
    """
    storage = open_storage(url)
    scratch = storage.scratch() / f"{shard.name}.{secrets.token_hex(6)}"
    with writing(f"{url}/{tar_path(shard.name)}"), ShardWriter(scratch, extension) as writer:
        for piece in shard.pieces:
            for sample in _samples(storage, piece):
                writer.add(sample)
        info = writer.publish(storage, shard.name)
    info = replace(info, metadata_sha256=_write_sidecar(storage, shard))
    storage.put_bytes(f"{RECORDS}/{shard.name}.json", json.dumps({"digest": digest, "shard": asdict(info)}).encode())
    return info


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """What may go after a compaction."""

    since: int
    """The newest compaction."""
    generations: tuple[int, ...]
    """Those before it, ascending."""
    paths: tuple[str, ...]
    """Files of the shards that no later generation names."""


def plan_deletion(storage: Storage) -> Deletion:
    """What `delete_old` would delete.

    Raises:
        UserError: there was no compaction.
    """
    manifests = [Manifest.load(storage, number) for number in generations(storage)]
    since = max((manifest.generation for manifest in manifests if manifest.action == "compact"), default=None)
    if since is None:
        raise UserError(f"{storage.url} was never compacted", expected="a compaction, after which old shards can be deleted")
    needed = {shard.name for manifest in manifests if manifest.generation >= since for split in manifest.splits.values() for shard in split.shards}
    paths = [path for folder in ("shards/", "metadata/") for path in storage.list(folder)]
    names = [path.partition("/")[2].partition(".")[0] for path in paths]
    # Shards of a generation that is still being written are in no manifest yet.
    newest = manifests[-1].generation
    orphans = (path for path, name in zip(paths, names, strict=True) if name not in needed and generation_of(name) <= newest)
    return Deletion(since=since, generations=tuple(m.generation for m in manifests if m.generation < since), paths=tuple(orphans))


def delete_old(storage: Storage, deletion: Deletion) -> None:
    """Deletes the generations before a compaction, then their shards: a reader never finds a manifest without its shards.

    Killed half-way, it is finished by the next call. The caller is the only writer.
    """
    lineage = {number: base_of(storage, number) for number in deletion.generations}
    if lineage:  # `jetway prep` and `retry` go back through it to the inputs that were read
        write_lineage(storage, {**read_lineage(storage), **lineage})
    for number in deletion.generations:
        storage.delete(manifest_path(number))
    storage.delete_many(deletion.paths)


def clear_records(storage: Storage) -> None:
    """Forgets the records of a compaction that is finished or given up."""
    storage.delete_many(storage.list(f"{RECORDS}/"))
    storage.remove_empty(RECORDS)


def _cut(left: Sequence[tuple[ShardInfo, Rows]], size: int) -> Iterator[tuple[Piece, ...]]:
    """Runs of `size` samples through what is left of the shards; the last run may be shorter, none is empty."""
    pieces: list[Piece] = []
    room = size
    for shard, rows in left:
        while len(rows):
            part, rows = rows[:room], rows[room:]
            pieces.append(Piece(shard=shard, rows=tuple(part.tolist())))
            room -= len(part)
            if not room:
                yield tuple(pieces)
                pieces, room = [], size
    if pieces:
        yield tuple(pieces)


def _written(arguments: Sequence[tuple[Any, ...]], ray: RayConfig) -> Iterator[ShardInfo]:
    if len(arguments) <= NUM_SHARDS_IN_PROCESS:
        yield from (write_shard(*values) for values in arguments)
    else:
        with ray_session(ray):
            yield from run_tasks(write_shard, arguments, ray)


def _finished(storage: Storage, plan: Compaction) -> dict[str, ShardInfo]:
    """Shards that a killed run of the same plan has finished."""
    found = {}
    for path in storage.list(f"{RECORDS}/"):
        record = json.loads(storage.read_bytes(path))
        if record["digest"] == plan.digest:
            info = ShardInfo(**record["shard"])
            found[info.name] = info
    return found


def _samples(storage: Storage, piece: Piece) -> Iterator[Sample]:
    """The samples of a piece as they stand in the old shard, each member checked."""
    index = ShardIndex.load(storage, piece.shard.name, sha256=piece.shard.index_sha256)
    for rows in _runs(index, piece.rows):
        begin, end = int(index.offsets[rows[0], 0]), int(index.offsets[rows[-1], 2] + index.sizes[rows[-1], 2])
        try:
            data = storage.read_range(tar_path(piece.shard.name), begin, end - begin)
        except FileNotFoundError:
            raise UserError(f"{storage.url}/{tar_path(piece.shard.name)} is missing", fix="restore it, or take down all of its samples") from None
        for row in rows:
            members = []
            for offset, num_bytes, checksum in zip(index.offsets[row] - begin, index.sizes[row], index.xxh3[row], strict=True):
                member = data[offset : offset + num_bytes]
                if xxhash.xxh3_64_intdigest(member) != int(checksum):
                    key = index.keys[row].decode()
                    fix = f"restore the shard, or leave the sample out with `jetway takedown {storage.url} --key {key}`"
                    raise UserError(f"{storage.url}/{tar_path(piece.shard.name)} is damaged", got=f"other bytes for sample {key}", fix=fix)
                members.append(member)
            yield Sample(key=index.keys[row].decode(), image=members[0], txt=members[1], json=members[2], sha256=index.sha256[row].tobytes())


def _runs(index: ShardIndex, rows: Sequence[int]) -> Iterator[list[int]]:
    """Neighbouring rows that are read at once: at most about `_READ_BYTES`, and no further than one left-out sample apart."""
    run: list[int] = []
    for row in rows:
        if run and (row > run[-1] + 2 or int(index.offsets[row, 2] + index.sizes[row, 2] - index.offsets[run[0], 0]) > _READ_BYTES):
            yield run
            run = []
        run.append(row)
    if run:
        yield run


def _write_sidecar(storage: Storage, shard: NewShard) -> str:
    """The rows of the old sidecars; none (and an empty checksum) where an old shard has none."""
    if not all(piece.shard.metadata_sha256 for piece in shard.pieces):
        return ""
    import pyarrow as pa

    parts = [metadata.load(storage, piece.shard.name, sha256=piece.shard.metadata_sha256).take(list(piece.rows)) for piece in shard.pieces]
    return metadata.dump(storage, shard.name, pa.concat_tables(parts).combine_chunks())


def _write_ledger(storage: Storage, plan: Compaction) -> None:
    """Lists the samples that are gone, in the order of the old shards."""
    kept: dict[str, set[int]] = {}
    for piece in (piece for new in plan.shards for piece in new.pieces):
        kept.setdefault(piece.shard.name, set()).update(piece.rows)
    lines = []
    for shard in plan.replaced:
        keys = ShardIndex.load(storage, shard.name, sha256=shard.index_sha256).keys
        sources = _sources(storage, shard)
        for row in sorted(set(range(shard.num_samples)) - kept.get(shard.name, set())):
            entry = {"key": keys[row].decode(), "source": sources[row], "reason": "takedown", "detail": f"was in {shard.name}"}
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    storage.put_bytes(f"ledger/{plan.generation:06d}/failures-000000.jsonl", "".join(lines).encode("utf-8", "replace"))


def _sources(storage: Storage, shard: ShardInfo) -> Sequence[str]:
    if not shard.metadata_sha256:
        return [""] * shard.num_samples
    table = metadata.load(storage, shard.name, columns=["source"], sha256=shard.metadata_sha256)
    return list(table.column("source").to_pylist())


def _manifest(plan: Compaction, written: Mapping[str, ShardInfo]) -> Manifest:
    base, gone = plan.base, {shard.name for shard in plan.replaced}
    splits = {}
    for name, split in base.splits.items():
        kept = [shard for shard in split.shards if shard.name not in gone]
        shards = (*kept, *(written[shard.name] for shard in plan.shards if shard.split == name))
        splits[name] = Split(num_samples=sum(shard.num_samples for shard in shards), shards=shards)
    dropped = {**base.counts.dropped, "takedown": base.counts.dropped.get("takedown", 0) + plan.num_removed}
    counts = Counts(read=base.counts.read, kept=base.counts.kept - plan.num_removed, dropped=dict(sorted(dropped.items())))
    return replace(base, generation=plan.generation, splits=splits, counts=counts, action="compact", base=base.generation)
