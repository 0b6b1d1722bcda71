"""How the work of the duplicate search is cut into tasks. Changes nothing about the result."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from data_prep.config import DedupConfig, PrepConfig
from data_prep.dedup.caption import choose_bands
from data_prep.dedup.gather import DUPLICATE, NEAR_CAPTION, NEAR_IMAGE, GatherTask, needs_exact
from data_prep.dedup.image import Scheme, choose_scheme
from data_prep.dedup.search import CaptionTask, GroupTask, ImageTask, SearchTask, SpreadTask
from data_prep.dedup.store import NUM_BUCKETS, cut
from data_prep.dedup.verdict import RelationFiles
from data_prep.schema import ShardInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Sizes of tasks."""

    gather_rows: int = 1 << 19
    """Samples that one task reads from their sidecars: 600 MB for half a million with captions."""
    search_rows: int = 1 << 22
    """Samples that one task searches for groups or close captions: 700 MB for 4 million."""
    image_rows: int = 1 << 22
    """Perceptual hashes that one task searches: 450 MB for 4 million."""
    image_work: int = 1 << 26
    """Hashes times tables that one task searches."""
    window: int = 1 << 22
    """Ids that the greedy pass decides at a time."""


def gather_tasks(config: PrepConfig, parts: Sequence[str], base: Sequence[ShardInfo], scale: Scale) -> list[GatherTask]:
    """Sidecars, about `gather_rows` samples at a time: first the parts, then the published shards, where these matter."""
    tasks: list[GatherTask] = []
    at_once = max(1, scale.gather_rows // config.samples_per_shard)
    for begin in range(0, len(parts), at_once):
        names = tuple(parts[begin : begin + at_once])
        tasks.append(GatherTask(number=len(tasks), names=names, sha256=("",) * len(names), is_base=False, dedup=config.dedup))
    if not (needs_exact(config.dedup) or config.dedup.caption_similarity is not None):
        return tasks  # only evaluation sets to compare with
    for batch in _batches([shard.num_samples for shard in base], scale.gather_rows):
        shards = base[batch.start : batch.stop]
        names, checksums = tuple(shard.name for shard in shards), tuple(shard.metadata_sha256 for shard in shards)
        tasks.append(GatherTask(number=len(tasks), names=names, sha256=checksums, is_base=True, dedup=config.dedup))
    return tasks


def spread_tasks(dedup: DedupConfig, gathered: Sequence[Mapping[str, int]], scale: Scale) -> list[SpreadTask]:
    """Perceptual hashes that are too many for one task, about `image_rows` at a time; nothing where they are not."""
    num = sum(counts["num"] for counts in gathered)
    if not dedup.image_distance or num <= scale.image_rows:
        return []
    scheme = choose_scheme(dedup.image_distance, num, is_stored=True)
    batches = _batches([counts["num"] for counts in gathered], scale.image_rows)
    return [SpreadTask(number=number, scheme=scheme, gathered=batch) for number, batch in enumerate(batches)]


def plan_searches(
    dedup: DedupConfig, gathered: Sequence[Mapping[str, int]], num_spread: int, scale: Scale
) -> tuple[list[SearchTask], tuple[RelationFiles, ...]]:
    """All searches, and which of them make which relation.

    Args:
        dedup: what to look for.
        gathered: results of the gather step.
        num_spread: tasks of the spread step.
        scale: how to cut it.
    """
    num = sum(counts["num"] for counts in gathered)
    windows = windows_of(gathered, scale)
    tasks: list[SearchTask] = []
    if not windows:
        return [], ()

    def add(new: Iterable[SearchTask]) -> tuple[int, ...]:
        first = len(tasks)
        tasks.extend(new)
        return tuple(range(first, len(tasks)))

    def groups(kind: str) -> tuple[int, ...]:
        return add(GroupTask(kind=kind, buckets=buckets, windows=windows, window_size=scale.window) for buckets in _cuts(num, scale.search_rows))

    relations = []
    if needs_exact(dedup):
        relations.append(RelationFiles(code=DUPLICATE, group_searches=groups("exact")))
    if dedup.image_distance is not None:
        scheme = choose_scheme(dedup.image_distance, num, is_stored=num_spread > 0)
        edges = add(_image_tasks(scheme, num, num_spread, scale)) if dedup.image_distance else ()
        relations.append(RelationFiles(code=NEAR_IMAGE, group_searches=groups("image"), edge_searches=edges))
    if dedup.caption_similarity is not None:
        edges = add(_caption_tasks(dedup.caption_similarity, num, scale))
        relations.append(RelationFiles(code=NEAR_CAPTION, group_searches=groups("text"), edge_searches=edges))
    return tasks, tuple(relations)


def windows_of(gathered: Sequence[Mapping[str, int]], scale: Scale) -> range:
    """Windows of the ids of the parts (published ones are negative and need no decision)."""
    held = [counts for counts in gathered if counts["num"] and counts["low"] >= 0]
    if not held:
        return range(0)
    return range(min(counts["low"] for counts in held) // scale.window, max(counts["high"] for counts in held) // scale.window + 1)


def _image_tasks(scheme: Scheme, num: int, num_spread: int, scale: Scale) -> Iterator[ImageTask]:
    if num_spread:
        for table, buckets in itertools.product(range(scheme.num_tables), _cuts(num, scale.image_rows)):
            yield ImageTask(scheme=scheme, tables=range(table, table + 1), num_spread=num_spread, buckets=buckets)
        return
    at_once = max(1, scale.image_work // num)
    for begin in range(0, scheme.num_tables, at_once):
        yield ImageTask(scheme=scheme, tables=range(begin, min(scheme.num_tables, begin + at_once)))


def _caption_tasks(similarity: float, num: int, scale: Scale) -> Iterator[CaptionTask]:
    num_bands = choose_bands(similarity).num_bands
    at_once = max(1, scale.search_rows // num)
    for begin in range(0, num_bands, at_once):
        for buckets in _cuts(num, scale.search_rows):
            yield CaptionTask(similarity=similarity, bands=range(begin, min(num_bands, begin + at_once)), buckets=buckets)


def _cuts(num: int, at_once: int) -> list[range]:
    """All buckets, cut so that each cut holds about `at_once` of `num` samples."""
    return cut(NUM_BUCKETS, min(NUM_BUCKETS, math.ceil(num / at_once)))


def _batches(counts: Sequence[int], most: int) -> Iterator[range]:
    """Consecutive positions whose counts add up to at most `most` (or single ones above it)."""
    begin = total = 0
    for position, count in enumerate(counts):
        if position > begin and total + count > most:
            yield range(begin, position)
            begin, total = position, 0
        total += count
    if begin < len(counts):
        yield range(begin, len(counts))
