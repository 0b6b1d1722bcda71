"""Which samples a step read, and which steps read a sample: answered from the order alone, without a log."""

from dataclasses import dataclass

import numpy as np

from pipeline.data.batching import BatchPlan
from pipeline.data.hashing import Int64Array
from pipeline.data.live_order import LiveOrder
from pipeline.data.reader import SampleReader


@dataclass(frozen=True, slots=True)
class SampleName:
    """One sample of one epoch."""

    position: int
    """Global position in the run."""
    epoch: int
    shard: str
    key: str


def name_samples(order: LiveOrder, reader: SampleReader, positions: Int64Array) -> list[SampleName]:
    """Shard and key of the samples at these positions; reads indexes, no images."""
    located = order.locate(positions)
    rows = zip(positions.tolist(), *(column.tolist() for column in located), strict=True)
    return [SampleName(position, epoch, reader.split.shards[shard].name, reader.key(shard, member)) for position, epoch, shard, member in rows]


def steps_of_sample(order: LiveOrder, plan: BatchPlan, *, shard: int, member: int, num_steps: int) -> list[int]:
    """The steps before `num_steps` that read this sample, ascending: once per epoch, and where it stands in for one that was taken down."""
    stop = plan.samples_seen(num_steps)
    epochs = np.arange(-(-stop // order.num_samples), dtype=np.int64)
    positions = order.positions_of(shard, member, epochs)
    seen = positions[(positions >= plan.origin) & (positions < stop)]
    return [int(step) for step in plan.step_of(seen)]
