"""kill -9 of a real driver in the middle of its work; the rerun ends with the bytes of an uninterrupted run."""

import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.prepare import prepare
from data_prep.storage import LocalStorage
from tests.data_prep.conftest import files_below, small_config

SCRIPT = """
import sys
from pathlib import Path
from data_prep.prepare import prepare
from tests.data_prep.conftest import small_config
prepare(small_config(Path(sys.argv[1]), Path(sys.argv[2]), samples_per_shard=2))
"""


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("stop_at", ["parts/part-000003.json", "shards/train-000002.tar"])
def test_rerun_of_a_killed_run_gives_the_same_bytes(make_folder: Callable[..., Path], tmp_path: Path, stop_at: str) -> None:
    folder, killed = make_folder(60), tmp_path / "killed"
    driver = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), str(killed)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / stop_at).exists() and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(driver.pid, signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL, "the run ended before it could be killed"

    storage = LocalStorage(killed)
    assert not storage.list("manifests/")
    for path in storage.list():
        if path.endswith(".tar"):
            with tarfile.open(killed / path) as archive:
                assert len(archive.getnames()) % 3 == 0, "a tar under its final name is whole"
    kept = {path: (killed / path).stat().st_ino for path in storage.list("parts/") if path.endswith(".json")}
    assert kept

    config = small_config(folder, killed, samples_per_shard=2)
    prepare(config)
    prepare(small_config(folder, tmp_path / "whole", samples_per_shard=2))
    assert files_below(killed) == files_below(tmp_path / "whole")


@pytest.mark.usefixtures("ray_cluster")
def test_finished_parts_are_not_made_again(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    """The pictures of the finished parts are gone: the rerun can only succeed by using the parts."""
    from data_prep.plan import make_plan
    from data_prep.process import write_part

    folder = make_folder(20)
    config = small_config(folder, tmp_path / "set")
    plan = make_plan(config)
    plan.dump(LocalStorage(tmp_path / "set"))
    write_part(config, plan.tasks[0])
    for name in plan.tasks[0].slices[0].names:
        (folder / name).unlink()
    manifest, _ = prepare(config)
    assert manifest.counts.kept == 20
