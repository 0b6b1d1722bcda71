"""Duplicates of one generation: what is like what among the parts, the published shards and the evaluation sets, and who goes.

gather (half a million samples a task) -> search (groups and pairs, by bucket) -> one greedy pass -> a file of verdicts per part. Every task
stores its record last, so a killed run repeats only what was unfinished, and none of it depends on how the work was cut.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from data_prep.cluster import run_tasks
from data_prep.config import DedupConfig, PrepConfig
from data_prep.dedup.cutting import Scale, gather_tasks, plan_searches, spread_tasks, windows_of
from data_prep.dedup.evaluation import EvaluationTask, join_evaluation, plan_evaluation, read_evaluation
from data_prep.dedup.gather import gather
from data_prep.dedup.search import search, spread
from data_prep.dedup.store import FOLDER, path_of
from data_prep.dedup.verdict import GreedyTask, decide_all, verdicts, write_verdicts
from data_prep.schema import ShardInfo
from data_prep.storage import Storage, open_storage

__all__ = ["Duplicates", "Scale", "find_duplicates", "verdicts"]

logger = logging.getLogger(__name__)

Runner = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterable[Any]]
"""Runs a function once per argument tuple and yields the results in any order."""


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
    tasks = gather_tasks(config, parts, base, scale)
    gathered = stages.run("gather", gather, [(config.output, task) for task in tasks])
    has_relations = _search(stages, config, gathered, scale)
    arguments = [(config.output, task.number, task.names, scale.window, has_relations) for task in tasks if not task.is_base]
    counts: dict[str, dict[str, int]] = {}
    for found in stages.run("verdict", write_verdicts, arguments):
        counts.update(found)
    return Duplicates(counts=counts, digests=digests)


def _search(stages: "_Stages", config: PrepConfig, gathered: Sequence[Mapping[str, int]], scale: Scale) -> bool:
    """Searches for what is alike and decides who goes; False if only evaluation sets are compared with, and all is decided."""
    spreads = spread_tasks(config.dedup, gathered, scale)
    stages.run("spread", spread, [(config.output, task) for task in spreads])
    searches, relations = plan_searches(config.dedup, gathered, len(spreads), scale)
    stages.run("search", search, [(config.output, number, len(gathered), task) for number, task in enumerate(searches)])
    if relations:
        task = GreedyTask(relations=relations, windows=windows_of(gathered, scale), window_size=scale.window)
        stages.run("decide", decide_all, [(config.output, task)])
    return bool(relations)


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
