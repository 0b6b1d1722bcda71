"""kill -9 of a real driver, worker or raylet at random moments; the rerun ends with the bytes of an uninterrupted run.

A moment is "when so many files have been published", drawn at random, so that it falls into the work however fast the machine is. While the
run lives, every tar that a listing shows is read to its end.
"""

import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from data_prep.part import record_path, write_part
from data_prep.plan import make_plan
from data_prep.prepare import prepare
from data_prep.run_stats import load_whole
from data_prep.schema import ShardIndex, generations
from data_prep.shard import PartCounts, plan_shards, write_shard
from data_prep.storage import LocalStorage
from data_prep.task_samples import Job
from tests.data_prep.conftest import files_below, small_config

SCRIPT = """
import sys
from pathlib import Path
from data_prep.config import DedupConfig
from data_prep.prepare import prepare
from tests.data_prep.conftest import small_config
prepare(small_config(Path(sys.argv[1]), Path(sys.argv[2]), samples_per_shard=3, dedup=DedupConfig(exact=True)))
"""

NUM_SAMPLES = 60
VICTIMS = ("driver", "worker", "raylet")


def reference(folder: Path, output: Path) -> dict[str, bytes]:
    from data_prep.config import DedupConfig

    prepare(small_config(folder, output, samples_per_shard=3, dedup=DedupConfig(exact=True)))
    return files_below(output)


class Watch:
    """Follows an output: counts what is published, and checks every tar the moment it can be seen."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.seen: set[str] = set()

    def look(self) -> int:
        """How many files have been published so far."""
        for path in LocalStorage(self._folder).list() if self._folder.exists() else []:
            if path in self.seen:
                continue
            self.seen.add(path)
            if path.endswith(".tar"):
                try:
                    with tarfile.open(self._folder / path) as archive:
                        assert len(archive.getnames()) % 3 == 0, f"{path} is not whole"
                except FileNotFoundError:
                    pass  # parts are deleted at the end
        return len(self.seen)


def start(folder: Path, output: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), str(output)], stderr=subprocess.DEVNULL)


def kill(driver: subprocess.Popen[bytes], victim: str) -> None:
    """SIGKILL to the driver, to one of its busy workers, or to its raylet."""
    if victim == "driver":
        os.kill(driver.pid, signal.SIGKILL)
        return
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            name = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if (victim == "raylet" and "raylet/raylet" in name) or (victim == "worker" and name.startswith("ray::") and "IDLE" not in name):
            process.kill()
            return


def finish(driver: subprocess.Popen[bytes], watch: Watch, deadline_s: float = 90) -> int:
    deadline = time.monotonic() + deadline_s
    while driver.poll() is None and time.monotonic() < deadline:
        watch.look()
        time.sleep(0.002)
    if driver.poll() is None:
        driver.kill()
        driver.wait()
        pytest.fail("the run hangs after the kill")
    return driver.returncode


def interrupt_and_rerun(folder: Path, output: Path, *, kills: Sequence[tuple[str, int]]) -> int:
    """Runs, kills as told, runs again until the data set is there; returns how many kills hit a living run."""
    num_hits = 0
    watch = Watch(output)
    for victim, moment in kills:
        driver = start(folder, output)
        while driver.poll() is None and watch.look() < moment:
            time.sleep(0.001)
        if driver.poll() is None:
            kill(driver, victim)
            num_hits += 1
        finish(driver, watch)
        if generations(LocalStorage(output)) and driver.returncode == 0:
            return num_hits
    assert finish(start(folder, output), watch) == 0
    return num_hits


@pytest.mark.usefixtures("ray_cluster")
def test_rerun_after_one_kill_of_each_kind_gives_the_same_bytes(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(NUM_SAMPLES)
    expected = reference(folder, tmp_path / "whole")
    kills = [("driver", 40), ("worker", 90), ("driver", 150)]
    assert interrupt_and_rerun(folder, tmp_path / "killed", kills=kills) >= 2
    assert files_below(tmp_path / "killed") == expected


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("ray_cluster")
def test_twenty_kills_at_random_moments(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(NUM_SAMPLES)
    expected = reference(folder, tmp_path / "whole")
    generator = random.Random(20)
    num_hits, attempt = 0, 0
    while num_hits < 20:
        output = tmp_path / f"killed-{attempt}"
        moments = sorted(generator.randrange(2, 230) for _ in range(3))
        kills = [(VICTIMS[(attempt + number) % 3], moment) for number, moment in enumerate(moments)]
        num_hits += interrupt_and_rerun(folder, output, kills=kills)
        assert files_below(output) == expected, f"attempt {attempt}: {kills}"
        attempt += 1


@pytest.mark.usefixtures("ray_cluster")
def test_finished_parts_are_not_made_again(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    """The pictures of the finished parts are gone: the rerun can only succeed by using the parts."""
    folder = make_folder(20)
    config = small_config(folder, tmp_path / "set")
    plan = make_plan(config)
    plan.dump(LocalStorage(tmp_path / "set"))
    write_part(config, Job(generation=1), plan.tasks[0])
    for name in plan.tasks[0].spans[0].part.names:
        (folder / name).unlink()
    manifest, _ = prepare(config)
    assert manifest.counts.kept == 20


@pytest.mark.usefixtures("ray_cluster")
def test_a_task_killed_before_its_record_is_counted_once(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(20)
    config = small_config(folder, tmp_path / "set")
    storage = LocalStorage(tmp_path / "set")
    plan = make_plan(config)
    plan.dump(storage)
    for task in plan.tasks[:2]:
        write_part(config, Job(generation=1), task)
    storage.delete(record_path(1, 1))  # all but its last write was done
    prepare(config)
    stats = load_whole(storage, 1)
    assert stats is not None
    assert (stats.num_parts, stats.read, stats.kept) == (3, 20, 20)


@pytest.mark.usefixtures("ray_cluster")
def test_a_part_that_is_made_anew_leaves_no_shard_of_the_old_one(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    """As after a damaged part: its record is deleted, and the task finds another input."""
    folder = make_folder(20)
    config = small_config(folder, tmp_path / "set", heldout_permille=0)
    storage = LocalStorage(tmp_path / "set")
    plan = make_plan(config)
    plan.dump(storage)
    job = Job(generation=1)
    records = [write_part(config, job, task)[0] for task in plan.tasks]
    parts = [PartCounts(name=record.name, num_train=record.kept, num_heldout=0) for record in records]
    write_shard(config, job, plan_shards(parts, config, 1, has_verdicts=False)[0])
    storage.delete(record_path(1, 0))
    (folder / "p003.png").write_bytes(b"no image")
    manifest, _ = prepare(config)
    assert manifest.counts.kept == 19
    keys = [key for shard in manifest.splits["train"].shards for key in ShardIndex.load(storage, shard.name).keys.tolist()]
    assert keys == [b"%010d" % number for number in range(20) if number != 3]
