"""The searches: groups of samples that share a value, and pairs of groups that are close. Each task takes some buckets or some tables.

Files of the gather step are read bucket by bucket, or, for perceptual hashes (16 bytes a sample), whole, keeping what falls to the task.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.dedup.caption import BUCKET_CAP, agreement, choose_bands
from data_prep.dedup.exact import groups_of_digests, groups_of_hashes
from data_prep.dedup.image import Scheme, matches_in_table, shuffled_bits
from data_prep.dedup.pairs import colliding, mix
from data_prep.dedup.store import BAND, EDGE, EXACT, HASH, NUM_BUCKETS, different, joined, path_of, read_all, read_each, records, write_buckets
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
    part: int
    num_parts: int
    """The hashes of a table are dealt to so many tasks, by their key."""


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
    storage.put_bytes(path_of("search", f"{number:06d}.groups"), np.unique(members["group"]).tobytes())
    return len(members)


def _image_edges(storage: Storage, num_gathered: int, task: ImageTask) -> Iterator[np.ndarray]:
    scheme, parts = task.scheme, []
    for found in read_each(storage, _gathered(num_gathered, "image"), HASH, range(NUM_BUCKETS)):
        if task.num_parts > 1:
            (table,) = task.tables
            found = found[mix(scheme.keys(shuffled_bits(found["value"]), table)[0]) % np.uint64(task.num_parts) == task.part]
        parts.append(found)
    rows = joined(parts, HASH)
    hashes, ids = first_of_each(rows["value"], rows["id"])
    shuffled, num_published = shuffled_bits(hashes), int((ids < 0).sum())
    for table in task.tables:
        for later, earlier, bits in matches_in_table(shuffled, scheme, table, num_fixed=num_published):
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
        found = read_all(storage, _gathered(num_gathered, f"band-{band:02d}"), BAND, task.buckets)
        # A normal form that several files hold stands there several times: its smallest id counts.
        found = found[np.lexsort((found["id"], found["text"]))]
        found = found[np.concatenate([[True], found["text"][1:] != found["text"][:-1]])[: len(found)]]
        found = found[np.argsort(found["id"])]
        ids, sketches = found["id"], found["sketch"]
        for later, earlier in colliding(found["key"], num_fixed=int((ids < 0).sum()), cap=BUCKET_CAP):
            agreed = agreement(sketches[later], sketches[earlier])
            close = agreed >= least
            yield records(EDGE, later=ids[later[close]], earlier=ids[earlier[close]], measure=agreed[close])


def _gathered(num_gathered: int, kind: str) -> list[str]:
    return [path_of("gather", f"{number:06d}.{kind}") for number in range(num_gathered)]
