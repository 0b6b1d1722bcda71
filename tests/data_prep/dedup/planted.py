"""Sidecars made on the spot, a runner without Ray, and a slow reference of the rule."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import metadata
from data_prep.config import DedupConfig, PrepConfig
from data_prep.metadata import Facts
from data_prep.schema import ShardInfo
from data_prep.storage import open_storage

Verdicts = dict[str, tuple[str, str]]
"""Key of a dropped sample -> (reason, detail)."""


def run_here(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """Runs tasks in this process, last first: nobody may count on an order."""
    for argument in reversed(arguments):
        yield function(*argument)


def telling_hashes(count: int, generator: np.random.Generator) -> np.ndarray:
    """uint64 [count] with 32 bits set, as photographs have."""
    places = generator.permuted(np.tile(np.arange(64), (count, 1)), axis=1)[:, :32]
    return np.bitwise_or.reduce(np.uint64(1) << places.astype(np.uint64), axis=1)


def flipped(hashes: np.ndarray, most: int, generator: np.random.Generator) -> np.ndarray:
    """The hashes with up to `most` bits of each flipped."""
    hashes = hashes.copy()
    for _ in range(most):
        hashes ^= generator.integers(0, 2, len(hashes), dtype=np.uint64) << generator.integers(0, 64, len(hashes), dtype=np.uint64)
    return hashes


def facts(number: int, *, content: object = None, phash: int = 0, caption: str = "") -> Facts:
    """One row; `content` stands for the bytes of the file (None: bytes that no other row has)."""
    return Facts(
        key=f"{number:010d}",
        source=f"pairs.csv#{number}",
        url="",
        caption=caption,
        width=64,
        height=64,
        format="jpeg",
        jpeg_quality=90,
        num_bytes=1000,
        sha256=hashlib.sha256(str(("own", number) if content is None else content).encode()).digest(),
        phash=phash,
    )


def write_parts(folder: Path | str, rows: Sequence[Facts], size: int) -> list[str]:
    """Writes rows as parts of `size`; returns their names."""
    storage, names = open_storage(folder), []
    for begin in range(0, len(rows), size):
        name = f"000001/part-{len(names):06d}.abcd"
        metadata.dump(storage, name, metadata.table_of(rows[begin : begin + size]), folder="parts")
        names.append(name)
    return names


def write_base(folder: Path | str, rows: Sequence[Facts], size: int) -> list[ShardInfo]:
    """Writes rows as the sidecars of published shards."""
    storage, shards = open_storage(folder), []
    for begin in range(0, len(rows), size):
        chunk = rows[begin : begin + size]
        name = f"train-{len(shards):06d}"
        checksum = metadata.dump(storage, name, metadata.table_of(chunk))
        shards.append(ShardInfo(name=name, num_samples=len(chunk), num_bytes=0, sha256="", index_sha256="", metadata_sha256=checksum))
    return shards


def settings(folder: Path | str, size: int, **dedup: Any) -> PrepConfig:
    """A configuration that looks for duplicates below `folder`."""
    return replace(PrepConfig(output=str(folder), samples_per_shard=size), dedup=DedupConfig(**dedup))


def greedy_reference(ids: Sequence[int], is_close: Callable[[int, int], bool], published: frozenset[int] = frozenset()) -> list[int]:
    """Ids that stay, by the rule itself: one after the other, compared with all that stay."""
    kept = sorted(published)
    for identity in sorted(set(ids) - published):
        if not any(is_close(identity, other) for other in kept):
            kept.append(identity)
    return kept
