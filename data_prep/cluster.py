"""Ray: one task per shard, a bounded number of them submitted at a time."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from configs.errors import UserError
from data_prep.config import RayConfig

Result = TypeVar("Result")


@contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """A connection to the cluster of the configuration, or a Ray on this machine that ends with the block.

    An existing connection of this process is used and left open.

    Raises:
        UserError: no cluster answers at `ray.address`.
    """
    # Before the import: Ray would ask the internet about usage statistics, and warn about a coming default.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if config.address is None:
            num_cpus = config.num_cpus or _usable_cpus()
            # Tasks return a few numbers each: the smallest object store will do, and fits a container's /dev/shm.
            ray.init(num_cpus=num_cpus, include_dashboard=False, object_store_memory=80 * 2**20, **quiet)
        else:
            ray.init(address=config.address, **quiet)
    except (ConnectionError, ValueError, TimeoutError) as error:
        raise UserError(f"cannot reach Ray at {config.address}", got=error, fix="start it, or leave ray.address empty to use this machine") from None
    try:
        yield
    finally:
        ray.shutdown()


def run_tasks(function: Callable[..., Result], arguments: Sequence[tuple[Any, ...]], config: RayConfig) -> Iterator[Result]:
    """Runs `function` once per argument tuple on the cluster and yields results as they come.

    At most `ray.max_in_flight` tasks are submitted at a time, so the driver and the scheduler hold a window, not the job.
    A task whose worker or node dies is tried again up to three times.

    Raises:
        UserError: raised by a task, or a task's worker keeps dying. The tasks in flight are cancelled.
    """
    import ray

    remote = ray.remote(num_cpus=1, max_retries=3)(function)
    window = config.max_in_flight or 2 * num_slots()
    waiting = iter(arguments)
    in_flight: dict[Any, int] = {}
    submitted = 0
    try:
        while True:
            while len(in_flight) < window and (argument := next(waiting, None)) is not None:
                in_flight[remote.remote(*argument)] = submitted
                submitted += 1
            if not in_flight:
                return
            (done,), _ = ray.wait(list(in_flight), num_returns=1)
            number = in_flight.pop(done)
            try:
                result = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise UserError(
                    f"{function.__name__} task {number} died on the cluster",
                    got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
                    fix="check the memory of the machine (fewer ray.num_cpus need less), then run the same command again",
                ) from None
            yield result
    finally:
        for reference in in_flight:
            ray.cancel(reference, force=True)


def num_slots() -> int:
    """How many tasks the connected cluster runs at once: its CPUs, at least 1."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
