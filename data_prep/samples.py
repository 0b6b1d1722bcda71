"""Reads samples back out of a data set, for the inspection verbs. (Training reads through `pipeline.data`.)"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.schema import Manifest, ShardIndex, tar_path
from data_prep.storage import Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSample:
    """One sample of a shard."""

    shard: str
    key: str
    image: bytes
    caption: str
    values: dict[str, Any]
    """The JSON member: source, original width, height and format, sha256, label and extra columns."""


def stored_samples(storage: Storage, manifest: Manifest, split: str, *, every: int = 1, start: int = 0) -> Iterator[StoredSample]:
    """Samples start, start + every, ... of a split, in the order of its shards; untouched shards are not read."""
    position = 0
    for shard in manifest.splits[split].shards:
        first = max(start - position, (start - position) % every)
        position += shard.num_samples
        if first >= shard.num_samples:
            continue
        index = ShardIndex.load(storage, shard.name, sha256=shard.index_sha256)
        path = tar_path(shard.name)
        for row in range(first, shard.num_samples, every):
            begin = int(index.offsets[row, 0])
            data = storage.read_range(path, begin, int(index.offsets[row, 2] + index.sizes[row, 2]) - begin)
            image, txt, values = (data[offset : offset + size] for offset, size in zip(index.offsets[row] - begin, index.sizes[row], strict=True))
            yield StoredSample(shard=shard.name, key=index.keys[row].decode(), image=image, caption=txt.decode(), values=json.loads(values))
