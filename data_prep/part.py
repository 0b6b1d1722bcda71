"""One task -> one part: its samples written down in the order of their numbers, with index, metadata, failures and a record.

The bytes of a part depend neither on which answer came first nor on where or how often the task ran. A part counts once its record exists,
and the record is written last and only once: of two copies of a task (a straggler and its stand-in, or the worker of a killed run) the first
wins, whatever the web served to the other.
"""

import json
import secrets
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import ledger, metadata, run_stats
from data_prep.config import PrepConfig
from data_prep.metadata import Facts
from data_prep.plan import Task
from data_prep.run_stats import PartStats
from data_prep.schema import index_path, tar_path
from data_prep.shard_writer import Sample, ShardWriter, stored_bytes
from data_prep.spool import Prepared, Spool
from data_prep.storage import LocalStorage, Storage, open_storage, writing
from data_prep.task_samples import Job, TaskSamples

PARTS = "parts"
"""Folder of the intermediate parts and of the records that say which parts and shards are finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRecord:
    """What a finished task reports. Stored last: a part counts once its record exists."""

    number: int
    name: str
    """Of the files of the part: `000001/part-000003.1f2e3d4c`, below `PARTS`."""
    read: int
    kept: int
    num_heldout: int
    dropped: Mapping[str, int]
    retried: Mapping[str, int]
    """Second-chance passes: what the samples had failed with before, by reason."""
    index_sha256: str
    """Empty if nothing was kept, and hence no part written."""


def record_path(generation: int, number: int) -> str:
    """Path of the record of a part."""
    return f"{PARTS}/{generation:06d}/part-{number:06d}.json"


def failures_path(name: str) -> str:
    """Path of the failures of a part."""
    return f"{PARTS}/{name}.failures.jsonl"


def dropped_path(name: str) -> str:
    """Path of the tar of a part's dropped images (`keep_dropped`)."""
    return f"{PARTS}/{name}.dropped.tar"


def is_heldout(sha256: np.ndarray, permille: int) -> np.ndarray:
    """Whether samples belong to the held-out split: bool [N] from the content hashes uint8 [N, 32].

    A function of the original bytes alone: it stays the same when the input grows, and copies of an image stay together.
    """
    leading = np.ascontiguousarray(sha256[:, :8]).view(">u8")[:, 0]
    return leading % np.uint64(1000) < np.uint64(permille)


def write_part(config: PrepConfig, job: Job, task: Task) -> tuple[PartRecord, PartStats]:
    """Prepares all samples of a task and publishes the part, its failures, and its record.

    Returns:
        The record that counts (of another copy of this task, where that was faster), and the statistics of this copy.

    Raises:
        UserError: the output is full or not writable. A bad sample raises nothing: it is dropped and listed.
    """
    storage = open_storage(config.output)
    with writing(f"{config.output}/{PARTS}"), ExitStack() as stack:
        samples = TaskSamples(config, job, task, storage.scratch(), stack)
        samples.run(storage)
        return _publish(storage, config, job, task, samples)


def measure(task: Task, config: PrepConfig) -> tuple[PartStats, list[Facts], int]:
    """Prepares the samples of a task and publishes nothing: what `jetway prep --plan` measures.

    Returns:
        Statistics, what is known of the samples kept, and the bytes that they would take in a shard.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        samples = TaskSamples(config, Job(generation=1), task, folder, stack)
        samples.run(LocalStorage(folder))
        facts, num_bytes = [], 0
        for sample in samples.kept:
            facts.append(sample.facts)
            num_bytes += stored_bytes(len(sample.image), len(sample.facts.caption.encode()), len(_json(sample.values)))
        return samples.stats(), facts, num_bytes


def _publish(storage: Storage, config: PrepConfig, job: Job, task: Task, samples: TaskSamples) -> tuple[PartRecord, PartStats]:
    """Writes the files of the part under a name of its own, then the record, unless another copy was first."""
    number, kept = task.number, len(samples.kept)
    name = f"{job.generation:06d}/part-{number:06d}.{secrets.token_hex(4)}"
    num_heldout, index_sha256 = 0, ""
    if kept:
        num_heldout, index_sha256 = _publish_kept(storage, config, name, samples.kept)
    if samples.failures:
        storage.put_bytes(failures_path(name), ledger.to_bytes(samples.failures))
    if len(samples.dropped):
        with ShardWriter(_scratch(storage, dropped_path(name)), "bin") as writer:
            for sample in samples.dropped:
                writer.add(_stored(sample))
            writer.publish_tar(storage, dropped_path(name))
    record = PartRecord(
        number=number,
        name=name,
        read=kept + len(samples.failures),
        kept=kept,
        num_heldout=num_heldout,
        dropped=dict(sorted(Counter(failure.reason for failure in samples.failures).items())),
        retried=dict(sorted(samples.retried.items())),
        index_sha256=index_sha256,
    )
    stats = samples.stats()
    run_stats.dump_part(storage, job.generation, number, stats)
    path = record_path(job.generation, number)
    if storage.put_new(path, json.dumps(asdict(record)).encode()):
        return record, stats
    counting = PartRecord(**json.loads(storage.read_bytes(path)))
    if counting.name == name:  # it is ours: the reply got lost, and the repeated request found it
        return record, stats
    ours = (tar_path(name, PARTS), index_path(name, PARTS), metadata.metadata_path(name, PARTS), failures_path(name), dropped_path(name))
    storage.delete_many(ours)
    return counting, stats


def _publish_kept(storage: Storage, config: PrepConfig, name: str, kept: Spool) -> tuple[int, str]:
    """(samples of the held-out split, hash of the index)."""
    rows: list[Facts] = []
    with ShardWriter(_scratch(storage, name), config.image.format) as writer:
        for sample in kept:
            rows.append(sample.facts)
            writer.add(_stored(sample))
        num_heldout = int(is_heldout(writer.content_hashes(), config.heldout_permille).sum())
        info = writer.publish(storage, name, folder=PARTS)
    metadata.dump(storage, name, metadata.table_of(rows), folder=PARTS)
    return num_heldout, info.index_sha256


def _stored(sample: Prepared) -> Sample:
    """The sample as it stands in a tar."""
    facts = sample.facts
    return Sample(key=facts.key, image=sample.image, txt=facts.caption.encode(), json=_json(sample.values), sha256=facts.sha256)


def _scratch(storage: Storage, name: str) -> Path:
    """A local file for building what will be published as `name`, which is unique."""
    return storage.scratch() / name.replace("/", "-")


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "replace")
