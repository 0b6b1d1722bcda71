"""The few collectives that saving and loading need, the same with and without a process group."""

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Ranks:
    """The processes that save or load together; one process alone where no process group is initialised.

    Objects travel pickled between live processes of one job (as torch.distributed does it); nothing read from disk is unpickled.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self._active = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank(group) if self._active else 0
        self.size: int = dist.get_world_size(group) if self._active else 1

    @classmethod
    def alone(cls) -> "Ranks":
        """This process by itself, also inside a job of many."""
        ranks = cls.__new__(cls)
        ranks._group, ranks._active, ranks.rank, ranks.size = None, False, 0, 1
        return ranks

    @property
    def is_first(self) -> bool:
        """Whether this process commits."""
        return self.rank == 0

    def _first_global_rank(self) -> int:
        return dist.get_global_rank(self._group, 0) if self._group is not None else 0

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self._first_global_rank(), group=self._group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value on rank 0; an empty list elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(value, values, dst=self._first_global_rank(), group=self._group)
        return values or []

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values
