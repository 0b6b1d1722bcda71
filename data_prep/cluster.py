"""Ray: many tasks, a bounded number of them at a time, and an end in every case.

- A task that takes far longer than the others gets a second copy on a free CPU; the first to finish counts.
- One that takes longer still is stopped and started afresh, once.
- One whose worker dies is started again, but not for ever: a picture that kills its decoder kills the next one too.
"""

import logging
import os
import reprlib
import socket
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from configs.errors import UserError
from data_prep.config import PrepConfig, RayConfig
from data_prep.ray_session import num_slots, ray_session

__all__ = ["num_slots", "ray_session", "run_tasks"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_DEATHS = 3
"""Workers that one task may take with it."""
MAX_LOST_NODES = 20
"""Nodes that may vanish under one task: machines of the spot market do."""
DEADLINE_FACTORS = (10, 40)
"""A task is stopped after this many times the age at which it gets a second copy: at first, and the second time, which ends the job."""
TASKS_PER_WORKER = 100
"""After these a worker process is replaced, which bounds what libraries leak. Costs about a second of one CPU."""

_MIN_FINISHED = 5
_DURATIONS = 1000
_TICK_S = 1.0


def run_tasks(
    function: Callable[..., Result],
    arguments: Iterable[tuple[Any, ...]],
    config: RayConfig,
    *,
    on_death: Callable[..., Result] | None = None,
) -> Iterator[Result]:
    """Runs `function` once per argument tuple on the cluster and yields results as they come.

    At most `ray.max_in_flight` tasks are submitted at a time, and `arguments` is read no further ahead. A task may run more than once,
    also at the same time: it must be able to, and only its first result is given.

    Args:
        function: runs on one CPU.
        arguments: any iterable.
        config: `straggler_factor` and `straggler_min_s` say when a task gets a second copy.
        on_death: called here, with the arguments of a task that killed `MAX_DEATHS` workers; its result counts as the task's.

    Raises:
        UserError: a task keeps killing its workers and there is no `on_death`, or it did not end in time twice.
        Exception: whatever a task raises.
        In every case the tasks in flight are cancelled.
    """
    run = _Run(function, config, on_death)
    try:
        yield from run.results(iter(arguments))
    finally:
        run.cancel_all()


@dataclass(eq=False, slots=True)
class _Copy:
    """One submission of a task."""

    stream: Any
    """Of Ray: first gives `_here`, as soon as the task runs, then the result."""
    started: float | None = None
    where: str = ""
    node: str = ""


@dataclass(eq=False, slots=True)
class _Task:
    number: int
    arguments: tuple[Any, ...]
    copies: list[_Copy] = field(default_factory=list)
    deaths: int = 0
    lost_nodes: int = 0
    was_stopped: bool = False
    has_second: bool = False

    @property
    def started(self) -> float | None:
        """When its oldest living copy began to run."""
        return min((copy.started for copy in self.copies if copy.started is not None), default=None)

    @property
    def text(self) -> str:
        """Its inputs, for people."""
        short = reprlib.Repr()
        short.maxother = short.maxstring = 300
        return ", ".join(short.repr(value) for value in self.arguments if not isinstance(value, PrepConfig))


class _Run(Generic[Result]):
    """The tasks of one call of `run_tasks` that are under way."""

    def __init__(self, function: Callable[..., Result], config: RayConfig, on_death: Callable[..., Result] | None) -> None:
        import ray

        self._ray: Any = ray
        self._name = function.__name__
        self._config = config
        self._on_death = on_death

        def task(*arguments: Any) -> Iterator[Any]:
            yield _here()
            yield function(*arguments)

        # Ray's own retries would go on for ever without telling us; speculation needs to know when a task began to run.
        self._remote = ray.remote(num_cpus=1, max_retries=0, max_calls=TASKS_PER_WORKER, num_returns="streaming")(task)
        self._owners: dict[Any, tuple[_Task, _Copy]] = {}
        self._num_tasks = self._num_submitted = self._num_finished = 0
        self._durations: deque[float] = deque(maxlen=_DURATIONS)
        self._next_look = 0.0
        self._idle_since: float | None = None

    def results(self, arguments: Iterator[tuple[Any, ...]]) -> Iterator[Result]:
        """See `run_tasks`."""
        while True:
            window = self._config.max_in_flight or 2 * num_slots()
            while self._num_tasks < window and (values := next(arguments, None)) is not None:
                self._submit(_Task(number=self._num_submitted, arguments=values))
                self._num_tasks += 1
                self._num_submitted += 1
            if not self._num_tasks:
                return
            ready, _ = self._ray.wait(list(self._owners), num_returns=1, timeout=min(_TICK_S, self._config.straggler_min_s / 4 + 0.01))
            for stream in ready:
                yield from self._take(*self._owners[stream])
            if time.monotonic() >= self._next_look:
                self._look_at_clock()

    def cancel_all(self) -> None:
        """Stops whatever still runs."""
        for task in {id(task): task for task, _ in self._owners.values()}.values():
            self._cancel(task)

    def _submit(self, task: _Task, strategy: str = "DEFAULT") -> None:
        copy = _Copy(stream=self._remote.options(name=self._name, scheduling_strategy=strategy).remote(*task.arguments))
        task.copies.append(copy)
        self._owners[copy.stream] = (task, copy)

    def _drop(self, task: _Task, copy: _Copy) -> None:
        task.copies.remove(copy)
        del self._owners[copy.stream]

    def _cancel(self, task: _Task) -> None:
        for copy in list(task.copies):
            self._drop(task, copy)
            self._ray.cancel(copy.stream, force=True)

    def _take(self, task: _Task, copy: _Copy) -> Iterator[Result]:
        """What a copy has to say: that it runs, its result, or that it failed."""
        errors = self._ray.exceptions
        try:
            value = self._ray.get(next(copy.stream))
        except errors.RayTaskError as error:
            raise (error.cause or error) from None
        except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError, errors.ObjectLostError, errors.TaskCancelledError) as error:
            self._drop(task, copy)
            yield from self._bury(task, copy, error)
            return
        except errors.RayError as error:
            fix = "check that the nodes have the packages of this one"
            raise UserError(f"Ray could not run {self._name}", got=_first_line(error), fix=fix) from None
        if copy.started is None:
            copy.started, (copy.where, copy.node) = time.monotonic(), value
            return
        self._durations.append(time.monotonic() - copy.started)
        self._drop(task, copy)
        self._cancel(task)
        yield self._finished(value)

    def _finished(self, result: Result) -> Result:
        self._num_tasks -= 1
        self._num_finished += 1
        return result

    def _bury(self, task: _Task, copy: _Copy, error: Exception) -> Iterator[Result]:
        """A copy died without a word of its own: start the task again, unless it is to blame."""
        is_lost = isinstance(error, self._ray.exceptions.NodeDiedError) or (bool(copy.node) and copy.node not in self._living_nodes())
        task.lost_nodes += is_lost
        task.deaths += not is_lost
        where = copy.where or "a worker that had not begun"
        logger.warning("%s task %d died with %s: %s", self._name, task.number, where, _first_line(error))
        if task.deaths < MAX_DEATHS and task.lost_nodes < MAX_LOST_NODES:
            if not task.copies:
                self._submit(task)
            return
        self._cancel(task)
        if self._on_death is not None and task.deaths >= MAX_DEATHS:
            yield self._finished(self._on_death(*task.arguments))
            return
        raise UserError(
            f"{self._name} task {task.number} took {task.deaths} workers and {task.lost_nodes} nodes with it: {task.text}",
            got=f"{type(error).__name__}: {_first_line(error)}",
            fix="check the memory of the machine (fewer ray.num_cpus need less) and these inputs, then run the same command again",
        )

    def _look_at_clock(self) -> None:
        """Second copies for the slow, an end for those that hang."""
        now = time.monotonic()
        self._next_look = now + min(_TICK_S, self._config.straggler_min_s / 4)
        tasks = list({id(task): task for task, _ in self._owners.values()}.values())
        self._warn_of_idleness(tasks, now)
        limit = self._limit_s()
        if limit is None:
            return
        has_room = all(copy.started is not None for _, copy in self._owners.values())
        for task in sorted(tasks, key=lambda task: task.number):
            age = now - (task.started or now)
            if age > DEADLINE_FACTORS[task.was_stopped] * limit:
                self._stop(task, age)
            elif age > limit and not task.has_second and has_room and self._ray.available_resources().get("CPU", 0) >= 1:
                logger.info("%s task %d has taken %.0f s on %s: starting a second copy", self._name, task.number, age, task.copies[0].where)
                task.has_second = True
                has_room = False
                self._submit(task, "SPREAD")

    def _stop(self, task: _Task, age: float) -> None:
        where = " and ".join(copy.where for copy in task.copies)
        self._cancel(task)
        if task.was_stopped:
            raise UserError(
                f"{self._name} task {task.number} did not end within {age:.0f} s, twice: {task.text}",
                got=f"running on {where}; half of the other tasks took less than {statistics.median(self._durations):.1f} s",
                fix="look at these inputs, or raise ray.straggler_min_s, then run the same command again: what is finished is kept",
            )
        logger.warning("%s task %d has hung for %.0f s on %s: starting it again", self._name, task.number, age, where)
        task.was_stopped = True
        task.has_second = False
        self._submit(task, "SPREAD")

    def _limit_s(self) -> float | None:
        """Age in seconds at which a task is slow; None before enough have finished to tell."""
        if self._num_finished < max(_MIN_FINISHED, self._num_submitted / 2) or not self._durations:
            return None
        return max(self._config.straggler_min_s, self._config.straggler_factor * statistics.median(self._durations))

    def _warn_of_idleness(self, tasks: list[_Task], now: float) -> None:
        if any(copy.started is not None for task in tasks for copy in task.copies):
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        elif now - self._idle_since > 60:
            logger.warning("no task has begun for a minute: the cluster has no free CPU, or its workers cannot start")
            self._idle_since = now + 600

    def _living_nodes(self) -> set[str]:
        return {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}


def _here() -> tuple[str, str]:
    """(host and process, Ray node) of the worker that runs this."""
    import ray

    return f"{socket.gethostname()} (process {os.getpid()})", ray.get_runtime_context().get_node_id()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
