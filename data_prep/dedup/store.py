"""Intermediate files of the duplicate search: plain records, sorted into buckets, so that a task reads the buckets it works on.

All lie below `parts/dedup/` of the output and vanish with `parts/`. A file is a header (where each bucket begins, int64, in records)
and the records behind it.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data_prep.storage import Storage

FOLDER = "parts/dedup"

NUM_BUCKETS = 256
"""Buckets of the files that are cut by hash value: at most so many tasks share one search."""

EXACT = np.dtype([("value", "u1", 32), ("id", "<i8")])
"""SHA-256 of the file."""
HASH = np.dtype([("value", "<u8"), ("id", "<i8")])
"""Perceptual hash (of `image.shuffled_bits`), or hash of a normal form."""
BAND = np.dtype([("key", "<u8"), ("text", "<u8"), ("id", "<i8"), ("sketch", "u1", 64)])
"""Key of one band, hash of the normal form, smallest id that has it, MinHash sketch."""
MEMBER = np.dtype([("id", "<i8"), ("group", "<i8")])
"""A sample, and the smallest id of those with the same value."""
EDGE = np.dtype([("later", "<i8"), ("earlier", "<i8"), ("measure", "u1")])
"""Two groups that are close: by so many differing bits, or agreeing minima."""
DECISION = np.dtype([("id", "<i8"), ("other", "<i8"), ("code", "u1"), ("measure", "u1")])
"""A dropped sample, the sample or evaluation item it is like, the relation, and how close."""

BASE = 1 << 40
"""Published samples have the id `key - BASE`: negative, so they are considered first, and are never dropped."""

_THREADS = 8


def path_of(*names: str) -> str:
    """Path of an intermediate file."""
    return "/".join((FOLDER, *names))


def bucket_of(hashes: np.ndarray) -> np.ndarray:
    """Bucket of mixed uint64 [N]: uint8 [N]."""
    return (hashes >> np.uint64(56)).astype(np.uint8)


def write_buckets(storage: Storage, path: str, records: np.ndarray, buckets: np.ndarray, num_buckets: int) -> None:
    """Publishes records [N], sorted stably by their bucket number [N]."""
    order = np.argsort(buckets, kind="stable")
    starts = np.searchsorted(buckets[order], np.arange(num_buckets + 1)).astype("<i8")
    storage.put_bytes(path, b"".join((starts.tobytes(), records[order].data)))


def read_buckets(storage: Storage, path: str, dtype: np.dtype, buckets: range, num_buckets: int) -> np.ndarray:
    """Records of consecutive buckets of a file of `write_buckets`."""
    header = 8 * (num_buckets + 1)
    if len(buckets) == num_buckets:
        return np.frombuffer(storage.read_bytes(path), dtype, offset=header)
    first, last = np.frombuffer(storage.read_range(path, 0, header), "<i8")[[buckets.start, buckets.stop]]
    data = storage.read_range(path, int(header + first * dtype.itemsize), int((last - first) * dtype.itemsize))
    return np.frombuffer(data, dtype)


def read_each(storage: Storage, paths: Sequence[str], dtype: np.dtype, buckets: range, num_buckets: int = NUM_BUCKETS) -> Iterator[np.ndarray]:
    """`read_buckets` of many files, in their order, some of them at a time: most of it is waiting for the store."""
    with ThreadPoolExecutor(_THREADS) as threads:
        for begin in range(0, len(paths), _THREADS):
            batch = paths[begin : begin + _THREADS]
            yield from threads.map(lambda path: read_buckets(storage, path, dtype, buckets, num_buckets), batch)


def read_all(storage: Storage, paths: Sequence[str], dtype: np.dtype, buckets: range, num_buckets: int = NUM_BUCKETS) -> np.ndarray:
    """`read_each`, joined."""
    return joined(list(read_each(storage, paths, dtype, buckets, num_buckets)), dtype)


def joined(found: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """All records in one array, also if there are none."""
    return np.concatenate(found) if found else np.zeros(0, dtype)


def cut(num_buckets: int, num_parts: int) -> list[range]:
    """Consecutive buckets in `num_parts` parts of nearly equal size."""
    edges = [num_buckets * part // num_parts for part in range(num_parts + 1)]
    return [range(begin, end) for begin, end in zip(edges[:-1], edges[1:], strict=True)]


def records(dtype: np.dtype, **columns: np.ndarray) -> np.ndarray:
    """A record array of equally long columns."""
    result = np.zeros(len(next(iter(columns.values()))), dtype)
    for name, column in columns.items():
        result[name] = column
    return result


def different(edges: np.ndarray) -> np.ndarray:
    """`EDGE` records, sorted, each pair once (np.unique compares records field by field, ten times as slowly)."""
    edges = edges[np.lexsort((edges["earlier"], edges["later"]))]
    same = (edges["later"][1:] == edges["later"][:-1]) & (edges["earlier"][1:] == edges["earlier"][:-1])
    return edges[np.concatenate([[True], ~same])[: len(edges)]]


def key_of(identity: int) -> str:
    """Key of the sample with this id."""
    return f"{identity + BASE if identity < 0 else identity:010d}"
