"""The searches: groups of samples that share a value, and pairs of groups that are close. Each task takes some buckets or some tables.

Files of the gather step are read bucket by bucket. Perceptual hashes (16 bytes a sample) are read whole while a task can hold them all; where
it cannot, one more step first lays them out table by table.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.dedup.caption import BUCKET_CAP, agreement, choose_bands
from data_prep.dedup.exact import groups_of_digests, groups_of_hashes
from data_prep.dedup.image import Scheme, matches_in_table
from data_prep.dedup.pairs import colliding, mix, order_of, sorted_unique
from data_prep.dedup.store import BAND, EDGE, EXACT, HASH, NUM_BUCKETS, bucket_of, different, joined, path_of, read_all, records, write_buckets
from data_prep.storage import Storage, open_storage


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTask:
    """Groups of one value among the samples of some buckets."""

    kind: str
    """`exact`, `image` or `text`: which files of the gather step."""
    buckets: range
    windows: range
    """Of all ids, to sort the members by: see `window_of`."""
    window_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTask:
    """Pairs of close perceptual hashes, by some tables of a scheme."""

    scheme: Scheme
    tables: range
    num_spread: int = 0
    """Files that the spread step wrote for every table; 0: it was not needed."""
    buckets: range = range(NUM_BUCKETS)
    """Of those files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpreadTask:
    """Perceptual hashes of some files of the gather step, to be laid out table by table."""

    number: int
    scheme: Scheme
    gathered: range


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionTask:
    """Pairs of close captions, by some bands."""

    similarity: float
    bands: range
    buckets: range


SearchTask = GroupTask | ImageTask | CaptionTask


def search(url: str, number: int, num_gathered: int, task: SearchTask) -> dict[str, int]:
    """Runs one search over all files of the gather step, and stores what it finds below `parts/dedup/search/`.

    Returns:
        `found`: members of groups, or edges.
    """
    storage = open_storage(url)
    if isinstance(task, GroupTask):
        return {"found": _find_groups(storage, number, num_gathered, task)}
    edges = _image_edges(storage, num_gathered, task) if isinstance(task, ImageTask) else _caption_edges(storage, num_gathered, task)
    found = different(joined(list(edges), EDGE))
    storage.put_bytes(path_of("search", f"{number:06d}.edges"), found.tobytes())
    return {"found": len(found)}


def window_of(ids: np.ndarray, window_size: int) -> np.ndarray:
    """Number of the window that each id falls into: int64 [N]. Windows keep the last pass from needing all members at once."""
    return ids // window_size


def _find_groups(storage: Storage, number: int, num_gathered: int, task: GroupTask) -> int:
    dtype = EXACT if task.kind == "exact" else HASH
    found = read_all(storage, _gathered(num_gathered, task.kind), dtype, task.buckets)
    members = (groups_of_digests if task.kind == "exact" else groups_of_hashes)(found["value"], found["id"])
    members = members[np.argsort(members["id"], kind="stable")]
    windows = window_of(members["id"], task.window_size) - task.windows.start
    write_buckets(storage, path_of("search", f"{number:06d}.members"), members, windows, len(task.windows))
    storage.put_bytes(path_of("search", f"{number:06d}.groups"), sorted_unique(members["group"]).tobytes())
    return len(members)


def spread(url: str, task: SpreadTask) -> dict[str, int]:
    """Stores the hashes of a task once for every table, cut by the key in it; returns how many there are.

    Hashes that one table compares lie far apart in another's order: laid out so, a search reads only what it compares.
    """
    storage = open_storage(url)
    found = read_all(storage, [path_of("gather", f"{number:06d}.image") for number in task.gathered], HASH, range(NUM_BUCKETS))
    hashes, ids = first_of_each(found["value"], found["id"])
    rows = records(HASH, value=hashes, id=ids)
    for table in range(task.scheme.num_tables):
        buckets = bucket_of(mix(task.scheme.keys(hashes, table)[0]))
        write_buckets(storage, path_of("spread", f"{task.number:06d}.table-{table:03d}"), rows, buckets, NUM_BUCKETS)
    return {"num": len(rows)}


def _image_edges(storage: Storage, num_gathered: int, task: ImageTask) -> Iterator[np.ndarray]:
    paths = _gathered(num_gathered, "image")
    if task.num_spread:
        (table,) = task.tables
        paths = [path_of("spread", f"{number:06d}.table-{table:03d}") for number in range(task.num_spread)]
    found = read_all(storage, paths, HASH, task.buckets)
    hashes, ids = first_of_each(found["value"], found["id"])
    num_published = int((ids < 0).sum())
    for table in task.tables:
        for later, earlier, bits in matches_in_table(hashes, task.scheme, table, num_fixed=num_published):
            yield records(EDGE, later=ids[later], earlier=ids[earlier], measure=bits)


def first_of_each(values: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(every different value, the smallest id that has it), in the order of these ids: uint64 [U], int64 [U]."""
    order = np.lexsort((ids, values))
    values, ids = values[order], ids[order]
    is_first = np.concatenate([[True], values[1:] != values[:-1]])[: len(values)]
    values, ids = values[is_first], ids[is_first]
    order = np.argsort(ids)
    return values[order], ids[order]


def _caption_edges(storage: Storage, num_gathered: int, task: CaptionTask) -> Iterator[np.ndarray]:
    least = choose_bands(task.similarity).min_agreement
    for band in task.bands:
        found = _sharing(read_all(storage, _gathered(num_gathered, f"band-{band:02d}"), BAND, task.buckets))
        # A normal form that several files hold stands there several times: its smallest id counts.
        found = found[np.lexsort((found["id"], found["text"]))]
        found = found[np.concatenate([[True], found["text"][1:] != found["text"][:-1]])[: len(found)]]
        found = found[np.argsort(found["id"])]
        ids, sketches = found["id"], found["sketch"]
        for later, earlier in colliding(found["key"], num_fixed=int((ids < 0).sum()), cap=BUCKET_CAP):
            agreed = agreement(sketches[later], sketches[earlier])
            close = agreed >= least
            yield records(EDGE, later=ids[later[close]], earlier=ids[earlier[close]], measure=agreed[close])


def _sharing(found: np.ndarray) -> np.ndarray:
    """The few records whose key is not theirs alone."""
    keys = np.ascontiguousarray(found["key"])
    order = order_of(keys)
    alike = keys[order][1:] == keys[order][:-1]
    return found[order[np.concatenate([alike, [False]]) | np.concatenate([[False], alike])]] if len(found) else found


def _gathered(num_gathered: int, kind: str) -> list[str]:
    return [path_of("gather", f"{number:06d}.{kind}") for number in range(num_gathered)]
