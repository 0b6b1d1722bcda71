"""Duplicates of one generation: what is like what among the parts, the published shards and the evaluation sets, and who goes.

gather (a million samples a task) -> search (groups and pairs, by bucket) -> one greedy pass -> a file of verdicts per part. Every task
stores its record last, so a killed run repeats only what was unfinished, and none of it depends on how the work was cut.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from data_prep.cluster import run_tasks
from data_prep.config import DedupConfig, PrepConfig
from data_prep.dedup.caption import choose_bands
from data_prep.dedup.evaluation import EvaluationTask, join_evaluation, plan_evaluation, read_evaluation
from data_prep.dedup.gather import DUPLICATE, NEAR_CAPTION, NEAR_IMAGE, GatherTask, gather, needs_exact
from data_prep.dedup.image import choose_scheme
from data_prep.dedup.search import CaptionTask, GroupTask, ImageTask, SearchTask, search
from data_prep.dedup.store import FOLDER, NUM_BUCKETS, cut, path_of
from data_prep.dedup.verdict import GreedyTask, RelationFiles, decide_all, verdicts, write_verdicts
from data_prep.schema import ShardInfo
from data_prep.storage import Storage, open_storage

__all__ = ["Duplicates", "Scale", "find_duplicates", "verdicts"]

logger = logging.getLogger(__name__)

Runner = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterable[Any]]
"""Runs a function once per argument tuple and yields the results in any order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How the work is cut. Changes nothing about the result."""

    gather_rows: int = 1 << 20
    """Samples that one task reads from their sidecars."""
    search_rows: int = 1 << 21
    """Samples that one task searches, for groups and captions (88 bytes each and as much again to sort them)."""
    image_rows: int = 1 << 23
    """Perceptual hashes that one task searches (16 bytes each, and about 50 to work on them)."""
    image_work: int = 1 << 26
    """Hashes times tables that one task searches."""
    window: int = 1 << 22
    """Ids that the greedy pass decides at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicates:
    """What was found."""

    counts: Mapping[str, Mapping[str, int]]
    """Samples dropped, by part and reason."""
    digests: Mapping[str, str]
    """Hex SHA-256 of every evaluation set, by the path that the configuration names."""


def find_duplicates(
    config: PrepConfig, parts: Sequence[str], base: Sequence[ShardInfo] = (), *, run: Runner | None = None, scale: Scale | None = None
) -> Duplicates:
    """Decides which samples of the parts go; `verdicts` tells for each part.

    Args:
        config: with absolute paths; `dedup` says what to look for.
        parts: names of parts, in any order; none empty.
        base: shards of the generation that is continued: they stay, and what is like them goes.
        run: how tasks are run; None: on the connected Ray cluster.
        scale: how the work is cut.

    Raises:
        UserError: an evaluation set or a sidecar cannot be used.
    """
    storage, scale = open_storage(config.output), scale or Scale()
    evaluation = plan_evaluation(config)
    parts = sorted(parts)
    _forget_other_work(storage, config.dedup, {"parts": parts, "base": base, "evaluation": evaluation, "scale": scale})
    stages = _Stages(storage, config.output, run or partial(run_tasks, config=config.ray))
    digests = _evaluation_digests(stages, config, evaluation)
    gather_tasks = _gather_tasks(config, parts, base, scale)
    gathered = stages.run("gather", gather, [(config.output, task) for task in gather_tasks])
    of_parts = [task for task in gather_tasks if not task.is_base]
    searches, relations = _searches(config.dedup, gathered, of_parts, scale)
    if relations:
        stages.run("search", search, [(config.output, number, len(gathered), task) for number, task in enumerate(searches)])
        windows = _windows(gathered, scale)
        stages.run("decide", decide_all, [(config.output, GreedyTask(relations=relations, windows=windows, window_size=scale.window))])
    arguments = [(config.output, task.number, task.names, scale.window, bool(relations)) for task in of_parts]
    counts: dict[str, dict[str, int]] = {}
    for found in stages.run("verdict", write_verdicts, arguments):
        counts.update(found)
    return Duplicates(counts=counts, digests=digests)


