"""From the plan of one generation to its manifest: parts -> duplicates -> failures -> shards -> tokenizer -> manifest.

Every step leaves a record on the output. A rerun takes up what is there and ends with the same bytes as a run that was never interrupted.
The manifest comes last: before it, the generation does not exist.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NoReturn, Protocol

from tqdm import tqdm

from configs.errors import UserError
from data_prep import run_stats
from data_prep.cluster import num_slots, ray_session, run_tasks
from data_prep.config import PrepConfig
from data_prep.dedup.run import find_duplicates
from data_prep.diagnosis import Watch, diagnose, findings
from data_prep.ledger import LEDGER
from data_prep.part import PARTS, PartRecord, write_part
from data_prep.plan import Plan, Task, plan_path
from data_prep.progress import Progress
from data_prep.reasons import explain
from data_prep.run_stats import PartStats
from data_prep.schema import SPLITS, Counts, ImageInfo, Manifest, ShardInfo, Split, TokenizerInfo
from data_prep.scoring import scorers
from data_prep.shard import (
    PartCounts,
    ShardPlan,
    count_part,
    finished_parts,
    finished_shards,
    plan_shards,
    publish_failures,
    write_shard,
)
from data_prep.storage import Storage
from data_prep.task_samples import Job
from data_prep.tokenizer import make_tokenizer

logger = logging.getLogger(__name__)

NUM_ADVISED = 3
"""Causes that are explained where not one sample is usable."""


class Lease(Protocol):
    """What keeps other runs from writing here."""

    def check(self) -> None:
        """Raises:
        UserError: the lease was lost; nothing may be published any more.
        """


def build_generation(config: PrepConfig, plan: Plan, storage: Storage, lease: Lease, *, takedowns: tuple[str, ...] = ()) -> Manifest:
    """Makes and publishes the generation of a stored plan.

    Args:
        config: with absolute paths; its identity is that of the plan.
        plan: already stored on the output.
        storage: the output.
        lease: asked before the manifest is published.
        takedowns: rules of earlier takedowns (see `data_prep.tombstones`).

    Raises:
        UserError: a full disk, a lost lease, or (first generation) not one usable sample.
    """
    base = Manifest.load(storage, plan.base) if plan.base is not None else None
    with ray_session(config.ray), scorers(config.filters) as actors:
        job = Job(generation=plan.generation, num_workers=num_slots(), takedowns=takedowns, scorers=actors)
        records, stats = _make_parts(config, job, plan, storage)
        digests = _find_duplicates(config, plan, records, base)
        duplicates = _publish_failures(config, job, records)
        stats = _without(stats, duplicates)
        counts = _count(config, records)
        if base is None and not any(part.kept for part in counts):
            _give_up(config, plan, _dropped(records, duplicates), stats, storage)
        wanted = plan_shards(counts, config, plan.generation, has_verdicts=config.dedup.is_on, evaluation=digests)
        splits = _make_shards(config, job, wanted, storage)
        splits = _joined(base, splits)
        tokenizer = base.tokenizer if base is not None else _make_tokenizer(config, splits)
    run_stats.dump_whole(storage, plan.generation, stats)
    for finding in diagnose(stats, config):
        logger.warning("%s", finding)
    image = config.image
    manifest = Manifest(
        generation=plan.generation,
        config=plan.config,
        config_hash=plan.config_hash,
        image=ImageInfo(resolution=image.resolution, channels=image.channels, extension=image.format, resize_mode=image.resize_mode),
        splits=splits,
        tokenizer=tokenizer,
        counts=_counts(base, plan, records, duplicates, kept=sum(part.kept for part in counts)),
        action=plan.action,
        base=plan.base,
        num_planned=plan.num_planned,
        inputs=tuple(dict.fromkeys([*(base.inputs if base else ()), *plan.inputs])),
        lists={**plan.lists, **digests},
    )
    lease.check()
    manifest.dump(storage)
    return manifest


def _make_parts(config: PrepConfig, job: Job, plan: Plan, storage: Storage) -> tuple[list[PartRecord], PartStats]:
    records = {record.number: record for record in finished_parts(storage, plan.generation)}
    if records:
        logger.info("%d of %d tasks were finished by an earlier run", len(records), len(plan.tasks))
    # Of finished tasks only: one that was killed just before its record has left statistics too.
    stats = run_stats.total_of(run_stats.load_parts(storage, plan.generation, records)) if records else PartStats()
    remaining = ((config, job, absolute_task(task)) for task in plan.tasks if task.number not in records)
    watch = Watch(config)
    with Progress(plan.num_samples, before=stats) as progress:
        for record, part_stats in run_tasks(write_part, remaining, config.ray, on_death=_isolated):
            records[record.number] = record
            stats = run_stats.merge(stats, part_stats)
            progress.update(part_stats)
            for finding in watch.new(stats):
                progress.note(finding)
    return [records[task.number] for task in plan.tasks], stats


def _isolated(config: PrepConfig, job: Job, task: Task) -> tuple[PartRecord, PartStats]:
    """The task again, each image decoded in a child process: one of them kills its decoder."""
    import ray

    logger.warning("task %d has killed its worker three times: its images are decoded one by one in a process of their own", task.number)
    # Without Ray's own retries: it has died often enough.
    run = ray.remote(num_cpus=1, max_retries=0)(write_part)
    try:
        found: tuple[PartRecord, PartStats] = ray.get(run.remote(config, replace(job, is_isolated=True), task))
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from None
    except ray.exceptions.RayError as error:
        raise UserError(
            f"task {task.number} kills its worker, also with its images decoded in a process of their own",
            got=str(error).partition("\n")[0],
            expected="a worker that the system lets live",
            fix="check the memory of the machine (fewer ray.num_cpus need less), then run the same command again: what is finished is kept",
        ) from None
    return found


def absolute_task(task: Task) -> Task:
    """The task for a worker, whose current folder may be another."""
    spans = tuple(
        replace(span, part=replace(span.part, path=os.path.abspath(span.part.path))) if "://" not in span.part.path else span for span in task.spans
    )
    return replace(task, spans=spans)


def _give_up(config: PrepConfig, plan: Plan, dropped: Mapping[str, int], stats: PartStats, storage: Storage) -> NoReturn:
    """Says why nothing was kept, and forgets the attempt, so that a run on the mended input starts afresh."""
    storage.delete(plan_path(plan.generation))
    storage.delete_many(storage.list(f"{PARTS}/"))
    found = [finding.text for finding in findings(stats, config, min_samples=1) if finding.code != "retry"]  # there is nothing to retry on
    raise UserError(
        "not one sample of the input is usable: no data set was written",
        got=", ".join(f"{number} x {reason} ({explain(reason)})" for reason, number in dropped.items()),
        expected="images with captions",
        fix="\n          ".join([f"see {storage.url}/{LEDGER}/ for every sample, and run again", *found[:NUM_ADVISED]]),
    )


def _find_duplicates(config: PrepConfig, plan: Plan, records: Sequence[PartRecord], base: Manifest | None) -> dict[str, str]:
    """Looks for duplicates, if that is wanted; returns the digests of the evaluation sets, by path as the user gave it."""
    if not config.dedup.is_on or (base is None and not any(record.kept for record in records)):
        return {}
    shards = [shard for split in base.splits.values() for shard in split.shards] if base else []
    digests = find_duplicates(config, [record.name for record in records if record.kept], shards).digests
    given = dict(zip(config.dedup.evaluation, plan.settings["dedup"]["evaluation"], strict=True))
    return {given[path]: digest for path, digest in digests.items()}


def _publish_failures(config: PrepConfig, job: Job, records: Sequence[PartRecord]) -> PartStats:
    """Puts the failures in their place; returns statistics of the duplicates."""
    duplicates = PartStats()
    wanted = [record for record in records if record.dropped or (config.dedup.is_on and record.kept)]
    for found in run_tasks(publish_failures, ((config, job, record, config.dedup.is_on) for record in wanted), config.ray):
        duplicates = run_stats.merge(duplicates, found)
    return duplicates


def _without(stats: PartStats, duplicates: PartStats) -> PartStats:
    """The statistics with the duplicates, which the tasks counted as kept, among what was dropped."""
    both = run_stats.merge(stats, duplicates)
    return replace(both, num_parts=stats.num_parts, read=stats.read, kept=stats.kept - duplicates.read)


def _count(config: PrepConfig, records: Sequence[PartRecord]) -> list[PartCounts]:
    kept = [record for record in records if record.kept]
    if not config.dedup.is_on:
        return [PartCounts(name=record.name, num_train=record.kept - record.num_heldout, num_heldout=record.num_heldout) for record in kept]
    found = {counts.name: counts for counts in run_tasks(count_part, ((config, record.name) for record in kept), config.ray)}
    return [found[record.name] for record in kept]


def _make_shards(config: PrepConfig, job: Job, wanted: Sequence[ShardPlan], storage: Storage) -> dict[str, Split]:
    finished = finished_shards(storage, job.generation, wanted[0].work) if wanted else {}
    remaining = [(config, job, shard) for shard in wanted if shard.name not in finished]
    with tqdm(total=len(wanted), initial=len(wanted) - len(remaining), desc="shards", unit="shard") as progress:
        for info in run_tasks(write_shard, remaining, config.ray):
            finished[info.name] = info
            progress.update()
    splits = {}
    for split in SPLITS:
        shards = tuple(finished[shard.name] for shard in wanted if shard.is_heldout == (split == "heldout"))
        splits[split] = Split(num_samples=sum(shard.num_samples for shard in shards), shards=shards)
    if config.heldout_permille and job.generation == 1 and not splits["heldout"].shards:
        logger.warning(
            "the held-out split is empty: %d samples are too few for heldout_permille=%d; evaluation will need another set",
            splits["train"].num_samples,
            config.heldout_permille,
        )
    return splits


def _joined(base: Manifest | None, splits: dict[str, Split]) -> dict[str, Split]:
    """The shards of the base, then the new ones."""
    if base is None:
        return splits

    def both(name: str) -> Iterator[ShardInfo]:
        yield from base.splits[name].shards
        yield from splits[name].shards

    return {name: Split(num_samples=base.splits[name].num_samples + splits[name].num_samples, shards=tuple(both(name))) for name in SPLITS}


def _make_tokenizer(config: PrepConfig, splits: dict[str, Split]) -> TokenizerInfo:
    arguments: tuple[str, tuple[ShardInfo, ...], object] = (config.output, splits["train"].shards, config.tokenizer)
    with tqdm(total=1, desc="tokenizer", unit="model") as progress:
        (tokenizer,) = run_tasks(make_tokenizer, [arguments], config.ray)
        progress.update()
    if config.tokenizer.model_file is None and tokenizer.num_pieces != config.tokenizer.vocab_size:
        logger.warning(
            "the captions support a tokenizer of %d pieces, not tokenizer.vocab_size=%d: train with model.text.num_pieces=%d",
            tokenizer.num_pieces,
            config.tokenizer.vocab_size,
            tokenizer.num_pieces,
        )
    return tokenizer


def _counts(base: Manifest | None, plan: Plan, records: Sequence[PartRecord], duplicates: PartStats, *, kept: int) -> Counts:
    """Of everything read so far; a second-chance pass reads nothing new, it moves samples from dropped to kept."""
    dropped = Counter(base.counts.dropped if base else {})
    for record in records:
        dropped.update(record.dropped)
        dropped.subtract(record.retried)
    dropped.update(duplicates.dropped)
    new = 0 if plan.action == "retry" else sum(record.read for record in records)
    return Counts(
        read=(base.counts.read if base else 0) + new,
        kept=(base.counts.kept if base else 0) + kept,
        dropped={reason: number for reason, number in sorted(dropped.items()) if number},
    )


def _dropped(records: Iterable[PartRecord], duplicates: PartStats) -> dict[str, int]:
    total: Counter[str] = Counter(duplicates.dropped)
    for record in records:
        total.update(record.dropped)
    return dict(sorted(total.items()))
