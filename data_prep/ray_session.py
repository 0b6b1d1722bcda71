"""A connection to Ray: one started on this machine, or a cluster that runs already.

Memory is not a Ray resource here: `ray.memory_per_task_bytes` is a ceiling that a task keeps by itself and mostly stays far below, and to
reserve it would leave CPUs idle wherever a node has less than that per CPU. A node that could not bear all its tasks at their ceiling
is named in a warning.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data_prep.config import RayConfig

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[1]
"""Where `data_prep` and `configs` are imported from."""

_PLACES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "OMP_NUM_THREADS")
"""Environment that the workers of a cluster get from the driver. Never credentials: Ray would log them."""


@contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """A connection to the cluster of the configuration, or a Ray on this machine that ends with the block.

    An existing connection of this process is used and left open. Workers of a cluster get this very code, installed there or not;
    what it imports, and credentials of their own for the storage, they must have.

    Raises:
        UserError: no cluster answers at `ray.address`, or it has no CPU.
    """
    # Before the import: Ray would ask the internet about usage statistics, and warn about a coming default.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if config.address is None:
        num_cpus = config.num_cpus or _usable_cpus()
        with _importable():
            # Tasks return a few numbers each: the smallest object store will do, and fits a container's /dev/shm.
            ray.init(num_cpus=num_cpus, include_dashboard=False, object_store_memory=80 * 2**20, **quiet)
    else:
        _connect(config.address, quiet)
    try:
        _check_resources(config)
        yield
    finally:
        ray.shutdown()


def num_slots() -> int:
    """How many tasks the connected cluster runs at once: its CPUs, at least 1."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _connect(address: str, options: dict[str, Any]) -> None:
    import ray

    if address.startswith("ray://"):
        raise UserError(
            f"ray.address={address} is a Ray Client address",
            expected="`auto` or HOST:PORT, on a machine of the cluster",
            fix="run this command on a node of the cluster with ray.address=auto, or through `ray job submit`",
        )
    environment = {
        "py_modules": [str(_ROOT / name) for name in ("configs", "data_prep")],
        "env_vars": {name: os.environ[name] for name in _PLACES if name in os.environ},
        "excludes": ["__pycache__"],
    }
    try:
        ray.init(address=address, runtime_env=environment, **options)
    except (ConnectionError, ValueError, TimeoutError, RuntimeError) as error:
        raise UserError(f"cannot reach Ray at {address}", got=error, fix="start it, or leave ray.address empty to use this machine") from None


def _check_resources(config: RayConfig) -> None:
    import ray

    if ray.cluster_resources().get("CPU", 0) < 1:
        raise UserError(
            f"the Ray cluster at {config.address} has no CPU",
            got=f"{len(ray.nodes())} nodes",
            expected="at least one node that offers CPUs",
            fix="add a node (`ray start --address=...`), or start the head with --num-cpus",
        )
    for node in ray.nodes():
        resources = node.get("Resources", {})
        needed, there = resources.get("CPU", 0) * config.memory_per_task_bytes, resources.get("memory", 0)
        if node.get("Alive") and there and needed > there:
            logger.warning(
                "%s may need up to %.0f GiB for %d tasks at once and has %.0f: if it runs out, lower ray.num_cpus or ray.memory_per_task_bytes",
                node.get("NodeManagerHostname", "a node"),
                needed / 2**30,
                resources["CPU"],
                there / 2**30,
            )


@contextmanager
def _importable() -> Iterator[None]:
    """While it is open, processes that start find our code, from whatever folder and however the driver found it."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
