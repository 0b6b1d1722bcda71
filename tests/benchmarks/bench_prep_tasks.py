"""The tasks of a data preparation and nothing else: no shards, no tokenizer, no manifest. Runs them here, in a pool, or through Ray.

    python -m tests.benchmarks.bench_prep_tasks process|pool|ray FOLDER OUTPUT --tasks 4 [--workers 1] [key=value ...]

`process` calls the functions one after the other in this process, `pool` in so many processes of `multiprocessing`, and `ray` through
`data_prep.cluster`, as `jetway prep` does.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from itertools import starmap
from typing import Any

from configs.loader import load_config
from data_prep.cluster import ray_session, run_tasks
from data_prep.config import PrepConfig
from data_prep.part import write_part
from data_prep.plan import make_plan
from data_prep.task_samples import Job

SAMPLES_PER_TASK = 250


def arguments_of_tasks(config: PrepConfig, count: int) -> list[tuple[Any, ...]]:
    """What the first `count` tasks of the plan are called with."""
    return [(config, Job(generation=1), task) for task, _ in zip(make_plan(config).tasks, range(count), strict=False)]


def run(mode: str, config: PrepConfig, count: int, workers: int) -> int:
    """Runs the tasks and returns how many samples they kept."""
    tasks = arguments_of_tasks(config, count)
    assert len(tasks) == count, f"the input has only {len(tasks)} tasks"
    if mode == "ray":
        with ray_session(config.ray):
            return sum(record.kept for record, *_ in run_tasks(write_part, tasks, config.ray))
    if mode == "pool":
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            return sum(record.kept for record, *_ in pool.starmap(write_part, tasks, chunksize=1))
    return sum(record.kept for record, *_ in starmap(write_part, tasks))


def main(argv: Sequence[str]) -> int:
    """Runs the tasks and prints the number of samples kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("mode", choices=("process", "pool", "ray"))
    parser.add_argument("folder")
    parser.add_argument("output")
    parser.add_argument("--tasks", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args(argv)
    settings = [f"inputs=[{given.folder}]", f"output={given.output}", f"samples_per_shard={SAMPLES_PER_TASK}", f"ray.num_cpus={given.workers}"]
    config = load_config(PrepConfig, None, [*settings, *given.overrides])
    print(run(given.mode, config, given.tasks, given.workers))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