class _Stages:
    """Runs the tasks of one step after the other; those that an earlier run finished are only looked up."""

    def __init__(self, storage: Storage, url: str, run: Runner) -> None:
        self._storage, self._url, self._run = storage, url, run

    def run(self, stage: str, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The results of all tasks, in the order of their arguments."""
        results = dict(self._finished(stage))
        remaining = [(self._url, stage, number, function, argument) for number, argument in enumerate(arguments) if number not in results]
        if results:
            logger.info("%s: %d of %d tasks were finished by an earlier run", stage, len(results), len(arguments))
        for number, result in self._run(_recorded, remaining) if remaining else ():
            results[number] = result
        return [results[number] for number in range(len(arguments))]

    def _finished(self, stage: str) -> Iterator[tuple[int, Any]]:
        for path in self._storage.list(path_of("records", f"{stage}-")):
            yield int(path.rpartition("-")[2].removesuffix(".json")), json.loads(self._storage.read_bytes(path))


def _recorded(url: str, stage: str, number: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[int, Any]:
    """Runs one task, then stores its result as the record that it is finished."""
    result = function(*arguments)
    open_storage(url).put_bytes(path_of("records", f"{stage}-{number:06d}.json"), json.dumps(result).encode())
    return number, result


def _forget_other_work(storage: Storage, dedup: DedupConfig, work: dict[str, Any]) -> None:
    """Deletes what an earlier run left, unless it was at the same work."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, range) else asdict(value)

    digest = hashlib.sha256(json.dumps({"dedup": dedup, **work}, default=plain, sort_keys=True).encode()).hexdigest()
    path = path_of("work")
    if storage.exists(path):
        if storage.read_bytes(path).decode() == digest:
            return
        storage.delete(path)
    storage.delete_many(storage.list(f"{FOLDER}/"))
    storage.put_bytes(path, digest.encode())


def _evaluation_digests(stages: _Stages, config: PrepConfig, tasks: Sequence[EvaluationTask]) -> dict[str, str]:
    if not tasks:
        return {}
    found = stages.run("evaluation", read_evaluation, [(config, task, number) for number, task in enumerate(tasks)])
    unusable = sum(counts["num_unusable"] for counts in found)
    if unusable:
        logger.warning("%d of %d evaluation pictures cannot be used", unusable, sum(counts["num_items"] for counts in found))
    (digests,) = stages.run("join", join_evaluation, [(config, [task.set_path for task in tasks])])
    return dict(digests)


def _gather_tasks(config: PrepConfig, parts: Sequence[str], base: Sequence[ShardInfo], scale: Scale) -> list[GatherTask]:
    tasks: list[GatherTask] = []
    at_once = max(1, scale.gather_rows // config.samples_per_shard)
    for begin in range(0, len(parts), at_once):
        names = tuple(parts[begin : begin + at_once])
        tasks.append(GatherTask(number=len(tasks), names=names, sha256=("",) * len(names), is_base=False, dedup=config.dedup))
    if not (needs_exact(config.dedup) or config.dedup.caption_similarity is not None):
        return tasks  # only evaluation sets to compare with: published samples do not matter
    for shards in _batches(base, scale.gather_rows):
        names, checksums = tuple(shard.name for shard in shards), tuple(shard.metadata_sha256 for shard in shards)
        tasks.append(GatherTask(number=len(tasks), names=names, sha256=checksums, is_base=True, dedup=config.dedup))
    return tasks


def _batches(shards: Sequence[ShardInfo], num_rows: int) -> Iterator[list[ShardInfo]]:
    batch: list[ShardInfo] = []
    for shard in shards:
        if batch and sum(other.num_samples for other in batch) + shard.num_samples > num_rows:
            yield batch
            batch = []
        batch.append(shard)
    if batch:
        yield batch


def _searches(
    dedup: DedupConfig, gathered: Sequence[Mapping[str, int]], of_parts: Sequence[GatherTask], scale: Scale
) -> tuple[list[SearchTask], tuple[RelationFiles, ...]]:
    """All searches, and which of them make which relation."""
    num = sum(counts["num"] for counts in gathered)
    if not num or not of_parts:
        return [], ()
    num_cuts = min(NUM_BUCKETS, math.ceil(num / scale.search_rows))
    windows = _windows(gathered, scale)
    tasks: list[SearchTask] = []

    def add(new: Iterable[SearchTask]) -> tuple[int, ...]:
        first = len(tasks)
        tasks.extend(new)
        return tuple(range(first, len(tasks)))

    def groups(kind: str) -> tuple[int, ...]:
        return add(GroupTask(kind=kind, buckets=buckets, windows=windows, window_size=scale.window) for buckets in cut(NUM_BUCKETS, num_cuts))

    relations = []
    if needs_exact(dedup):
        relations.append(RelationFiles(code=DUPLICATE, group_searches=groups("exact")))
    if dedup.image_distance is not None:
        edges = add(_image_tasks(dedup.image_distance, num, scale)) if dedup.image_distance else ()
        relations.append(RelationFiles(code=NEAR_IMAGE, group_searches=groups("image"), edge_searches=edges))
    if dedup.caption_similarity is not None:
        edges = add(_caption_tasks(dedup.caption_similarity, num, num_cuts, scale))
        relations.append(RelationFiles(code=NEAR_CAPTION, group_searches=groups("text"), edge_searches=edges))
    return tasks, tuple(relations)


def _image_tasks(distance: int, num: int, scale: Scale) -> Iterator[ImageTask]:
    scheme = choose_scheme(distance, num)
    num_parts = math.ceil(num / scale.image_rows)
    at_once = 1 if num_parts > 1 else max(1, scale.image_work // num)
    for begin in range(0, scheme.num_tables, at_once):
        for part in range(num_parts):
            yield ImageTask(scheme=scheme, tables=range(begin, min(scheme.num_tables, begin + at_once)), part=part, num_parts=num_parts)


def _caption_tasks(similarity: float, num: int, num_cuts: int, scale: Scale) -> Iterator[CaptionTask]:
    num_bands = choose_bands(similarity).num_bands
    at_once = max(1, scale.search_rows // num)
    for begin in range(0, num_bands, at_once):
        for buckets in cut(NUM_BUCKETS, num_cuts):
            yield CaptionTask(similarity=similarity, bands=range(begin, min(num_bands, begin + at_once)), buckets=buckets)


def _windows(gathered: Sequence[Mapping[str, int]], scale: Scale) -> range:
    """Windows of the ids of the parts (published ones are negative and need no decision)."""
    held = [counts for counts in gathered if counts["num"] and counts["low"] >= 0]
    if not held:
        return range(0)
    return range(min(counts["low"] for counts in held) // scale.window, max(counts["high"] for counts in held) // scale.window + 1)
