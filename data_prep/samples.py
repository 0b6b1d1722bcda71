"""Reads samples back out of a data set, for the inspection verbs. (Training reads through `pipeline.data`.)"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.schema import Manifest, ShardIndex, ShardInfo, tar_path
from data_prep.storage import Storage
from data_prep.tombstones import Rows, Tombstones, load


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSample:
    """One sample of a shard."""

    shard: str
    key: str
    image: bytes
    caption: str
    values: dict[str, Any]
    """The JSON member: source, original width, height and format, sha256, label and extra columns."""


def stored_samples(
    storage: Storage, manifest: Manifest, split: str, *, every: int = 1, start: int = 0, tombstones: Tombstones | None = None
) -> Iterator[StoredSample]:
    """Samples start, start + every, ... of a split, in the order of its shards; untouched shards are not read.

    Args:
        tombstones: samples to pass over as if they were not there; None: all that were taken down.
    """
    for shard, rows in chosen_rows(manifest, split, load(storage) if tombstones is None else tombstones, every=every, start=start):
        yield from shard_samples(storage, shard, rows)


def shard_samples(storage: Storage, shard: ShardInfo, rows: Rows) -> Iterator[StoredSample]:
    """These samples of one shard, each by one read."""
    index = ShardIndex.load(storage, shard.name, sha256=shard.index_sha256)
    path = tar_path(shard.name)
    for row in rows.tolist():
        begin = int(index.offsets[row, 0])
        data = storage.read_range(path, begin, int(index.offsets[row, 2] + index.sizes[row, 2]) - begin)
        image, txt, values = (data[offset : offset + size] for offset, size in zip(index.offsets[row] - begin, index.sizes[row], strict=True))
        yield StoredSample(shard=shard.name, key=index.keys[row].decode(), image=image, caption=txt.decode(), values=json.loads(values))


def chosen_rows(manifest: Manifest, split: str, tombstones: Tombstones, *, every: int = 1, start: int = 0) -> Iterator[tuple[ShardInfo, Rows]]:
    """Shards, and in each the rows of the samples start, start + every, ... of the split, not counting those in `tombstones`."""
    position = 0
    for shard in manifest.splits[split].shards:
        kept = tombstones.kept(shard.name, shard.num_samples)
        first = max(start - position, (start - position) % every)
        position += len(kept)
        if first < len(kept):
            yield shard, kept[first::every]


def num_usable(manifest: Manifest, split: str, tombstones: Tombstones) -> int:
    """Samples of a split that were not taken down."""
    return manifest.splits[split].num_samples - tombstones.count(shard.name for shard in manifest.splits[split].shards)
