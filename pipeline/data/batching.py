"""Which global sample positions a rank reads at a step: plain arithmetic, the same samples per step in every layout.

Step t covers the positions [t * G, (t + 1) * G) of the run's sample order, G the global batch size. They are dealt to the
data-parallel ranks in consecutive runs, and within a rank to its micro-batches in consecutive runs.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.data.hashing import Int64Array


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """Positions of every (step, rank, micro-batch)."""

    global_batch_size: int
    dp_degree: int = 1
    micro_batch_size: int
    """Examples per forward pass of one data-parallel rank."""
    origin: int = 0
    """Position of step 0. Not 0 only after a resume with another global batch size, so that no sample is skipped or repeated."""

    def __post_init__(self) -> None:
        if min(self.global_batch_size, self.dp_degree, self.micro_batch_size) < 1:
            raise ValueError(f"{self}: sizes must be at least 1")
        if self.global_batch_size % (self.dp_degree * self.micro_batch_size):
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not divisible by dp_degree * micro_batch_size = "
                f"{self.dp_degree} * {self.micro_batch_size}"
            )

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per step of one rank."""
        return self.global_batch_size // (self.dp_degree * self.micro_batch_size)

    def positions(self, step: int, *, dp_rank: int, micro_batch: int) -> Int64Array:
        """int64 [micro_batch_size]: what this rank reads for this micro-batch of this step."""
        if not (step >= 0 and 0 <= dp_rank < self.dp_degree and 0 <= micro_batch < self.num_micro_batches):
            raise ValueError(f"no micro-batch {micro_batch} of rank {dp_rank} at step {step} in {self}")
        share = self.global_batch_size // self.dp_degree
        start = self.samples_seen(step) + dp_rank * share + micro_batch * self.micro_batch_size
        return np.arange(start, start + self.micro_batch_size, dtype=np.int64)

    def step_positions(self, step: int) -> Int64Array:
        """int64 [global_batch_size]: what all ranks together read at this step."""
        start = self.samples_seen(step)
        return np.arange(start, start + self.global_batch_size, dtype=np.int64)

    def samples_seen(self, step: int) -> int:
        """First position of `step` = samples consumed by the steps before it: the whole state of the loader."""
        return self.origin + step * self.global_batch_size

    def step_of(self, positions: Int64Array) -> Int64Array:
        """The step that reads each position (negative: before `origin`)."""
        return (positions - self.origin) // self.global_batch_size


def split_evenly(num: int, parts: int) -> Int64Array:
    """Boundaries int64 [parts + 1] that cut `num` things into consecutive parts whose sizes differ by at most one."""
    return np.arange(parts + 1, dtype=np.int64) * num // parts
